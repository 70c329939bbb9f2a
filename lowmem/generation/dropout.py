"""Whether a model draws random numbers in its forward, as it does where a trainer generates in train mode."""

from __future__ import annotations

import torch

_FUNCTIONAL = ("attention_dropout", "attn_dropout", "hidden_dropout", "activation_dropout", "layerdrop")


def draws_numbers(model: torch.nn.Module) -> bool:
    """Whether any dropout is on: a module's, or a rate that a module applies by function."""
    return any(module.training and _rate(module) > 0 for module in model.modules())


def _rate(module: torch.nn.Module) -> float:
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return module.p
    rates = (getattr(module, name, 0.0) for name in _FUNCTIONAL)
    return max((rate for rate in rates if isinstance(rate, float)), default=0.0)


__all__ = ["draws_numbers"]
