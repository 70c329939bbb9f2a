"""Single experts brought from disk when a token is sent to them, and kept as stored while there is room.

For forwards of few tokens, which would not touch most of what a whole block's read brings. Experts of the next block
may be foreseen: their reads begin behind those that are needed now, in buffers that these do not need, and nothing but
the time of their end changes. Wrong guesses are read for nothing; where more than a quarter are, no more are made.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload import BlockLayout, BlockSpec, FileIO, StagingBuffer, Transfer, lay_out, view_tensor

Key = tuple[int, int]
"""Number of a block, number of an expert in it."""


@dataclass(eq=False)
class _Held:
    buffer: StagingBuffer
    layout: BlockLayout
    spec: BlockSpec
    transfer: Transfer | None


class ExpertReader:
    """Reads experts one by one into buffers of its own, the least recently used ones giving way.

    One thread at a time asks; reads go on beside it.

    Args:
        spec_of: What is read for an expert of a block.
        reader: Reads; stays the caller's.
        device: Compute device.
        buffer_bytes: Bytes of the largest expert in a buffer.
        num_buffers: Experts that are kept, at least 1.
    """

    def __init__(
        self,
        spec_of: Callable[[int, int], BlockSpec],
        *,
        reader: FileIO,
        device: torch.device,
        buffer_bytes: int,
        num_buffers: int,
    ) -> None:
        self._spec_of, self._reader, self._device = spec_of, reader, device
        self._buffer_bytes, self._num_buffers = buffer_bytes, num_buffers
        self._held: OrderedDict[Key, _Held] = OrderedDict()
        self._idle: list[StagingBuffer] = []
        self._num_allocated = 0
        self.bytes_read = 0
        """Bytes of all reads begun, alignment included."""
        self.num_asked = 0
        """Experts asked for so far."""
        self.num_read = 0
        """Experts read so far, those that were expected and then not asked for included."""
        self.num_foreseen = 0
        """Experts read because they were foreseen, so far."""
        self.num_came_true = 0
        """Those of them that were asked for afterwards."""
        self._foreseen: set[Key] = set()
        self._wanted: list[Key] = []

    @property
    def allocated_bytes(self) -> int:
        """Memory that it has taken."""
        return self._buffer_bytes * self._num_allocated

    def expect(self, block: int, experts: Sequence[int]) -> None:
        """Start reading experts that will be asked for next, as far as there is room beside one another.

        Args:
            block: Number of the block.
            experts: Their numbers, the first needed first.
        """
        wanted = self._wanted = [(block, expert) for expert in experts][: self._num_buffers]
        for key in reversed(wanted):
            if key in self._held:
                self._held.move_to_end(key)
        for key in wanted:
            if key not in self._held:
                self._start(key, keep=wanted)

    @property
    def foresees(self) -> bool:
        """Whether guesses are worth their reads, as far as is known: three of four came true."""
        num_known = self.num_foreseen - len(self._foreseen)
        return self.num_foreseen < _FIRST_GUESSES or 4 * self.num_came_true >= 3 * num_known

    def foresee(self, block: int, experts: Sequence[int]) -> None:
        """Start reading experts that may be asked for later, as far as there is room beside those expected now.

        Waits for nothing: buffers that are still being written to are left alone.

        Args:
            block: Number of the block.
            experts: Their numbers, the likeliest first.
        """
        if not self.foresees:
            return
        keep = set(self._wanted)
        for key in [(block, expert) for expert in experts][: self._num_buffers - len(keep)]:
            keep.add(key)
            if key in self._held:
                self._held.move_to_end(key)
            elif self._has_room(keep):
                self._start(key, keep=[*keep])
                self._foreseen.add(key)
                self.num_foreseen += 1

    def bring(self, block: int, expert: int) -> Mapping[str, Tensor]:
        """An expert's stored tensors by name, on the compute device; valid until another one is asked for.

        Raises:
            OffloadError: They cannot be read.
        """
        key = (block, expert)
        self.num_asked += 1
        if key in self._foreseen:
            self._foreseen.remove(key)
            self.num_came_true += 1
        if key not in self._held:
            self._start(key, keep=[key])
        held = self._held[key]
        self._held.move_to_end(key)
        if held.transfer is not None:
            try:
                held.transfer.wait()
            except BaseException:
                # An interrupted wait ends before the read does, which is still writing to the buffer.
                if held.transfer.done():
                    self._idle.append(self._held.pop(key).buffer)
                raise
            held.transfer = None
        tensors = {
            spec.name: view_tensor(held.buffer.tensor, held.layout.tensor_offsets[spec.name], spec=spec)
            for spec in held.spec.tensors
        }
        if self._device.type == "cpu":
            return tensors
        # Waits: the buffer may be given to another expert as soon as this returns.
        return {name: tensor.to(self._device) for name, tensor in tensors.items()}

    def close(self) -> None:
        """Wait for the reads under way and release the buffers."""
        for held in self._held.values():
            if held.transfer is not None:
                held.transfer.outcome()
            held.buffer.close()
        for buffer in self._idle:
            buffer.close()
        self._held.clear()
        self._idle.clear()
        self._foreseen.clear()
        self._num_allocated = 0

    def _has_room(self, keep: Collection[Key]) -> bool:
        if self._idle or self._num_allocated < self._num_buffers:
            return True
        oldest = next((key for key in self._held if key not in keep), None)
        transfer = None if oldest is None else self._held[oldest].transfer
        return oldest is not None and (transfer is None or transfer.done())

    def _start(self, key: Key, *, keep: Collection[Key]) -> None:
        spec = self._spec_of(*key)
        # Gaps are not read: what lies between is other experts.
        layout = lay_out(spec, max_gap_bytes=_MAX_GAP_BYTES)
        buffer = self._buffer(keep)
        transfer = self._reader.read(layout, buffer.tensor)
        self._held[key] = _Held(buffer=buffer, layout=layout, spec=spec, transfer=transfer)
        self.bytes_read += layout.read_bytes
        self.num_read += 1

    def _buffer(self, keep: Collection[Key]) -> StagingBuffer:
        if self._idle:
            return self._idle.pop()
        if self._num_allocated < self._num_buffers:
            self._num_allocated += 1
            return StagingBuffer(self._buffer_bytes)
        oldest = next((key for key in self._held if key not in keep), next(iter(self._held)))
        held = self._held.pop(oldest)
        self._foreseen.discard(oldest)
        if held.transfer is not None:
            # Still being written to. What came of it concerns nobody.
            held.transfer.outcome()
        return held.buffer


_MAX_GAP_BYTES = 4096

_FIRST_GUESSES = 64
"""Guesses that are made before it is asked whether they come true."""
