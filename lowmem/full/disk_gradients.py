"""Gradients of blocks on disk: accumulated in one block's buffer, written behind, read back for the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.full.chunks import Chunk, parts
from lowmem.full.flat import ParamPlace, UnitLayout
from lowmem.full.tier import Contribution
from offload import FileSlot, Scratch, StagingBuffer, Trace, Transfer

_ELEMENT_BYTES = 4


class DiskGradients:
    """Scratch space for the gradients of one step.

    Used by the thread that runs the backward, and by the one that updates; the caller sees to it that they do not use
    one block at the same time.
    """

    def __init__(
        self, layouts: Sequence[UnitLayout], chunks: Sequence[tuple[Chunk, ...]], *, folder: Path, trace: Trace
    ) -> None:
        """Open scratch space; nothing is written yet.

        Args:
            layouts: The blocks.
            chunks: Their chunks.
            folder: Where the scratch file is.
            trace: Where transfers are recorded.
        """
        self._layouts, self._chunks = layouts, chunks
        self._scratch = Scratch(folder, trace=trace)
        self._slots: dict[tuple[int, int], FileSlot] = {}
        self._writes: dict[int, list[Transfer]] = {}
        self._norms: dict[int, dict[str, Tensor]] = {}
        self._spent: set[int] = set()
        self._applied: set[int] = set()
        self._numel = max(layout.numel for layout in layouts)
        self._buffer: StagingBuffer | None = None
        self._chunk_buffer: StagingBuffer | None = None
        self._in_buffer: int | None = None
        self._reading: Transfer | None = None

    @property
    def memory_bytes(self) -> int:
        """Bytes of the buffer."""
        return 0 if self._buffer is None else self._buffer.nbytes

    @contextmanager
    def holding(self, index: int) -> Iterator[Callable[[Contribution], None]]:
        """Take the gradients of a block's one backward into the buffer, and leave them there."""
        filling = _Filling(partial(self._begin_holding, index))
        yield filling.take
        if filling.kept:
            self._norms.setdefault(index, {}).update(filling.norms())
            self._applied.add(index)

    def _begin_holding(self, index: int) -> Tensor:
        self._settle_buffer()
        self._in_buffer = None
        return self._zeroed(index)

    def held(self, index: int) -> Tensor:
        """The flat gradient held: the caller's to read until the transfer given to `release_after` has ended."""
        return self._flat()[: self._layouts[index].numel]

    def release_after(self, reading: Transfer) -> None:
        """Let the next block have the buffer when somebody has read it."""
        self._reading = reading

    @contextmanager
    def accumulating(self, index: int, *, adds: bool) -> Iterator[Callable[[Contribution], None]]:
        """See `StateTier.accumulating`. The first gradient waits for the writes of the block before."""
        filling = _Filling(partial(self._begin_accumulating, index, adds=adds))
        yield filling.take
        if filling.kept:
            self._norms.setdefault(index, {}).update(filling.norms())
            self._spent.discard(index)
            self._applied.discard(index)
            self._write(index, self._flat())

    def _begin_accumulating(self, index: int, *, adds: bool) -> Tensor:
        if adds and index in self._spent:
            raise _spent(self._layouts[index].places[0].key)
        # Should the buffer still hold this block, it may be changed once its writes are over.
        self._settle_buffer()
        holds = self._in_buffer == index and adds
        # As long as it is being filled it holds no block.
        self._in_buffer = None
        if holds:
            return self._flat()
        if index not in self._norms or index in self._spent:
            return self._zeroed(index)
        # What was accumulated of parameters that this backward says nothing of is kept.
        self._read_into(index, self._flat())
        return self._flat()

    def _zeroed(self, index: int) -> Tensor:
        flat = self._flat()
        flat[: self._layouts[index].numel].zero_()
        return flat

    def norm(self, index: int, place: ParamPlace) -> Tensor | None:
        """The 2-norm of an accumulated gradient; of one that was `hold`-ed also after an update has used it up."""
        is_unknown = index in self._spent and index not in self._applied
        return None if is_unknown else self._norms[index][place.key]

    def read(self, index: int, place: ParamPlace) -> Tensor:
        """A copy of an accumulated gradient."""
        self.check_unspent(index, place)
        self.wait_written(index)
        found = torch.empty(place.shape)
        flat = found.view(-1)
        if self._chunk_buffer is None:
            self._chunk_buffer = StagingBuffer(max(chunks[0].numel for chunks in self._chunks) * _ELEMENT_BYTES)
        values = self._chunk_buffer.tensor.view(torch.float32)
        for chunk, here, there in parts(self._chunks[index], place):
            self.start_read(chunk, self._chunk_buffer.tensor).wait()
            flat[there] = values[here]
        return found

    def check_unspent(self, index: int, place: ParamPlace) -> None:
        """Refuse to read a gradient that an update has used up.

        Raises:
            UnsupportedError: It has.
        """
        if index in self._spent:
            raise _spent(place.key)

    def start_read(self, chunk: Chunk, into: Tensor) -> Transfer:
        """Start reading a chunk; `wait_written` first."""
        nbytes = chunk.numel * _ELEMENT_BYTES
        return self._scratch.read(self._slots[chunk.unit, chunk.number], into[:nbytes], name=f"{chunk.name} gradient")

    def wait_written(self, index: int) -> None:
        """Wait until a block's gradient is in the file.

        Raises:
            TierFull: The disk is full.
            WriteError: The disk failed.
        """
        for write in self._writes.pop(index, []):
            write.wait()

    def spend(self, index: int) -> None:
        """Note that an update uses the gradient up."""
        self._spent.add(index)

    def rest(self) -> None:
        """Give the buffer's memory back until the next backward."""
        if self._buffer is not None:
            self._settle_buffer()
            self._in_buffer, self._buffer = None, None

    def close(self) -> None:
        """Give the space back. May be called twice."""
        self._scratch.close()

    def _flat(self) -> Tensor:
        if self._buffer is None:
            self._buffer = StagingBuffer(self._numel * _ELEMENT_BYTES)
        return self._buffer.tensor.view(torch.float32)

    def _settle_buffer(self) -> None:
        if self._reading is not None:
            self._reading.wait()
            self._reading = None
        if self._in_buffer is not None:
            self.wait_written(self._in_buffer)

    def _read_into(self, index: int, flat: Tensor) -> None:
        reads = [
            self.start_read(chunk, flat[chunk.start : chunk.stop].view(torch.uint8)) for chunk in self._chunks[index]
        ]
        for read in reads:
            read.wait()

    def _write(self, index: int, flat: Tensor) -> None:
        self._in_buffer = index
        writes = []
        for chunk in self._chunks[index]:
            slot = self._slots.get((index, chunk.number))
            if slot is None:
                slot = self._slots[index, chunk.number] = self._scratch.take(chunk.numel * _ELEMENT_BYTES)
            data = flat[chunk.start : chunk.stop].view(torch.uint8)
            writes.append(self._scratch.write(slot, data, name=f"{chunk.name} gradient"))
        self._writes[index] = writes


class _Filling:
    """Puts one backward's gradients into a block's flat buffer, which is made ready when the first of them comes.

    Not before: until then the block is recomputed, while the buffer is still being written or read for another block.
    """

    def __init__(self, begin: Callable[[], Tensor]) -> None:
        """Wait for the first gradient.

        Args:
            begin: Makes the buffer ready.
        """
        self.kept: dict[str, Tensor] = {}
        """What has been taken: views of the buffer by parameter name."""
        self._begin = begin
        self._flat: Tensor | None = None

    def take(self, one: Contribution) -> None:
        """Accumulate a gradient."""
        if self._flat is None:
            self._flat = self._begin()
        place = one.place
        kept = self.kept[place.key] = self._flat[place.start : place.stop].view(place.shape)
        one.add_to(kept)

    def norms(self) -> dict[str, Tensor]:
        """2-norms of what has been taken."""
        return {key: torch.linalg.vector_norm(kept) for key, kept in self.kept.items()}


def _spent(key: str) -> UnsupportedError:
    return UnsupportedError(
        f"keeping the gradient of {key} after optimizer.step()",
        reason="an update of weights on disk uses it up",
        instead="optimizer.zero_grad() after each step, as the Trainer does, or state in memory (Budget.host)",
    )


__all__ = ["DiskGradients"]
