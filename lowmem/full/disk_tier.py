"""State on disk: masters, gradients and moments in versions of which a kill at any instant leaves a whole step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.full.chunk_files import ChunkEdits, ChunkFiles
from lowmem.full.chunks import NewestBlocks, block_spec, chunk_numel, cut, parts
from lowmem.full.disk_gradients import DiskGradients
from lowmem.full.disk_updates import Job, UpdateThread
from lowmem.full.flat import ParamPlace, Segment, UnitLayout
from lowmem.full.rules import RuleStream, Upcoming
from lowmem.full.tier import WEIGHT, Contribution
from offload import Counters, OffloadError, PlacementPlan, Scheduler, Trace, Transfer, open_device

_ELEMENT_BYTES = 4


class DiskTier:
    """Keeps state in a `Store`, and blocks' gradients in scratch space beside it.

    A step's updates are carried out in a thread of their own: those of parameters outside the blocks at once, a block's
    when its weight is fetched for the next forward, as the scheduler goes ahead of the visits. The state of a step is
    committed when its last update has been written.
    """

    def __init__(
        self,
        layouts: Sequence[UnitLayout],
        *,
        live: Mapping[int, Tensor],
        num_blocks: int,
        placement: PlacementPlan,
        folder: Path,
        fingerprint: str,
        load_base: Callable[[int, Tensor], None],
        read_base: Callable[[str], Tensor],
        trace: Trace,
    ) -> None:
        """Open the folder; a state that is in it stays until the first step of this run is committed.

        Args:
            layouts: The units, blocks first.
            live: Flat views of the weights that the model itself holds, by unit.
            num_blocks: Number of blocks.
            placement: The ring that blocks are visited from.
            folder: Where state is kept; one run at a time.
            fingerprint: What the state belongs to.
            load_base: Fills a flat fp32 buffer with a block's weight as the checkpoint has it.
            read_base: Reads one parameter as the checkpoint has it, by name.
            trace: Where transfers are recorded.

        Raises:
            FolderInUse: Another run has the folder.
            SourceError: The folder holds the state of something else.
        """
        self.layouts = tuple(layouts)
        self._live, self._num_blocks, self._read_base = dict(live), num_blocks, read_base
        self._chunks = cut(self.layouts)
        self._gradients = DiskGradients(
            self.layouts[:num_blocks], self._chunks[:num_blocks], folder=folder, trace=trace
        )
        self._changed = threading.Condition(threading.RLock())
        self._pending: dict[int, Sequence[Segment]] = {}
        self._running: set[int] = set()
        self._outer: list[Transfer] = []
        self._is_updating, self._is_committing = False, False
        self._step: tuple[int, dict[str, object]] | None = None
        self._last: tuple[int, dict[str, object]] = (0, {})
        self._edited: set[int] = set()
        self._changed_live: set[int] = set()
        self.keeps_live = False
        """Whether what rules change of the weights that the model itself holds is committed with the step, too."""
        self._held: dict[int, tuple[Sequence[Segment], Tensor]] = {}
        self.files = ChunkFiles(
            folder,
            fingerprint=fingerprint,
            chunks=self._chunks,
            load_base=load_base,
            finished=self._job_done,
            gradients=self._gradients,
            trace=trace,
        )
        self._edits = ChunkEdits(self.files, self._chunks, settle=self._settle, changed=self._invalidate)
        self._rules = RuleStream(
            self.files, self._gradients, self._chunks, settle=self._carry_out, changed=self._invalidate
        )
        self._thread = UpdateThread(self.files, chunk_numel=chunk_numel(self.layouts))
        self._scheduler = Scheduler(
            [block_spec(layout, folder) for layout in self.layouts[:num_blocks]],
            plan=placement,
            reader=NewestBlocks(self.layouts[:num_blocks], self.fetch),
            device=open_device("cpu"),
            trace=trace,
        )

    @contextmanager
    def lend(self, index: int) -> Iterator[Tensor]:
        """See `StateTier.lend`: a slot of the ring."""
        self._flush()
        with self._scheduler.resident(index) as tensors:
            yield tensors[WEIGHT]
        # Not before the visit has ended: until then the old weight is in use.
        self._start_held(index)

    def expect(self, order: Sequence[int]) -> None:
        """See `StateTier.expect`."""
        self._scheduler.expect(order)

    def fetch(self, index: int, into: Tensor) -> Transfer:
        """Start bringing a block's newest weight into a slot, its update first if one is pending.

        Called by the scheduler's thread.
        """
        with self._changed:
            segments = self._pending.pop(index, None)
            if segments is None and index not in self._running and self.files.has_weight(index):
                return self.files.read_weight(index, into)
            return self._submit(index, segments or (), into=into)

    def accumulating(self, index: int, *, adds: bool) -> AbstractContextManager[Callable[[Contribution], None]]:
        """See `StateTier.accumulating`."""
        return self._gradients.accumulating(index, adds=adds)

    def holding(self, index: int) -> AbstractContextManager[Callable[[Contribution], None]]:
        """Take the gradients of a block's one backward, for `apply`."""
        return self._gradients.holding(index)

    def apply(self, index: int, segments: Sequence[Segment]) -> None:
        """Update a block whose gradients are held as soon as its visit ends."""
        self.begin_updates()
        self._held[index] = segments, self._gradients.held(index)
        self._gradients.spend(index)

    def _start_held(self, index: int) -> None:
        held = self._held.pop(index, None)
        if held is None:
            return
        segments, gradient = held
        with self._changed:
            self._gradients.release_after(self._submit(index, segments, gradient=gradient))
        self._scheduler.invalidate((index,))

    def read_gradient(self, index: int, place: ParamPlace) -> Tensor:
        """See `StateTier.read_gradient`."""
        return self._gradients.read(index, place)

    def gradient_norm(self, index: int, place: ParamPlace) -> Tensor | None:
        """See `StateTier.gradient_norm`."""
        return self._gradients.norm(index, place)

    def clear_gradient(self, index: int, place: ParamPlace) -> None:
        """Refuse it.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            f"zero_grad(set_to_none=False), or zeroing the gradient of {place.key}",
            reason="the gradients of a block on disk are replaced as a whole",
            instead="zero_grad(), which sets gradients to None",
        )

    def update(self, index: int, segments: Sequence[Segment], gradient: Tensor | None) -> None:
        """See `StateTier.update`: blocks when they are fetched, parameters outside them from now on."""
        self.begin_updates()
        if index >= self._num_blocks:
            with self._changed:
                self._outer.append(self._submit(index, segments, gradient=gradient))
            return
        self._gradients.spend(index)
        with self._changed:
            self._pending[index] = segments
        # What the scheduler has fetched of it, or is fetching, is out of date now; from here on it gets the update.
        self._scheduler.invalidate((index,))

    def change(
        self,
        index: int,
        place: ParamPlace,
        run: Callable[[Tensor, Tensor], None],
        *,
        gradient: Tensor | None,
        scales: Sequence[float],
        upcoming: Upcoming | None,
    ) -> None:
        """See `StateTier.change`. What the rule takes has the room of the gradients' buffer."""
        self.begin_updates()
        self._gradients.rest()
        if gradient is not None:
            run(self._live[index][place.start : place.stop].view(place.shape), gradient)
            self._changed_live.add(index)
            return
        self._edits.flush()
        self._rules.run(index, place, run, scales=scales, upcoming=upcoming)
        self._edited.add(index)

    def end_step(self, step: int, record: dict[str, object]) -> None:
        """See `StateTier.end_step`. Waits for the weights that the model itself holds."""
        self.begin_updates()
        self._flush()
        for index in self._edited:
            self._gradients.spend(index)
        self._edited.clear()
        if self.keeps_live:
            for index in self._changed_live:
                self._edits.write_unit(index, self._live[index])
        self._changed_live.clear()
        outer, self._outer = self._outer, []
        for transfer in outer:
            transfer.wait()
        with self._changed:
            self._is_updating = False
            self._step = self._last = (step, record)
        self._commit_if_complete()

    def finish(self) -> None:
        """See `StateTier.finish`."""
        self._flush()
        with self._changed:
            for index in list(self._pending):
                self._submit(index, self._pending.pop(index))
        self._finish_jobs()
        if not self._is_updating:
            self._commit_if_complete()
            # What was written between steps belongs to the last one.
            self.files.commit(*self._last)

    def read(self, index: int, field: str, place: ParamPlace) -> Tensor:
        """See `StateTier.read`."""
        self._settle(index)
        if field == WEIGHT and index in self._live:
            return self._live[index][place.start : place.stop].view(place.shape).clone()
        if field == WEIGHT and not self.files.has_weight(index):
            return self._read_base(place.key)
        found = torch.empty(place.shape)
        for chunk, here, there in parts(self._chunks[index], place):
            found.view(-1)[there] = self.files.read_chunk(chunk, field)[here]
        return found

    def write(self, index: int, field: str, place: ParamPlace, value: Tensor) -> None:
        """See `StateTier.write`. Changes are collected chunk by chunk."""
        if field == WEIGHT and index in self._live:
            self._settle(index)
            self._live[index][place.start : place.stop].view(place.shape).copy_(value)
            return
        self._edits.write(index, field, place, value)

    @property
    def counters(self) -> Counters:
        """See `StateTier.counters`."""
        return self._scheduler.counters

    def reset(self) -> None:
        """See `StateTier.reset`."""
        self._scheduler.reset()

    def memory(self) -> dict[str, int]:
        """See `StateTier.memory`."""
        return {
            **self._scheduler.memory(),
            "state_chunk_bytes": self._thread.memory_bytes,
            "gradient_bytes": self._gradients.memory_bytes,
        }

    def close(self) -> None:
        """Complete what is pending, then give everything back. A run that has failed keeps its last whole step."""
        if threading.current_thread().name.startswith(("lowmem-update", "offload-")):
            # The collector runs finalizers in any thread; one that the work needs must not wait for it.
            threading.Thread(target=self.close, name="lowmem-close").start()
            return
        with suppress(OffloadError):
            self.finish()
        self._scheduler.close()
        self._thread.close()
        self._gradients.close()
        self.files.close()

    def save_to(self, folder: Path) -> None:
        """Keep the state of the last step in a folder of its own, by links where possible."""
        self.finish()
        self.files.save_to(folder)

    def adopt(self, folder: Path | None = None) -> dict[str, object]:
        """Go on from the state that was committed last, or from that of a folder.

        Args:
            folder: What `save_to` made; None for the tier's own folder.

        Returns:
            The record of its step.

        Raises:
            SourceError: There is no such state.
        """
        self._flush()
        # Nothing is fetched ahead while the state changes under it.
        self._scheduler.expect(())
        with self._changed:
            self._pending.clear()
            self._step = None
        self._finish_jobs()
        if folder is None:
            self.files.adopt()
        else:
            self.files.restore(folder)
        self._last = (self.files.step, self.files.record)
        self._scheduler.invalidate(range(self._num_blocks))
        for index, live in self._live.items():
            if self.files.has_weight(index):
                for chunk in self._chunks[index]:
                    part = live[chunk.start : chunk.stop]
                    part.copy_(self.files.read_chunk(chunk, WEIGHT)[: part.numel()])
        return self.files.record

    def begin_updates(self) -> None:
        """Begin a step's updates, unless that has been done; what the last step has left to do comes first."""
        if not self._is_updating:
            self.finish()
            self._is_updating = True
            self.files.begin()

    def _submit(
        self,
        index: int,
        segments: Sequence[Segment],
        *,
        into: Tensor | None = None,
        gradient: Tensor | None = None,
    ) -> Transfer:
        """Queue a job; the lock is held."""
        numel = self.layouts[index].numel
        memory = torch.empty(0, dtype=torch.uint8) if into is None else into
        done = Transfer(self.layouts[index].name, nbytes=numel * _ELEMENT_BYTES, num_pieces=1, memory=memory)
        if segments:
            self._running.add(index)
        self._thread.submit(
            Job(
                unit=index,
                chunks=self._chunks[index],
                segments=segments,
                done=done,
                into=None if into is None else into.view(torch.float32)[:numel],
                live=self._live.get(index),
                gradient=gradient,
            )
        )
        return done

    def _job_done(self, job: Job) -> None:
        """In the updating thread."""
        if not job.segments:
            return
        with self._changed:
            self._running.discard(job.unit)
            self._changed.notify_all()
        self._commit_if_complete()

    def _commit_if_complete(self) -> None:
        with self._changed:
            step = self._step
            if step is None or self._pending or self._running or self._is_committing:
                return
            self._step, self._is_committing = None, True
        try:
            self.files.commit(*step)
        finally:
            with self._changed:
                self._is_committing = False
                self._changed.notify_all()

    def _finish_jobs(self) -> None:
        with self._changed:
            while self._running or self._is_committing:
                self._raise_failure()
                self._changed.wait(0.05)
            self._raise_failure()

    def _invalidate(self, index: int) -> None:
        if index < self._num_blocks:
            self._scheduler.invalidate((index,))

    def _flush(self) -> None:
        """Have single parameters written that are in memory."""
        self._edits.flush()
        self._rules.flush()

    def _settle(self, index: int) -> None:
        """Have a unit's weight and moments on disk as they are to be."""
        self._flush()
        self._carry_out(index)

    def _carry_out(self, index: int) -> None:
        """Have a unit's pending update carried out."""
        with self._changed:
            if index in self._pending:
                self._submit(index, self._pending.pop(index))
            while index in self._running:
                self._raise_failure()
                self._changed.wait(0.05)
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._thread.failure is not None:
            raise self._thread.failure


__all__ = ["DiskTier"]
