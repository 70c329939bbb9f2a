"""Brings blocks to the compute device just in time for their visits, and takes their room back afterwards."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

from torch import Tensor

from offload.blocks import BlockLayout, BlockSpec, lay_out
from offload.buffers import view_tensor
from offload.device import Copy, Device
from offload.errors import Closed, ClosedAfterwards, OffloadError
from offload.pipeline import KeptMemory, Pipeline, ReadBlock, Slot
from offload.placement import Placement, PlacementPlan
from offload.trace import Trace
from offload.transfer import WorkerThread, refuse_in_child


@dataclass(frozen=True, kw_only=True)
class Hold:
    """A visit's claim on a slot."""

    slot: Slot
    """Not overwritten until the claim is given back."""
    epoch: int
    """Number of resets before it was made: a reset gives back all claims."""


class Fetcher:
    """Runs a pipeline in a thread of its own.

    All changes of state happen in that thread but for a few assignments: the visiting thread may be interrupted
    anywhere (Ctrl-C). The thread refers to this object and not to its owner, so that an owner that nobody closed can be
    collected.

    Args:
        pipeline: What to run; closed with this.
        names: Names of the blocks, for errors and traces.
        trace: Gets a span for every visit that had to wait, on the device's `wait_lane`.
    """

    def __init__(self, pipeline: Pipeline, *, names: Sequence[str], trace: Trace) -> None:
        self._pipeline = pipeline
        self._names = tuple(names)
        self._trace = trace
        # Reentrant: a collected owner's finalizer may close this in the middle of the fetching thread's work.
        self._changed = threading.Condition(threading.RLock())
        self._closed = False
        self._failure: BaseException | None = None
        self._epoch = 0
        self._pid = os.getpid()
        self.num_visits = 0
        """Visits so far."""
        self.num_hits = 0
        """Visits whose block was there already."""
        self.stall_s = 0.0
        """Seconds that visits have waited."""
        self._woken = False
        pipeline.outside, pipeline.ended = self._without_lock, self._wake_safely
        self._copies: SimpleQueue[Copy | None] = SimpleQueue()
        if not pipeline.device.is_host:
            pipeline.started = self._copies.put
            WorkerThread(target=self._await_copies, name="offload-copies").start()
        # Stopped at exit by its owner's finalizer.
        self._thread = WorkerThread(target=self._run, name="offload-fetch")
        self._thread.start()

    @contextmanager
    def locked(self) -> Iterator[Pipeline]:
        """The pipeline, for reading its state.

        Raises:
            Closed: It was closed.
        """
        refuse_in_child("scheduler", self._pid)
        with self._changed:
            self._check_open()
            yield self._pipeline

    def expect(self, order: Sequence[int]) -> None:
        """Fetch for these visits from now on. Blocks that could not be fetched are tried again."""
        with self.locked() as pipeline:
            pipeline.order.replace(order)
            pipeline.try_again()
            self._wake()

    def acquire(self, block: int) -> Hold:
        """Wait until a block is on the device, and keep it there.

        Raises:
            OffloadError: It could not be fetched; no slot can come free; this was closed.
        """
        with self.locked() as pipeline:
            slot = pipeline.find(block)
            # A visit inside a visit to the same block is not one that the order knows of.
            if (slot is None or slot.holds == 0) and not pipeline.order.visit(block):
                self._wake()
            self.num_visits += 1
            if slot is None:
                slot = self._wait_for(block)
            else:
                self.num_hits += 1
            slot.holds += 1
            slot.last_use = self.num_visits
            return Hold(slot=slot, epoch=self._epoch)

    def release(self, hold: Hold) -> None:
        """Give a claim back. Does nothing after a reset or a close, which have given it back already."""
        with self._changed:
            if self._closed or hold.epoch != self._epoch:
                return
            may_be_reused = hold.slot.holds == 1 and self._pipeline.free(hold.slot)
            hold.slot.holds -= 1
            # Waking the other thread costs more than all the rest, so not where it would find nothing to do.
            if may_be_reused:
                self._wake()

    def invalidate(self, blocks: Sequence[int]) -> None:
        """Fetch blocks anew: what has been fetched of them, or is being fetched, is out of date."""
        with self.locked() as pipeline:
            for block in blocks:
                pipeline.invalidate(block)
            self._wake()

    def reset(self) -> None:
        """Give back all claims, forget the order and the errors. What has been fetched stays."""
        with self.locked() as pipeline:
            self._epoch += 1
            pipeline.order.replace(())
            pipeline.try_again()
            for slot in pipeline.slots():
                if slot.holds:
                    pipeline.free(slot)
                    slot.holds = 0
            self._wake()

    def close(self) -> None:
        """Stop the thread once the reads under way have ended, and free the buffers. May be called twice."""
        if os.getpid() != self._pid:
            return  # A forked child has neither the thread nor anything to free.
        with self._changed:
            self._closed = True
            self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            # They refer to this: without them nothing of it waits for a cyclic collection.
            self._pipeline.outside, self._pipeline.ended = contextlib.nullcontext, lambda: None

    def _wait_for(self, block: int) -> Slot:
        """Wait, with the lock given away meanwhile, until a block can be used."""
        pipeline = self._pipeline
        held = pipeline.held_blocks(block)
        if held:
            raise OffloadError(
                f"block {self._names[block]}: all {len(held)} slots are held by visits to "
                f"{', '.join(self._names[other] for other in held)}; end one of them first, or plan a larger ring"
            )
        start_ns = time.perf_counter_ns()
        pipeline.demands[block] += 1
        self._wake()
        try:
            while (slot := pipeline.find(block)) is None:
                if block in pipeline.errors:
                    raise pipeline.errors.pop(block)
                self._check_open()
                self._changed.wait()
            return slot
        finally:
            pipeline.demands[block] -= 1
            if not pipeline.demands[block]:
                del pipeline.demands[block]
            end_ns = time.perf_counter_ns()
            self.stall_s += (end_ns - start_ns) / 1e9
            self._trace.add(pipeline.device.wait_lane, self._names[block], start_ns, end_ns)

    def _check_open(self) -> None:
        if self._failure is not None:
            raise OffloadError(
                f"the thread that fetches blocks has stopped: {type(self._failure).__name__}: {self._failure}; "
                "make a new scheduler"
            ) from self._failure
        if self._closed:
            raise Closed("the scheduler was closed; make a new one")

    def _run(self) -> None:
        """Body of the fetching thread."""
        try:
            try:
                self._fetch()
            finally:
                self._drain()
        # Nobody waits for this thread's result: visits find it here instead of waiting for ever.
        except BaseException as error:  # noqa: BLE001
            self._failure = error
        self._copies.put(None)
        with self._changed:
            self._changed.notify_all()

    def _fetch(self) -> None:
        """Start what can be started, take note of what has ended, and wait for more, until this is closed."""
        with self._changed:
            while not self._closed:
                self._woken = False
                progress = self._pipeline.collect()
                while self._pipeline.start():
                    progress = True
                if progress:
                    self._changed.notify_all()
                # What woke it while the lock was given away in between has not been looked at.
                while not self._woken and not self._closed:
                    self._changed.wait()

    def _wake(self) -> None:
        """Have the fetching thread look again; with the lock held."""
        self._woken = True
        self._changed.notify_all()

    def _wake_safely(self) -> None:
        """As `_wake`, without the lock."""
        with self._changed:
            self._wake()

    @contextmanager
    def _without_lock(self) -> Iterator[None]:
        """Give the lock away for something that takes long; in the fetching thread, which holds it."""
        self._changed.release()
        try:
            yield
        finally:
            self._changed.acquire()

    def _await_copies(self) -> None:
        """Body of the thread that tells the fetching one of copies that have ended: an event calls nobody."""
        while (copy := self._copies.get()) is not None:
            # A device that has failed says so at its next use.
            with contextlib.suppress(RuntimeError):
                copy.wait()
            self._wake_safely()

    def _drain(self) -> None:
        """Wait for what is under way, which is still writing to the buffers, and free them."""
        with self._changed:
            while (transfer := self._pipeline.oldest_transfer()) is not None:
                with self._without_lock():
                    transfer.outcome()
                self._pipeline.collect()
            self._pipeline.close()


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


class Scheduler(ClosedAfterwards):
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
        read: Reads the blocks' files, as `FileIO.read` does; to be closed after this.
        device: Where blocks are needed; stays the caller's.
        trace: Gets "disk", "copy" and "stall" spans.
        poison: For tests: overwrite a slot with 0xFF (NaN) as soon as its visit ends. Every visit then fetches anew.
        keep: Where blocks that stay in host memory lie (`SharedReader.keep`); in memory of this process by default.
        visited: Called when a block's visit begins (`SharedReader.visited`).

    Raises:
        ValueError: The plan is for other blocks, or for another kind of device, or has too few buffers.
    """

    def __init__(
        self,
        blocks: Sequence[BlockSpec],
        *,
        plan: PlacementPlan,
        read: ReadBlock,
        device: Device,
        trace: Trace,
        poison: bool = False,
        keep: KeptMemory = lambda layout: None,
        visited: Callable[[], None] = lambda: None,
    ) -> None:
        self._blocks = tuple(blocks)
        self.num_blocks = len(self._blocks)
        """Number of blocks."""
        self._layouts = tuple(lay_out(block) for block in self._blocks)
        _check_plan(plan, self._layouts, device)
        self._device = device
        self._visited = visited
        self._pipeline = Pipeline(
            self._layouts, plan=plan, read=read, device=device, trace=trace, poison=poison, keep=keep
        )
        self._fetcher = Fetcher(self._pipeline, names=[block.name for block in self._blocks], trace=trace)
        self._finalizer = weakref.finalize(self, self._fetcher.close)

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
        self._visited()
        try:
            if hold.slot.copy is not None:
                self._device.wait_for(hold.slot.copy)
            layout = self._layouts[block]
            offsets = layout.tensor_offsets if self._device.is_host else layout.device_offsets
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
