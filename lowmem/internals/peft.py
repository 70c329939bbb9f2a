"""Which adapters a block's modules apply: PEFT's own flags, read, compared, and set for the time of one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lowmem.models.absent import AbsentParameter

Flags = tuple[bool, str | tuple[str, ...]]
"""Of one adapted module: whether its adapters are disabled, and which are active."""


BlockFlags = tuple[Flags, ...]
"""Of a block's adapted modules in `modules()` order."""


_DISABLED, _ACTIVE = "_disable_adapters", "_active_adapter"


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _adapted(block: torch.nn.Module) -> Iterator[torch.nn.Module]:
    return (module for module in block.modules() if hasattr(module, _DISABLED))


def read_flags(block: torch.nn.Module) -> BlockFlags:
    """The flags as they are: what PEFT's `disable_adapter` and `set_adapter` change."""
    return tuple((bool(getattr(module, _DISABLED)), _frozen(getattr(module, _ACTIVE))) for module in _adapted(block))


def _frozen(active: object) -> str | tuple[str, ...]:
    return active if isinstance(active, str) else tuple(active)  # type: ignore[arg-type]


@contextmanager
def flags_set(block: torch.nn.Module, flags: BlockFlags) -> Iterator[None]:
    """Run a block with other flags; whether adapters require gradients stays as it is."""
    modules = list(_adapted(block))
    before = [(getattr(module, _DISABLED), getattr(module, _ACTIVE)) for module in modules]
    try:
        for module, (disabled, active) in zip(modules, flags, strict=True):
            setattr(module, _DISABLED, disabled)
            setattr(module, _ACTIVE, active if isinstance(active, str) else list(active))
        yield
    finally:
        for module, (disabled, active) in zip(modules, before, strict=True):
            setattr(module, _DISABLED, disabled)
            setattr(module, _ACTIVE, active)


def weight_marks(blocks: Sequence[torch.nn.Module]) -> tuple[object, ...]:
    """What changes when any weight of the adapters does: identities, versions, and sums over their bits.

    Some optimizers write through raw pointers, which no version counts: hence the bits.
    """
    params = [param for block in blocks for param in block.parameters() if type(param) is not AbsentParameter]
    sums = [_bit_sum(param) for param in params]
    return (
        tuple((id(param), param._version) for param in params),
        tuple(torch.stack(sums).tolist()) if sums else (),
    )


def _bit_sum(param: Tensor) -> Tensor:
    return param.detach().contiguous().view(_BITS[param.element_size()]).sum(dtype=torch.int64)


__all__ = ["BlockFlags", "Flags", "flags_set", "read_flags", "weight_marks"]
