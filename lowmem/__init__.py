"""Fine-tune a model that fits in neither device memory nor RAM, exactly, with transformers, PEFT and TRL unmodified."""

import logging
from typing import TYPE_CHECKING

from lowmem.errors import UnsupportedError
from offload import Budget

if TYPE_CHECKING:
    from lowmem import full, optim
    from lowmem.adapters.expert_export import export_experts
    from lowmem.adapters.merge import merge
    from lowmem.api import from_pretrained, plan
    from lowmem.essa.trainer import ESSAConfig, ESSATrainer
    from lowmem.machines.cards import Machine
    from lowmem.monitoring.monitor import Monitor
    from lowmem.monitoring.progress import TokenBar
    from lowmem.packing.place import pack
    from lowmem.planning.plan import Plan

__version__ = "0.1.0"

# PEFT imports bitsandbytes where that is installed, which then asks, on processors with bf16 instructions, for a
# package of kernels. Streamed weights do not go through them: they are unpacked block by block.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "kernels-community" not in record.getMessage()
)

# Imported when first used: transformers, PEFT and TRL take seconds and hundreds of MB, and a plan needs none of TRL.
_LAZY = {
    "ESSAConfig": "lowmem.essa.trainer",
    "ESSATrainer": "lowmem.essa.trainer",
    "Machine": "lowmem.machines.cards",
    "Monitor": "lowmem.monitoring.monitor",
    "Plan": "lowmem.planning.plan",
    "TokenBar": "lowmem.monitoring.progress",
    "export_experts": "lowmem.adapters.expert_export",
    "from_pretrained": "lowmem.api",
    "merge": "lowmem.adapters.merge",
    "pack": "lowmem.packing.place",
    "plan": "lowmem.api",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in ("full", "optim"):
        return import_module(f"lowmem.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'lowmem' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "Budget",
    "ESSAConfig",
    "ESSATrainer",
    "Machine",
    "Monitor",
    "Plan",
    "TokenBar",
    "UnsupportedError",
    "export_experts",
    "from_pretrained",
    "full",
    "merge",
    "optim",
    "pack",
    "plan",
]
