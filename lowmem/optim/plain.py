"""Optimizers that look at the whole gradient of every parameter: AdamW and AdaLomo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lowmem.optim.adalomo import AdaLomoRule
from lowmem.optim.adamw import AdamWRule
from lowmem.optim.groups import groups_of_module
from lowmem.optim.moments import STATE_DTYPES
from lowmem.optim.optimizer import RuleOptimizer
from lowmem.optim.rule import Hyper, Place, Rule
from lowmem.optim.writer import WRITERS


class AdamW(RuleOptimizer):
    """AdamW, bitwise `torch.optim.AdamW(fused=True)` with the defaults (with `fused=False`, `foreach=False`).

    Of a model, norms and biases do not decay.

    Args:
        params: As `RuleOptimizer`.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled.
        fused: torch's fused kernel or its plain operations.
        state_dtype: "fp32", "bf16" (stochastic rounding) or "8bit" (blocks of 256; moments of fewer than 4096 values
            stay fp32); None: the parameter's dtype, as torch does it.
        writer: How bf16 weights are written: "nearest" as torch does it, "stochastic", "kahan", or "fp32" for a master
            copy.
        seed: Of stochastic rounding.
    """

    method_name: ClassVar[str] = "AdamW"

    def __init__(
        self,
        params: nn.Module | ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        fused: bool = True,
        state_dtype: str | None = None,
        writer: str = "nearest",
        seed: int = 0,
    ) -> None:
        if state_dtype is not None and state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype={state_dtype!r}: expected None or one of {', '.join(STATE_DTYPES)}")
        _check_writer(writer)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed}
        super().__init__(params, {**defaults, "fused": fused, "state_dtype": state_dtype, "writer": writer})

    def _groups_of(self, model: nn.Module) -> ParamsT:
        return groups_of_module(model)

    def _rule(self, group: Mapping[str, Any], place: Place, param: Tensor) -> Rule:
        return AdamWRule(
            state_dtype=group["state_dtype"], writer=group["writer"], fused=group["fused"], seed=place.own_seed
        )


class AdaLomo(RuleOptimizer):
    """AdaLomo (arXiv 2310.10195) on all parameters: keeps one value per row and column of a matrix, and no momentum.

    Args:
        params: As `RuleOptimizer`.
        lr: Relative to each weight's root mean square; the paper fine-tunes with 5e-4.
        weight_decay: Decoupled.
        eps: Added to g^2; smallest root mean square of a weight.
        clip_threshold: Largest root mean square of the normalised update.
        decay_rate: Second moments decay by 1 - t^decay_rate.
        writer: How bf16 weights are written, see `AdamW`.
        seed: Of stochastic rounding.
    """

    method_name: ClassVar[str] = "AdaLomo"

    def __init__(
        self,
        params: nn.Module | ParamsT,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        writer: str = "stochastic",
        seed: int = 0,
    ) -> None:
        _check_writer(writer)
        if clip_threshold <= 0 or not -1 <= decay_rate < 0:
            raise ValueError(
                f"clip_threshold={clip_threshold}, decay_rate={decay_rate}: expected above 0, and in [-1, 0)"
            )
        defaults = {"lr": lr, "weight_decay": weight_decay, "eps": eps, "clip_threshold": clip_threshold}
        super().__init__(params, {**defaults, "decay_rate": decay_rate, "writer": writer, "seed": seed})

    def hyper(self, group: Mapping[str, Any]) -> Hyper:
        """There are no betas, and eps belongs to the rule."""
        return Hyper(
            lr=float(group["lr"]),
            betas=(0.0, 0.0),
            eps=0.0,
            weight_decay=float(group["weight_decay"]),
            clock=int(group["clock"]),
        )

    def _groups_of(self, model: nn.Module) -> ParamsT:
        return groups_of_module(model)

    def _rule(self, group: Mapping[str, Any], place: Place, param: Tensor) -> Rule:
        return AdaLomoRule(
            eps=tuple(group["eps"]),
            clip_threshold=group["clip_threshold"],
            decay_rate=group["decay_rate"],
            writer=group["writer"],
            seed=place.own_seed,
        )


def _check_writer(writer: str) -> None:
    if writer not in WRITERS:
        raise ValueError(f"writer={writer!r}: expected one of {', '.join(WRITERS)}")
