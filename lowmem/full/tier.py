"""What the engine needs of the place where weights, gradients and moments are kept.

State in memory: each unit's flat buffers, updated where they lie.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from lowmem.full.flat import (
    ELEMENT_BYTES,
    EXP_AVG,
    EXP_AVG_SQ,
    SCALED_ELEMENTS,
    FlatBuffers,
    FlatMoment,
    ParamPlace,
    Segment,
    UnitLayout,
    clipped,
    lay_out_moments,
    update_runs,
)
from offload import PeerLost, StagingBuffer

WEIGHT = "weight"

FIELDS = (WEIGHT, EXP_AVG, EXP_AVG_SQ)
"""What a unit keeps from step to step, each a flat buffer. The gradient is a fourth, in fp32, within a step."""


_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")


def weakly(method: Callable[_Given, _Found]) -> Callable[_Given, _Found]:
    """A method for a part of its object to call: without a reference, so that no cycle keeps the object's buffers.

    Args:
        method: A bound method; its object lives as long as the part is used.
    """
    found = weakref.WeakMethod(method)

    def call(*args: _Given.args, **kwargs: _Given.kwargs) -> _Found:
        bound = found()
        assert bound is not None, "the part outlives what it belongs to"
        return bound(*args, **kwargs)

    return call


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """One parameter's gradient of one backward."""

    place: ParamPlace
    """The parameter."""
    value: Tensor
    """The gradient, of the parameter's shape."""
    earlier_scales: tuple[float, ...] | None
    """None: it replaces what was accumulated. Else it is added to that, once that is multiplied with these."""

    def add_to(self, kept: Tensor) -> None:
        """Accumulate it in what is kept, of the parameter's shape."""
        if self.earlier_scales is None:
            kept.copy_(self.value)
            return
        for scale in self.earlier_scales:
            kept.mul_(scale)
        kept.add_(self.value)


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A change that a rule makes to one parameter's weight."""

    unit: int
    """Number of the parameter's unit."""
    place: ParamPlace
    """The parameter."""
    run: Callable[[Tensor, Tensor], None]
    """Called with weight and gradient, of the parameter's shape."""
    gradient: Tensor | None
    """The gradient of a parameter outside the blocks; None for a block's, which was accumulated."""
    reduced: ParamPlace | None = None
    """Where what was accumulated of it lies, if that is not the whole gradient; `run` is called with that."""
    scales: Sequence[float]
    """What the accumulated gradient is multiplied with first."""
    upcoming: tuple[int, ParamPlace] | None
    """Unit and parameter of the accumulated gradient that is used next, to be read meanwhile."""


class FlatWeight(Protocol):
    """A block's flat weight: a tensor, or what is sliced like one."""

    def __getitem__(self, elements: slice, /) -> Tensor:
        """The elements of one parameter."""


class StateTier(Protocol):
    """Keeps the flat buffers of all units: the decoder blocks first, then the parameters outside them.

    A unit's weight is the newest one wherever it is read: an update that has been begun is completed first.
    """

    layouts: tuple[UnitLayout, ...]
    """The units."""
    state_dtype: str
    """How moments are stored: "fp32", "bf16" or "8bit"."""

    def store_moments_as(self, state_dtype: str) -> None:
        """Store moments in another way from now on; those that there are become zero."""

    def refuse_optimizer(self, optimizer: str, moments: Collection[str | None]) -> None:
        """Refuse an optimizer that cannot be served.

        Args:
            optimizer: Its name.
            moments: How its moments would be stored; None where its rules go through `change`.
        """
        return

    def lend(self, index: int) -> AbstractContextManager[FlatWeight]:
        """A block's flat weight for the time of a visit; nobody writes to it meanwhile."""

    def expect(self, order: Sequence[int]) -> None:
        """Prefetch blocks for visits in this order, where they are not in memory anyway."""
        return

    def accumulating(
        self, index: int, *, adds: bool, stays: bool
    ) -> AbstractContextManager[Callable[[Contribution], None]]:
        """Take the gradients of a block's backward one by one; each may be dropped once it was taken.

        Args:
            index: The block.
            adds: Whether any of them may be added to what was accumulated before.
            stays: Whether `update` is called with them before the visit ends, and they are not needed afterwards.
        """

    def exchange(
        self, index: int, taken: Collection[str], earlier: Mapping[str, tuple[float, ...] | None]
    ) -> Collection[str]:
        """Make what `accumulating` took, which has ended, the mean over all ranks of a run.

        Args:
            index: The block.
            taken: Parameters, by name, that have had a gradient here.
            earlier: For each parameter of the block, `Contribution.earlier_scales` of its first gradient.

        Returns:
            Parameters that have had one on any rank.
        """
        return taken

    def set_gradient(self, index: int, place: ParamPlace, value: Tensor) -> None:
        """Replace an accumulated gradient with a value of the parameter's shape."""
        with self.accumulating(index, adds=False, stays=False) as keep:
            keep(Contribution(place=place, value=value.view(place.shape), earlier_scales=None))

    def read_gradient(self, index: int, place: ParamPlace) -> Tensor:
        """A copy of an accumulated gradient, of the parameter's shape."""

    def gradient_norm(self, index: int, place: ParamPlace) -> Tensor | None:
        """The 2-norm of an accumulated gradient."""

    def clear_gradient(self, index: int, place: ParamPlace) -> None:
        """Make an accumulated gradient zero."""

    def begin_step(self) -> None:
        """Note that the updates of a step are about to be asked for."""
        return

    def update(self, index: int, segments: Sequence[Segment], gradient: Tensor | None) -> None:
        """Update a unit, now or before anybody reads it.

        An accumulated gradient is multiplied with its scales, or cannot be read or added to any more.

        Args:
            index: The unit.
            segments: What to update, and how; not empty.
            gradient: The flat gradient of a parameter outside the blocks; None for a block, whose was accumulated.
        """

    def change(self, edit: Edit) -> None:
        """Let a rule change one parameter's weight in place, now."""

    def end_step(self, step: int, record: dict[str, object]) -> None:
        """Note that all updates of a step have been asked for.

        Args:
            step: Number of the step.
            record: Plain data that belongs to it: what a resumed run needs besides the buffers.
        """
        return

    def finish(self) -> None:
        """Complete all updates; where the tier outlives the process, they are safe there afterwards."""
        return

    def read(self, index: int, field: str, place: ParamPlace) -> Tensor:
        """A copy of a parameter's weight, in its type, or of a moment, in fp32; of its shape."""

    def write(self, index: int, field: str, place: ParamPlace, value: Tensor) -> None:
        """Set a parameter's weight or moment."""

    def reset(self) -> None:
        """End all visits, wherever an exception has left them."""
        return

    def lost(self, wait_s: float) -> PeerLost | None:
        """Which process that shares the state has ended, if one has; waits so long for word of it."""
        return None

    def memory(self) -> dict[str, int]:
        """Bytes of memory taken, by role."""

    def close(self) -> None:
        """Complete all updates, then give everything back. May be called twice."""


class StateMemory(Protocol):
    """Memory in which a tier has its flat buffers: this process's own, or that of several which change a part each.

    Units are counted as in the tier; elements are those of its flat buffers.
    """

    is_shared: bool
    """Whether others change parts of it."""

    def room(self, index: int, field: str, nbytes: int) -> Tensor:
        """Where a unit's weight, gradient or moments lie, uint8; zeros before they are first written."""

    def drop(self, index: int, field: str) -> None:
        """Forget one of these."""

    def sizes(self) -> dict[tuple[int, str], int]:
        """Bytes that this process counts for each."""

    def refuse_optimizer(self, optimizer: str, moments: Collection[str | None]) -> None:
        """See `StateTier.refuse_optimizer`."""
        return

    def refuse_setting(self, key: str) -> None:
        """Refuse to replace the accumulated gradient of a parameter, where that is not one process's to do."""
        return

    def fill(self, num_blocks: int, load: Callable[[int], None]) -> None:
        """Have the weights of blocks filled, each once, by `load` with the block's number."""

    def part(self, index: int) -> slice:
        """Elements of a unit that this process updates."""

    def meet(self) -> None:
        """Wait for the others: what each has changed before, all see afterwards."""
        return

    def changing(self, index: int, place: ParamPlace) -> AbstractContextManager[slice]:
        """Change a parameter's weight, gradient or moment, as the others do: yields this process's elements."""

    def adding(self, accumulated: Callable[[], Tensor]) -> Callable[[Contribution], None]:
        """Begin a backward of a block; returns what takes its gradients.

        Args:
            accumulated: The block's flat gradient, which is complete after `exchange`.
        """

    def exchange(
        self,
        index: int,
        accumulated: Callable[[], Tensor],
        taken: Collection[str],
        earlier: Mapping[str, tuple[float, ...] | None],
    ) -> Collection[str]:
        """See `StateTier.exchange`."""
        return taken

    def norm(self, index: int, place: ParamPlace, accumulated: Tensor) -> Tensor:
        """The 2-norm of a parameter's accumulated gradient."""

    def cleared(self, index: int, place: ParamPlace) -> None:
        """Note, while it is being changed, that a parameter's accumulated gradient is zero now."""
        return

    def lost(self, wait_s: float) -> PeerLost | None:
        """See `StateTier.lost`."""
        return None

    def close(self) -> None:
        """Let go of it. May be called twice."""


class PrivateState(StateMemory):
    """This process's own: mappings in huge pages, committed as they are first written.

    Args:
        layouts: The units.
        pin: Whether to keep it page-locked, for a GPU that copies from it and to it.
    """

    is_shared = False

    def __init__(self, layouts: Sequence[UnitLayout], *, pin: bool = False) -> None:
        self._layouts, self._pin = tuple(layouts), pin
        self._buffers: dict[tuple[int, str], StagingBuffer] = {}

    def room(self, index: int, field: str, nbytes: int) -> Tensor:
        buffer = self._buffers.get((index, field))
        if buffer is None:
            buffer = self._buffers[index, field] = StagingBuffer(nbytes, pin=self._pin)
        return buffer.tensor

    def drop(self, index: int, field: str) -> None:
        self._buffers.pop((index, field), None)

    def sizes(self) -> dict[tuple[int, str], int]:
        return {key: buffer.nbytes for key, buffer in self._buffers.items()}

    def fill(self, num_blocks: int, load: Callable[[int], None]) -> None:
        for index in range(num_blocks):
            load(index)

    def part(self, index: int) -> slice:
        """See `StateMemory.part`: all."""
        return slice(0, self._layouts[index].numel)

    @contextmanager
    def changing(self, index: int, place: ParamPlace) -> Iterator[slice]:
        """See `StateMemory.changing`: all of it, at once."""
        yield slice(place.start, place.stop)

    def adding(self, accumulated: Callable[[], Tensor]) -> Callable[[Contribution], None]:
        """See `StateMemory.adding`: to what is accumulated, at once."""
        return lambda one: one.add_to(view_of(accumulated(), one.place))

    def norm(self, index: int, place: ParamPlace, accumulated: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(view_of(accumulated, place))
        return norm

    def close(self) -> None:
        """Release all buffers."""
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()


GRADIENT, MOMENTS = "gradient", "moments"


class MemoryTier(StateTier):
    """Keeps state in RAM. A processor computes from the master weights themselves, so nothing is copied.

    Updates are done when they are asked for: on a processor they would take the same cores from the next forward.

    Args:
        layouts: The units.
        live: The weights that the model itself holds, by unit.
        memory: Where the buffers are; closed with this.
        updates_live: Whether the weights that the model itself holds are updated where they are. Otherwise, and where
            several processes update a part each, they are copied into the buffers for that, and back.
    """

    def __init__(
        self,
        layouts: Sequence[UnitLayout],
        *,
        live: Mapping[int, Tensor],
        memory: StateMemory,
        updates_live: bool = True,
    ) -> None:
        self.layouts = tuple(layouts)
        self.state_dtype = "fp32"
        self._live, self._updates_live = dict(live), updates_live and not memory.is_shared
        self._memory = memory
        self._updated: list[int] = []
        # Committed by the first update that scales a gradient.
        self._scaled = StagingBuffer(SCALED_ELEMENTS * ELEMENT_BYTES)

    def store_moments_as(self, state_dtype: str) -> None:
        if state_dtype != self.state_dtype:
            self.state_dtype = state_dtype
            for index in range(len(self.layouts)):
                self._memory.drop(index, MOMENTS)

    def refuse_optimizer(self, optimizer: str, moments: Collection[str | None]) -> None:
        self._memory.refuse_optimizer(optimizer, moments)

    def fill(self, num_blocks: int, load: Callable[[int, Tensor], None]) -> None:
        """Fill the weights of so many units, the first ones: `load` is called with a number and the flat weight."""
        self._memory.fill(num_blocks, lambda index: load(index, self._flat(index, WEIGHT)))

    @contextmanager
    def lend(self, index: int) -> Iterator[FlatWeight]:
        """See `StateTier.lend`: the master weight itself."""
        yield self._flat(index, WEIGHT)

    @contextmanager
    def accumulating(self, index: int, *, adds: bool, stays: bool) -> Iterator[Callable[[Contribution], None]]:
        del adds, stays
        yield self._memory.adding(partial(self._flat, index, GRADIENT))

    def exchange(
        self, index: int, taken: Collection[str], earlier: Mapping[str, tuple[float, ...] | None]
    ) -> Collection[str]:
        return self._memory.exchange(index, partial(self._flat, index, GRADIENT), taken, earlier)

    def set_gradient(self, index: int, place: ParamPlace, value: Tensor) -> None:
        self._memory.refuse_setting(place.key)
        super().set_gradient(index, place, value)

    def read_gradient(self, index: int, place: ParamPlace) -> Tensor:
        return view_of(self._flat(index, GRADIENT), place).clone()

    def gradient_norm(self, index: int, place: ParamPlace) -> Tensor:
        return self._memory.norm(index, place, self._flat(index, GRADIENT))

    def clear_gradient(self, index: int, place: ParamPlace) -> None:
        with self._memory.changing(index, place) as own:
            self._flat(index, GRADIENT)[own].zero_()
            self._memory.cleared(index, place)

    def begin_step(self) -> None:
        self._memory.meet()

    def update(self, index: int, segments: Sequence[Segment], gradient: Tensor | None) -> None:
        """See `StateTier.update`: this process's part, at once."""
        part = self._memory.part(index)
        self._take_live(index)
        self._run(index, clipped(segments, part.start, part.stop), gradient)
        if self._memory.is_shared:
            self._updated.append(index)
        else:
            self._renew(index)

    def end_step(self, step: int, record: dict[str, object]) -> None:
        """See `StateTier.end_step`. Until the next step begins, nobody changes what is copied here."""
        self._memory.meet()
        for index in self._updated:
            self._renew(index)
        self._updated.clear()

    def change(self, edit: Edit) -> None:
        gradient = edit.gradient
        if gradient is None:
            gradient = view_of(self._flat(edit.unit, GRADIENT), edit.reduced or edit.place)
            for scale in edit.scales:
                gradient.mul_(scale)
        self._take_live(edit.unit)
        edit.run(view_of(self._flat(edit.unit, WEIGHT), edit.place), gradient)
        if edit.unit in self._live:
            self._renew(edit.unit)

    def read(self, index: int, field: str, place: ParamPlace) -> Tensor:
        if field == WEIGHT:
            live = self._live_weight(index)
            return view_of(self._flat(index, field) if live is None else live, place).to("cpu", copy=True)
        return self._moment(index, field).read(slice(place.start, place.stop)).view(place.shape).clone()

    def write(self, index: int, field: str, place: ParamPlace, value: Tensor) -> None:
        """See `StateTier.write`; called by all processes that share the memory, with the same value."""
        if field == WEIGHT and (live := self._live_weight(index)) is not None:
            view_of(live, place).copy_(value)
            return
        with self._memory.changing(index, place) as own:
            flat = value.detach().to("cpu").reshape(-1)[own.start - place.start : own.stop - place.start]
            if field == WEIGHT:
                self._flat(index, field)[own].copy_(flat)
            else:
                self._moment(index, field).write(own, flat.float())

    def lost(self, wait_s: float) -> PeerLost | None:
        return self._memory.lost(wait_s)

    def memory(self) -> dict[str, int]:
        by_role = {f"{field}_bytes": 0 for field in (*FIELDS, GRADIENT)}
        for (_, field), nbytes in self._memory.sizes().items():
            if field == MOMENTS:
                # Both are equally large.
                by_role[f"{EXP_AVG}_bytes"] += nbytes // 2
                by_role[f"{EXP_AVG_SQ}_bytes"] += nbytes // 2
            else:
                by_role[f"{field}_bytes"] = by_role.get(f"{field}_bytes", 0) + nbytes
        return by_role

    def close(self) -> None:
        """Release all buffers."""
        self._memory.close()
        self._live.clear()

    def _live_weight(self, index: int) -> Tensor | None:
        """What the model itself holds of a unit, flat, where it is now: accelerate may have moved it since."""
        live = self._live.get(index)
        return None if live is None else live.detach().view(-1)

    def _take_live(self, index: int) -> None:
        """Bring what the model itself holds of a unit to its buffer, this process's part: it may have been set."""
        live = self._live_weight(index)
        if live is not None and not self._updates_live:
            part = self._memory.part(index)
            own = slice(part.start, min(part.stop, live.numel()))
            self._flat(index, WEIGHT)[own].copy_(live[own])

    def _renew(self, index: int) -> None:
        """Bring a unit's newest weight to wherever there is a copy of it."""
        live = self._live_weight(index)
        if live is not None and not self._updates_live:
            live.copy_(self._flat(index, WEIGHT)[: live.numel()])

    def _run(self, index: int, segments: Sequence[Segment], gradient: Tensor | None) -> None:
        """Update runs of a unit, with the gradient that is given in place of the accumulated one."""
        self._update_here(self._buffers_of(index, gradient), segments)

    def _update_here(self, unit: FlatBuffers, segments: Sequence[Segment]) -> None:
        update_runs(unit, segments, scaled=self._scaled.tensor.view(torch.float32))

    def _buffers_of(self, index: int, gradient: Tensor | None) -> FlatBuffers:
        return FlatBuffers(
            weight=self._flat(index, WEIGHT),
            exp_avg=self._moment(index, EXP_AVG),
            exp_avg_sq=self._moment(index, EXP_AVG_SQ),
            gradient=self._flat(index, GRADIENT) if gradient is None else gradient,
        )

    def _flat(self, index: int, field: str) -> Tensor:
        """A unit's flat weight that is updated, or its flat gradient."""
        if field == WEIGHT and self._updates_live and (live := self._live_weight(index)) is not None:
            return live
        layout = self.layouts[index]
        dtype = layout.weight_dtype if field == WEIGHT else torch.float32
        return self._memory.room(index, field, layout.numel * dtype.itemsize).view(dtype)

    def _moment(self, index: int, field: str) -> FlatMoment:
        layout = self.layouts[index]
        stored = lay_out_moments(self.state_dtype, layout.numel, num_wide=layout.num_wide)
        return FlatMoment(field, stored.views(self._memory.room(index, MOMENTS, stored.nbytes)))


def view_of(flat: Tensor, place: ParamPlace) -> Tensor:
    """A parameter of a unit's flat buffer, in its shape."""
    return flat[place.start : place.stop].view(place.shape)
