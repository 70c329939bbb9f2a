"""What is told of each visit of a block.

Which rows of a generated batch a block is computing now.

Which blocks come next: the visiting order of forward, backward, and passes without gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Phase = Literal["forward", "backward", "no_grad"]


@dataclass(frozen=True, kw_only=True)
class Visit:
    """The start or the end of one visit of one block, told in the training thread."""

    block: int
    """Number of the block."""
    num_blocks: int
    """How many blocks the model has."""
    phase: Phase
    """A forward that will have a backward, that backward, or a forward without gradients."""
    started: bool
    """True when the visit begins (its weights may still be on their way), False when it has ended."""
    time_ns: int
    """time.perf_counter_ns()."""
    num_tokens: int
    """Tokens of the batch that go through the block, padding included."""


class ActiveRows:
    """Tells modules inside a block which rows of the batch their input's rows are.

    Finished sequences are left out and a prompt may pass in parts, so row 0 of what a module gets need not be row 0 of
    the batch. Modules that treat rows differently (one adapter per row) look here.
    """

    def __init__(self) -> None:
        self.index: Tensor | None = None
        """Numbers of the rows in the batch, shape (rows,), int64; None for all of them in order."""

    @contextmanager
    def set(self, index: Tensor | None) -> Iterator[None]:
        """Announce rows for the time of a `with`."""
        before, self.index = self.index, index
        try:
            yield
        finally:
            self.index = before


@dataclass(eq=False)
class TrainingPass:
    """One forward that awaits its backward. Alive while autograd holds its graph."""

    recorded: list[int] = field(default_factory=list)
    """Blocks that recorded a call, in forward order."""


class VisitingOrder:
    """Predicts the order of visits and tells it whenever a new pass begins.

    A wrong prediction costs time, never correctness: the scheduler fetches whatever block is asked for.
    """

    def __init__(self, num_blocks: int, *, tell: Callable[[Sequence[int]], None]) -> None:
        """Begin with no pass.

        Args:
            num_blocks: Number of blocks.
            tell: Called with the upcoming order, the current visit first.
        """
        self._all = list(range(num_blocks))
        self._tell = tell
        self._phase: Phase | None = None
        self._last = -1
        self._passes: list[weakref.ref[TrainingPass]] = []
        self._last_recorded = self._all
        self._current: TrainingPass | None = None

    def enter(self, block: int, phase: Phase) -> None:
        """Note that a block is about to be visited."""
        forwards = phase != "backward"
        begins = phase != self._phase or (block <= self._last if forwards else block >= self._last)
        if begins:
            if phase == "forward":
                self._begin_training_pass()
            self._tell(self._order(block, phase))
        self._phase, self._last = phase, block

    def record(self, block: int) -> TrainingPass:
        """Note that the block being visited recorded a call; the caller keeps the pass as long as its graph."""
        if self._current is None:
            self._begin_training_pass()
        assert self._current is not None
        self._current.recorded.append(block)
        return self._current

    def forget(self) -> None:
        """After an error: the next visit begins a new pass."""
        self._phase, self._last, self._current = None, -1, None

    def _begin_training_pass(self) -> None:
        if self._current is not None and self._current.recorded:
            self._last_recorded = self._current.recorded
        self._current = TrainingPass()
        self._passes = [ref for ref in self._passes if ref() is not None]
        self._passes.append(weakref.ref(self._current))

    def _order(self, block: int, phase: Phase) -> list[int]:
        ahead = self._all[block:]
        if phase == "forward":
            return ahead + self._last_recorded[::-1] + self._all
        waiting = [training.recorded for ref in self._passes if (training := ref()) is not None and training.recorded]
        if phase == "no_grad":
            # A second pass without gradients in a row: tokens are being generated, one pass each.
            return ahead + (waiting[-1][::-1] if waiting and self._phase != "no_grad" else self._all)
        own = next((recorded for recorded in reversed(waiting) if block in recorded), self._all)
        rest = [index for index in reversed(own) if index <= block]
        return rest + self._all
