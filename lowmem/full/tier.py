"""What the engine needs of the place where weights, gradients and moments are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lowmem.full.adamw import Segment
from lowmem.full.layout import ParamPlace, UnitLayout
from offload import Counters

WEIGHT, EXP_AVG, EXP_AVG_SQ = "weight", "exp_avg", "exp_avg_sq"
FIELDS = (WEIGHT, EXP_AVG, EXP_AVG_SQ)
"""What a unit keeps from step to step, each a flat fp32 buffer. The gradient is a fourth, within a step."""


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """One parameter's gradient of one backward."""

    place: ParamPlace
    """Whose."""
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


class StateTier(Protocol):
    """Keeps the flat buffers of all units: the decoder blocks first, then the parameters outside them.

    A unit's weight is the newest one wherever it is read: an update that has been begun is completed first.
    """

    layouts: tuple[UnitLayout, ...]
    """The units."""

    def lend(self, index: int) -> AbstractContextManager[Tensor]:
        """A block's flat weight for the time of a visit; nobody writes to it meanwhile."""

    def expect(self, order: Sequence[int]) -> None:
        """Have blocks ready for visits in this order."""

    def accumulating(self, index: int, *, adds: bool) -> AbstractContextManager[Callable[[Contribution], None]]:
        """Take the gradients of a block's backward one by one; each may be dropped once it was taken.

        Args:
            index: The block.
            adds: Whether any of them may be added to what was accumulated before.
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

    def change(
        self,
        index: int,
        place: ParamPlace,
        run: Callable[[Tensor, Tensor], None],
        *,
        gradient: Tensor | None,
        scales: Sequence[float],
        upcoming: tuple[int, ParamPlace] | None,
    ) -> None:
        """Let `run` change one parameter's weight in place, now.

        Args:
            index: The unit.
            place: The parameter.
            run: Called with weight and gradient.
            gradient: The gradient of a parameter outside the blocks; None for a block's, which was accumulated.
            scales: What the accumulated gradient is multiplied with first.
            upcoming: Unit and parameter of the accumulated gradient that is used next, to be read meanwhile.
        """

    def end_step(self, step: int, record: dict[str, object]) -> None:
        """Note that all updates of a step have been asked for.

        Args:
            step: Number of the step.
            record: Plain data that belongs to it: what a resumed run needs besides the buffers.
        """

    def finish(self) -> None:
        """Complete all updates; where the tier outlives the process, they are safe there afterwards."""

    def read(self, index: int, field: str, place: ParamPlace) -> Tensor:
        """A copy of a parameter's weight or moment, of its shape."""

    def write(self, index: int, field: str, place: ParamPlace, value: Tensor) -> None:
        """Set a parameter's weight or moment."""

    @property
    def counters(self) -> Counters:
        """What has been read for visits."""

    def reset(self) -> None:
        """End all visits, wherever an exception has left them."""

    def memory(self) -> dict[str, int]:
        """Bytes of memory taken, by role."""

    def close(self) -> None:
        """Give everything back. May be called twice."""


__all__ = ["EXP_AVG", "EXP_AVG_SQ", "FIELDS", "WEIGHT", "Contribution", "StateTier"]
