"""How the tensors of a stored object lie one after another, each beginning on a page. Pure arithmetic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from offload.layout import PAGE_BYTES, round_up
from offload.spec import BlockSpec, TensorSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedTensor:
    """One tensor of an object."""

    name: str
    """Its name within the object."""
    dtype: torch.dtype
    """Type of its elements."""
    shape: tuple[int, ...]
    """Its shape."""
    offset_bytes: int
    """Where it begins, from the start of the object: a whole number of pages."""

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class ObjectLayout:
    """The tensors that make up one object; the same in its file and in a buffer that it is read into as a whole."""

    tensors: tuple[PlacedTensor, ...]
    """By position."""

    @property
    def nbytes(self) -> int:
        """Size of the object in whole pages."""
        return max((round_up(placed.offset_bytes + placed.nbytes, PAGE_BYTES) for placed in self.tensors), default=0)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tensors in a buffer of shape (nbytes,), uint8, by name: views of it.

        Raises:
            ValueError: The buffer is too small.
        """
        if buffer.numel() < self.nbytes:
            raise ValueError(f"expected a buffer of at least {self.nbytes} bytes, got {buffer.numel()}")
        return {
            placed.name: buffer[placed.offset_bytes : placed.offset_bytes + placed.nbytes]
            .view(placed.dtype)
            .view(placed.shape)
            for placed in self.tensors
        }

    def spec(self, name: str, file: Path) -> BlockSpec:
        """The object as a block whose tensors lie in a file.

        Args:
            name: Name of the block.
            file: The file.
        """
        tensors = tuple(
            TensorSpec(
                name=placed.name,
                dtype=placed.dtype,
                shape=placed.shape,
                file=file,
                offset_bytes=placed.offset_bytes,
                nbytes=placed.nbytes,
            )
            for placed in self.tensors
        )
        return BlockSpec(name=name, tensors=tensors)


def place(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> ObjectLayout:
    """Lay tensors out one after another, each on a page of its own, so that each can be read alone without a page more.

    Args:
        tensors: Type and shape by name.
    """
    placed = []
    start = 0
    for name, (dtype, shape) in tensors.items():
        tensor = PlacedTensor(name=name, dtype=dtype, shape=tuple(shape), offset_bytes=start)
        placed.append(tensor)
        start = round_up(start + tensor.nbytes, PAGE_BYTES)
    return ObjectLayout(tensors=tuple(placed))


__all__ = ["ObjectLayout", "PlacedTensor", "place"]
