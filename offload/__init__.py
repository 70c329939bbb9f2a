"""Moves bytes and tensors between disk, host memory and a compute device. Knows nothing of models."""

from offload.errors import BudgetError, Closed, OffloadError, ReadError, SourceChanged, SourceError, TierFull
from offload.sources import SafetensorsSource
from offload.spec import BlockSpec, TensorSpec

__all__ = [
    "BlockSpec",
    "BudgetError",
    "Closed",
    "OffloadError",
    "ReadError",
    "SafetensorsSource",
    "SourceChanged",
    "SourceError",
    "TensorSpec",
    "TierFull",
]
