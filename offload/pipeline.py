"""Moves blocks up, disk to host buffer to device slot, in the order of the visits to come; waits for nothing."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.blocks import BlockLayout
from offload.buffers import StagingBuffer
from offload.device import Copy, Device
from offload.placement import Placement, PlacementPlan
from offload.sharing.arena import SharedPlace
from offload.trace import Trace
from offload.transfer import Transfer

NEVER = sys.maxsize
"""The next use of a block that is not expected."""


class VisitOrder:
    """Blocks still to come, and how far away each is.

    A visit that is not the expected one is taken for an excursion, and the order stays where it is. When the visit
    after it is the one that follows it in the order, the consumer has jumped and the order goes on from there: blocks
    left out, or a pass begun again.

    Args:
        num_blocks: Blocks are numbered from 0 to this.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._order: tuple[int, ...] = ()
        self._positions: dict[int, list[int]] = {}
        self._here = 0
        self._after_excursion: int | None = None

    def replace(self, order: Sequence[int]) -> None:
        """Expect these visits, in this order, instead of what was expected until now.

        Raises:
            ValueError: A number is not that of a block; what was expected until now stays.
        """
        for block in order:
            if not 0 <= block < self._num_blocks:
                raise ValueError(f"order: expected block numbers from 0 to {self._num_blocks - 1}, got {block}")
        self._order = tuple(order)
        self._positions = {}
        for position, block in enumerate(self._order):
            self._positions.setdefault(block, []).append(position)
        self._here = 0
        self._after_excursion = None

    def visit(self, block: int) -> bool:
        """Note that a block is being visited now. False if it is not the one expected next."""
        if self._expects(self._here, block):
            self._here += 1
            self._after_excursion = None
            return True
        if self._after_excursion is not None and self._expects(self._after_excursion, block):
            self._here = self._after_excursion + 1
            self._after_excursion = None
        else:
            found = self._find(block)
            self._after_excursion = None if found is None else found + 1
        return False

    def next_use(self, block: int) -> int:
        """Visits until the block is visited: 0 for the very next one, `NEVER` if it is not expected."""
        positions = self._positions.get(block, [])
        nearest = bisect_left(positions, self._here)
        return positions[nearest] - self._here if nearest < len(positions) else NEVER

    def upcoming(self) -> Iterator[int]:
        """Blocks to be visited, nearest first."""
        for position in range(self._here, len(self._order)):
            yield self._order[position]

    def _expects(self, position: int, block: int) -> bool:
        return position < len(self._order) and self._order[position] == block

    def _find(self, block: int) -> int | None:
        """Nearest position of a block from here on, else its first one."""
        positions = self._positions.get(block)
        if positions is None:
            return None
        nearest = bisect_left(positions, self._here)
        return positions[nearest] if nearest < len(positions) else positions[0]


@dataclass(eq=False, kw_only=True)
class Slot:
    """Memory that holds one block's stored bytes or is being filled with them. The fetcher's lock guards its fields."""

    tensor: Tensor
    """The memory, uint8."""
    block: int | None = None
    """Whose bytes these are, or will be."""
    ready: bool = False
    """Whether the bytes are there or, where `copy` is set, will be when that is done."""
    holds: int = 0
    """Visits, or copies out of it, that are using it. It is not overwritten before they end."""
    last_use: int = 0
    """Number of the visit that used it last."""
    mark: torch.cuda.Event | None = None
    """The point on the compute stream after which it may be overwritten, where the device has one."""
    copy: Copy | None = None
    """The copy that fills it, where the device has memory of its own: compute has to wait for it."""

    @property
    def busy(self) -> bool:
        """Whether somebody is reading or writing it, so that it cannot be given to another block."""
        return self.holds > 0 or (self.block is not None and not self.ready)

    def clear(self) -> None:
        """Forget whose bytes these are."""
        self.block = None
        self.ready = False
        self.copy = None


class Ring:
    """Slots of one size and their eviction.

    Args:
        slots: The slots, all free.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._slots = tuple(slots)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def find(self, block: int) -> Slot | None:
        """The slot that holds a block or is being filled with it."""
        return next((slot for slot in self._slots if slot.block == block), None)

    def take(self, block: int, *, next_use: Callable[[int], int], leave: int = 0) -> Slot | None:
        """Give a slot to a block: a free one, else that of the block whose next use is farthest.

        Belady's rule (A study of replacement algorithms for a virtual-storage computer, 1966), with which the fewest
        blocks are fetched when the order is known. Among blocks that are not expected at all the one used longest ago
        goes.

        Args:
            block: Who wants it.
            next_use: Visits until a block is used.
            leave: Slots that must remain to be had, for blocks that are needed sooner and cannot take theirs yet.

        Returns:
            The slot, now the block's and not ready, or None: the others are busy or hold blocks that are needed sooner.
        """
        wanted = next_use(block)
        uses = [
            (NEVER if slot.block is None else next_use(slot.block), slot.block is None, -slot.last_use, slot)
            for slot in self._slots
            if not slot.busy
        ]
        can_be_had = [use for use in uses if use[0] > wanted]
        if len(can_be_had) <= leave:
            return None
        chosen = max(can_be_had, key=lambda use: use[:3])[3]
        chosen.clear()
        chosen.block = block
        return chosen


_OUTDATED = -1
"""Stands for the block in a slot that is being filled with bytes that nobody wants any more."""

POISON = 0xFF
"""Every 16-, 32- and 64-bit float made of such bytes is NaN."""


@dataclass(frozen=True, kw_only=True)
class _Read:
    block: int
    slot: Slot
    transfer: Transfer


@dataclass(frozen=True, kw_only=True)
class _Moving:
    block: int
    source: Slot
    copy: Copy


ReadBlock = Callable[[BlockLayout, Tensor], Transfer]
"""Starts bringing a block's bytes, in its layout, into a host buffer; returns at once."""


KeptMemory = Callable[[BlockLayout], SharedPlace | None]
"""Gives the memory that a block is kept in for all processes of this machine, or None where it has none for it."""


class Pipeline:
    """The storage of all blocks and the transfers under way. Not safe by itself: one lock guards all of it.

    Where the device computes from host memory, reads land in the slots that visits are served from. Where it has its
    own, they land in staging buffers, or in the host cache, and are copied into slots from there.

    Args:
        layouts: How each block is read.
        plan: Where each block lives, and how many buffers there are.
        read: Reads blocks.
        device: Where slots are; stays the caller's.
        trace: Gets a span for every finished read and copy.
        poison: Fill buffers with `POISON` when they are given free, so that a use after the release shows.
        keep: Where blocks that stay in host memory lie; in memory of this process by default.
    """

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        *,
        plan: PlacementPlan,
        read: ReadBlock,
        device: Device,
        trace: Trace,
        poison: bool,
        keep: KeptMemory = lambda layout: None,
    ) -> None:
        self._layouts = tuple(layouts)
        self._plan = plan
        self._read_block = read
        self.device = device
        """Where blocks are computed."""
        self._trace = trace
        self._poison = poison
        self._keep = keep
        self._moving = frozenset(plan.moving)
        self._buffers: dict[Slot, StagingBuffer | SharedPlace] = {}
        self._reads: deque[_Read] = deque()
        self._copies: deque[_Moving] = deque()
        # A read is queued behind the one that the disk is busy with; more would only delay an unexpected visit.
        self._max_reads = max(2, plan.num_staging)
        self._last_read_ns = 0
        through = [
            layout.buffer_bytes
            for block, layout in enumerate(self._layouts)
            if plan.placements[block] != Placement.HOST and (block in self._moving or not device.is_host)
        ]
        staging_bytes = max(through, default=0)
        self._staging = Ring([self._slot_in(device.staging(staging_bytes)) for _ in range(plan.num_staging)])
        self._ring = self._staging
        if not device.is_host:
            slot_bytes = max((self._layouts[block].buffer_bytes for block in self._moving), default=0)
            self._ring = Ring([self._device_slot(slot_bytes) for _ in range(plan.num_slots)])
        # What visits are served from for good, and host copies of what moves to the device from there.
        self._kept: dict[int, Slot] = {}
        self._cached: dict[int, Slot] = {}
        self.order = VisitOrder(len(self._layouts))
        """What to fetch ahead of the visits."""
        self.demands: Counter[int] = Counter()
        """Blocks that a visit is waiting for now."""
        self.errors: dict[int, BaseException] = {}
        """Why blocks could not be fetched. They are not tried again until this is cleared."""
        self._excused: set[Transfer] = set()
        self.outside: Callable[[], AbstractContextManager[None]] = nullcontext
        """Entered around what may take long: the lock is free meanwhile, and the state may change."""
        self.ended: Callable[[], None] = lambda: None
        """Called in a thread of the reader when a read has ended."""
        self.started: Callable[[Copy], None] = lambda copy: None
        """Called with every copy that was started."""
        self.num_reads = [0] * len(self._layouts)
        """Finished reads of each block."""
        self.bytes_read = 0
        """Bytes of all finished reads."""

    def find(self, block: int) -> Slot | None:
        """The slot from which a visit to the block can be served now, or None."""
        slot = self._on_device(block)
        return slot if slot is not None and slot.ready else None

    def held_blocks(self, wanted: int) -> list[int]:
        """The blocks of all slots that `wanted` could be fetched into, if visits hold them all; else none."""
        if wanted not in self._moving or not all(slot.holds for slot in self._ring):
            return []
        return sorted(slot.block for slot in self._ring if slot.block is not None)

    def slots(self) -> Iterator[Slot]:
        """All memory from which visits are served."""
        yield from self._ring
        yield from self._kept.values()

    def allocated_bytes(self) -> dict[str, int]:
        """Bytes allocated by role. Of host memory the system counts a page once it has been written to."""
        own = [*self._kept.items(), *self._cached.items()]
        by_tier = {
            tier: sum(slot.tensor.numel() for block, slot in own if self._plan.placements[block] == tier)
            for tier in (Placement.RESIDENT, Placement.HOST)
        }
        return {
            "resident_bytes": by_tier[Placement.RESIDENT],
            "ring_bytes": sum(slot.tensor.numel() for slot in self._ring),
            "host_cache_bytes": by_tier[Placement.HOST],
            "staging_bytes": 0 if self.device.is_host else sum(slot.tensor.numel() for slot in self._staging),
        }

    def collect(self) -> bool:
        """Take note of reads and copies that have finished. False if there were none."""
        finished_reads = [read for read in self._reads if read.transfer.done()]
        for read in finished_reads:
            self._reads.remove(read)
            self._finish_read(read)
        num_copies = 0
        # One stream: copies finish in the order in which they were started.
        while self._copies and self._copies[0].copy.done():
            self._finish_copy(self._copies.popleft())
            num_copies += 1
        return bool(finished_reads or num_copies)

    def start(self) -> bool:
        """Start the one transfer that is needed soonest. False if nothing is needed, or there is no room for it yet."""
        # In the order of need: what comes later must not take the room of what comes sooner.
        can_read = len(self._reads) < self._max_reads
        can_copy = not self.device.is_host
        num_waiting = 0
        for block in self._missing():
            source = self._cached.get(block) or self._staging.find(block)
            if source is None:
                if can_read and self._read(block):
                    return True
                can_read = False
            if source is not None and source.ready and can_copy:
                if self._copy(block, source, leave=num_waiting):
                    return True
                can_copy = False
            num_waiting += block in self._moving
            if not (can_read or can_copy) or num_waiting > len(self._ring) + len(self._staging):
                break
        return False

    def try_again(self) -> None:
        """Forget what could not be fetched; what is under way is read again should it fail."""
        self.errors.clear()
        self._excused.update(read.transfer for read in self._reads)

    def oldest_transfer(self) -> Transfer | None:
        """The read that was started first among those not collected."""
        return self._reads[0].transfer if self._reads else None

    def free(self, slot: Slot) -> bool:
        """End the last visit to a slot. False if the block stays there anyway, else it may be given to another one."""
        if slot.block in self._kept:
            return False
        if self._poison:
            slot.tensor.fill_(POISON)
            slot.clear()
        # Recorded after everything that reads the slot was enqueued, by the thread that enqueued it.
        slot.mark = self.device.mark()
        return True

    def invalidate(self, block: int) -> None:
        """Have a block fetched anew: its stored bytes have changed.

        Raises:
            ValueError: It does not move through the ring.
            RuntimeError: A visit is using it.
        """
        if block not in self._moving or block in self._cached:
            raise ValueError(f"block {self._layouts[block].name} is kept in memory and cannot be fetched anew")
        self.errors.pop(block, None)
        for slot in {found for found in (self._ring.find(block), self._staging.find(block)) if found is not None}:
            if slot.holds and self.device.is_host:
                raise RuntimeError(f"block {self._layouts[block].name} changes while a visit is using it")
            if slot.ready and not slot.holds:
                if self._poison:
                    slot.tensor.fill_(POISON)
                slot.clear()
            else:
                # Busy until what fills or reads it has ended, and found by nobody.
                slot.block, slot.ready = _OUTDATED, False

    def close(self) -> None:
        """Give all memory back; nothing may be under way. Views that somebody still holds keep theirs."""
        self.device.synchronize()
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()
        self._staging = self._ring = Ring([])
        self._kept, self._cached = {}, {}

    def _on_device(self, block: int) -> Slot | None:
        return self._kept.get(block) or self._ring.find(block)

    def _missing(self) -> Iterator[int]:
        """Blocks that have no place on the device yet, in the order of need, each once."""
        seen = set(self.errors)
        for block in (*self.demands, *self.order.upcoming()):
            if block not in seen and self._on_device(block) is None:
                yield block
            seen.add(block)

    def _next_use(self, block: int) -> int:
        return -1 if block in self.demands else self.order.next_use(block)

    def _read(self, block: int) -> bool:
        """Start reading a block from disk. False if there is no room for it yet."""
        slot: Slot | None = None
        try:
            slot = self._landing(block)
            if slot is None:
                return False
            transfer = self._read_block(self._layouts[block], slot.tensor)
        # Whatever it is belongs to the thread that visits the block: it is raised there.
        except Exception as error:  # noqa: BLE001
            self._fail_read(block, slot, error)
        else:
            self._reads.append(_Read(block=block, slot=slot, transfer=transfer))
            transfer.when_done(self.ended)
        return True

    def _landing(self, block: int) -> Slot | None:
        """Where a read of the block goes: a buffer of its own for what stays in host memory, else a staging buffer."""
        own = self._kept if self.device.is_host else self._cached
        placement = self._plan.placements[block]
        if placement == Placement.HOST or (placement == Placement.RESIDENT and self.device.is_host):
            # Page-locking takes 0.1 s and more per GB, during which visits begin and end.
            with self.outside():
                layout = self._layouts[block]
                slot = self._slot_in(self._keep(layout) or self.device.staging(layout.buffer_bytes))
            slot.block = block
            own[block] = slot
            return slot
        return self._staging.take(block, next_use=self._next_use)

    def _finish_read(self, read: _Read) -> None:
        transfer = read.transfer
        if transfer.start_ns:
            # The disk serves requests in the order they came: what overlaps the read before is time spent in the queue.
            start_ns = min(max(transfer.start_ns, self._last_read_ns), transfer.end_ns)
            name = self._layouts[read.block].name
            self._trace.add("disk", name, start_ns, transfer.end_ns, nbytes=transfer.nbytes)
            self._last_read_ns = transfer.end_ns
        error = transfer.outcome()
        is_excused = transfer in self._excused
        self._excused.discard(transfer)
        if read.slot.block == _OUTDATED:
            read.slot.clear()
        elif error is None:
            read.slot.ready = True
        else:
            self._fail_read(read.block, read.slot, None if is_excused else error)
        if error is None:
            self.num_reads[read.block] += 1
            self.bytes_read += transfer.nbytes

    def _fail_read(self, block: int, slot: Slot | None, error: BaseException | None) -> None:
        if error is not None:
            self.errors[block] = error
        if slot is None:
            return
        slot.clear()
        if self._kept.get(block) is slot or self._cached.get(block) is slot:
            self._kept.pop(block, None)
            self._cached.pop(block, None)
            self._buffers.pop(slot).close()

    def _copy(self, block: int, source: Slot, *, leave: int) -> bool:
        """Start copying a block from host memory to the device. False if there is no room for it yet."""
        layout = self._layouts[block]
        slot: Slot | None = None
        try:
            if block in self._moving:
                slot = self._ring.take(block, next_use=self._next_use, leave=leave)
            else:
                slot = self._device_slot(layout.buffer_bytes)
            if slot is None:
                return False
            # The source must not be overwritten before it has been copied.
            source.holds += 1
            with self.outside():
                copy = self.device.copy(source.tensor, into=slot.tensor, after=slot.mark, parts=layout.copies)
        # As above: the device is out of memory, for one.
        except Exception as error:  # noqa: BLE001
            self.errors[block] = error
            if slot is not None:
                source.holds -= 1
                slot.clear()
            return True
        if slot.block == _OUTDATED:
            # While the copy was being started. The next one into this slot comes behind it on the same stream.
            slot.clear()
        else:
            if block not in self._moving:
                self._kept[block] = slot
            slot.block, slot.ready, slot.copy = block, True, copy
        self._copies.append(_Moving(block=block, source=source, copy=copy))
        self.started(copy)
        return True

    def _finish_copy(self, moving: _Moving) -> None:
        start_ns, end_ns = moving.copy.times_ns()
        layout = self._layouts[moving.block]
        self._trace.add("copy", layout.name, start_ns, end_ns, nbytes=layout.copied_bytes)
        source = moving.source
        source.holds -= 1
        # At a turn the block may be on its way a second time: that copy reads the same bytes.
        if moving.block not in self._cached and not source.holds:
            if self._poison:
                source.tensor.fill_(POISON)
            source.clear()

    def _slot_in(self, memory: StagingBuffer | SharedPlace) -> Slot:
        slot = Slot(tensor=memory.tensor)
        self._buffers[slot] = memory
        return slot

    def _device_slot(self, nbytes: int) -> Slot:
        tensor: Tensor = self.device.slot(nbytes)
        return Slot(tensor=tensor, mark=self.device.mark())
