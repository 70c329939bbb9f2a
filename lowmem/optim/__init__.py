"""Memory-efficient optimizers, as torch optimizers: `lowmem.optim.GaLore(model, lr=...)` and its kin."""

from lowmem.optim.apollo import APOLLO, APOLLOMini
from lowmem.optim.blockwise import LISA, BAdam
from lowmem.optim.frugal import FRUGAL
from lowmem.optim.galore import Fira, GaLore
from lowmem.optim.method import Method
from lowmem.optim.plain import AdaLomo, AdamW
from lowmem.optim.projected_optimizer import Projected

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
