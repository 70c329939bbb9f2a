"""Boundary activations: each block's input, kept in its tier from the forward until the block's backward."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from heapq import nlargest
from typing import Protocol

import torch
from torch import Tensor

from lowmem.internals.torch import version_of
from offload import PAGE_BYTES, FileSlot, Scratch, SlotAllocator, StagingBuffer, Transfer

_LARGE_BYTES = 8 << 20

_TAKEN_TWICE = (
    "backward ran twice through a streamed block; run the forward again (retain_graph is not supported: a block keeps "
    "nothing for a second backward)"
)


class Boundary:
    """One kept activation; a graph that is dropped without a backward releases it too.

    Args:
        take: Brings it to the compute device.
        release: Lets others have its room.
        drop: The same from a collection, where that differs.
    """

    def __init__(
        self, take: Callable[[], Tensor], *, release: Callable[[], None], drop: Callable[[], None] | None = None
    ) -> None:
        self._take: Callable[[], Tensor] | None = take
        self._release, self._drop = release, drop or release

    def take(self) -> Tensor:
        """Give it back on the compute device; valid until `release`: on a CPU it may be a view of a tier's buffer.

        Raises:
            RuntimeError: It was released before, or changed in place since the forward.
            OffloadError: The disk failed.
        """
        if self._take is None:
            raise RuntimeError(_TAKEN_TWICE)
        return self._take()

    def release(self) -> None:
        """Release it: its tier's memory is free afterwards. May be called repeatedly."""
        self._end(self._release)

    def __del__(self) -> None:
        self._end(self._drop)

    def _end(self, release: Callable[[], None]) -> None:
        is_kept, self._take = self._take is not None, None
        if is_kept:
            # From here on nothing of it is held: neither its buffer nor its tier.
            self._release = self._drop = _nothing
            release()


def _nothing() -> None:
    """What is left to do of a boundary that was released."""


class BoundaryTier(Protocol):
    """Where boundary activations wait for the backward."""

    def keep(self, value: Tensor, *, turn: int | None = None) -> Boundary:
        """Keep an activation of any shape; the caller may drop its own reference afterwards.

        Args:
            value: The activation.
            turn: Tells when it will be taken, as far as that is of use: of two, the one with the higher number comes
                first. No two are equal. None for the reverse of the order in which all are kept.
        """

    held_bytes: int
    """Bytes of memory the tier has taken for kept activations."""

    def release_idle(self) -> None:
        """Give memory back that kept activations can do without until they are taken, if there is any."""
        return

    def close(self) -> None:
        """Release everything that is the tier's own; nothing can be kept or taken afterwards."""
        return


class DeviceBoundaries(BoundaryTier):
    """Kept by reference, in the device's memory."""

    held_bytes = 0

    def keep(self, value: Tensor, *, turn: int | None = None) -> Boundary:
        """Keep an activation where it is."""
        return Boundary(partial(_unchanged, value.detach(), version=version_of(value)), release=_nothing)


class HostBoundaries(BoundaryTier):
    """Copied into page-aligned buffers of host RAM that one step after another uses.

    On a CPU this is where all boundaries go. They outlive the temporaries of many blocks: left on the heap, they would
    pin the pages around them, and the process would grow by a block's temporaries for each few blocks.

    Args:
        device: Compute device, where activations come from and go back to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[StagingBuffer] = []
        self.held_bytes = 0
        self.most_wasteful: float = 2
        """How many times as large as an activation its buffer may be."""

    def keep(self, value: Tensor, *, turn: int | None = None) -> Boundary:
        """Copy an activation of any shape into a buffer of this tier; from a GPU, returns at once."""
        buffer = self._take_buffer(value.nbytes)
        kept = buffer.tensor[: value.nbytes].view(value.dtype).view(value.shape)
        self.bring_down(value, kept)
        return Boundary(partial(self.on_device, kept), release=partial(self._free.append, buffer))

    def bring_down(self, value: Tensor, kept: Tensor) -> None:
        """Copy an activation to its place in a buffer."""
        kept.copy_(value)

    def on_device(self, kept: Tensor) -> Tensor:
        """A kept activation where blocks compute: the buffer itself on a CPU, a copy elsewhere."""
        return kept.to(self._device)

    def close(self) -> None:
        """Release the buffers that no activation is in."""
        self.held_bytes -= sum(buffer.nbytes for buffer in self._free)
        self._free.clear()

    def _take_buffer(self, nbytes: int) -> StagingBuffer:
        """The smallest free buffer that is large enough, unless it would waste too much; else a new one."""
        fitting = [buffer for buffer in self._free if nbytes <= buffer.nbytes <= self.most_wasteful * nbytes]
        if fitting:
            best = min(fitting, key=lambda buffer: buffer.nbytes)
            self._free.remove(best)
            return best
        # Lengths have changed: what is too small or too large now would only add up.
        self.held_bytes -= sum(buffer.nbytes for buffer in self._free)
        self._let_go(self._free)
        self._free.clear()
        made = self._make_buffer(nbytes)
        self.held_bytes += made.nbytes
        return made

    def _make_buffer(self, nbytes: int) -> StagingBuffer:
        return StagingBuffer(nbytes)

    def _let_go(self, buffers: Sequence[StagingBuffer]) -> None:
        """Have the memory of buffers go, with the last view of them."""


class ProductBoundaries(BoundaryTier):
    """Many tensors of all sizes, in one mapping of a processor's memory that one step after another uses.

    Nothing that is made for one of them lies on the C library's heap: they are kept between a block's temporaries, and
    small pieces that stay would keep the memory of these from being used again in large ones.

    Args:
        nbytes: What they take together, at most; what does not fit gets memory of its own.
    """

    def __init__(self, nbytes: int) -> None:
        # Committed as it is first written, so that whole pages for each cost nothing here.
        self._buffer = StagingBuffer(nbytes + _ROOM_FOR_PAGES * PAGE_BYTES)
        self._slots = SlotAllocator()
        # A collection may release one while a slot is being taken: they are given back before the next is.
        self._released: deque[FileSlot] = deque()
        self._beside_bytes = 0

    @property
    def held_bytes(self) -> int:  # type: ignore[override]
        """Bytes of memory taken so far."""
        return min(self._slots.end_bytes, self._buffer.nbytes) + self._beside_bytes

    def keep(self, value: Tensor, *, turn: int | None = None) -> Boundary:
        """Copy a tensor; what comes back is a view of the mapping."""
        while self._released:
            self._slots.give_back(self._released.popleft())
        slot = self._slots.take(value.nbytes)
        if slot.offset_bytes + slot.nbytes > self._buffer.nbytes:
            self._slots.give_back(slot)
            self._beside_bytes += value.nbytes
            return Boundary(partial(_itself, value.clone()), release=partial(self._drop, value.nbytes))
        take = partial(self._view, slot.offset_bytes, value.nbytes, value.dtype, tuple(value.shape))
        take().copy_(value)
        return Boundary(take, release=partial(self._released.append, slot))

    def _view(self, start: int, nbytes: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        return self._buffer.tensor[start : start + nbytes].view(dtype).view(shape)

    def _drop(self, nbytes: int) -> None:
        self._beside_bytes -= nbytes


_ROOM_FOR_PAGES = 4096
"""Pages that kept products may take beyond their own bytes."""


def _itself(value: Tensor) -> Tensor:
    return value


def _unchanged(value: Tensor, *, version: int) -> Tensor:
    """An activation that stayed where it was.

    Raises:
        RuntimeError: It was changed in place since the forward.
    """
    if version_of(value) != version:
        raise RuntimeError(
            "a boundary activation was changed in place after its block's forward; clone it before changing it"
        )
    return value


class DiskBoundaries:
    """Kept in scratch space on disk; a few buffers of host RAM carry everything there and back.

    An activation is copied into a buffer and written from there while the next block computes. Boundaries come back in
    the reverse order, or by turns: once one is taken, those that follow it are read ahead into other buffers. The last
    boundaries of a forward are still in their buffers when the backward starts, and are not read.

    Memory is the buffers, each as large as the largest activation, whatever the number of blocks and of passes that
    wait for their backward. With one buffer nothing is read ahead. Should a block have more activations than there are
    buffers, there are more for as long as it holds them.

    Args:
        device: Compute device, where activations come from and go back to.
        scratch: Where they are written; closed with the tier.
        num_buffers: Buffers to write behind and to read ahead with.

    Raises:
        ValueError: `num_buffers` is less than 1.
    """

    def __init__(self, device: torch.device, scratch: Scratch, *, num_buffers: int = 2) -> None:
        if num_buffers < 1:
            raise ValueError(f"num_buffers must be at least 1, got {num_buffers}")
        self.held_bytes = 0
        self.scratch = scratch
        """Where activations are written."""
        self._device, self._num_buffers = device, num_buffers
        self._lock = threading.Lock()
        self._kept: dict[int, StoredBoundary] = {}
        self._leaving: list[StoredBoundary] = []
        self._free: list[StagingBuffer] = []
        self._num_existing = 0
        self._num_kept = 0
        self._largest_bytes = 0
        # Filled without the lock: a collection may release a boundary while this very thread holds it.
        self._released: deque[StoredBoundary] = deque()

    def keep(self, value: Tensor, *, turn: int | None = None) -> Boundary:
        """Copy an activation into a buffer and start writing it; waits only where no buffer is free.

        Args:
            value: The activation.
            turn: As in `BoundaryTier.keep`; told for all that are kept at a time, or for none.

        Raises:
            TierFull: The disk has no room for an activation that was kept before.
            WriteError: The disk failed to take one.
            Closed: The tier was closed.
        """
        with self._lock:
            self._settle()
            if not self._kept:
                self.shrink()
            self._num_kept += 1
            number = self._num_kept if turn is None else turn
            stored = StoredBoundary(number, value, slot=self.scratch.take(value.numel() * value.element_size()))
            self._largest_bytes = max(self._largest_bytes, stored.slot.nbytes)
            try:
                stored.buffer = self._room(stored)
                stored.transfer = self.send(stored, value)
            except BaseException:
                self._clear(stored)
                raise
            stored.writing = True
            self._kept[stored.number] = stored
        # A collection may run while this very thread holds the lock.
        return Boundary(
            partial(self.bring, stored),
            release=partial(self.release, stored),
            drop=partial(self._released.append, stored),
        )

    def bring(self, stored: StoredBoundary) -> Tensor:
        """A kept activation on the compute device; has those kept before it follow.

        Raises:
            TierFull: The disk had no room for an activation.
            WriteError: The disk failed to take one.
            ReadError: The disk failed to give this one back.
            Closed: The tier was closed.
        """
        with self._lock:
            # Before anything that may raise another boundary's error: as long as it is in a buffer, none can touch it.
            stored.taken = stored.buffer is not None
            self._settle()
            if stored.lost is not None:
                raise stored.lost
            if stored.buffer is None:
                stored.buffer = self._room(stored)
                self._start_reading(stored)
            stored.taken = True
            # A write that is under way reads the buffer as the block does; how it ends does not matter any more.
            error = None if stored.writing or stored.transfer is None else stored.transfer.outcome()
            if error is not None:
                self.take_buffer_from(stored)
                raise error
            return self.arrive(stored)

    def send(self, stored: StoredBoundary, value: Tensor) -> Transfer:
        """Copy an activation into its buffer and start writing that; what ends when the buffer is not needed for it."""
        stored.view().copy_(value)
        return self.write(stored)

    def write(self, stored: StoredBoundary) -> Transfer:
        """Start writing an activation from its buffer."""
        return self.scratch.write(stored.slot, stored.pages(), name=stored.name)

    def fetch(self, stored: StoredBoundary) -> Transfer:
        """Start reading an activation into its buffer."""
        return self.scratch.read(stored.slot, stored.pages(), name=stored.name)

    def arrive(self, stored: StoredBoundary) -> Tensor:
        """The activation in a buffer where blocks compute; has those kept before it read ahead."""
        self.read_ahead(stored.number)
        return stored.view()

    def release(self, stored: StoredBoundary) -> None:
        """Use an activation's room for others. Not from a collection."""
        self._released.append(stored)
        with self._lock:
            self._settle(report=False)

    def release_idle(self) -> None:
        """Release large buffers, on a CPU: reading what they hold takes less than a block does.

        Raises:
            TierFull: The disk has no room for an activation that was kept before.
            WriteError: The disk failed to take one.
        """
        if self._device.type != "cpu" or self.held_bytes < _LARGE_BYTES:
            return
        with self._lock:
            for stored in self._kept.values():
                if stored.writing and stored.transfer is not None:
                    stored.transfer.outcome()
            self._settle()
            for stored in self._kept.values():
                if stored.idle:
                    self.take_buffer_from(stored)
            while self._free:
                self._drop(self._free.pop())

    def close(self) -> None:
        """Stop the transfers; give memory and disk space back. What is still kept is lost. Twice is fine."""
        self.scratch.close()
        with self._lock:
            self._settle(report=False)
            for stored in self._kept.values():
                self.take_buffer_from(stored)
            while self._free:
                self._drop(self._free.pop())

    def _settle(self, *, report: bool = True) -> None:
        """Notice what has ended since.

        Raises:
            TierFull: A write found the disk full, and what it was to write is needed; each raises once here.
            WriteError: Likewise, it failed.
        """
        while self._released:
            stored = self._released.popleft()
            self._kept.pop(stored.number, None)
            stored.taken = False
            self._leaving.append(stored)
        # The slot and the buffer of a transfer that is under way belong to it.
        leaving, self._leaving = self._leaving, []
        for stored in leaving:
            if stored.under_way:
                self._leaving.append(stored)
            else:
                self._clear(stored)
        for stored in self._kept.values():
            if stored.writing and not stored.under_way:
                stored.end_of_write()
                if stored.lost is not None:
                    self.take_buffer_from(stored)
        if report:
            for stored in self._kept.values():
                if stored.lost is not None and not stored.reported:
                    # Other writes of this step that fail are not told to the next one, which may begin before the
                    # failed step's graph is gone; whoever takes such an activation is told in any case.
                    for other in self._kept.values():
                        other.reported = True
                    raise stored.lost

    def _room(self, stored: StoredBoundary) -> StagingBuffer:
        """A buffer for an activation: a free one, a new one, or one whose contents are on disk. May have to wait.

        Raises:
            TierFull: As `_settle`.
            WriteError: As `_settle`.
        """
        while True:
            buffer = self._spare_buffer(stored, others=self._kept.values())
            if buffer is not None:
                return buffer
            under_way = [
                other for other in (*self._leaving, *self._kept.values()) if other.under_way and not other.taken
            ]
            if not under_way:
                # Blocks hold them all.
                return self._new_buffer(stored.slot.nbytes)
            oldest = under_way[0].transfer
            assert oldest is not None
            oldest.outcome()
            self._settle()

    def _spare_buffer(self, stored: StoredBoundary, *, others: Iterable[StoredBoundary]) -> StagingBuffer | None:
        """A buffer that nothing needs at the moment, if need be from `others` that have it on disk as well."""
        nbytes = stored.slot.nbytes
        fitting = [buffer for buffer in self._free if buffer.nbytes >= nbytes]
        if fitting:
            best = min(fitting, key=lambda buffer: buffer.nbytes)
            self._free.remove(best)
            return best
        if self._num_existing >= self._num_buffers:
            if not self._free:
                idle = [other for other in others if other.idle]
                if not idle:
                    return None
                # What was kept later has been passed by; of what is still to come, the earliest comes last.
                self.take_buffer_from(max(idle, key=lambda other: (other.number > stored.number, -other.number)))
                return self._spare_buffer(stored, others=others)
            self._drop(self._free.pop())
        return self._new_buffer(nbytes)

    def read_ahead(self, number: int) -> None:
        """Start reading what was kept before an activation, as far as there are buffers."""
        earlier = (other for other in self._kept.values() if other.number < number and not other.taken)
        later = [other for other in self._kept.values() if other.number > number]
        for stored in nlargest(self._num_buffers - 1, earlier, key=lambda other: other.number):
            if stored.buffer is None and stored.lost is None:
                stored.buffer = self._spare_buffer(stored, others=later)
                if stored.buffer is None:
                    return
                self._start_reading(stored)

    def _start_reading(self, stored: StoredBoundary) -> None:
        try:
            stored.transfer = self.fetch(stored)
        except BaseException:
            self.take_buffer_from(stored)
            raise

    def _clear(self, stored: StoredBoundary) -> None:
        self.take_buffer_from(stored)
        self.scratch.give_back(stored.slot)

    def take_buffer_from(self, stored: StoredBoundary) -> None:
        """Let others have an activation's buffer."""
        buffer, stored.buffer, stored.transfer, stored.taken = stored.buffer, None, None, False
        if buffer is not None:
            self._free.append(buffer)
            if self._num_existing > self._num_buffers:
                self._drop(self._free.pop())

    def _new_buffer(self, nbytes: int) -> StagingBuffer:
        # As large as the largest of a step: any serves any then, and none has to be mapped anew.
        buffer = self.make_buffer(max(nbytes, self._largest_bytes))
        self._num_existing += 1
        self.held_bytes += buffer.nbytes
        return buffer

    def make_buffer(self, nbytes: int) -> StagingBuffer:
        """A buffer for activations of up to so many bytes."""
        return StagingBuffer(nbytes, in_children=False)

    def close_buffer(self, buffer: StagingBuffer) -> None:
        """Give a buffer's memory back; no transfer between it and the disk is under way."""
        buffer.close()

    def _drop(self, buffer: StagingBuffer) -> None:
        self._num_existing -= 1
        self.held_bytes -= buffer.nbytes
        self.close_buffer(buffer)

    def shrink(self) -> None:
        """Let go of buffers that are far too large for what was kept since the last time that nothing was."""
        too_large = [buffer for buffer in self._free if buffer.nbytes > 2 * self._largest_bytes]
        for buffer in too_large:
            self._free.remove(buffer)
            self._drop(buffer)
        self._largest_bytes = 0


class StoredBoundary:
    """An activation in its slot on disk, in a buffer, or on the way between them."""

    def __init__(self, number: int, value: Tensor, *, slot: FileSlot) -> None:
        self.number, self.slot = number, slot
        self.name = f"boundary {number}"
        self._nbytes = value.numel() * value.element_size()
        self._dtype, self._shape = value.dtype, value.shape
        self.buffer: StagingBuffer | None = None
        self.transfer: Transfer | None = None
        self.writing = False
        """Whether `transfer` is the write; it may have ended."""
        self.taken = False
        """Whether a block uses the buffer."""
        self.lost: BaseException | None = None
        """Why it is neither on disk nor in a buffer."""
        self.reported = False

    @property
    def under_way(self) -> bool:
        """Whether a transfer uses slot and buffer."""
        return self.transfer is not None and not self.transfer.done()

    @property
    def idle(self) -> bool:
        """Whether it has a buffer that it does not need now."""
        return self.buffer is not None and not self.taken and not self.under_way and not self.writing

    def end_of_write(self) -> None:
        """Take note of how the write ended."""
        assert self.transfer is not None
        error = self.transfer.outcome()
        self.writing, self.transfer = False, None
        # Where a block has taken it, nothing is lost.
        self.lost = None if self.taken else error

    def pages(self) -> Tensor:
        """The buffer's part that is moved, whole pages."""
        assert self.buffer is not None
        return self.buffer.tensor[: self.slot.nbytes]

    def view(self) -> Tensor:
        """The activation in the buffer."""
        assert self.buffer is not None
        return self.buffer.tensor[: self._nbytes].view(self._dtype).view(self._shape)
