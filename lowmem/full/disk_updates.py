"""The thread that brings units on disk up to date: reads chunks ahead, updates them, writes them behind."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from lowmem.full.chunks import Chunk
from lowmem.full.flat import Segment, update_run
from offload import StagingBuffer, Transfer

_ELEMENT_BYTES = 4


NUM_SETS = 4
"""Chunks in memory: one is updated while others are read and written."""


class ChunkStore(Protocol):
    """Where chunks lie; called from the updating thread."""

    def start_load(self, chunk: Chunk, *, weight: Tensor | None, moments: Tensor | None) -> list[Transfer]:
        """Start reading a chunk's newest weight and moments, unless None; what there is not yet becomes zero."""

    def start_gradient(self, chunk: Chunk, into: Tensor) -> list[Transfer]:
        """Start reading a chunk's accumulated gradient."""

    def start_save(self, chunk: Chunk, *, weight: Tensor, moments: Tensor) -> list[Transfer]:
        """Start writing a chunk's new weight and moments."""

    def has_weight(self, unit: int) -> bool:
        """Whether the unit's weight was ever written."""

    def load_base(self, unit: int, into: Tensor) -> None:
        """Fill a flat fp32 buffer with a unit's weight as the checkpoint has it."""

    def job_done(self, job: Job) -> None:
        """Called when all of a job is computed and its writes have been started."""


@dataclass(kw_only=True)
class Job:
    """One unit to be updated, or only its weight to be brought."""

    unit: int
    """Its number."""
    chunks: Sequence[Chunk]
    """Its chunks."""
    segments: Sequence[Segment]
    """What to update; none where only the weight is wanted."""
    done: Transfer
    """Ends when the new weight is there."""
    into: Tensor | None = None
    """Gets the new weight: flat fp32, or None."""
    live: Tensor | None = None
    """The weight itself, flat, where the model holds it."""
    gradient: Tensor | None = None
    """The flat gradient, where the model holds it."""


@dataclass(kw_only=True, eq=False)
class _Set:
    """Buffers of one chunk."""

    weight: Tensor
    moments: Tensor
    gradient: Tensor
    writes: list[Transfer] = field(default_factory=list)


@dataclass(kw_only=True)
class _Task:
    job: Job
    chunk: Chunk
    buffers: _Set
    base: Tensor | None
    reads: list[Transfer]
    is_last: bool


class UpdateThread:
    """Works on jobs one after another; reads for the next chunks run ahead, across jobs too.

    One processor core computes: with all of them it would take turns with the model's own threads.
    """

    def __init__(self, store: ChunkStore, *, chunk_numel: int) -> None:
        """Start the thread; buffers are committed as they are first used.

        Args:
            store: Where chunks lie.
            chunk_numel: Elements of the largest chunk.
        """
        self._store = store
        nbytes = chunk_numel * _ELEMENT_BYTES
        self._memory = StagingBuffer(NUM_SETS * 4 * nbytes)
        cuts = [self._memory.tensor[number * nbytes : (number + 1) * nbytes] for number in range(NUM_SETS * 4)]
        self._sets = deque(
            _Set(
                weight=cuts[4 * number],
                moments=self._memory.tensor[(4 * number + 1) * nbytes : (4 * number + 3) * nbytes],
                gradient=cuts[4 * number + 3],
            )
            for number in range(NUM_SETS)
        )
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._tasks: deque[_Task] = deque()
        self._cutting: Iterator[_Task] | None = None
        self._cutting_job: Job | None = None
        self._waiting: Job | None = None
        self._closed = False
        self.failure: BaseException | None = None
        """Why it has given up."""
        self._thread = threading.Thread(target=self._run, name="lowmem-update", daemon=True)
        self._thread.start()

    @property
    def memory_bytes(self) -> int:
        """Bytes of its buffers."""
        return self._memory.nbytes

    def submit(self, job: Job) -> None:
        """Queue a job."""
        self._queue.put(job)

    def close(self) -> None:
        """Finish what is queued and end the thread. May be called twice."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        _compute_on_one_core()
        ended = False
        while not ended or self._tasks or self._cutting is not None or self._waiting is not None:
            # One set of buffers stays free of reads: it may still be written.
            while len(self._tasks) < NUM_SETS - 1:
                task, ended = self._next_task(ended)
                if task is None:
                    break
                self._tasks.append(task)
            if self._tasks:
                self._guarded(self._tasks[0].job, self._finish_first)

    def _next_task(self, ended: bool) -> tuple[_Task | None, bool]:
        if self._cutting is None:
            job, self._waiting = self._waiting, None
            if job is None:
                # Waits only where nothing is under way.
                if ended or (self._tasks and self._queue.empty()):
                    return None, ended
                job = self._queue.get()
            if job is None:
                return None, True
            if any(task.job.unit == job.unit for task in self._tasks):
                # It must read what the job before it, on the same unit, has not begun to write yet.
                self._waiting = job
                return None, ended
            job.done.begin_piece()
            self._cutting, self._cutting_job = self._cut(job), job
        cutting, found = self._cutting, None
        try:
            found = next(cutting, None)
        # Whatever it is belongs to those who wait for the job.
        except BaseException as error:  # noqa: BLE001
            self._fail(error)
        if found is None:
            self._cutting = None
        return found, ended

    def _cut(self, job: Job) -> Iterator[_Task]:
        """The tasks of a job, their reads started."""
        if self.failure is not None:
            job.done.finish_piece(self.failure)
            return
        base = None
        if job.live is None and not self._store.has_weight(job.unit):
            base = job.into if job.into is not None else torch.empty(job.chunks[-1].stop)
            self._store.load_base(job.unit, base)
        if not job.segments and base is not None:
            self._end(job)
            return
        for chunk in job.chunks:
            buffers = self._sets.popleft()
            # A buffer is filled again only once it has been written.
            for write in buffers.writes:
                write.wait()
            buffers.writes = []
            reads = self._start_reads(job, chunk, buffers, base)
            yield _Task(job=job, chunk=chunk, buffers=buffers, base=base, reads=reads, is_last=chunk is job.chunks[-1])

    def _start_reads(self, job: Job, chunk: Chunk, buffers: _Set, base: Tensor | None) -> list[Transfer]:
        from_store = job.live is None and base is None
        reads = self._store.start_load(
            chunk,
            weight=buffers.weight[: chunk.numel * _ELEMENT_BYTES] if from_store else None,
            moments=buffers.moments[: 2 * chunk.numel * _ELEMENT_BYTES] if job.segments else None,
        )
        if job.gradient is None and job.segments:
            reads += self._store.start_gradient(chunk, buffers.gradient)
        return reads

    def _finish_first(self) -> None:
        task = self._tasks.popleft()
        try:
            for read in task.reads:
                read.wait()
            self._update(task)
        finally:
            self._sets.append(task.buffers)
        if task.is_last:
            self._end(task.job)

    def _update(self, task: _Task) -> None:
        job, chunk, buffers = task.job, task.chunk, task.buffers
        weight = buffers.weight.view(torch.float32)[: chunk.numel]
        moments = buffers.moments.view(torch.float32)
        source = job.live if job.live is not None else task.base
        if source is not None:
            _copy(source[chunk.start : chunk.stop], weight)
        gradient = buffers.gradient.view(torch.float32)[: chunk.numel]
        if job.gradient is not None:
            _copy(job.gradient[chunk.start : chunk.stop], gradient)
        for segment in job.segments:
            start, stop = max(segment.start, chunk.start), min(segment.stop, chunk.stop)
            if start < stop:
                run = slice(start - chunk.start, stop - chunk.start)
                update_run(
                    segment.update,
                    weight=weight[run],
                    gradient=gradient[run],
                    exp_avg=moments[: chunk.numel][run],
                    exp_avg_sq=moments[chunk.numel : 2 * chunk.numel][run],
                )
        for target in (job.live, job.into):
            if target is not None:
                part = target[chunk.start : chunk.stop]
                part.copy_(weight[: part.numel()])
        if job.segments:
            nbytes = chunk.numel * _ELEMENT_BYTES
            buffers.writes = self._store.start_save(
                chunk, weight=buffers.weight[:nbytes], moments=buffers.moments[: 2 * nbytes]
            )

    def _end(self, job: Job) -> None:
        job.done.finish_piece()
        self._store.job_done(job)

    def _guarded(self, job: Job, work: Callable[[], None]) -> None:
        try:
            work()
        # Whatever it is belongs to those who wait for the job.
        except BaseException as error:  # noqa: BLE001
            self._fail(error)
            if not job.done.done():
                job.done.finish_piece(error)

    def _fail(self, error: BaseException) -> None:
        """Note the first error; everything that was queued fails with it."""
        self.failure = self.failure or error
        self._cutting = None
        if self._cutting_job is not None and not self._cutting_job.done.done():
            self._cutting_job.done.finish_piece(error)
        while self._tasks:
            task = self._tasks.popleft()
            for read in task.reads:
                read.outcome()
            self._sets.append(task.buffers)
            if not task.job.done.done():
                task.job.done.finish_piece(error)


def _copy(source: Tensor, into: Tensor) -> None:
    """Copy what there is; the model's own tensors are not padded to pages."""
    into[: source.numel()].copy_(source)
    into[source.numel() :].zero_()


def _compute_on_one_core() -> None:
    """Let this thread compute on one core, and leave the number of cores of all other threads as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # The setting of a thread is its own, but the one for threads to come is shared.
    restorer = threading.Thread(target=torch.set_num_threads, args=(before,))
    restorer.start()
    restorer.join()


__all__ = ["ChunkStore", "Job", "UpdateThread"]
