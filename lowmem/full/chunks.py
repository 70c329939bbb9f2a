"""How a unit's flat buffers are cut for the disk: chunks, each with its objects in the store. Pure arithmetic.

Blocks whose weights change, as the scheduler sees them: sizes, and reads that bring the newest weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowmem.full.flat import ELEMENT_BYTES, ParamPlace, UnitLayout
from lowmem.full.tier import EXP_AVG, EXP_AVG_SQ, WEIGHT
from lowmem.planning.limits import state_chunk_bytes
from offload import BlockLayout, BlockSpec, ObjectLayout, TensorSpec, Transfer, lay_out_object


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A run of a unit's elements that is read, updated and written at once."""

    unit: int
    """Number of the unit."""
    number: int
    """Number within the unit."""
    name: str
    """Name of its objects, without what they hold."""
    start: int
    """First element of the unit's buffers."""
    stop: int
    """One past the last; whole pages."""

    @property
    def numel(self) -> int:
        """Elements."""
        return self.stop - self.start

    @property
    def weight_name(self) -> str:
        """The object that holds its weight."""
        return f"{self.name} weight"

    @property
    def moments_name(self) -> str:
        """The object that holds its moments."""
        return f"{self.name} moments"

    @property
    def weight_layout(self) -> ObjectLayout:
        """One flat fp32 tensor."""
        return lay_out_object({WEIGHT: (torch.float32, (self.numel,))})

    @property
    def moments_layout(self) -> ObjectLayout:
        """Two flat fp32 tensors, one after the other."""
        shape = (torch.float32, (self.numel,))
        return lay_out_object({EXP_AVG: shape, EXP_AVG_SQ: shape})


def chunk_numel(layouts: Sequence[UnitLayout]) -> int:
    """Elements of the largest chunk."""
    return state_chunk_bytes(max(layout.numel for layout in layouts) * ELEMENT_BYTES) // ELEMENT_BYTES


def cut(layouts: Sequence[UnitLayout]) -> list[tuple[Chunk, ...]]:
    """The chunks of each unit, in order."""
    size = chunk_numel(layouts)
    return [
        tuple(
            # Numbered with leading zeros: in the order of their names they are in the order of the buffer.
            Chunk(
                unit=unit,
                number=number,
                name=f"{layout.name} {number:06d}",
                start=start,
                stop=min(start + size, layout.numel),
            )
            for number, start in enumerate(range(0, layout.numel, size))
        )
        for unit, layout in enumerate(layouts)
    ]


def parts(chunks: Sequence[Chunk], place: ParamPlace) -> Iterator[tuple[Chunk, slice, slice]]:
    """The chunks that hold a parameter, where it is in each, and which part of it."""
    for chunk in chunks:
        start, stop = max(chunk.start, place.start), min(chunk.stop, place.stop)
        if start < stop:
            yield (
                chunk,
                slice(start - chunk.start, stop - chunk.start),
                slice(start - place.start, stop - place.start),
            )


class NewestBlocks:
    """Reads blocks for the scheduler."""

    def __init__(self, layouts: Sequence[UnitLayout], fetch: Callable[[int, Tensor], Transfer]) -> None:
        """Read through a tier.

        Args:
            layouts: Of the blocks.
            fetch: Starts bringing a block's newest weight into a buffer.
        """
        self._fetch = fetch
        self._indices = {layout.name: index for index, layout in enumerate(layouts)}

    def read(self, layout: BlockLayout, into: Tensor) -> Transfer:
        """As `BlockReader.read`."""
        return self._fetch(self._indices[layout.name], into)


def block_spec(layout: UnitLayout, folder: Path) -> BlockSpec:
    """What the scheduler needs to know of a block: its size. It reads through the tier, not from this file."""
    shape = (layout.numel,)
    weight = TensorSpec(
        name=WEIGHT,
        dtype=torch.float32,
        shape=shape,
        file=folder / "newest" / layout.name,
        offset_bytes=0,
        nbytes=layout.numel * ELEMENT_BYTES,
    )
    return BlockSpec(name=layout.name, tensors=(weight,))
