"""What is told of each visit of a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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


__all__ = ["Phase", "Visit"]
