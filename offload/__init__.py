"""Moves bytes and tensors between disk, host memory and a compute device. Knows nothing of models."""

from offload.blocks import BlockLayout, BlockSpec, ObjectLayout, TensorSpec, lay_out, place
from offload.budget import Budget, available_ram_bytes, format_bytes, format_seconds, parse_bytes
from offload.buffers import StagingBuffer, view_tensor
from offload.device import measured, open_device
from offload.errors import (
    BudgetError,
    Closed,
    FolderInUse,
    OffloadError,
    ReadError,
    SourceChanged,
    SourceError,
    TierFull,
    WriteError,
)
from offload.files.file import OpenedFile, OwnFile
from offload.files.file_io import FileReader, FileWriter
from offload.files.safetensors_read import SafetensorsSource
from offload.files.safetensors_write import OutputTensor, ShardFile, TensorReader, split_into_shards, write_index
from offload.files.scratch import FileSlot, Scratch
from offload.placement import Placement, PlacementPlan, place_blocks
from offload.probe import DiskRate, probe_compute, probe_disk
from offload.scheduler import Counters, Scheduler
from offload.store.store import Store
from offload.store.store_files import StoreIo
from offload.trace import LANES, Span, Trace
from offload.transfer import Transfer, WorkerThread

__all__ = [
    "LANES",
    "BlockLayout",
    "BlockSpec",
    "Budget",
    "BudgetError",
    "Closed",
    "Counters",
    "DiskRate",
    "FileReader",
    "FileSlot",
    "FileWriter",
    "FolderInUse",
    "ObjectLayout",
    "OffloadError",
    "OpenedFile",
    "OutputTensor",
    "OwnFile",
    "Placement",
    "PlacementPlan",
    "ReadError",
    "SafetensorsSource",
    "Scheduler",
    "Scratch",
    "ShardFile",
    "SourceChanged",
    "SourceError",
    "Span",
    "StagingBuffer",
    "Store",
    "StoreIo",
    "TensorReader",
    "TensorSpec",
    "TierFull",
    "Trace",
    "Transfer",
    "WorkerThread",
    "WriteError",
    "available_ram_bytes",
    "format_bytes",
    "format_seconds",
    "lay_out",
    "measured",
    "open_device",
    "parse_bytes",
    "place",
    "place_blocks",
    "probe_compute",
    "probe_disk",
    "split_into_shards",
    "view_tensor",
    "write_index",
]
