"""Where the parameters of one unit lie in its flat buffers: one place for weight, gradient and both moments.

Moments in flat buffers: fp32, bf16, or 8 bits for parameters that are large enough.

AdamW on flat buffers: which elements share their settings, and torch's fused update of a run of them.

Decoupled weight decay (Loshchilov and Hutter, Decoupled weight decay regularization, 2019), in the arithmetic of
`torch.optim.AdamW(fused=True)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowmem.optim.plain import adamw_step
from lowmem.optim.rule import Hyper, mix
from lowmem.optim.state import (
    BLOCK_VALUES,
    SMALLEST_8BIT_VALUES,
    decode,
    encode,
    num_scales,
    round_to_bf16,
    rounding_of_moment,
    rounding_of_weight,
)
from offload import ObjectLayout, lay_out_object, round_up

ELEMENT_BYTES = 4
"""Gradients are fp32, and so are weights and moments unless their layout says otherwise."""

EXP_AVG, EXP_AVG_SQ = "exp_avg", "exp_avg_sq"

_ALIGN_ELEMENTS = BLOCK_VALUES
"""A parameter begins with a block of 8-bit values of its own; and with a cache line, as vector instructions do."""

PAGE_ELEMENTS = 4096
"""A page of bytes: buffers of whatever type end on one, so that they can be read and written past the page cache."""


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
    weight_dtype: torch.dtype = torch.float32
    """Type of the weight."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the flat weight."""
        return self.numel * self.weight_dtype.itemsize

    @property
    def num_wide(self) -> int:
        """Elements, the first ones, of parameters that are large enough for moments in 8 bits."""
        return min((place.start for place in self.places if _is_narrow(place.shape)), default=self.numel)


def _is_narrow(shape: torch.Size) -> bool:
    return shape.numel() < SMALLEST_8BIT_VALUES


def lay_out_unit(
    name: str, shapes: Iterable[tuple[str, torch.Size]], *, weight_dtype: torch.dtype = torch.float32
) -> UnitLayout:
    """Lay out a unit: large parameters first, and of these matrices first, then vectors.

    Norms and biases usually have a decay of their own. Apart from the matrices, they leave two long runs of equal
    settings, each of which is one call of the fused update.

    Args:
        name: The unit's name.
        shapes: Name and shape of each parameter.
        weight_dtype: Type of the weights: fp32 or bf16.
    """
    places: list[ParamPlace] = []
    end = 0
    for key, shape in sorted(shapes, key=lambda entry: (_is_narrow(entry[1]), len(entry[1]) < 2)):
        places.append(ParamPlace(key=key, shape=shape, start=end))
        end += round_up(shape.numel(), _ALIGN_ELEMENTS)
    numel = max(PAGE_ELEMENTS, round_up(end, PAGE_ELEMENTS))
    return UnitLayout(name=name, places=tuple(places), numel=numel, weight_dtype=weight_dtype)


def lay_out_moments(state_dtype: str, numel: int, *, num_wide: int) -> ObjectLayout:
    """How both moments of a run of elements lie in a buffer or a file.

    Args:
        state_dtype: "fp32", "bf16" or "8bit".
        numel: Elements, whole pages.
        num_wide: How many of them, the first ones, may be in 8 bits; whole blocks.
    """
    if state_dtype != "8bit":
        dtype = torch.bfloat16 if state_dtype == "bf16" else torch.float32
        return lay_out_object({EXP_AVG: (dtype, (numel,)), EXP_AVG_SQ: (dtype, (numel,))})
    tensors: dict[str, tuple[torch.dtype, tuple[int]]] = {}
    for name, codes in ((EXP_AVG, torch.int8), (EXP_AVG_SQ, torch.uint8)):
        if num_wide:
            tensors[name] = (codes, (num_wide,))
            tensors[f"{name}{_SCALE}"] = (torch.float32, (num_scales(num_wide),))
        if num_wide < numel:
            tensors[f"{name}{_REST}"] = (torch.float32, (numel - num_wide,))
    return lay_out_object(tensors)


_SCALE, _REST = "_scale", "_rest"


class FlatMoment:
    """One moment of a run of elements, as it is stored; read and written in fp32.

    Args:
        name: exp_avg or exp_avg_sq.
        stored: Views of memory laid out by `lay_out_moments`.
    """

    def __init__(self, name: str, stored: Mapping[str, Tensor]) -> None:
        self._name = name
        self._values, self._scales = stored.get(name), stored.get(f"{name}{_SCALE}")
        self._rest = stored.get(f"{name}{_REST}")
        self._num_wide = 0 if self._values is None else self._values.numel()

    def read(self, piece: slice) -> Tensor:
        """Some elements in fp32: the stored ones themselves where they are.

        Args:
            piece: They begin with a block, and are all wide or all narrow.
        """
        part = self._part(piece)
        if part.dtype in (torch.int8, torch.uint8):
            return decode(part, self._scales_of(piece))
        return part if part.dtype == torch.float32 else part.float()

    def values(self, numel: int) -> Tensor:
        """All of so many elements in fp32."""
        if self._rest is None:
            return self.read(slice(0, numel))
        rest = self.read(slice(self._num_wide, numel))
        return torch.cat([self.read(slice(0, self._num_wide)), rest]) if self._num_wide else rest

    def write(self, piece: slice, values: Tensor, *, seed: int | None = None, first: int = 0) -> None:
        """Store some elements.

        Args:
            piece: As for `read`.
            values: fp32, flat.
            seed: Of the parameter in this step, for rounding to bf16; None where the values are bf16's own.
            first: Position of the first one in its parameter.
        """
        part = self._part(piece)
        if part.dtype in (torch.int8, torch.uint8):
            codes, scales = encode(values, signed=part.dtype == torch.int8)
            part.copy_(codes)
            self._scales_of(piece).copy_(scales)
        elif part.dtype == torch.bfloat16 and seed is not None:
            part.copy_(round_to_bf16(values, seed=rounding_of_moment(seed, self._name), first=first))
        elif part.data_ptr() != values.data_ptr():
            part.copy_(values)

    def stored(self, piece: slice) -> dict[str, Tensor]:
        """What some elements are stored in: the tensors of a moment that begins with them.

        Args:
            piece: As for `read`.
        """
        if self._rest is not None and piece.start >= self._num_wide:
            return {f"{self._name}{_REST}": self._part(piece)}
        found = {self._name: self._part(piece)}
        return found if self._scales is None else found | {f"{self._name}{_SCALE}": self._scales_of(piece)}

    def _part(self, piece: slice) -> Tensor:
        if self._rest is not None and piece.start >= self._num_wide:
            return self._rest[piece.start - self._num_wide : piece.stop - self._num_wide]
        assert self._values is not None, "there are wide elements"
        return self._values[piece]

    def _scales_of(self, piece: slice) -> Tensor:
        assert self._scales is not None, "8-bit values have scales"
        return self._scales[piece.start // BLOCK_VALUES : num_scales(piece.stop)]


SCALED_ELEMENTS = 1 << 21
"""A gradient is scaled 8 MiB at a time, so that the update finds it in the cache; smaller pieces cost more in calls."""

_CONVERTED_ELEMENTS = 1 << 18
"""Weights and moments that are not stored as fp32 are made so 1 MiB at a time: whole blocks."""


@dataclass(frozen=True, kw_only=True)
class ParamUpdate:
    """The settings of one parameter's update."""

    hyper: Hyper
    """Those of its group."""
    step: int
    """Number of this update, 1 for the first."""
    scales: tuple[float, ...] = ()
    """What the gradient is multiplied with first, one after the other."""
    seed: int | None = None
    """Of the parameter, where weights or moments are not stored as fp32; then each parameter is a run of its own."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of elements with equal settings."""

    start: int
    """First element."""
    stop: int
    """One past the last element."""
    update: ParamUpdate
    """Their settings."""
    skipped: int = 0
    """Elements of the whole run that come before these."""


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
        if runs and runs[-1].stop == place.start and runs[-1].update == update and update.seed is None:
            runs[-1] = Segment(start=runs[-1].start, stop=stop, update=update)
        else:
            runs.append(Segment(start=place.start, stop=stop, update=update))
    return tuple(runs)


def clipped(segments: Iterable[Segment], start: int, stop: int) -> tuple[Segment, ...]:
    """The parts of runs that lie between two elements."""
    return tuple(
        replace(
            segment,
            start=max(segment.start, start),
            stop=min(segment.stop, stop),
            skipped=segment.skipped + max(0, start - segment.start),
        )
        for segment in segments
        if max(segment.start, start) < min(segment.stop, stop)
    )


@dataclass(frozen=True, kw_only=True)
class FlatBuffers:
    """A unit, or a chunk of one, in memory: flat buffers of one length, all on one device."""

    weight: Tensor
    """fp32 or bf16."""
    exp_avg: FlatMoment
    """First moments."""
    exp_avg_sq: FlatMoment
    """Second moments."""
    gradient: Tensor
    """As accumulated; fp32, or the weight's type."""


UpdateRuns = Callable[[FlatBuffers, Sequence[Segment]], None]
"""Updates runs of a unit, or of a chunk of one, in place."""


def update_runs(at: FlatBuffers, segments: Sequence[Segment], *, scaled: Tensor | None = None) -> None:
    """Update runs in place, where their buffers are.

    Args:
        at: Has the runs; the gradient is left as it is, or multiplied with the scales.
        segments: The runs, counted from the beginning of the buffers.
        scaled: Room for `SCALED_ELEMENTS` of a scaled gradient, which stay in the cache; scaled in place if not given.
    """
    for run in segments:
        is_converted = run.update.seed is not None
        size = _CONVERTED_ELEMENTS if is_converted else SCALED_ELEMENTS if run.update.scales else run.stop - run.start
        for first in range(run.start, run.stop, size):
            piece = slice(first, min(first + size, run.stop))
            _update_piece(run.update, at, piece, first=run.skipped + first - run.start, scaled=scaled)


def _update_piece(update: ParamUpdate, at: FlatBuffers, piece: slice, *, first: int, scaled: Tensor | None) -> None:
    part = at.gradient[piece]
    if part.dtype != torch.float32:
        part = part.float()
    for scale in update.scales:
        part = part.mul_(scale) if scaled is None else torch.mul(part, scale, out=scaled[: part.numel()])
    # It counts the step itself.
    # Made where it is used: copied to a GPU, it would have the host wait.
    step = torch.full((), float(update.step - 1), device=part.device)
    stored = at.weight[piece]
    weight = stored if stored.dtype == torch.float32 else stored.float()
    exp_avg, exp_avg_sq = at.exp_avg.read(piece), at.exp_avg_sq.read(piece)
    adamw_step(weight, part, exp_avg, exp_avg_sq, step, hyper=update.hyper)
    if update.seed is None:
        return
    seed = mix(update.seed, update.step)
    at.exp_avg.write(piece, exp_avg, seed=seed, first=first)
    at.exp_avg_sq.write(piece, exp_avg_sq, seed=seed, first=first)
    if weight is not stored:
        stored.copy_(round_to_bf16(weight, seed=rounding_of_weight(seed), first=first))
