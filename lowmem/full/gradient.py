"""The `.grad` of a weight whose gradient is accumulated elsewhere: its norm is known, its scale is noted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.full.flat import ParamPlace
from lowmem.full.tier import Contribution, StateTier
from lowmem.internals.stand_in import Operator, StandIn

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
        with self._tier.accumulating(self._index, adds=False, stays=False) as keep:
            keep(Contribution(place=self._place, value=value.view(self._place.shape), earlier_scales=None))
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
