"""State on disk: masters, gradients and moments in versions of which a kill at any instant leaves a whole step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.full.chunks import Chunk, ChunkFiles, block_spec, chunk_numel, cut, parts, reads_newest
from lowmem.full.disk_gradients import DiskGradients
from lowmem.full.disk_updates import UpdateJob, UpdateThread, keep_as_it_is, put_values, update_chunk
from lowmem.full.flat import ELEMENT_BYTES, FlatBuffers, ParamPlace, Segment, UnitLayout, UpdateRuns, update_runs
from lowmem.full.gpu_tier import DeviceUpdates, GradientLanding
from lowmem.full.rules import RuleStream
from lowmem.full.tier import WEIGHT, Contribution, Edit, FlatWeight, StateTier, weakly
from lowmem.optim.state import STATE_DTYPES
from offload import JsonObject, OffloadError, PlacementPlan, Scheduler, Trace, Transfer, WorkerThread, open_device


class DiskTier(StateTier):
    """Keeps state in a `Store`, and blocks' gradients in scratch space beside it.

    A step's updates are carried out in a thread of their own: those of parameters outside the blocks at once, a block's
    when its weight is fetched for the next forward, as the scheduler goes ahead of the visits. The state of a step is
    committed when its last update has been written. A state that is in the folder already stays until the first step of
    this run is committed.

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
        device: Where blocks are computed. On a GPU, blocks go up from the ring, and gradients come down as made.
        update_share: Which part of each chunk of a block's state a GPU updates.

    Raises:
        FolderInUse: Another run has the folder.
        SourceError: The folder holds the state of something else.
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
        device: torch.device,
        update_share: float = 0.0,
    ) -> None:
        self.layouts, self.state_dtype = tuple(layouts), "fp32"
        self._live, self._num_blocks, self._read_base = dict(live), num_blocks, read_base
        self._chunks = cut(self.layouts)
        self._gradients = DiskGradients(
            self.layouts[:num_blocks], self._chunks[:num_blocks], folder=folder, trace=trace
        )
        self._lock = threading.RLock()
        self._pending: dict[int, Sequence[Segment]] = {}
        self._working: dict[int, Transfer] = {}
        self._outer: list[Transfer] = []
        self._is_updating = False
        self._has_ended, self._last = False, (0, dict[str, object]())
        self._edited: set[int] = set()
        self._changed_live: set[int] = set()
        self.keeps_live = False
        """Whether what rules change of the weights that the model itself holds is committed with the step, too."""
        self._at_end_of_visit: dict[int, Sequence[Segment]] = {}
        self.files = ChunkFiles(folder, fingerprint=fingerprint, chunks=self._chunks, load_base=load_base, trace=trace)
        self._rules = RuleStream(
            self.files, self._gradients, self._chunks, settle=weakly(self._carry_out), changed=weakly(self._invalidate)
        )
        self._update_runs: UpdateRuns = (
            DeviceUpdates(device, share=update_share).run if update_share > 0 else update_runs
        )
        self._thread = UpdateThread(
            self.files, self._gradients, chunk_numel=chunk_numel(self.layouts), pin=update_share > 0
        )
        self._scheduler = Scheduler(
            [block_spec(layout, folder) for layout in self.layouts[:num_blocks]],
            plan=placement,
            read=reads_newest(self.layouts[:num_blocks], weakly(self.fetch)),
            device=open_device(device),
            trace=trace,
        )
        widest_bytes = ELEMENT_BYTES * max(layout.numel for layout in self.layouts[:num_blocks])
        self._landing = None if device.type == "cpu" else GradientLanding(device, widest_bytes=widest_bytes)

    def store_moments_as(self, state_dtype: str) -> None:
        """See `StateTier.store_moments_as`. What is pending comes first."""
        if state_dtype != self.state_dtype:
            self.finish()
            with self._lock:
                drop = UpdateJob(name="state", at_last=partial(self.files.drop_moments, state_dtype))
                done = self._thread.submit(drop)
            done.wait()
            self.state_dtype = state_dtype

    @contextmanager
    def lend(self, index: int) -> Iterator[FlatWeight]:
        """See `StateTier.lend`: a slot of the ring."""
        self._rules.flush()
        with self._scheduler.resident(index) as tensors:
            yield tensors[WEIGHT]
        # Not before the visit has ended: until then the old weight is in use.
        segments = self._at_end_of_visit.pop(index, None)
        if segments is not None:
            gradient = self._gradients.staying(index)
            self._gradients.spend(index)
            with self._lock:
                self._gradients.release_after(self._submit_update(index, segments, gradient=gradient))
            self._scheduler.invalidate((index,))

    def expect(self, order: Sequence[int]) -> None:
        self._scheduler.expect(order)

    def fetch(self, index: int, into: Tensor) -> Transfer:
        """Start bringing a block's newest weight into a slot, its update first if one is pending.

        Called by the scheduler's thread.
        """
        layout = self.layouts[index]
        flat = into.view(layout.weight_dtype)[: layout.numel]
        with self._lock:
            segments = self._pending.pop(index, None)
            if segments is not None:
                done = self._submit_update(index, segments, into=flat)
                self._commit_if_complete()
                return done
            working = self._working.get(index)
            if self.files.has_weight(index) and (working is None or working.done()):
                return self.files.read_weight(index, into)
            job = self._job(index, change=None)
            job.into = flat
            return self._submit(job)

    @contextmanager
    def accumulating(self, index: int, *, adds: bool, stays: bool) -> Iterator[Callable[[Contribution], None]]:
        """See `StateTier.accumulating`. At its end gradients of a GPU have come: they go on to disk as a whole."""
        with self._gradients.accumulating(index, adds=adds, stays=stays) as keep:
            if self._landing is None:
                yield keep
                return
            yield partial(self._landing.take, keep=keep)
            self._landing.finish()

    def read_gradient(self, index: int, place: ParamPlace) -> Tensor:
        return self._gradients.read(index, place)

    def gradient_norm(self, index: int, place: ParamPlace) -> Tensor | None:
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
        """See `StateTier.update`: parameters outside the blocks from now on, blocks when they are fetched.

        A block whose gradient stays in the buffer is updated as soon as its visit ends.
        """
        self.begin_updates()
        if index >= self._num_blocks:
            gradient = None if gradient is None else gradient.cpu()
            with self._lock:
                self._outer.append(self._submit_update(index, segments, gradient=gradient))
            return
        if self._gradients.staying(index) is not None:
            self._at_end_of_visit[index] = segments
            return
        self._gradients.spend(index)
        with self._lock:
            self._pending[index] = segments
        # What the scheduler has fetched of it, or is fetching, is out of date now; from here on it gets the update.
        self._scheduler.invalidate((index,))

    def change(self, edit: Edit) -> None:
        """See `StateTier.change`. What the rule takes has the room of the gradients' buffer."""
        self.begin_updates()
        self._gradients.rest()
        if edit.gradient is not None:
            live = self._live[edit.unit][edit.place.start : edit.place.stop].view(edit.place.shape)
            # On a CPU, the weight itself.
            weight = live.cpu()
            edit.run(weight, edit.gradient.cpu())
            if weight is not live:
                live.copy_(weight)
            self._changed_live.add(edit.unit)
            return
        self._rules.run(edit)
        self._edited.add(edit.unit)

    def end_step(self, step: int, record: dict[str, object]) -> None:
        """See `StateTier.end_step`. Waits for the weights that the model itself holds."""
        self.begin_updates()
        self._rules.flush()
        for index in self._edited:
            self._gradients.spend(index)
        self._edited.clear()
        outer, self._outer = self._outer, []
        if self.keeps_live:
            for index in self._changed_live:
                job = self._job(index, change=keep_as_it_is)
                job.live = self._live[index]
                outer.append(self._submit(job))
        self._changed_live.clear()
        for transfer in outer:
            transfer.wait()
        with self._lock:
            self._last = (step, record | {_STATE_DTYPE: self.state_dtype})
            self._is_updating, self._has_ended = False, True
            self._commit_if_complete()

    def finish(self) -> None:
        self._rules.flush()
        with self._lock:
            for index in list(self._pending):
                self._submit_update(index, self._pending.pop(index))
            # What was written between steps belongs to the last one.
            commit = None if self._is_updating else partial(self.files.commit, *self._last)
            self._has_ended = False
            done = self._thread.submit(UpdateJob(name="state", at_last=commit))
        done.wait()

    def read(self, index: int, field: str, place: ParamPlace) -> Tensor:
        self._rules.flush()
        self._carry_out(index)
        if field == WEIGHT and index in self._live:
            return self._live[index][place.start : place.stop].view(place.shape).to("cpu", copy=True)
        if field == WEIGHT and not self.files.has_weight(index):
            return self._read_base(place.key)
        found = torch.empty(place.shape, dtype=self.layouts[index].weight_dtype if field == WEIGHT else torch.float32)
        for chunk, here, there in parts(self._chunks[index], place):
            found.view(-1)[there] = self.files.read_chunk(chunk, field)[here]
        return found

    def write(self, index: int, field: str, place: ParamPlace, value: Tensor) -> None:
        self._rules.flush()
        self._carry_out(index)
        is_weight = field == WEIGHT
        if is_weight and index in self._live:
            self._live[index][place.start : place.stop].view(place.shape).copy_(value)
            return
        change = partial(put_values, field, place, value)
        job = self._job(index, change=change, weight=is_weight, moments=not is_weight)
        if not is_weight or self.files.has_weight(index):
            # Else it is written as a whole, as the checkpoint has it: from now on parts of it differ.
            job.chunks = [chunk for chunk, _, _ in parts(self._chunks[index], place)]
        self._submit(job).wait()
        self._invalidate(index)

    def reset(self) -> None:
        self._scheduler.reset()

    def memory(self) -> dict[str, int]:
        return {
            **self._scheduler.memory(),
            "state_chunk_bytes": self._thread.memory_bytes,
            "gradient_bytes": self._gradients.memory_bytes,
            **({} if self._landing is None else {"gradient_buffer_bytes": self._landing.held_bytes}),
        }

    def close(self) -> None:
        """Complete what is pending, then give everything back. A run that has failed keeps its last whole step."""
        if isinstance(threading.current_thread(), WorkerThread):
            # The collector runs finalizers in any thread; one that the work needs must not wait for it.
            threading.Thread(target=self.close, name="lowmem-close").start()
            return
        with ExitStack() as closing:
            for part in (self.files, self._gradients, self._thread, self._scheduler, self._landing):
                if part is not None:
                    closing.callback(part.close)
            with suppress(OffloadError):
                self.finish()

    def save_to(self, folder: Path) -> None:
        """Keep the state of the last step in a folder of its own, by links where possible."""
        self.finish()
        self.files.save_to(folder)

    def adopt(self, folder: Path | None = None) -> JsonObject:
        """Go on from the state that was committed last, or from that of a folder.

        Args:
            folder: What `save_to` made; None for the tier's own folder.

        Returns:
            The record of its step.

        Raises:
            SourceError: There is no such state.
        """
        self._rules.flush()
        # Nothing is fetched ahead while the state changes under it.
        self._scheduler.expect(())
        with self._lock:
            self._pending.clear()
            self._has_ended = False
            done = self._thread.submit(UpdateJob(name="state"))
        done.wait()
        try:
            if folder is None:
                self.files.adopt()
            else:
                self.files.restore(folder)
        except OffloadError:
            # A Trainer has loaded the weights of a checkpoint by then.
            self._scheduler.invalidate(range(self._num_blocks))
            self._read_live()
            raise
        record = self.files.record
        self.state_dtype = self.files.state_dtype = _state_dtype(record)
        self._last = (self.files.step, dict(record.members))
        self._scheduler.invalidate(range(self._num_blocks))
        self._read_live()
        return record

    def _read_live(self) -> None:
        """Bring what the model itself holds to the state that is committed, or to the checkpoint that it began with."""
        for index, live in self._live.items():
            if not self.files.has_weight(index):
                for place in self.layouts[index].places:
                    live[place.start : place.stop].view(place.shape).copy_(self._read_base(place.key))
                continue
            for chunk in self._chunks[index]:
                part = live[chunk.start : chunk.stop]
                part.copy_(self.files.read_chunk(chunk, WEIGHT)[: part.numel()])

    def begin_updates(self) -> None:
        """Begin a step's updates, unless that has been done; what the last step has left to do comes first."""
        if not self._is_updating:
            self.finish()
            self._is_updating = True
            self.files.begin()

    def _submit_update(
        self, index: int, segments: Sequence[Segment], *, into: Tensor | None = None, gradient: Tensor | None = None
    ) -> Transfer:
        run = self._update_runs if index < self._num_blocks else update_runs
        job = self._job(index, change=partial(update_chunk, segments, run), moments=True)
        job.into, job.live, job.gradient = into, self._live.get(index), gradient
        job.reads_gradient = gradient is None
        return self._submit(job)

    def _job(
        self,
        index: int,
        *,
        change: Callable[[Chunk, FlatBuffers], None] | None,
        weight: bool = True,
        moments: bool = False,
    ) -> UpdateJob:
        return UpdateJob(
            name=self.layouts[index].name,
            unit=index,
            chunks=self._chunks[index],
            change=change,
            weight=weight,
            moments=moments,
        )

    def _submit(self, job: UpdateJob) -> Transfer:
        with self._lock:
            if job.change is not None:
                self._working[job.unit] = job.done
            return self._thread.submit(job)

    def _commit_if_complete(self) -> None:
        """Queue the commit of the step once nothing of it is pending; the lock is held."""
        if self._has_ended and not self._pending:
            self._has_ended = False
            self._thread.submit(UpdateJob(name="state", at_last=partial(self.files.commit, *self._last)))

    def _invalidate(self, index: int) -> None:
        if index < self._num_blocks:
            self._scheduler.invalidate((index,))

    def _carry_out(self, index: int) -> None:
        """Carry a unit's pending update out, and wait for whatever else is done to it."""
        with self._lock:
            if index in self._pending:
                self._submit_update(index, self._pending.pop(index))
                self._commit_if_complete()
            working = self._working.get(index)
        if working is not None:
            working.wait()


_STATE_DTYPE = "state_dtype"


def _state_dtype(record: JsonObject) -> str:
    """How the moments of a state are stored.

    Raises:
        SourceError: In no way that is known.
    """
    found = record.members.get(_STATE_DTYPE, "fp32")
    if not isinstance(found, str) or found not in STATE_DTYPES:
        record.refuse(_STATE_DTYPE, f"expected one of {', '.join(STATE_DTYPES)}")
    return found
