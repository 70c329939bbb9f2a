"""Blocks whose weights change, as the scheduler sees them: sizes, and reads that bring the newest weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowmem.full.layout import UnitLayout
from lowmem.full.tier import WEIGHT
from offload import BlockLayout, BlockSpec, TensorSpec, Transfer

_ELEMENT_BYTES = 4


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
        nbytes=layout.numel * _ELEMENT_BYTES,
    )
    return BlockSpec(name=layout.name, tensors=(weight,))


__all__ = ["NewestBlocks", "block_spec"]
