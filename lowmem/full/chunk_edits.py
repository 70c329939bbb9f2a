"""Writing single parameters to state on disk: changes are collected chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowmem.full.chunk_files import ChunkFiles
from lowmem.full.chunks import Chunk, parts
from lowmem.full.layout import ParamPlace
from lowmem.full.tier import EXP_AVG_SQ, WEIGHT
from offload import StagingBuffer

_ELEMENT_BYTES = 4


class ChunkEdits:
    """One chunk's weight, or its moments, in memory on the way to the next version."""

    def __init__(
        self,
        files: ChunkFiles,
        chunks: Sequence[tuple[Chunk, ...]],
        *,
        settle: Callable[[int], None],
        changed: Callable[[int], None],
    ) -> None:
        """Begin without a chunk.

        Args:
            files: Where chunks lie.
            chunks: Of each unit.
            settle: Called before a unit is changed.
            changed: Called when a unit has been changed.
        """
        self._files, self._chunks = files, chunks
        self._settle, self._changed = settle, changed
        self._chunk: Chunk | None = None
        self._is_weight = True
        self._buffer: StagingBuffer | None = None

    def write(self, index: int, field: str, place: ParamPlace, value: Tensor) -> None:
        """Change a parameter's weight or moment; on disk after `flush`."""
        for chunk, here, there in parts(self._chunks[index], place):
            if (self._chunk, self._is_weight) != (chunk, field == WEIGHT):
                self._begin(chunk, is_weight=field == WEIGHT)
            flat = self._data().view(torch.float32)
            half = flat[chunk.numel :] if field == EXP_AVG_SQ else flat[: chunk.numel]
            half[here] = value.detach().reshape(-1)[there].float()

    def flush(self) -> None:
        """Write the chunk that is in memory."""
        if self._chunk is None:
            return
        chunk = self._chunk
        for write in self._files.start_save(chunk, **self._halves()):
            write.wait()
        self._chunk = None
        self._changed(chunk.unit)

    def write_unit(self, index: int, weight: Tensor) -> None:
        """Write a unit's whole weight, flat and maybe without what fills its last page."""
        self.flush()
        self._files.begin()
        for chunk in self._chunks[index]:
            self._chunk, self._is_weight = chunk, True
            part = weight[chunk.start : chunk.stop]
            flat = self._data().view(torch.float32)
            flat[: part.numel()].copy_(part)
            flat[part.numel() :].zero_()
            self.flush()

    def _begin(self, chunk: Chunk, *, is_weight: bool) -> None:
        self.flush()
        self._settle(chunk.unit)
        self._files.begin()
        if is_weight and not self._files.has_weight(chunk.unit):
            self._write_base(chunk.unit)
        self._chunk, self._is_weight = chunk, is_weight
        for read in self._files.start_load(chunk, **self._halves()):
            read.wait()

    def _halves(self) -> dict[str, Tensor | None]:
        data = self._data()
        return {"weight": data, "moments": None} if self._is_weight else {"weight": None, "moments": data}

    def _data(self) -> Tensor:
        assert self._chunk is not None, "a chunk is being edited"
        nbytes = (1 if self._is_weight else 2) * self._chunk.numel * _ELEMENT_BYTES
        if self._buffer is None or self._buffer.nbytes < nbytes:
            self._buffer = StagingBuffer(nbytes)
        return self._buffer.tensor[:nbytes]

    def _write_base(self, index: int) -> None:
        """Write a block's weight as the checkpoint has it: from now on parts of it may differ."""
        with StagingBuffer(self._chunks[index][-1].stop * _ELEMENT_BYTES) as buffer:
            flat = buffer.tensor.view(torch.float32)
            self._files.load_base(index, flat)
            for chunk in self._chunks[index]:
                data = flat[chunk.start : chunk.stop].view(torch.uint8)
                for write in self._files.start_save(chunk, weight=data, moments=None):
                    write.wait()


__all__ = ["ChunkEdits"]
