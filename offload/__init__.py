"""Moves bytes and tensors between disk, host memory and a compute device. Knows nothing of models."""

from offload.buffers import StagingBuffer, view_tensor
from offload.errors import BudgetError, Closed, OffloadError, ReadError, SourceChanged, SourceError, TierFull
from offload.file_io import FileReader, Transfer
from offload.layout import BlockLayout, lay_out
from offload.sources import SafetensorsSource
from offload.spec import BlockSpec, TensorSpec

__all__ = [
    "BlockLayout",
    "BlockSpec",
    "BudgetError",
    "Closed",
    "FileReader",
    "OffloadError",
    "ReadError",
    "SafetensorsSource",
    "SourceChanged",
    "SourceError",
    "StagingBuffer",
    "TensorSpec",
    "TierFull",
    "Transfer",
    "lay_out",
    "view_tensor",
]
