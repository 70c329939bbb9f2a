"""Settings of an ESSA run, named as TRL's configurations name them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ESSAConfig:
    """How to evolve an adapter's singular values."""

    output_dir: str
    """Folder for the adapter and for checkpoints."""
    max_steps: int = 100
    """Generations of the evolution strategy."""
    per_device_train_batch_size: int = 8
    """Prompts of a step; every member of the population answers all of them."""
    population_size: int = 16
    """Members of the population, in mirrored pairs."""
    sigma: float = 0.1
    """Standard deviation to begin with, in units of the mean singular value of each adapted layer."""
    generation_batch_size: int | None = None
    """Rows generated together at most, rounded down to whole members; None for the whole population at once."""
    max_completion_length: int = 256
    """Tokens of a completion."""
    temperature: float = 0.0
    """0 answers greedily, so that members differ by their values only; else as in `generate`."""
    reward_weights: tuple[float, ...] | None = None
    """Of the reward functions; 1 each if not given."""
    logging_steps: int = 1
    """Steps between two entries of the log."""
    save_steps: int = 50
    """Steps between two checkpoints; 0 for none."""
    seed: int = 0
    """Of prompts, members and samples."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "per_device_train_batch_size", "max_completion_length", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.population_size < 4 or self.population_size % 2:
            raise ValueError(f"population_size={self.population_size}: expected an even number of at least 4")
        if self.sigma <= 0:
            raise ValueError(f"sigma={self.sigma}: expected more than 0")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: expected 0 or more")
        if self.save_steps < 0:
            raise ValueError(f"save_steps={self.save_steps}: expected 0 or more")
        rows = self.generation_batch_size
        if rows is not None and rows < self.per_device_train_batch_size:
            raise ValueError(
                f"generation_batch_size={rows}: a member answers {self.per_device_train_batch_size} prompts at once; "
                "give at least as many"
            )


__all__ = ["ESSAConfig"]
