"""Where the parameters of one unit lie in its flat buffers: one place for weight, gradient and both moments.

AdamW on flat buffers: which elements share their settings, and torch's fused update of a run of them.

Decoupled weight decay (Loshchilov and Hutter, Decoupled weight decay regularization, 2019), in the arithmetic of
`torch.optim.AdamW(fused=True)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.optim.plain import adamw_step
from lowmem.optim.rule import Hyper
from offload import round_up

ELEMENT_BYTES = 4
"""All buffers are fp32."""

_ALIGN_ELEMENTS = 16
"""A cache line of fp32: vector instructions cover a parameter from its first element on."""

PAGE_ELEMENTS = 1024
"""A page of fp32: buffers end on one, so that they can be read and written past the page cache."""


@dataclass(frozen=True, kw_only=True)
class ParamPlace:
    """One parameter's elements in a flat buffer."""

    key: str
    """Fully qualified name in the model."""
    shape: torch.Size
    """Shape in the model."""
    start: int
    """First element."""

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.shape.numel()


@dataclass(frozen=True, kw_only=True)
class UnitLayout:
    """The flat buffers of one unit: a decoder block, or one parameter outside the blocks."""

    name: str
    """The unit's name, for errors and files."""
    places: tuple[ParamPlace, ...]
    """Its parameters in the order of the buffer."""
    numel: int
    """Elements of one buffer, a whole number of pages; what belongs to no parameter stays zero."""


def lay_out_unit(name: str, shapes: Iterable[tuple[str, torch.Size]]) -> UnitLayout:
    """Lay out a unit: matrices first, then vectors.

    Norms and biases usually have a decay of their own. Apart from the matrices, they leave two long runs of equal
    settings, each of which is one call of the fused update.

    Args:
        name: The unit's name.
        shapes: Name and shape of each parameter.
    """
    places: list[ParamPlace] = []
    end = 0
    for key, shape in sorted(shapes, key=lambda entry: len(entry[1]) < 2):
        places.append(ParamPlace(key=key, shape=shape, start=end))
        end += round_up(shape.numel(), _ALIGN_ELEMENTS)
    return UnitLayout(name=name, places=tuple(places), numel=max(PAGE_ELEMENTS, round_up(end, PAGE_ELEMENTS)))


SCALED_ELEMENTS = 1 << 21
"""A gradient is scaled 8 MiB at a time, so that the update finds it in the cache; smaller pieces cost more in calls."""


@dataclass(frozen=True, kw_only=True)
class ParamUpdate:
    """The settings of one parameter's update."""

    hyper: Hyper
    """Those of its group."""
    step: int
    """Number of this update, 1 for the first."""
    scales: tuple[float, ...] = ()
    """What the gradient is multiplied with first, one after the other."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of elements with equal settings."""

    start: int
    """First element."""
    stop: int
    """One past the last element."""
    update: ParamUpdate
    """Their settings."""


def segments_of(layout: UnitLayout, updates: Mapping[str, ParamUpdate]) -> tuple[Segment, ...]:
    """The runs of a unit's buffers that are updated, in order; parameters without an update are left out.

    Args:
        layout: The unit.
        updates: Settings by parameter name.
    """
    runs: list[Segment] = []
    # The gap behind a parameter belongs to its run: there all four buffers are zero, and stay so.
    stops = [*(place.start for place in layout.places[1:]), layout.places[-1].stop]
    for place, stop in zip(layout.places, stops, strict=True):
        update = updates.get(place.key)
        if update is None:
            continue
        if runs and runs[-1].stop == place.start and runs[-1].update == update:
            runs[-1] = Segment(start=runs[-1].start, stop=stop, update=update)
        else:
            runs.append(Segment(start=place.start, stop=stop, update=update))
    return tuple(runs)


@dataclass(frozen=True, kw_only=True)
class FlatBuffers:
    """A unit, or a chunk of one, in memory: flat fp32 tensors of one length, all on one device."""

    weight: Tensor
    exp_avg: Tensor
    """First moments."""
    exp_avg_sq: Tensor
    """Second moments."""
    gradient: Tensor
    """As accumulated."""


def update_run(update: ParamUpdate, at: FlatBuffers, *, start: int, stop: int, scaled: Tensor | None = None) -> None:
    """Update a run of elements in place.

    Args:
        update: Its settings.
        at: Has the run; the gradient is left as it is, or multiplied with the scales.
        start: First element.
        stop: One past the last.
        scaled: Room for `SCALED_ELEMENTS` of a scaled gradient, which stay in the cache; scaled in place if not given.
    """
    size = SCALED_ELEMENTS if update.scales else stop - start
    for first in range(start, stop, size):
        piece = slice(first, min(first + size, stop))
        part = at.gradient[piece]
        for scale in update.scales:
            part = part.mul_(scale) if scaled is None else torch.mul(part, scale, out=scaled[: part.numel()])
        # It counts the step itself.
        step = torch.tensor(float(update.step - 1), device=part.device)
        adamw_step(at.weight[piece], part, at.exp_avg[piece], at.exp_avg_sq[piece], step, hyper=update.hyper)
