"""Random numbers that follow from integers alone: nothing to save, the same after a resume.

What an optimizer does to one parameter, wherever its weight and gradient are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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
    """One parameter's update. Holds no tensors: everything that changes is in the state, which is the caller's."""

    def is_active(self, clock: int) -> bool:
        """Whether the parameter is updated at all in the step after `clock` completed ones; if not, drop its state."""
        del clock
        return True

    def num_flops(self) -> int:
        """Operations of the products of one update: what it does besides to each element is left out."""
        return 0

    def relative_time(self, weight_dtype: torch.dtype) -> float:
        """What an update does to each element, in the time that torch's fused AdamW takes, products left out.

        Args:
            weight_dtype: Type of the weight.
        """
        del weight_dtype
        return 1.0

    def temporary_values(self, weight: Tensor) -> int:
        """fp32 values that an update holds at its largest, besides the weight, its gradient and the state.

        Args:
            weight: The weight, or one on the meta device.
        """
        del weight
        return 0

    @abstractmethod
    def init(self, weight: Tensor) -> State:
        """The state before the first step: every tensor there will ever be, in its final shape and dtype.

        Counters are scalars on the CPU, the rest is on the weight's device. A weight on the meta device gives the
        sizes.
        """

    @abstractmethod
    def update(self, weight: Tensor, gradient: Tensor, state: State, hyper: Hyper) -> None:
        """Change the weight in place, weight decay included, and advance the state.

        The same call with the same state gives the same bits on the same device.

        Args:
            weight: The weight, fp32 or bf16.
            gradient: The whole step's gradient, of the same shape; may be changed.
            state: What `init` made, as earlier steps have left it.
            hyper: The numbers of this step.
        """


def counter(value: int = 0) -> Tensor:
    """A counter for the state: an int64 scalar on the CPU, so that reading it never waits for a device."""
    return torch.tensor(value, dtype=torch.int64, device="cpu")
