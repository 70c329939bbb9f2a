"""The random generators' state, so that a recomputation draws the numbers that the forward drew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """State of the CPU generator and of the compute device's."""

    cpu: Tensor
    """As torch.get_rng_state answers."""
    cuda: Tensor | None
    """As torch.cuda.get_rng_state answers; None on a CPU."""


def capture(device: torch.device) -> RandomState:
    """Note the generators' state now."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RandomState(cpu=torch.get_rng_state(), cuda=cuda)


def restore(state: RandomState, device: torch.device) -> None:
    """Put the generators back to where they were."""
    torch.set_rng_state(state.cpu)
    if state.cuda is not None:
        torch.cuda.set_rng_state(state.cuda, device)


def same_state(one: RandomState, other: RandomState) -> bool:
    """Whether nothing was drawn between the two."""
    pairs = ((one.cpu, other.cpu), (one.cuda, other.cuda))
    return all(left is None or right is None or torch.equal(left, right) for left, right in pairs)


class RandomTape:
    """Notes states for later; as long as nothing is drawn, all notes are one.

    Notes live until the backward. Each is small, and on a CPU lies in the heap between a block's temporaries: hundreds
    of them would keep that memory from being used again in large pieces.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin with no note.

        Args:
            device: Compute device.
        """
        self.device = device
        self._last: RandomState | None = None

    def note(self) -> RandomState:
        """The generators' state now."""
        state = capture(self.device)
        if self._last is None or not same_state(self._last, state):
            self._last = state
        return self._last


@contextmanager
def restored(state: RandomState, device: torch.device) -> Iterator[None]:
    """Draw from `state` inside the block; afterwards the generators are where they were before it."""
    outer = capture(device)
    restore(state, device)
    try:
        yield
    finally:
        restore(outer, device)


__all__ = ["RandomState", "RandomTape", "capture", "restore", "restored", "same_state"]
