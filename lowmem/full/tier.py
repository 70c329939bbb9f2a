"""What the engine needs of the place where weights, gradients and moments are kept.

State in memory: each unit's flat buffers, updated where they lie.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
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
    lay_out_moments,
    update_runs,
)
from offload import StagingBuffer

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

    def read_gradient(self, index: int, place: ParamPlace) -> Tensor:
        """A copy of an accumulated gradient, of the parameter's shape."""

    def gradient_norm(self, index: int, place: ParamPlace) -> Tensor | None:
        """The 2-norm of an accumulated gradient."""

    def clear_gradient(self, index: int, place: ParamPlace) -> None:
        """Make an accumulated gradient zero."""

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

    def memory(self) -> dict[str, int]:
        """Bytes of memory taken, by role."""

    def close(self) -> None:
        """Complete all updates, then give everything back. May be called twice."""


_GRADIENT, _MOMENTS = "gradient", "moments"


class MemoryTier(StateTier):
    """Keeps state in RAM. A processor computes from the master weights themselves, so nothing is copied.

    Updates are done when they are asked for: on a processor they would take the same cores from the next forward.
    Buffers are mappings of their own, in huge pages, committed as they are first written.

    Args:
        layouts: The units.
        live: Flat views of the weights that the model itself holds, by unit.
        pin: Whether to keep the state of blocks page-locked, for a GPU that copies from it and to it.
    """

    def __init__(self, layouts: Sequence[UnitLayout], *, live: Mapping[int, Tensor], pin: bool = False) -> None:
        self.layouts = tuple(layouts)
        self._pin = pin
        self.state_dtype = "fp32"
        self._live = dict(live)
        self._buffers: dict[tuple[int, str], StagingBuffer] = {}
        # Committed by the first update that scales a gradient.
        self._scaled = StagingBuffer(SCALED_ELEMENTS * ELEMENT_BYTES)

    def store_moments_as(self, state_dtype: str) -> None:
        if state_dtype != self.state_dtype:
            self.state_dtype = state_dtype
            for index in range(len(self.layouts)):
                self._buffers.pop((index, _MOMENTS), None)

    def weight(self, index: int) -> Tensor:
        """A unit's flat master weight, to be filled."""
        return self._flat(index, WEIGHT)

    @contextmanager
    def lend(self, index: int) -> Iterator[FlatWeight]:
        """See `StateTier.lend`: the master weight itself."""
        yield self._flat(index, WEIGHT)

    @contextmanager
    def accumulating(self, index: int, *, adds: bool, stays: bool) -> Iterator[Callable[[Contribution], None]]:
        del adds, stays
        yield lambda one: one.add_to(_view(self._flat(index, _GRADIENT), one.place))

    def read_gradient(self, index: int, place: ParamPlace) -> Tensor:
        return _view(self._flat(index, _GRADIENT), place).clone()

    def gradient_norm(self, index: int, place: ParamPlace) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(_view(self._flat(index, _GRADIENT), place))
        return norm

    def clear_gradient(self, index: int, place: ParamPlace) -> None:
        _view(self._flat(index, _GRADIENT), place).zero_()

    def update(self, index: int, segments: Sequence[Segment], gradient: Tensor | None) -> None:
        """See `StateTier.update`: at once."""
        self._update_here(self._buffers_of(index, gradient), segments)

    def _update_here(self, unit: FlatBuffers, segments: Sequence[Segment]) -> None:
        update_runs(unit, segments, scaled=self._scaled.tensor.view(torch.float32))

    def change(self, edit: Edit) -> None:
        gradient = edit.gradient
        if gradient is None:
            gradient = _view(self._flat(edit.unit, _GRADIENT), edit.reduced or edit.place)
            for scale in edit.scales:
                gradient.mul_(scale)
        edit.run(_view(self._flat(edit.unit, WEIGHT), edit.place), gradient)

    def read(self, index: int, field: str, place: ParamPlace) -> Tensor:
        if field == WEIGHT:
            return _view(self._flat(index, field), place).clone()
        return self._moment(index, field).read(slice(place.start, place.stop)).view(place.shape).clone()

    def write(self, index: int, field: str, place: ParamPlace, value: Tensor) -> None:
        if field == WEIGHT:
            _view(self._flat(index, field), place).copy_(value)
        else:
            flat = value.detach().to("cpu", torch.float32).reshape(-1)
            self._moment(index, field).write(slice(place.start, place.stop), flat)

    def memory(self) -> dict[str, int]:
        by_field = dict.fromkeys((*FIELDS, _GRADIENT), 0)
        for (_, field), buffer in self._buffers.items():
            if field == _MOMENTS:
                # Both are equally large.
                by_field[EXP_AVG] += buffer.nbytes // 2
                by_field[EXP_AVG_SQ] += buffer.nbytes // 2
            else:
                by_field[field] += buffer.nbytes
        return {f"{field}_bytes": nbytes for field, nbytes in by_field.items()}

    def close(self) -> None:
        """Release all buffers."""
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()
        self._live.clear()

    def _buffers_of(self, index: int, gradient: Tensor | None) -> FlatBuffers:
        """A unit, with the gradient that is given in place of the accumulated one."""
        return FlatBuffers(
            weight=self._flat(index, WEIGHT),
            exp_avg=self._moment(index, EXP_AVG),
            exp_avg_sq=self._moment(index, EXP_AVG_SQ),
            gradient=self._flat(index, _GRADIENT) if gradient is None else gradient,
        )

    def _flat(self, index: int, field: str) -> Tensor:
        if field == WEIGHT and index in self._live:
            return self._live[index]
        layout = self.layouts[index]
        dtype = layout.weight_dtype if field == WEIGHT else torch.float32
        buffer = self._buffers.get((index, field))
        if buffer is None:
            buffer = self._buffers[index, field] = StagingBuffer(layout.numel * dtype.itemsize, pin=self._pin)
        return buffer.tensor.view(dtype)

    def _moment(self, index: int, field: str) -> FlatMoment:
        layout = self.layouts[index]
        stored = lay_out_moments(self.state_dtype, layout.numel, num_wide=layout.num_wide)
        buffer = self._buffers.get((index, _MOMENTS))
        if buffer is None:
            buffer = self._buffers[index, _MOMENTS] = StagingBuffer(stored.nbytes, pin=self._pin)
        return FlatMoment(field, stored.views(buffer.tensor))


def _view(flat: Tensor, place: ParamPlace) -> Tensor:
    return flat[place.start : place.stop].view(place.shape)
