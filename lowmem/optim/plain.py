"""AdamW on the whole gradient: torch's own kernel, with moments and weights in the types that were asked for.

AdaLomo: a factored second moment, no first moment, and updates in proportion to the weight.

Optimizers that look at the whole gradient of every parameter: AdamW and AdaLomo.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from lowmem.optim.optimizer import RuleOptimizer, arguments
from lowmem.optim.projected import limit_update_rms, norm_of_matrices
from lowmem.optim.rule import Hyper, Place, Rule, State, counter, mix
from lowmem.optim.state import (
    ENCODING_COPIES,
    ROUNDING_COPIES,
    STATE_DTYPES,
    WRITERS,
    check_writable,
    descend,
    new_moment,
    new_writer_state,
    read_moment,
    read_weight,
    write_moment,
    write_weight,
)


def adamw_step(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    hyper: Hyper,
    fused: bool = True,
) -> None:
    """Update a weight and its moments in place, as torch does; `step` counts the steps before this one, and goes up."""
    adamw(
        [weight],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step],
        foreach=False,
        fused=fused,
        amsgrad=False,
        beta1=hyper.betas[0],
        beta2=hyper.betas[1],
        lr=hyper.lr,
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        maximize=False,
    )


@dataclass(frozen=True, kw_only=True)
class AdamWRule(Rule):
    """AdamW (arXiv 1711.05101), bitwise torch's where state and weights are as torch has them."""

    state_dtype: str | None = None
    """"fp32", "bf16" (stochastic rounding) or "8bit"; None: the weight's own type, as torch does it."""
    writer: str = "nearest"
    """How bf16 weights are written; see `lowmem.optim.state`."""
    fused: bool = True
    """torch's fused kernel (what transformers' Trainer uses), or its plain loop of operations."""
    seed: int = 0
    """Seed of stochastic rounding."""

    def flat_moments(self, weight_dtype: torch.dtype) -> str | None:
        """How moments are stored where this rule can run on flat buffers, element by element; None where it cannot.

        Args:
            weight_dtype: Type of the weight.

        Returns:
            "fp32", "bf16" or "8bit".
        """
        is_exact = weight_dtype == torch.float32
        if not self.fused or not (is_exact or self.writer == "stochastic"):
            return None
        return self.state_dtype or ("fp32" if is_exact else "bf16")

    def relative_time(self, weight_dtype: torch.dtype) -> float:
        """See `Rule.relative_time`; benchmarks/moment_formats.py, on one thread."""
        if self.state_dtype is None and self.writer == "nearest":
            # All in the weight's type, by torch's kernel.
            return 1.0
        moments = self.state_dtype or ("fp32" if weight_dtype == torch.float32 else "bf16")
        return 1.0 + (0.0 if weight_dtype == torch.float32 else 4.5) + (0.0 if moments == "fp32" else 9.0)

    def temporary_values(self, weight: Tensor) -> int:
        """See `Rule.temporary_values`: what is not fp32 is made so, and is rounded one after the other."""
        if self.state_dtype is None and self.writer == "nearest":
            return 0
        moments = self.state_dtype or ("fp32" if weight.dtype == torch.float32 else "bf16")
        exact = 0 if weight.dtype == torch.float32 else 1
        num_moments = 0 if moments == "fp32" else 2
        rounding = {"fp32": 0, "bf16": ROUNDING_COPIES, "8bit": ENCODING_COPIES}[moments]
        if exact and self.writer == "stochastic":
            rounding = max(rounding, ROUNDING_COPIES)
        # The gradient in fp32 is gone by the time anything is rounded.
        return ceil((exact + num_moments + max(exact, rounding)) * weight.numel())

    def init(self, weight: Tensor) -> State:
        """The `step` of torch (fp32), `exp_avg` and `exp_avg_sq`, and what the writer keeps."""
        check_writable(weight)
        state: State = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            if self.state_dtype is None:
                state[name] = torch.zeros_like(weight, memory_format=torch.preserve_format)
            else:
                moment = new_moment(
                    name, weight.shape, state_dtype=self.state_dtype, signed=signed, device=weight.device
                )
                state.update(moment)
        return state | new_writer_state(self.writer, weight)

    def update(self, weight: Tensor, gradient: Tensor, state: State, hyper: Hyper) -> None:
        """One AdamW step: torch's kernel computes and applies the update in one pass over memory."""
        if self.state_dtype is None and self.writer == "nearest":
            self._step(weight, gradient.to(weight.dtype), state["exp_avg"], state["exp_avg_sq"], state, hyper)
            return
        exact = read_weight(weight, state)
        moments = [read_moment(state, name, weight.shape).float() for name in ("exp_avg", "exp_avg_sq")]
        self._step(exact, gradient.float(), moments[0], moments[1], state, hyper)
        seed = mix(self.seed, int(state["step"]))
        for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            write_moment(state, name, moment, seed=seed)
        write_weight(self.writer, weight, exact, state, seed=seed)

    def _step(
        self, weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, state: State, hyper: Hyper
    ) -> None:
        # torch's fused kernel wants the counter where the weights are; a copy is a launch, the counter stays on the
        # CPU.
        step = state["step"].to(weight.device) if self.fused else state["step"]
        adamw_step(weight, gradient, exp_avg, exp_avg_sq, step, hyper=hyper, fused=self.fused)
        if step is not state["step"]:
            state["step"].add_(1)


@dataclass(frozen=True, kw_only=True)
class AdaLomoRule(Rule):
    """AdaLomo (arXiv 2310.10195, algorithm 1), with Adafactor's factors and schedule of beta (arXiv 1804.04235).

    u = g / sqrt(v), v the outer product of the row and column means of g^2; then
    W <- (1 - lr * weight_decay) W - lr * max(eps[1], RMS(W)) * u / max(1, RMS(u) / clip_threshold).
    """

    eps: tuple[float, float]
    """Added to g^2; smallest RMS of a weight."""
    clip_threshold: float
    """Largest RMS of u."""
    decay_rate: float
    """beta_t = 1 - t^decay_rate."""
    writer: str = "stochastic"
    seed: int = 0

    def init(self, weight: Tensor) -> State:
        """Row and column means for matrices and stacks of them; the whole second moment for vectors."""
        check_writable(weight)
        state: State = {"step": counter()}
        if weight.ndim >= 2:
            *batch, num_rows, num_columns = weight.shape
            state["exp_avg_sq_row"] = torch.zeros((*batch, num_rows, 1), device=weight.device)
            state["exp_avg_sq_col"] = torch.zeros((*batch, 1, num_columns), device=weight.device)
        else:
            state["exp_avg_sq"] = torch.zeros(weight.shape, device=weight.device)
        return state | new_writer_state(self.writer, weight)

    def relative_time(self, weight_dtype: torch.dtype) -> float:
        """See `Rule.relative_time`; benchmarks/plan_accuracy.py, 1 x 256 of every weight on two cores."""
        del weight_dtype
        return 3.9

    def temporary_values(self, weight: Tensor) -> int:
        """See `Rule.temporary_values`: squares, u, and u times its size; then the weight is rounded."""
        if weight.dtype == torch.float32:
            return 3 * weight.numel()
        return ceil((4 + ROUNDING_COPIES) * weight.numel())

    def update(self, weight: Tensor, gradient: Tensor, state: State, hyper: Hyper) -> None:
        """Normalise the gradient, limit it, scale it by the weight's RMS, and descend."""
        gradient = gradient.float()
        state["step"] += 1
        weight_of_new = float(state["step"]) ** self.decay_rate
        squares = gradient.square().add_(self.eps[0])
        if "exp_avg_sq" in state:
            towards = gradient / state["exp_avg_sq"].lerp_(squares, weight_of_new).sqrt()
        else:
            rows = state["exp_avg_sq_row"].lerp_(squares.mean(dim=-1, keepdim=True), weight_of_new)
            columns = state["exp_avg_sq_col"].lerp_(squares.mean(dim=-2, keepdim=True), weight_of_new)
            # One factor after the other: the product of a row and a column that are both zero but for eps underflows.
            towards = gradient * rows.rsqrt()
            towards.mul_(columns.rsqrt() * rows.mean(dim=-2, keepdim=True).sqrt_())
        limit_update_rms(towards, self.clip_threshold)
        exact = read_weight(weight, state)
        num_values = weight.shape[-2:].numel()
        size = (norm_of_matrices(exact) / num_values**0.5).clamp_min_(self.eps[1])
        descend(exact, towards * size, hyper)
        write_weight(self.writer, weight, exact, state, seed=mix(self.seed, hyper.clock))


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
        given = arguments(locals())
        if state_dtype is not None and state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype={state_dtype!r}: expected None or one of {', '.join(STATE_DTYPES)}")
        _check_writer(writer)
        super().__init__(given.pop("params"), given)

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
        given = arguments(locals())
        _check_writer(writer)
        if clip_threshold <= 0 or not -1 <= decay_rate < 0:
            raise ValueError(
                f"clip_threshold={clip_threshold}, decay_rate={decay_rate}: expected above 0, and in [-1, 0)"
            )
        super().__init__(given.pop("params"), given)

    def hyper(self, group: Mapping[str, Any]) -> Hyper:
        """There are no betas, and eps belongs to the rule."""
        return super().hyper({**group, "betas": (0.0, 0.0), "eps": 0.0})

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
