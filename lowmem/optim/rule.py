"""Random numbers that follow from integers alone: nothing to save, the same after a resume.

What an optimizer does to one parameter, in three phases that an engine may run at different times and places.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """A seed from several integers, by SplitMix64's finaliser; below 2**63."""
    seed = 0
    for value in values:
        seed = (seed + (value & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) & _MASK
        seed ^= seed >> 31
    return seed >> 1


def generator(seed: int, device: torch.device) -> torch.Generator:
    """A generator on `device`. Its numbers are the same on every device of that kind, not between CPU and CUDA."""
    return torch.Generator(device=device).manual_seed(seed)


State = dict[str, Tensor]


Payload = dict[str, Tensor]


Update = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """The numbers of one optimizer step, as its parameter group had them when `step()` was called."""

    lr: float
    """Learning rate."""
    betas: tuple[float, float]
    """Decay of the first and of the second moment."""
    eps: float
    """Added to the denominator."""
    weight_decay: float
    """Decoupled: W is multiplied by 1 - lr * weight_decay."""
    clock: int
    """Optimizer steps completed before this one."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a parameter stands among those of its optimizer: what seeds, staggering and block schedules follow from."""

    index: int
    """Position among all parameters of the optimizer."""
    turn: int = 0
    """Position among the parameters that share their work out over steps: the matrices that are projected."""
    num_turns: int = 1
    """Number of these."""
    seed: int = 0
    """Seed of the optimizer."""
    block: int | None = None
    """Number of the decoder block that it belongs to, if any."""
    num_blocks: int = 0
    """Number of decoder blocks."""

    @property
    def own_seed(self) -> int:
        """Seed of this parameter's random numbers."""
        return mix(self.seed, self.index)


class Rule(ABC):
    """One parameter's update. Holds no tensors: everything that changes is in the state, which is the caller's.

    The order for one step is `reduce`, `solve`, `apply`, each once; `reduce` once per gradient (micro-batch or backward
    pass) where payloads may be added. The same calls with the same state give the same bits on the same device.
    """

    @property
    @abstractmethod
    def needs_full_gradient(self) -> bool:
        """Whether the payload holds the gradient itself, so that deferring the update means keeping it."""

    @property
    @abstractmethod
    def payload_is_linear(self) -> bool:
        """Whether payloads of parts of a step may be added. If not, add the gradients and reduce once."""

    @property
    def reduce_state(self) -> frozenset[str]:
        """Names of the state that `reduce` reads or writes; the rest is needed by `solve` and `apply` only."""
        return frozenset()

    def is_active(self, clock: int) -> bool:
        """Whether the parameter is updated at all in the step after `clock` completed ones; if not, call `retire`."""
        del clock
        return True

    def retire(self, state: State) -> None:
        """Drop the state of a parameter that is not active."""
        state.clear()

    def reduces_once(self, state: State) -> bool:
        """Whether this step's `reduce` has to be given the whole step's gradient, in one call."""
        del state
        return not self.payload_is_linear

    @abstractmethod
    def init(self, weight: Tensor) -> State:
        """The state before the first step: every tensor there will ever be, in its final shape and dtype.

        Counters are scalars on the CPU, the rest is on the weight's device. A weight on the meta device gives the
        sizes.
        """

    @abstractmethod
    def reduce(self, gradient: Tensor, state: State) -> Payload:
        """Reduce a gradient to what `solve` needs. Runs on the gradient's device; may refresh a basis in the state.

        The payload may share memory with the gradient.
        """

    def scale(self, payload: Payload, factor: float | Tensor) -> Payload:
        """The payload of `factor` times the gradient (clipping), for a factor above zero."""
        return {name: value * factor for name, value in payload.items()}

    def add(self, payload: Payload, other: Payload) -> None:
        """Add a second payload of the same step to the first, in place.

        Raises:
            ValueError: The payload is not linear in the gradient.
        """
        if not self.payload_is_linear:
            raise ValueError("payloads that are not linear in the gradient cannot be added; add the gradients")
        for name, value in other.items():
            payload[name].add_(value)

    @abstractmethod
    def solve(self, payload: Payload, state: State, hyper: Hyper) -> Update:
        """Turn a step's payload into the update of the weight, advancing the state."""

    @abstractmethod
    def apply(self, weight: Tensor, update: Update, state: State, hyper: Hyper) -> None:
        """Change the weight in place, weight decay included."""

    def state_bytes(self, shape: Iterable[int], dtype: torch.dtype) -> int:
        """Bytes of the state of an active parameter of this shape and dtype, counters included."""
        state = self.init(torch.empty(tuple(shape), dtype=dtype, device="meta"))
        return sum(value.nbytes for value in state.values())


def counter(value: int = 0) -> Tensor:
    """A counter for the state: an int64 scalar on the CPU, so that reading it never waits for a device."""
    return torch.tensor(value, dtype=torch.int64, device="cpu")
