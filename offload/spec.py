"""What a stored tensor is, and which of them make up a block."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Where a tensor lies on disk and how its bytes are to be read."""

    name: str
    """Name of the tensor in its checkpoint."""
    dtype: torch.dtype
    """Type of the stored elements; bytes are moved raw, conversion is the reader's business."""
    shape: tuple[int, ...]
    """Shape of the stored tensor; ``()`` for a scalar."""
    file: Path
    """File that holds it."""
    offset_bytes: int
    """Position of the first byte from the start of the file; need not be aligned to anything."""
    nbytes: int
    """Stored bytes: number of elements times element size."""

    def __post_init__(self) -> None:
        if self.offset_bytes < 0:
            raise ValueError(f"{self.name}: offset_bytes must be 0 or more, got {self.offset_bytes}")
        expected_bytes = math.prod(self.shape) * self.dtype.itemsize
        if self.nbytes != expected_bytes or min(self.shape, default=0) < 0:
            raise ValueError(
                f"{self.name}: shape {list(self.shape)} of {self.dtype} is {expected_bytes} bytes, got {self.nbytes}"
            )


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """The tensors that are moved together because they are used together."""

    name: str
    """Name of the block, for errors and traces."""
    tensors: tuple[TensorSpec, ...]
    """Its tensors, from any files and in any order."""

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for spec in self.tensors:
            if spec.name in seen:
                raise ValueError(f"block {self.name}: tensor {spec.name} is listed twice; list each tensor once")
            seen.add(spec.name)

    @property
    def nbytes(self) -> int:
        """Stored bytes of all its tensors, without alignment."""
        return sum(spec.nbytes for spec in self.tensors)
