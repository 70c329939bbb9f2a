"""Full tuning of a streamed model: lends blocks their weights, takes their gradients, runs their updates.

The `.grad` of a weight whose gradient is accumulated elsewhere: its norm is known, its scale is noted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.full.disk_tier import DiskTier
from lowmem.full.flat import ParamPlace, ParamUpdate, segments_of
from lowmem.full.tier import WEIGHT, Contribution, Edit, StateTier
from lowmem.internals.stand_in import Operator, StandIn
from lowmem.models.absent import AbsentParameter
from lowmem.planning.shapes import OptimizerShape
from offload import JsonObject

_SCALING = frozenset(("mul_", "_foreach_mul_"))
_NORMS = frozenset(("linalg_vector_norm", "_foreach_norm"))


class OffloadedGradient(StandIn):
    """Stands for a gradient that lies in its tier.

    Clipping needs its norm, which is known, and multiplies it, which is noted and done when the weight is updated.
    Other changes in place are written back.
    """

    _tier: StateTier
    _index: int
    _place: ParamPlace
    scales: list[float]
    """What it has been multiplied with since it was accumulated."""
    is_used_up: bool
    """Whether the weight has been updated with it already, within the backward."""
    reduced: ParamPlace | None
    """Where its projection lies, with its norm behind it, if that is all that was kept of it."""
    has_norm: bool
    """Whether the norm that was kept is that of all of it: it came in one piece."""

    @staticmethod
    def of(param: Tensor, tier: StateTier, index: int, place: ParamPlace) -> OffloadedGradient:
        """Make the gradient of one parameter.

        Args:
            param: Has the gradient's shape, dtype and device.
            tier: Where it is accumulated.
            index: The parameter's block.
            place: The parameter's place in the block.
        """
        made = OffloadedGradient.make(param.shape, dtype=param.dtype, device=param.device)
        assert isinstance(made, OffloadedGradient)
        made._tier, made._index, made._place = tier, index, place
        made.scales, made.is_used_up = [], False
        made.reduced, made.has_norm = None, False
        return made

    def read(self) -> Tensor:
        """The true gradient with its scales: a new tensor in the parameter's dtype, on its device.

        Raises:
            UnsupportedError: Only its projection is known.
        """
        if self.reduced is not None:
            raise self._refusal(f"reading the gradient of {self._place.key}")
        value = self._tier.read_gradient(self._index, self._place)
        for scale in self.scales:
            value.mul_(scale)
        return value.to(device=self.device, dtype=self.dtype)

    def check_write(self, by: str) -> None:
        """Refuse to change what the weight has been updated with."""
        if self.is_used_up:
            raise UnsupportedError(
                "gradient clipping (max_grad_norm) with updates in the backward",
                reason=f"{self._place.key} was updated before the norm of all gradients was known",
                instead="max_grad_norm=0, or no update_in_backward",
            )

    def write(self, value: Tensor, by: str) -> None:
        """Replace what was accumulated."""
        self._tier.set_gradient(self._index, self._place, value)
        self.scales.clear()
        self.reduced = None

    def run_without_values(self, func: Operator, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """Norms, multiplication with a number, and zeros."""
        name = func.overloadpacket.__name__
        if name in _NORMS and not self.scales and not kwargs and args in ((), (2,)):
            norm = self._norm()
            return NotImplemented if norm is None else norm.to(device=self.device, dtype=self.dtype)
        if name in ("zero_", "_foreach_zero_"):
            self._tier.clear_gradient(self._index, self._place)
            self.scales.clear()
            # Zeros are known as a whole.
            self.reduced = None
            return None
        factor = _number(args[0]) if name in _SCALING and len(args) == 1 else None
        if factor is None:
            return NotImplemented
        if factor != 1.0:
            self.check_write(name)
            self.scales.append(factor)
        return None

    def _norm(self) -> Tensor | None:
        if self.reduced is None:
            return self._tier.gradient_norm(self._index, self._place)
        if not self.has_norm:
            raise self._refusal(f"the norm of the gradient of {self._place.key} (max_grad_norm)")
        last = replace(self.reduced, shape=torch.Size([1]), start=self.reduced.stop - 1)
        return self._tier.read_gradient(self._index, last)[0]

    def _refusal(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            what,
            reason="of each of several backwards only its projection has left the GPU, or only that of one",
            instead="no clipping, or lowmem.plan(...) with the gradient_accumulation_steps of the run",
        )

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"OffloadedGradient({self._place.key}, shape={tuple(self.shape)}, dtype={self.dtype})"


def _number(factor: object) -> float | None:
    if isinstance(factor, list | tuple) and len(factor) == 1:
        factor = factor[0]
    if isinstance(factor, int | float) or (isinstance(factor, Tensor) and factor.numel() == 1):
        return float(factor)
    return None


@dataclass(frozen=True, kw_only=True)
class TunedParam:
    """One trained parameter of the model."""

    param: torch.nn.Parameter
    """The model's own: absent in a block, real outside."""
    unit: int
    """Number of its unit."""
    place: ParamPlace
    """Where it lies in the unit."""


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """How one parameter's gradient becomes all that its optimizer's next step wants of it."""

    run: Callable[[Tensor], Tensor]
    """Gives a gradient's projection in fp32, where the gradient is."""
    numel: int
    """Elements of that, fewer than the gradient has."""

    def with_norm(self, gradient: Tensor) -> Tensor:
        """The projection of a gradient, flat, and behind it the gradient's 2-norm."""
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        return torch.cat([self.run(gradient).reshape(-1), norm.reshape(1)])


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Where the weights were written last."""

    folder: Path
    """The folder."""
    version: int
    """Which weights: `FullTuning.version` at the time."""
    digest: str
    """Of the weights."""


class FullTuning:
    """Everything that changes from step to step in a model whose every weight is trained.

    Blocks have absent parameters. Their gradients do not go through autograd's accumulation: a block's backward gives
    them away one by one (`taking_gradients`), and `.grad` becomes a stand-in that clipping can use. `zero_grad` drops
    the stand-in, and with it what was accumulated. Parameters outside the blocks are ordinary ones with ordinary
    gradients; their moments are kept in the same tier.

    Args:
        blocks: Each block's absent parameters by name, in visiting order.
        outer: The other parameters by name, tied ones once.
        tier: Keeps their state, one unit for each block, then one for each other parameter.
    """

    def __init__(
        self,
        blocks: Sequence[Mapping[str, torch.nn.Parameter]],
        outer: Mapping[str, torch.nn.Parameter],
        *,
        tier: StateTier,
    ) -> None:
        self.tier = tier
        self.num_blocks = len(blocks)
        units = [*blocks, *({key: param} for key, param in outer.items())]
        places = [{place.key: place for place in layout.places} for layout in tier.layouts]
        self.params: Mapping[str, TunedParam] = {
            key: TunedParam(param=param, unit=unit, place=places[unit][key])
            for unit, params in enumerate(units)
            for key, param in params.items()
        }
        self._keys = {id(entry.param): key for key, entry in self.params.items()}
        for params in blocks:
            for key, param in params.items():
                self._take_gradients_of(key, param)
        self.version = 0
        """Counts changes of weights and moments."""
        self.reductions: Callable[[Sequence[str]], Mapping[str, Reduction]] | None = None
        """How gradients of a block are reduced before they leave the device, by name of those that are; None for none.
        """
        self.updates_now: Callable[[Sequence[str]], Mapping[str, ParamUpdate]] | None = None
        """Settings by name for updates within the backward; None where they wait for `step`."""
        self.optimizer: OptimizerShape | None = None
        """What the optimizer that serves it keeps besides the tier; None before there is one."""
        self.saved: Saved | None = None
        """What `save_pretrained` wrote last."""
        self.stored_shapes: Callable[[], Mapping[str, tuple[int, ...]]] = dict
        """Shapes of what it writes by name."""

    def _take_gradients_of(self, key: str, param: torch.nn.Parameter) -> None:
        """Put a gradient that somebody sets, or that the loss has of a weight itself, into its tier."""
        assert isinstance(param, AbsentParameter)
        # Weakly: the model holds the parameter, and this holds the model's parameters.
        full = weakref.ref(self)

        def take(value: Tensor, *, from_loss: bool = False) -> None:
            owner = full()
            assert owner is not None, "the model holds this"
            owner._replace_gradient(key, value, from_loss=from_loss)

        def after(param: Tensor) -> None:
            if param.grad is not None and not isinstance(param.grad, OffloadedGradient):
                take(param.grad, from_loss=True)

        param.take_gradient = take
        param.after_accumulating(after)

    def _replace_gradient(self, key: str, value: Tensor, *, from_loss: bool) -> None:
        if self.updates_now is not None:
            raise UnsupportedError(
                f"a gradient of {key} from outside its block with updates in the backward",
                reason="its block is updated before the whole gradient is known",
                instead="no update_in_backward",
            )
        entry = self.params[key]
        if from_loss:
            # Each rank's own, like those of the block's visits.
            with self.tier.accumulating(entry.unit, adds=False, stays=False) as keep:
                keep(Contribution(place=entry.place, value=value.view(entry.place.shape), earlier_scales=None))
            self.tier.exchange(entry.unit, {key}, {key: None})
        else:
            self.tier.set_gradient(entry.unit, entry.place, value)
        self._mark_taken(entry.unit, entry.place)

    def key_of(self, param: Tensor) -> str:
        """A parameter's name.

        Raises:
            ValueError: It is not one of the model's.
        """
        key = self._keys.get(id(param))
        if key is None:
            raise ValueError(
                f"a tensor of shape {list(param.shape)} is not a parameter of the model opened with tuning='full'"
            )
        return key

    @contextmanager
    def lend(self, index: int) -> Iterator[dict[str, Tensor]]:
        """A block's newest weights by name for the time of a visit."""
        with self.tier.lend(index) as flat:
            yield {place.key: flat[place.start : place.stop].view(place.shape) for place in self._places(index)}

    @contextmanager
    def taking_gradients(self, index: int, *, in_parts: bool) -> Iterator[Callable[[str, Tensor], None]]:
        """Accumulate the gradients of one backward of a block, each as it comes; whole when the `with` ends.

        Args:
            index: Number of the block.
            in_parts: Whether a weight's gradient comes as several that are added up.

        Yields:
            What takes a weight's gradient, by name; again for each further part of the block's batch.
        """
        places = {place.key: place for place in self._places(index)}
        earlier = {key: self._earlier_scales(key) for key in places}
        kept = [key for key, scales in earlier.items() if scales is not None]
        if kept and self.updates_now is not None:
            raise UnsupportedError(
                "several backwards before optimizer.step() (gradient_accumulation_steps) with updates in the backward",
                reason=f"{kept[0]} was updated within the first of them",
                instead="gradient_accumulation_steps=1, or no update_in_backward",
            )
        reduced = self._reductions_of(places, in_parts=in_parts)
        kept_at = {key: replace(places[key], shape=torch.Size([one.numel + 1])) for key, one in reduced.items()}
        taken: set[str] = set()
        with self.tier.accumulating(index, adds=bool(kept), stays=self.updates_now is not None) as keep:

            def take(key: str, value: Tensor) -> None:
                # What a part of the batch left is added to as it is.
                scales = () if key in taken else earlier[key]
                taken.add(key)
                if key in reduced:
                    value = reduced[key].with_norm(value)
                keep(Contribution(place=kept_at.get(key, places[key]), value=value, earlier_scales=scales))

            yield take
        taken = set(self.tier.exchange(index, taken, earlier))
        for key in taken:
            self._mark_taken(index, places[key], reduced=kept_at.get(key), is_whole=not in_parts and key not in kept)
        if taken and self.updates_now is not None:
            self.version += 1
            segments = segments_of(self.tier.layouts[index], self.updates_now([key for key in places if key in taken]))
            if segments:
                self.tier.update(index, segments, None)

    def _reductions_of(self, places: Mapping[str, ParamPlace], *, in_parts: bool) -> Mapping[str, Reduction]:
        """How a backward's gradients of a block are reduced, those that are.

        A gradient whose norm would not be known is left as it is, unless one of this step was reduced before.
        """
        if self.reductions is None:
            return {}
        grads = {key: self.params[key].param.grad for key in places}
        earlier = {key for key, grad in grads.items() if isinstance(grad, OffloadedGradient) and grad.reduced}
        first = {key for key, grad in grads.items() if grad is None}
        found = self.reductions(sorted(earlier if in_parts else earlier | first))
        if earlier - set(found):
            raise UnsupportedError(
                f"keeping the gradient of {min(earlier - set(found))} after optimizer.step()",
                reason="only its projection is known, and the next step takes another one",
                instead="optimizer.zero_grad() after each step, as the Trainer does",
            )
        return found

    def _earlier_scales(self, key: str) -> tuple[float, ...] | None:
        """What the gradient that was accumulated before is multiplied with first; None where there is none."""
        grad = self.params[key].param.grad
        if grad is not None and not isinstance(grad, OffloadedGradient):
            raise UnsupportedError(
                f"setting the gradient of {key}",
                reason="it is accumulated outside of the model",
                instead="the loss, or torch.nn.utils.clip_grad_norm_",
            )
        return None if grad is None else tuple(grad.scales)

    def _mark_taken(
        self, index: int, place: ParamPlace, *, reduced: ParamPlace | None = None, is_whole: bool = True
    ) -> None:
        param = self.params[place.key].param
        grad = param.grad
        if isinstance(grad, OffloadedGradient):
            grad.scales.clear()
        else:
            param.grad = grad = OffloadedGradient.of(param, self.tier, index, place)
            grad.is_used_up = self.updates_now is not None
        grad.reduced, grad.has_norm = reduced, is_whole

    def step(self, updates: Mapping[str, ParamUpdate], *, number: int, record: dict[str, object]) -> None:
        """Update every parameter that has settings and a gradient.

        Args:
            updates: Settings by parameter name, without scales.
            number: Number of the step, for the tiers that outlive the process.
            record: Plain data that belongs to it.
        """
        self.version += 1
        self.tier.begin_step()
        # What the next forward needs first comes first.
        for unit in [*range(self.num_blocks, len(self.tier.layouts)), *range(self.num_blocks)]:
            layout = self.tier.layouts[unit]
            scaled = {
                place.key: self._with_scales(place.key, updates[place.key])
                for place in layout.places
                if place.key in updates
            }
            segments = segments_of(layout, scaled)
            if segments:
                self.tier.update(unit, segments, self._outer_gradient(unit))
                self._forget_scales(unit)
        self.tier.end_step(number, record)

    def change(
        self,
        key: str,
        run: Callable[[Tensor, Tensor], None],
        *,
        gradient: Tensor | None,
        upcoming: str | None = None,
    ) -> None:
        """Let a rule change one weight now.

        Args:
            key: The parameter.
            run: Called with weight and gradient, both fp32 and of the parameter's shape, or with what it was reduced
                to; changes the weight in place, and may change the gradient.
            gradient: The gradient of a parameter outside the blocks; None for one that was accumulated.
            upcoming: The next parameter with an accumulated gradient that is changed.
        """
        entry = self.params[key]
        self.version += 1
        grad = entry.param.grad
        scales = tuple(grad.scales) if isinstance(grad, OffloadedGradient) else ()
        after = None if upcoming is None else self.params[upcoming]
        following = None if after is None else (after.unit, after.place)
        edit = Edit(
            unit=entry.unit,
            place=entry.place,
            run=run,
            gradient=gradient,
            reduced=grad.reduced if isinstance(grad, OffloadedGradient) else None,
            scales=scales,
            upcoming=following,
        )
        self.tier.change(edit)
        if isinstance(grad, OffloadedGradient):
            grad.scales.clear()

    def finish(self) -> None:
        """Complete all updates."""
        self.tier.finish()

    def adopt(self, folder: Path | None = None) -> JsonObject:
        """Go on from a state on disk: from what this or an earlier run committed last, or from a checkpoint's.

        Args:
            folder: The checkpoint's folder of state; None for the run's own folder.

        Returns:
            What `step` was given with it.

        Raises:
            UnsupportedError: State is kept in memory.
            SourceError: There is no such state.
        """
        if not isinstance(self.tier, DiskTier):
            raise UnsupportedError(
                "going on from state on disk",
                reason="this run keeps its state in memory",
                instead="a budget with Budget.disk that puts the state on disk",
            )
        self.version += 1
        return self.tier.adopt(folder)

    def read(self, key: str, field: str = WEIGHT) -> Tensor:
        """A copy of a parameter's newest weight or moment."""
        entry = self.params[key]
        return self.tier.read(entry.unit, field, entry.place)

    def write(self, key: str, value: Tensor, field: str = WEIGHT) -> None:
        """Set a parameter's weight or moment."""
        entry = self.params[key]
        if value.shape != entry.place.shape:
            raise ValueError(f"{key}: expected shape {list(entry.place.shape)}, got {list(value.shape)}")
        self.version += 1
        self.tier.write(entry.unit, field, entry.place, value)

    def _places(self, unit: int) -> tuple[ParamPlace, ...]:
        return self.tier.layouts[unit].places

    def _with_scales(self, key: str, update: ParamUpdate) -> ParamUpdate:
        grad = self.params[key].param.grad
        if not isinstance(grad, OffloadedGradient) or not grad.scales:
            return update
        return replace(update, scales=tuple(grad.scales))

    def _forget_scales(self, unit: int) -> None:
        for place in self._places(unit):
            grad = self.params[place.key].param.grad
            if isinstance(grad, OffloadedGradient):
                grad.scales.clear()

    def _outer_gradient(self, unit: int) -> Tensor | None:
        if unit < self.num_blocks:
            return None
        (place,) = self._places(unit)
        grad = self.params[place.key].param.grad
        assert grad is not None, "only parameters with gradients are updated"
        return grad.reshape(-1)
