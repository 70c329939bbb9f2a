"""Routed experts one at a time: each expert's weights are made when its tokens come, and need not stay for the others.

The arithmetic is that of transformers' `grouped_mm`: tokens sorted by expert, one product for each expert that has any.
Only the stack of weights is not there as a tensor. In the backward an expert's weights are made once more; of a frozen
product nothing else is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from lowmem.internals.experts import ExpertsTraits, experts_traits, grouped_experts


class OpenStack(Protocol):
    """The weights of one stack of experts for the time of a visit."""

    shape: torch.Size
    """(experts, outputs, inputs), or (experts, inputs, outputs) where the module's stacks are transposed."""
    dtype: torch.dtype
    """Compute dtype."""

    def expect(self, experts: Sequence[int]) -> None:
        """Announce which experts are asked for next, in order."""

    def expert(self, number: int) -> Tensor:
        """One expert's matrix, frozen, on the compute device; valid until another one is asked for."""


Foresee = Callable[[Tensor], None]
"""Sees the hidden states (tokens, hidden) that experts are about to work on, once these are being read."""

_STACKS = "_lowmem_open_stacks"


@dataclass(frozen=True, kw_only=True)
class _Lent:
    stacks: Mapping[str, OpenStack]
    foresee: Foresee | None


def lend(module: nn.Module, stacks: Mapping[str, OpenStack], foresee: Foresee | None = None) -> None:
    """Have a module of experts run on open stacks from now on.

    Args:
        module: The module; its own parameters of these names are not read.
        stacks: By the names of the parameters.
        foresee: Called in each forward, for whoever wants to guess what comes after it; changes nothing.
    """
    object.__setattr__(module, _STACKS, _Lent(stacks=stacks, foresee=foresee))


def take_back(module: nn.Module) -> None:
    """Have a module of experts run on its own parameters again."""
    module.__dict__.pop(_STACKS, None)


def run_experts(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Run a module of experts, on open stacks where it has been lent some, else as transformers does.

    Args:
        module: The module.
        hidden: Shape (tokens, hidden).
        index: Shape (tokens, k), int64: the experts of each token.
        weights: Shape (tokens, k): what their outputs are multiplied with.

    Returns:
        Shape (tokens, hidden).
    """
    lent: _Lent | None = getattr(module, _STACKS, None)
    if lent is None:
        return grouped_experts(module, hidden, index, weights)
    stacks = lent.stacks
    traits = experts_traits(module)
    assert traits is not None
    num_tokens, num_each = index.shape
    experts, order = torch.sort(index.reshape(-1))
    runs = _runs(experts)
    if lent.foresee is not None:
        stacks[traits.up].expect([expert for expert, _, _ in runs])
        lent.foresee(hidden)
    values = hidden[order // num_each]
    values = _product(module, traits, traits.up, stacks, values, experts=experts, runs=runs)
    values = traits.gate(values)
    # Where there is not room for all, the last ones are there still: in the same order none would be.
    values = _product(module, traits, traits.down, stacks, values, experts=experts, runs=runs[::-1])
    if traits.has_post_norm:
        values = module.post_expert_norm(values)  # type: ignore[operator]
    values = values * weights.reshape(-1)[order].unsqueeze(-1)
    # Back in the order of the tokens before the sum, whose order must not depend on the routing.
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return values[back].view(num_tokens, num_each, -1).sum(dim=1).to(hidden.dtype)


Run = tuple[int, int, int]
"""An expert, and the first and the last but one of its rows."""


def _runs(experts: Tensor) -> list[Run]:
    """Experts that have tokens, with their rows, from their sorted numbers."""
    numbers, counts = torch.unique_consecutive(experts, return_counts=True)
    runs, start = [], 0
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        runs.append((number, start, start + count))
        start += count
    return runs


def _product(
    module: nn.Module,
    traits: ExpertsTraits,
    name: str,
    stacks: Mapping[str, OpenStack],
    values: Tensor,
    *,
    experts: Tensor,
    runs: Sequence[Run],
) -> Tensor:
    stack = stacks[name]
    result: Tensor = ExpertProducts.apply(values.to(stack.dtype), stack, runs, traits.is_transposed)  # type: ignore[no-untyped-call]
    if traits.has_bias:
        result = result + getattr(module, f"{name}_bias")[experts]
    return result


class ExpertProducts(torch.autograd.Function):
    """One product for each expert's rows; weights are frozen, and are made again for the backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, stack: OpenStack, runs: Sequence[Run], is_transposed: bool) -> Tensor:
        """Multiply rows (pairs, inputs), sorted by expert; returns (pairs, outputs)."""
        ctx.stack, ctx.runs, ctx.is_transposed = stack, runs, is_transposed  # type: ignore[attr-defined]
        out = values.new_empty(len(values), stack.shape[2 if is_transposed else 1])
        stack.expect([expert for expert, _, _ in runs])
        for expert, start, stop in runs:
            matrix = stack.expert(expert)
            torch.mm(values[start:stop], matrix if is_transposed else matrix.t(), out=out[start:stop])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient of the rows."""
        stack, runs, is_transposed = ctx.stack, ctx.runs, ctx.is_transposed  # type: ignore[attr-defined]
        out = grad.new_empty(len(grad), stack.shape[1 if is_transposed else 2])
        # The last ones used come first: they may be there still.
        stack.expect([expert for expert, _, _ in reversed(runs)])
        for expert, start, stop in reversed(runs):
            matrix = stack.expert(expert)
            torch.mm(grad[start:stop], matrix.t() if is_transposed else matrix, out=out[start:stop])
        return out, None, None, None
