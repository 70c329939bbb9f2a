"""The weights that full tuning starts from: a block's parameters as the checkpoint has them, in fp32."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowmem.full.layout import UnitLayout
from lowmem.streaming.embedding import read_now
from offload import BlockSpec, FileReader, StagingBuffer, lay_out, view_tensor

if TYPE_CHECKING:
    from lowmem.models.build import Skeleton


class BaseWeights:
    """Reads blocks and single parameters of the checkpoint. Used from several threads."""

    def __init__(self, built: Skeleton, layouts: Sequence[UnitLayout], *, reader: FileReader) -> None:
        """Look parameters up; nothing is read yet.

        Args:
            built: Has the recipes; each makes one parameter of one stored tensor.
            layouts: The blocks.
            reader: Reads stored tensors.
        """
        self._blocks, self._layouts, self._reader = built.blocks, layouts, reader
        self._recipes = built.mapping.recipes
        self._lock = threading.Lock()
        self._buffer: StagingBuffer | None = None

    def load(self, index: int, into: Tensor) -> None:
        """Fill a flat fp32 buffer with a block's weights."""
        read = lay_out(self._blocks[index].spec)
        with self._lock:
            if self._buffer is None or self._buffer.nbytes < read.buffer_bytes:
                self._buffer = StagingBuffer(read.buffer_bytes)
            self._reader.read(read, self._buffer.tensor).wait()
            into[: self._layouts[index].numel].zero_()
            for place in self._layouts[index].places:
                spec = self._recipes[place.key].sources[0]
                stored = view_tensor(self._buffer.tensor, read.tensor_offsets[spec.name], spec=spec)
                into[place.start : place.stop].view(place.shape).copy_(stored)

    def load_once(self, index: int, into: Tensor) -> None:
        """As `load`, and keep no memory: where a block is read from the checkpoint hardly more than once."""
        self.load(index, into)
        self.release()

    def read(self, key: str) -> Tensor:
        """One parameter."""
        recipe = self._recipes[key]
        stored = read_now(BlockSpec(name=key, tensors=recipe.sources), reader=self._reader, device=torch.device("cpu"))
        return recipe.run(stored)[key].to(torch.float32, copy=True)

    def release(self) -> None:
        """Give the buffer back until it is needed again."""
        with self._lock:
            self._buffer = None


__all__ = ["BaseWeights"]
