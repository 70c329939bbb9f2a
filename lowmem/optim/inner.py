"""The optimizers inside a projection: from R, and the moments of earlier ones, to the direction N."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowmem.optim.moments import new_moment, read_moment, write_moment
from lowmem.optim.rule import Hyper, State

# Keeps the factored second moment above zero (Adafactor's eps_1).
_SQUARE_FLOOR = 1e-30


def new_inner_state(inner: str, shape: Sequence[int], *, state_dtype: str, device: torch.device) -> State:
    """Zero moments for R of this shape."""
    if inner == "adamw8bit":
        state_dtype = "8bit"
    state = new_moment("exp_avg", shape, state_dtype=state_dtype, signed=True, device=device)
    if inner in ("adamw", "adamw8bit"):
        state |= new_moment("exp_avg_sq", shape, state_dtype=state_dtype, signed=False, device=device)
    elif inner == "adafactor":
        *batch, num_rows, num_columns = shape
        state["exp_avg_sq_row"] = torch.zeros((*batch, num_rows, 1), device=device)
        state["exp_avg_sq_col"] = torch.zeros((*batch, 1, num_columns), device=device)
    return state


def direction(inner: str, low: Tensor, state: State, hyper: Hyper, *, step: int, seed: int) -> Tensor:
    """N = inner(R), a new tensor; advances the moments.

    Args:
        inner: adamw (also for 8 bits), adafactor with a first moment and bias-corrected betas[1], or sgd with
            momentum betas[0].
        low: R, fp32.
        state: Its moments.
        hyper: Betas and eps.
        step: Steps since the moments were zero, this one included.
        seed: For stochastic rounding of the moments.
    """
    beta1, beta2 = hyper.betas
    exp_avg = read_moment(state, "exp_avg", low.shape)
    if inner == "sgd":
        exp_avg.mul_(beta1).add_(low)
        write_moment(state, "exp_avg", exp_avg, seed=seed)
        return exp_avg.clone()
    exp_avg.lerp_(low, 1 - beta1)
    write_moment(state, "exp_avg", exp_avg, seed=seed)
    if inner == "adafactor":
        second = _factored(low, state, beta2)
    else:
        second = read_moment(state, "exp_avg_sq", low.shape)
        second.mul_(beta2).addcmul_(low, low, value=1 - beta2)
        write_moment(state, "exp_avg_sq", second, seed=seed)
    denominator = (second / (1 - beta2**step)).sqrt_().add_(hyper.eps)
    return (exp_avg / (1 - beta1**step)).div_(denominator)


def rotate_moments(state: State, shape: Sequence[int], overlap: Tensor, *, seed: int) -> None:
    """Take the moments into a new basis: C m, and (C * C) v, C = P^T P_old.

    The second is exact if the old coordinates are uncorrelated, and never negative.
    """
    first = read_moment(state, "exp_avg", shape)
    write_moment(state, "exp_avg", first.copy_(overlap @ first), seed=seed)
    if "exp_avg_sq" in state:
        second = read_moment(state, "exp_avg_sq", shape)
        write_moment(state, "exp_avg_sq", second.copy_(overlap.square() @ second), seed=seed)


def _factored(low: Tensor, state: State, beta2: float) -> Tensor:
    """Adafactor's second moment (arXiv 1804.04235, section 3): row means x column means / their mean."""
    squares = low.square().add_(_SQUARE_FLOOR)
    rows = state["exp_avg_sq_row"].lerp_(squares.mean(dim=-1, keepdim=True), 1 - beta2)
    columns = state["exp_avg_sq_col"].lerp_(squares.mean(dim=-2, keepdim=True), 1 - beta2)
    return rows * columns / rows.mean(dim=-2, keepdim=True)
