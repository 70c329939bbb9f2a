"""Memory-efficient optimizers, as torch optimizers: `lowmem.optim.GaLore(model, lr=...)` and its kin."""

from lowmem.optim.blockwise import LISA, BAdam
from lowmem.optim.method import Method
from lowmem.optim.methods import APOLLO, FRUGAL, APOLLOMini, Fira, GaLore, Projected
from lowmem.optim.plain import AdaLomo, AdamW

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
