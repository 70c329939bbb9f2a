"""Moves bytes and tensors between disk, host memory and a compute device. Knows nothing of models."""

import sys

if sys.platform != "linux":
    raise ImportError(
        f"lowmem and offload run on Linux and in WSL2 on Windows, and this is {sys.platform}: they read past the page "
        "cache and lock folders in ways that other systems do not have"
    )

from offload.blocks import (
    PAGE_BYTES,
    BlockLayout,
    BlockSpec,
    ObjectLayout,
    TensorSpec,
    ceil_div,
    lay_out,
    lay_out_object,
    round_up,
)
from offload.budget import (
    Budget,
    ControlGroup,
    available_ram_bytes,
    control_groups,
    format_bytes,
    format_number,
    format_seconds,
    installed_ram_bytes,
    parse_bytes,
)
from offload.buffers import StagingBuffer, register_host_memory, unregister_host_memory, view_tensor
from offload.device import ComputeTimes, CopyStream, open_device
from offload.errors import (
    BudgetError,
    Closed,
    FolderInUse,
    OffloadError,
    PeerLost,
    ReadError,
    SourceChanged,
    SourceError,
    TierFull,
    WriteError,
)
from offload.files.checkpoint_swap import replacing_checkpoint, sync_files, unfinished_folder
from offload.files.file import NO_ROOM, open_regular, open_source, sync_folder
from offload.files.file_io import FileIO
from offload.files.folder import Folder
from offload.files.safetensors import (
    DTYPES,
    OutputTensor,
    SafetensorsSource,
    ShardFile,
    TensorReader,
    shard_header,
    shards_of_index,
    split_into_shards,
    tensors_of_headers,
    write_index,
)
from offload.files.scratch import FileSlot, Scratch, SlotAllocator
from offload.files.strict_json import JsonObject, parse_json_object, read_json_object
from offload.pipeline import KeptMemory
from offload.placement import Placement, PlacementPlan, place_blocks
from offload.probe import DiskRate, probe_compute, probe_disk, probe_scratch
from offload.scheduler import Counters, Scheduler
from offload.sharing.arena import HandingOn, SharedArena
from offload.sharing.reader import SharedReader
from offload.sharing.server import NUM_SLOTS, BlockServer
from offload.store.store import Store
from offload.store.store_files import StoreIo, verify_store
from offload.trace import LANES, ORIGIN, Span, Trace
from offload.transfer import SerialThread, Transfer, WorkerThread

__all__ = [
    "DTYPES",
    "LANES",
    "NO_ROOM",
    "NUM_SLOTS",
    "ORIGIN",
    "PAGE_BYTES",
    "BlockLayout",
    "BlockServer",
    "BlockSpec",
    "Budget",
    "BudgetError",
    "Closed",
    "ComputeTimes",
    "ControlGroup",
    "CopyStream",
    "Counters",
    "DiskRate",
    "FileIO",
    "FileSlot",
    "Folder",
    "FolderInUse",
    "HandingOn",
    "JsonObject",
    "KeptMemory",
    "ObjectLayout",
    "OffloadError",
    "OutputTensor",
    "PeerLost",
    "Placement",
    "PlacementPlan",
    "ReadError",
    "SafetensorsSource",
    "Scheduler",
    "Scratch",
    "SerialThread",
    "ShardFile",
    "SharedArena",
    "SharedReader",
    "SlotAllocator",
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
    "ceil_div",
    "control_groups",
    "format_bytes",
    "format_number",
    "format_seconds",
    "installed_ram_bytes",
    "lay_out",
    "lay_out_object",
    "open_device",
    "open_regular",
    "open_source",
    "parse_bytes",
    "parse_json_object",
    "place_blocks",
    "probe_compute",
    "probe_disk",
    "probe_scratch",
    "read_json_object",
    "register_host_memory",
    "replacing_checkpoint",
    "round_up",
    "shard_header",
    "shards_of_index",
    "split_into_shards",
    "sync_files",
    "sync_folder",
    "tensors_of_headers",
    "unfinished_folder",
    "unregister_host_memory",
    "verify_store",
    "view_tensor",
    "write_index",
]
