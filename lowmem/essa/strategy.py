"""Separable CMA-ES: an evolution strategy with one variance per coordinate. Pure arithmetic on vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_MOST_STEPS = 1 << 40
"""Beyond them the generator's seed, which follows from the step, would overflow."""


class SeparableCma:
    """Maximises a noisy function of a vector from what groups of candidates score.

    R. Ros and N. Hansen, "A Simple Modification in CMA-ES Achieving Linear Time and Space Complexity" (PPSN 2008): the
    CMA-ES of Hansen's tutorial (arXiv:1604.00772, section 4 and table 1) with a diagonal covariance, whose learning
    rates are larger by (n + 2) / 3. Candidates come in mirrored pairs, mean + d and mean - d, which differs from it.

    Args:
        start: Mean to begin with, shape (n,); fp64 is used throughout.
        sigma: Standard deviation to begin with, of each coordinate.
        population_size: Candidates of a step; even.
        seed: Of the candidates, which depend on it and on the step's number only.
    """

    def __init__(self, start: Tensor, *, sigma: float, population_size: int, seed: int) -> None:
        n = start.numel()
        self._population_size, self._seed = population_size, seed
        self.mean = start.detach().to(torch.float64).clone()
        self.sigma = float(sigma)
        self.num_steps = 0
        self._variance = torch.ones(n, dtype=torch.float64)
        self._path = torch.zeros(n, dtype=torch.float64)
        self._sigma_path = torch.zeros(n, dtype=torch.float64)
        half = population_size // 2
        weights = math.log(half + 0.5) - torch.arange(1, half + 1, dtype=torch.float64).log()
        self._weights = weights / weights.sum()
        self._effective = mu = 1.0 / float(self._weights.square().sum())
        self._rate_sigma = (mu + 2) / (n + mu + 5)
        self._damping = 1 + 2 * max(0.0, math.sqrt((mu - 1) / (n + 1)) - 1) + self._rate_sigma
        self._rate_path = (4 + mu / n) / (n + 4 + 2 * mu / n)
        faster = (n + 2) / 3
        self._rate_one = min(1.0, faster * 2 / ((n + 1.3) ** 2 + mu))
        self._rate_rank = min(1 - self._rate_one, faster * 2 * (mu - 2 + 1 / mu) / ((n + 2) ** 2 + mu))
        self._expected_norm = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))

    def ask(self) -> Tensor:
        """The candidates of the next step, shape (population, n), fp64. The same until `tell`."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.num_steps)
        half = torch.randn(self._population_size // 2, self.mean.numel(), generator=generator, dtype=torch.float64)
        return self.mean + self.sigma * self._variance.sqrt() * torch.cat([half, -half])

    def tell(self, scores: Tensor) -> None:
        """Move towards the candidates that scored best.

        Args:
            scores: Of the candidates that `ask` gave, shape (population,); higher is better.

        Raises:
            ValueError: A score is missing or not a number.
        """
        if scores.shape != (self._population_size,) or not bool(scores.isfinite().all()):
            raise ValueError(f"scores: expected {self._population_size} finite numbers, got {scores.tolist()}")
        order = scores.argsort(descending=True, stable=True)[: self._population_size // 2]
        steps = (self.ask()[order] - self.mean) / self.sigma
        step = self._weights @ steps
        n, mu = self.mean.numel(), self._effective
        self.mean = self.mean + self.sigma * step
        self._sigma_path = (1 - self._rate_sigma) * self._sigma_path + math.sqrt(
            self._rate_sigma * (2 - self._rate_sigma) * mu
        ) * step / self._variance.sqrt()
        self.num_steps += 1
        norm = float(self._sigma_path.norm())
        settled = norm / math.sqrt(1 - (1 - self._rate_sigma) ** (2 * self.num_steps))
        is_steady = settled < (1.4 + 2 / (n + 1)) * self._expected_norm
        self._path = (1 - self._rate_path) * self._path
        if is_steady:
            self._path = self._path + math.sqrt(self._rate_path * (2 - self._rate_path) * mu) * step
        lost = 0.0 if is_steady else self._rate_one * self._rate_path * (2 - self._rate_path)
        self._variance = (
            (1 - self._rate_one - self._rate_rank + lost) * self._variance
            + self._rate_one * self._path.square()
            + self._rate_rank * (self._weights @ steps.square())
        )
        self.sigma *= math.exp((self._rate_sigma / self._damping) * (norm / self._expected_norm - 1))

    def state_dict(self) -> dict[str, Tensor | float | int]:
        """What a resumed run needs: tensors and numbers."""
        return {
            "mean": self.mean,
            "sigma": self.sigma,
            "num_steps": self.num_steps,
            "variance": self._variance,
            "path": self._path,
            "sigma_path": self._sigma_path,
        }

    def check_state_dict(self, state: Mapping[str, object]) -> None:
        """See that `load_state_dict` can go on from it.

        Raises:
            ValueError: It is of another number of coordinates, or holds what `state_dict` does not give; says which
                field.
        """
        expected = self.state_dict()
        if state.keys() != expected.keys():
            raise ValueError(f"expected the fields {', '.join(expected)}")
        for name, own in expected.items():
            if isinstance(own, Tensor):
                check_tensor(name, state[name], like=own)
        sigma, num_steps, variance = state["sigma"], state["num_steps"], state["variance"]
        if type(sigma) is not float or not 0 < sigma < math.inf:
            raise ValueError("sigma: expected a finite number above 0")
        if type(num_steps) is not int or not 0 <= num_steps < _MOST_STEPS:
            raise ValueError("num_steps: expected a number of steps")
        assert isinstance(variance, Tensor), "as the one beside it"
        if bool((variance <= 0).any()):
            raise ValueError("variance: expected numbers above 0")

    def load_state_dict(self, state: Mapping[str, Tensor | float | int]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            ValueError: It cannot; nothing is changed.
        """
        self.check_state_dict(state)
        self.sigma, self.num_steps = float(state["sigma"]), int(state["num_steps"])
        self.mean, self._variance, self._path, self._sigma_path = (
            torch.as_tensor(state[name]) for name in ("mean", "variance", "path", "sigma_path")
        )


def check_tensor(name: str, value: object, *, like: Tensor) -> None:
    """See that a stored value can take a tensor's place.

    Raises:
        ValueError: It is no tensor of the same shape and type, or has values that are no numbers.
    """
    if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
        found = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected {like.dtype} of shape {list(like.shape)}, got {found}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers")
