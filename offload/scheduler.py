"""Brings blocks to the compute device just in time for their visits, and takes their room back afterwards."""

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from torch import Tensor

from offload.buffers import view_tensor
from offload.device import Device
from offload.fetcher import Fetcher
from offload.layout import BlockLayout, lay_out
from offload.pipeline import BlockReader, Pipeline
from offload.plan import Placement, PlacementPlan
from offload.spec import BlockSpec
from offload.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Counters:
    """What a scheduler has done since it was made."""

    bytes_read: int
    """Bytes of all finished reads, alignment included."""
    num_reads: tuple[int, ...]
    """Finished reads of each block."""
    num_visits: int
    """Visits."""
    num_hits: int
    """Visits whose block was there already."""
    stall_s: float
    """Seconds that the other visits have waited."""


class Scheduler:
    """Lends blocks to visits, fetching them ahead in the order that it is told to expect.

    One thread reads and copies while the visitor computes. Resident and host-cached blocks are read once. The others
    pass through a fixed ring of slots: a block that is needed again before anything else needs its slot stays there (at
    a turn of direction nothing is read twice), and the slot that is taken is that of the block needed last. Visits off
    the expected order are served too, only not ahead.

    Errors of files come out of `resident`, in the visiting thread. The scheduler can be used further after them: the
    next visit tries again. It belongs to the process that made it, not to forks of it. Close it, or let it be
    collected; either ends its thread.

    Args:
        blocks: The blocks, in the order of the forward pass.
        plan: Where each one lives (`place_blocks` for these blocks' `BlockLayout.buffer_bytes`).
        reader: Reads the blocks' files; stays the caller's, to be closed after this.
        device: Where blocks are needed; stays the caller's.
        trace: Gets "disk", "copy" and "stall" spans.
        poison: For tests: overwrite a slot with 0xFF (NaN) as soon as its visit ends. Every visit then fetches anew.

    Raises:
        ValueError: The plan is for other blocks, or for another kind of device, or has too few buffers.
    """

    def __init__(
        self,
        blocks: Sequence[BlockSpec],
        *,
        plan: PlacementPlan,
        reader: BlockReader,
        device: Device,
        trace: Trace,
        poison: bool = False,
    ) -> None:
        self._blocks = tuple(blocks)
        self._layouts = tuple(lay_out(block) for block in self._blocks)
        _check_plan(plan, self._layouts, device)
        self._device = device
        self._pipeline = Pipeline(self._layouts, plan=plan, reader=reader, device=device, trace=trace, poison=poison)
        self._fetcher = Fetcher(self._pipeline, names=[block.name for block in self._blocks], trace=trace)
        self._finalizer = weakref.finalize(self, self._fetcher.close)

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self._blocks)

    @property
    def counters(self) -> Counters:
        """What it has done so far; also after `close`."""
        return Counters(
            bytes_read=self._pipeline.bytes_read,
            num_reads=tuple(self._pipeline.num_reads),
            num_visits=self._fetcher.num_visits,
            num_hits=self._fetcher.num_hits,
            stall_s=self._fetcher.stall_s,
        )

    def memory(self) -> dict[str, int]:
        """Bytes allocated now, by role: resident_bytes, ring_bytes, host_cache_bytes, staging_bytes.

        Raises:
            Closed: The scheduler was closed.
        """
        with self._fetcher.locked() as pipeline:
            return pipeline.allocated_bytes()

    def expect(self, order: Iterable[int]) -> None:
        """Fetch ahead for these visits, instead of those expected until now.

        Args:
            order: Block numbers, nearest first: the rest of this pass and what is known of the next, such as
                ``(*range(n), *reversed(range(n)), 0, 1)``. Must end.

        Raises:
            ValueError: A number is not that of a block.
            Closed: The scheduler was closed.
        """
        self._fetcher.expect(tuple(order))

    @contextlib.contextmanager
    def resident(self, block: int) -> Iterator[Mapping[str, Tensor]]:
        """Have a block on the device for the time of a ``with``, waiting for it if need be.

        Visits nest, to the same block without limit, to others as long as the ring has slots.

        Args:
            block: Number of the block.

        Yields:
            The block's tensors by name, as stored: raw dtype, on the compute device. They may be views of a slot: do
            not write to them, and do not keep them, as the slot's next block overwrites them.

        Raises:
            ReadError: Its bytes could not be read.
            SourceChanged: Its file is not the one that was opened.
            OffloadError: There is no slot left for it.
            Closed: The scheduler or its reader was closed.
            IndexError: There is no such block.
        """
        if not 0 <= block < len(self._blocks):
            raise IndexError(f"block: expected a number from 0 to {len(self._blocks) - 1}, got {block}")
        hold = self._fetcher.acquire(block)
        try:
            if hold.slot.copy is not None:
                self._device.wait_for(hold.slot.copy)
            offsets = self._layouts[block].tensor_offsets
            yield {
                spec.name: view_tensor(hold.slot.tensor, offsets[spec.name], spec=spec)
                for spec in self._blocks[block].tensors
            }
        finally:
            self._fetcher.release(hold)

    def invalidate(self, blocks: Iterable[int]) -> None:
        """Read blocks anew at their next visits: their stored bytes have changed.

        Whatever the reader is asked for from now on must be new; reads under way are not used.

        Args:
            blocks: Block numbers; none of them resident or cached in host memory, and none of them being visited.

        Raises:
            ValueError: A block is kept in memory.
            RuntimeError: A visit is using a block.
            Closed: The scheduler was closed.
        """
        self._fetcher.invalidate(tuple(blocks))

    def reset(self) -> None:
        """Make it ready for a new step, wherever an exception has left the last one. What has been fetched stays.

        Ends all visits: their tensors must not be used any more. May be called at any time and repeatedly.

        Raises:
            Closed: The scheduler was closed.
        """
        self._fetcher.reset()

    def close(self) -> None:
        """Wait for the reads under way, end the thread and free all buffers. May be called twice.

        A visit that is waiting gets `Closed`. Tensors of a visit that is going on stay as they are.
        """
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _check_plan(plan: PlacementPlan, layouts: Sequence[BlockLayout], device: Device) -> None:
    if len(plan.placements) != len(layouts):
        raise ValueError(f"plan: expected one for {len(layouts)} blocks, got one for {len(plan.placements)}")
    for layout, planned_bytes in zip(layouts, plan.block_bytes, strict=True):
        if layout.buffer_bytes > planned_bytes:
            raise ValueError(
                f"plan: block {layout.name} takes {layout.buffer_bytes} bytes in a buffer, planned were "
                f"{planned_bytes}; plan with BlockLayout.buffer_bytes"
            )
    if plan.device_is_host != device.is_host:
        kinds = {True: "one that computes from host memory", False: "one with memory of its own"}
        raise ValueError(
            f"plan: made for a device of another kind: {kinds[plan.device_is_host]}, got {kinds[device.is_host]}"
        )
    if plan.moving and not plan.ring_size:
        raise ValueError(f"plan: {len(plan.moving)} blocks move through a ring of no slots; plan at least one")
    through_staging = any(placement != Placement.HOST for placement in plan.placements)
    if not device.is_host and through_staging and not plan.num_staging:
        raise ValueError("plan: blocks are read through staging buffers, and it has none; plan at least one")
