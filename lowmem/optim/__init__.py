"""Memory-efficient optimizers, as torch optimizers: `lowmem.optim.GaLore(model, lr=...)` and its kin."""

from lowmem.optim.blockwise import LISA, BAdam
from lowmem.optim.method import Method
from lowmem.optim.plain import AdaLomo, AdamW
from lowmem.optim.projected_optimizer import Projected
from lowmem.optim.subspace import APOLLO, FRUGAL, APOLLOMini, Fira, GaLore

__all__ = [
    "APOLLO",
    "FRUGAL",
    "LISA",
    "APOLLOMini",
    "AdaLomo",
    "AdamW",
    "BAdam",
    "Fira",
    "GaLore",
    "Method",
    "Projected",
]
