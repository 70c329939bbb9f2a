"""Moves bytes and tensors between disk, host memory and a compute device. Knows nothing of models."""

from offload.budget import Budget
from offload.buffers import StagingBuffer, view_tensor
from offload.device import measured, open_device
from offload.errors import (
    BudgetError,
    Closed,
    OffloadError,
    ReadError,
    SourceChanged,
    SourceError,
    TierFull,
    WriteError,
)
from offload.file_io import FileReader
from offload.file_writer import FileWriter
from offload.layout import BlockLayout, lay_out
from offload.object_io import StoreIo
from offload.object_layout import ObjectLayout, place
from offload.own_file import OwnFile
from offload.plan import Placement, PlacementPlan
from offload.planner import place_blocks
from offload.probe import DiskRate, probe_compute, probe_disk
from offload.scheduler import Counters, Scheduler
from offload.scratch import Scratch
from offload.slots import FileSlot
from offload.sources import SafetensorsSource
from offload.spec import BlockSpec, TensorSpec
from offload.store import Store
from offload.trace import Span, Trace
from offload.transfer import Transfer
from offload.units import format_bytes, parse_bytes

__all__ = [
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
    "OwnFile",
    "Placement",
    "PlacementPlan",
    "ReadError",
    "SafetensorsSource",
    "Scheduler",
    "Scratch",
    "SourceChanged",
    "SourceError",
    "Span",
    "StagingBuffer",
    "Store",
    "StoreIo",
    "TensorSpec",
    "TierFull",
    "Trace",
    "Transfer",
    "WriteError",
    "format_bytes",
    "lay_out",
    "measured",
    "open_device",
    "parse_bytes",
    "place",
    "place_blocks",
    "probe_compute",
    "probe_disk",
    "view_tensor",
]
