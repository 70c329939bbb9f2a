"""The thread that brings blocks ahead of their visits, and the calls through which visits wait for it."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from offload.errors import Closed, OffloadError
from offload.pipeline import Pipeline
from offload.ring import Slot
from offload.trace import Trace

_POLL_S = 0.001
"""How often finished transfers are looked for while none of them is waited for."""


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
        trace: Gets a "stall" span for every visit that had to wait.
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
        # A daemon, stopped at exit by its owner's finalizer: it must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="offload-fetch", daemon=True)
        self._thread.start()

    @contextmanager
    def locked(self) -> Iterator[Pipeline]:
        """The pipeline, for reading its state.

        Raises:
            Closed: It was closed.
        """
        self._check_process()
        with self._changed:
            self._check_open()
            yield self._pipeline

    def expect(self, order: Sequence[int]) -> None:
        """Fetch for these visits from now on. Blocks that could not be fetched are tried again."""
        with self.locked() as pipeline:
            pipeline.order.replace(order)
            pipeline.try_again()
            self._changed.notify_all()

    def acquire(self, block: int) -> Hold:
        """Wait until a block is on the device, and keep it there.

        Raises:
            OffloadError: It could not be fetched; no slot can come free; this was closed.
        """
        with self.locked() as pipeline:
            slot = pipeline.find(block)
            # A visit inside a visit to the same block is not one that the order knows of.
            if (slot is None or slot.holds == 0) and not pipeline.order.visit(block):
                self._changed.notify_all()
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
                self._changed.notify_all()

    def invalidate(self, blocks: Sequence[int]) -> None:
        """Fetch blocks anew: what has been fetched of them, or is being fetched, is out of date."""
        with self.locked() as pipeline:
            for block in blocks:
                pipeline.invalidate(block)
            self._changed.notify_all()

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
            self._changed.notify_all()

    def close(self) -> None:
        """Stop the thread once the reads under way have ended, and free the buffers. May be called twice."""
        if os.getpid() != self._pid:
            return  # A forked child has neither the thread nor anything to free.
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

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
        self._changed.notify_all()
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
            self._trace.add("stall", self._names[block], start_ns, end_ns)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise OffloadError(
                f"a scheduler made in process {self._pid} was used in its forked child {os.getpid()}, which has not "
                "its threads; make a new one in the child, or start it with the spawn method"
            )

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
        with self._changed:
            self._changed.notify_all()

    def _fetch(self) -> None:
        """Start what can be started, take note of what has ended, and wait for more, until this is closed."""
        with self._changed:
            woken = True
            while not self._closed:
                progress = self._pipeline.collect()
                if progress or woken:
                    while self._pipeline.start():
                        progress = True
                if progress:
                    self._changed.notify_all()
                woken = self._sleep()

    def _sleep(self) -> bool:
        """Give the lock away until there may be something to do. False if only time has passed."""
        pipeline = self._pipeline
        transfer = pipeline.oldest_transfer()
        if transfer is not None and pipeline.waits_for_reads:
            self._changed.release()
            try:
                transfer.outcome()
            finally:
                self._changed.acquire()
            return True
        return self._changed.wait(_POLL_S if pipeline.busy else None)

    def _drain(self) -> None:
        """Wait for what is under way, which is still writing to the buffers, and free them."""
        with self._changed:
            while (transfer := self._pipeline.oldest_transfer()) is not None:
                self._changed.release()
                try:
                    transfer.outcome()
                finally:
                    self._changed.acquire()
                self._pipeline.collect()
            self._pipeline.close()
