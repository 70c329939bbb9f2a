"""The thread that works on units on disk: reads chunks ahead, changes them, writes them behind, commits steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue

import torch
from torch import Tensor

from lowmem.full.chunks import Chunk, ChunkFiles, parts
from lowmem.full.disk_gradients import DiskGradients
from lowmem.full.flat import (
    ELEMENT_BYTES,
    EXP_AVG,
    EXP_AVG_SQ,
    FlatBuffers,
    ParamPlace,
    Segment,
    UpdateRuns,
    clipped,
)
from lowmem.full.tier import WEIGHT
from lowmem.planning.limits import NUM_CHUNK_BUFFERS, PAGES_OF_SCALES
from offload import PAGE_BYTES, Closed, StagingBuffer, Transfer, WorkerThread


@dataclass(kw_only=True, eq=False)
class UpdateJob:
    """What is done to chunks of one unit; without chunks, to the files as a whole once all earlier jobs are done."""

    name: str
    """Of the unit, for errors."""
    unit: int = -1
    """Number of the unit."""
    chunks: Sequence[Chunk] = ()
    """Its chunks that are worked on: all of them where its weight is wanted and has never been written."""
    weight: bool = True
    """Whether the weight is read, and written if there is a change."""
    moments: bool = False
    """Whether the moments are read and written."""
    reads_gradient: bool = False
    """Whether the accumulated gradient is read."""
    change: Callable[[Chunk, FlatBuffers], None] | None = None
    """Changes a chunk in place; None where weights are only fetched."""
    into: Tensor | None = None
    """Gets the new weight: flat, or None."""
    live: Tensor | None = None
    """The weight itself, flat, where the model holds it."""
    gradient: Tensor | None = None
    """The flat gradient, where it is in memory."""
    at_last: Callable[[], None] | None = None
    """Called before `done` ends."""
    done: Transfer = field(init=False)
    """Ends when the new weight is in `into` and `live` and everything that is written is on its way."""

    def __post_init__(self) -> None:
        nbytes = sum(chunk.numel for chunk in self.chunks) * ELEMENT_BYTES
        self.done = Transfer(self.name, nbytes=nbytes, num_pieces=1, memory=torch.empty(0, dtype=torch.uint8))


def update_chunk(segments: Sequence[Segment], run: UpdateRuns, chunk: Chunk, at: FlatBuffers) -> None:
    """The change of an AdamW step, which `run` carries out."""
    here = clipped(segments, chunk.start, chunk.stop)
    run(at, [replace(one, start=one.start - chunk.start, stop=one.stop - chunk.start) for one in here])


def put_values(field: str, place: ParamPlace, value: Tensor, chunk: Chunk, at: FlatBuffers) -> None:
    """The change that sets a parameter's weight or moment."""
    for _, here, there in parts((chunk,), place):
        part = value.detach().reshape(-1)[there]
        if field == WEIGHT:
            at.weight[here].copy_(part)
        else:
            (at.exp_avg if field == EXP_AVG else at.exp_avg_sq).write(here, part.to("cpu", torch.float32))


def keep_as_it_is(chunk: Chunk, at: FlatBuffers) -> None:
    """The change of a weight that the model holds and that only has to be written."""


@dataclass(kw_only=True, eq=False)
class _Set:
    """Buffers for one chunk."""

    weight: Tensor
    moments: Tensor
    gradient: Tensor
    writes: list[Transfer] = field(default_factory=list)

    def views(self, chunk: Chunk, state_dtype: str) -> FlatBuffers:
        return FlatBuffers(
            weight=self.weight.view(chunk.weight_dtype)[: chunk.numel],
            exp_avg=chunk.moment(EXP_AVG, state_dtype, self.moments),
            exp_avg_sq=chunk.moment(EXP_AVG_SQ, state_dtype, self.moments),
            gradient=self.gradient.view(torch.float32)[: chunk.numel],
        )


@dataclass(kw_only=True)
class _Task:
    job: UpdateJob
    chunk: Chunk
    buffers: _Set
    base: Tensor | None
    reads: list[Transfer]


class UpdateThread:
    """Works on jobs one after another; reads for the next chunks run ahead, across jobs too.

    One processor core computes: with all of them it would take turns with the model's own threads. The first failure
    ends it: that job and all later ones fail with it, and the last whole step stays.

    Args:
        files: Where weights and moments lie.
        gradients: Where gradients lie.
        chunk_numel: Elements of the largest chunk.
        pin: Whether to keep chunks page-locked, for a GPU that copies from them and to them.
    """

    def __init__(self, files: ChunkFiles, gradients: DiskGradients, *, chunk_numel: int, pin: bool = False) -> None:
        self._files, self._gradients = files, gradients
        nbytes = chunk_numel * ELEMENT_BYTES
        # The widest format of moments; of others, and of weights in fewer bytes, the rest is never touched.
        moments_bytes = 2 * nbytes + PAGES_OF_SCALES * PAGE_BYTES
        self._memory = StagingBuffer(NUM_CHUNK_BUFFERS * (2 * nbytes + moments_bytes), pin=pin, in_children=False)
        self._sets = deque(
            _Set(weight=own[:nbytes], gradient=own[nbytes : 2 * nbytes], moments=own[2 * nbytes :])
            for own in torch.split(self._memory.tensor, 2 * nbytes + moments_bytes)
        )
        self._queue: SimpleQueue[UpdateJob | None] = SimpleQueue()
        self._tasks: deque[_Task] = deque()
        self._cutting: Iterator[_Task] | None = None
        self._cutting_job: UpdateJob | None = None
        self._waiting: UpdateJob | None = None
        self._failure: BaseException | None = None
        self._is_closed = False
        self._thread = WorkerThread(target=self._run, name="lowmem-update")
        self._thread.start()

    @property
    def memory_bytes(self) -> int:
        return self._memory.nbytes

    def submit(self, job: UpdateJob) -> Transfer:
        """Queue a job; returns its `done`."""
        if self._is_closed:
            job.done.finish_piece(Closed(f"{job.name}: the model was closed; open it again"))
        else:
            self._queue.put(job)
        return job.done

    def close(self) -> None:
        """Finish what is queued and end the thread. May be called twice."""
        self._is_closed = True
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        _compute_on_one_core()
        ended = False
        while not ended or self._tasks or self._cutting is not None or self._waiting is not None:
            # One set of buffers stays free of reads: it may still be written.
            while len(self._tasks) < NUM_CHUNK_BUFFERS - 1:
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
            if any(task.job.unit == job.unit or not job.chunks for task in self._tasks):
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
            self._cutting = self._cutting_job = None
        return found, ended

    def _cut(self, job: UpdateJob) -> Iterator[_Task]:
        """The tasks of a job, their reads started."""
        if self._failure is not None:
            job.done.finish_piece(self._failure)
            return
        if job.change is not None:
            self._files.begin()
        base = None
        if job.weight and job.live is None and job.chunks and not self._files.has_weight(job.unit):
            last = job.chunks[-1]
            base = job.into if job.into is not None else torch.empty(last.stop, dtype=last.weight_dtype)
            self._files.load_base(job.unit, base)
        if not job.chunks or (job.change is None and base is not None):
            self._end(job)
            return
        for chunk in job.chunks:
            buffers = self._sets.popleft()
            # A buffer is filled again only once it has been written.
            for write in buffers.writes:
                write.wait()
            buffers.writes = []
            reads = self._start_reads(job, chunk, buffers, base)
            yield _Task(job=job, chunk=chunk, buffers=buffers, base=base, reads=reads)

    def _start_reads(self, job: UpdateJob, chunk: Chunk, buffers: _Set, base: Tensor | None) -> list[Transfer]:
        from_files = job.weight and job.live is None and base is None
        reads = self._files.start_load(
            chunk,
            weight=buffers.weight[: chunk.weight_layout.nbytes] if from_files else None,
            moments=self._moments(chunk, buffers) if job.moments else None,
        )
        if job.reads_gradient:
            reads.append(self._gradients.start_read(chunk, buffers.gradient))
        return reads

    def _finish_first(self) -> None:
        task = self._tasks.popleft()
        try:
            for read in task.reads:
                read.wait()
            self._work_on(task)
        finally:
            self._sets.append(task.buffers)
        if task.chunk is task.job.chunks[-1]:
            self._end(task.job)

    def _work_on(self, task: _Task) -> None:
        job, chunk, buffers = task.job, task.chunk, task.buffers
        at = buffers.views(chunk, self._files.state_dtype)
        source = job.live if job.live is not None else task.base
        if job.weight and source is not None:
            _copy(source[chunk.start : chunk.stop], at.weight)
        if job.gradient is not None:
            _copy(job.gradient[chunk.start : chunk.stop], at.gradient)
        if job.change is not None:
            job.change(chunk, at)
        for target in (job.live, job.into):
            if job.weight and target is not None:
                part = target[chunk.start : chunk.stop]
                part.copy_(at.weight[: part.numel()])
        if job.change is not None:
            buffers.writes = self._files.start_save(
                chunk,
                weight=buffers.weight[: chunk.weight_layout.nbytes] if job.weight else None,
                moments=self._moments(chunk, buffers) if job.moments else None,
            )

    def _moments(self, chunk: Chunk, buffers: _Set) -> Tensor:
        return buffers.moments[: chunk.moments_layout(self._files.state_dtype).nbytes]

    def _end(self, job: UpdateJob) -> None:
        if job.at_last is not None:
            job.at_last()
        job.done.finish_piece()

    def _guarded(self, job: UpdateJob, work: Callable[[], None]) -> None:
        try:
            work()
        # Whatever it is belongs to those who wait for the job.
        except BaseException as error:  # noqa: BLE001
            self._fail(error)
            if not job.done.done():
                job.done.finish_piece(error)

    def _fail(self, error: BaseException) -> None:
        """Note the first error; everything that was queued fails with it."""
        self._failure = self._failure or error
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
