"""Fine-tune a model that fits in neither device memory nor RAM, exactly, with transformers, PEFT and TRL unmodified."""

from typing import TYPE_CHECKING

from lowmem.errors import UnsupportedError
from offload import Budget

if TYPE_CHECKING:
    from lowmem import optim
    from lowmem.adapters.merge import merge
    from lowmem.api import from_pretrained
    from lowmem.essa.config import ESSAConfig
    from lowmem.essa.trainer import ESSATrainer
    from lowmem.generation.bar import TokenBar
    from lowmem.monitor import Monitor
    from lowmem.planner import plan
    from lowmem.step_plan import Plan

__version__ = "0.1.0"

# Imported when first used: transformers, PEFT and TRL take seconds and hundreds of MB, and a plan needs none of TRL.
_LAZY = {
    "ESSAConfig": "lowmem.essa.config",
    "ESSATrainer": "lowmem.essa.trainer",
    "Monitor": "lowmem.monitor",
    "Plan": "lowmem.step_plan",
    "TokenBar": "lowmem.generation.bar",
    "from_pretrained": "lowmem.api",
    "merge": "lowmem.adapters.merge",
    "plan": "lowmem.planner",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name == "optim":
        return import_module("lowmem.optim")
    if name not in _LAZY:
        raise AttributeError(f"module 'lowmem' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "Budget",
    "ESSAConfig",
    "ESSATrainer",
    "Monitor",
    "Plan",
    "TokenBar",
    "UnsupportedError",
    "from_pretrained",
    "merge",
    "optim",
    "plan",
]
