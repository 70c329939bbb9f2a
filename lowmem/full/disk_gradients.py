"""Gradients of blocks on disk: accumulated in one block's buffer, written behind, read back for the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.full.chunks import Chunk, parts
from lowmem.full.flat import ELEMENT_BYTES, ParamPlace, UnitLayout
from lowmem.full.tier import Contribution
from offload import FileSlot, Scratch, StagingBuffer, Trace, Transfer


@dataclass(kw_only=True, eq=False)
class _Kept:
    """One block's accumulated gradient: in the file, in the buffer, or no more."""

    norms: dict[str, Tensor] = field(default_factory=dict)
    """2-norms by parameter, of those that have a gradient."""
    writes: list[Transfer] = field(default_factory=list)
    """On their way to the file."""
    stays: bool = False
    """It is in the buffer only, for an update within the backward."""
    is_spent: bool = False
    """An update has used it."""


class DiskGradients:
    """Scratch space for the gradients of one step, and the buffer in which one block's are accumulated.

    Used by the thread that runs the backward, and by the one that updates; the caller sees to it that they do not use
    one block at the same time.

    Args:
        layouts: The blocks.
        chunks: Their chunks.
        folder: Where the scratch file is.
        trace: Where transfers are recorded.
    """

    def __init__(
        self, layouts: Sequence[UnitLayout], chunks: Sequence[tuple[Chunk, ...]], *, folder: Path, trace: Trace
    ) -> None:
        self._layouts, self._chunks = layouts, chunks
        self._scratch = Scratch(folder, trace=trace)
        self._slots: dict[tuple[int, int], FileSlot] = {}
        self._kept: dict[int, _Kept] = {}
        self._numel = max(layout.numel for layout in layouts)
        self._buffer: StagingBuffer | None = None
        self._chunk_buffer: StagingBuffer | None = None
        self._in_buffer: int | None = None
        self._reading: Transfer | None = None

    @property
    def memory_bytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.nbytes

    @contextmanager
    def accumulating(self, index: int, *, adds: bool, stays: bool) -> Iterator[Callable[[Contribution], None]]:
        """See `StateTier.accumulating`. The first gradient waits until the buffer is free of the block before.

        What stays is in the buffer until the transfer that is given to `release_after` has ended.
        """
        filling = _Filling(partial(self._begin, index, adds=adds, stays=stays))
        yield filling.take
        if not filling.taken:
            return
        kept = self._kept.setdefault(index, _Kept())
        kept.norms.update(filling.norms())
        kept.stays, kept.is_spent = stays, False
        if not stays:
            self._in_buffer = index
            kept.writes = self._write(index)

    def _begin(self, index: int, *, adds: bool, stays: bool) -> Tensor:
        """The buffer, with what the gradients of a backward are added to."""
        if adds:
            self.check_unspent(index, self._layouts[index].places[0])
        holds = adds and self._in_buffer == index
        # Should the buffer still hold this block, it may be changed once its writes are over.
        self._settle_buffer()
        flat = self._flat()
        kept = self._kept.get(index)
        if stays or kept is None or kept.is_spent:
            flat[: self._layouts[index].numel].zero_()
        elif not holds:
            # What was accumulated of parameters that this backward says nothing of is kept.
            self._read_into(index, flat)
        return flat

    def staying(self, index: int) -> Tensor | None:
        """The flat gradient of a block that stays in the buffer until it is spent."""
        kept = self._kept.get(index)
        if kept is None or not kept.stays or kept.is_spent:
            return None
        return self._flat()[: self._layouts[index].numel]

    def release_after(self, reading: Transfer) -> None:
        """Let the next block have the buffer once a transfer, which reads it, has ended."""
        self._reading = reading

    def norm(self, index: int, place: ParamPlace) -> Tensor | None:
        """The 2-norm of an accumulated gradient; None if an update has used it, unless within the backward."""
        kept = self._kept[index]
        return None if kept.is_spent and not kept.stays else kept.norms[place.key]

    def read(self, index: int, place: ParamPlace) -> Tensor:
        """A copy of an accumulated gradient."""
        self.check_unspent(index, place)
        found = torch.empty(place.shape)
        flat = found.view(-1)
        if self._chunk_buffer is None:
            self._chunk_buffer = StagingBuffer(max(chunks[0].numel for chunks in self._chunks) * ELEMENT_BYTES)
        values = self._chunk_buffer.tensor.view(torch.float32)
        for chunk, here, there in parts(self._chunks[index], place):
            self.start_read(chunk, self._chunk_buffer.tensor).wait()
            flat[there] = values[here]
        return found

    def check_unspent(self, index: int, place: ParamPlace) -> None:
        """Refuse to read a gradient that an update has used.

        Raises:
            UnsupportedError: It has.
        """
        if index in self._kept and self._kept[index].is_spent:
            raise UnsupportedError(
                f"keeping the gradient of {place.key} after optimizer.step()",
                reason="an update of weights on disk reads it from there, and the next backward writes over it",
                instead="optimizer.zero_grad() after each step, as the Trainer does, or state in memory (Budget.host)",
            )

    def start_read(self, chunk: Chunk, into: Tensor) -> Transfer:
        """Start reading a chunk, once the block's gradient is in the file.

        Raises:
            TierFull: The disk was full.
            WriteError: The disk failed.
        """
        self._finish_writes(chunk.unit)
        nbytes = chunk.numel * ELEMENT_BYTES
        return self._scratch.read(self._slots[chunk.unit, chunk.number], into[:nbytes], name=f"{chunk.name} gradient")

    def spend(self, index: int) -> None:
        """Note that an update uses the gradient."""
        self._kept.setdefault(index, _Kept()).is_spent = True

    def rest(self) -> None:
        """Give the buffer's memory back until the next backward."""
        if self._buffer is not None:
            self._settle_buffer()
            self._buffer = None

    def close(self) -> None:
        """Give the space back. May be called twice."""
        self._scratch.close()

    def _flat(self) -> Tensor:
        if self._buffer is None:
            self._buffer = StagingBuffer(self._numel * ELEMENT_BYTES, in_children=False)
        return self._buffer.tensor.view(torch.float32)

    def _settle_buffer(self) -> None:
        """Wait until nobody reads the buffer; from here on it holds no block."""
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.wait()
        index, self._in_buffer = self._in_buffer, None
        if index is not None:
            self._finish_writes(index)

    def _finish_writes(self, index: int) -> None:
        # Both threads may wait for the same writes.
        for write in self._kept[index].writes:
            write.wait()

    def _read_into(self, index: int, flat: Tensor) -> None:
        reads = [
            self.start_read(chunk, flat[chunk.start : chunk.stop].view(torch.uint8)) for chunk in self._chunks[index]
        ]
        for read in reads:
            read.wait()

    def _write(self, index: int) -> list[Transfer]:
        flat, writes = self._flat(), []
        for chunk in self._chunks[index]:
            slot = self._slots.get((index, chunk.number))
            if slot is None:
                slot = self._slots[index, chunk.number] = self._scratch.take(chunk.numel * ELEMENT_BYTES)
            data = flat[chunk.start : chunk.stop].view(torch.uint8)
            writes.append(self._scratch.write(slot, data, name=f"{chunk.name} gradient"))
        return writes


class _Filling:
    """Puts one backward's gradients into a block's flat buffer, which is made ready when the first of them comes.

    Not before: until then the block is recomputed, while the buffer is still being written or read for another block.

    Args:
        begin: Makes the buffer ready.
    """

    def __init__(self, begin: Callable[[], Tensor]) -> None:
        self.taken: dict[str, Tensor] = {}
        """Views of the buffer by parameter name."""
        self._begin = begin
        self._flat: Tensor | None = None

    def take(self, one: Contribution) -> None:
        """Accumulate a gradient."""
        if self._flat is None:
            self._flat = self._begin()
        place = one.place
        taken = self.taken[place.key] = self._flat[place.start : place.stop].view(place.shape)
        one.add_to(taken)

    def norms(self) -> dict[str, Tensor]:
        """2-norms of what has been taken."""
        return {key: torch.linalg.vector_norm(taken) for key, taken in self.taken.items()}
