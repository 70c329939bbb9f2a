"""Gradients of a recomputed block: all at once, or each weight's handed on as soon as autograd has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

TakeGradient = Callable[[int, Tensor], None]
"""Called with a parameter's number and a gradient of it, once for each part that a block is differentiated in."""


def differentiate(
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    inputs: Sequence[Tensor],
    params: Sequence[Tensor],
    take: TakeGradient | None = None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Differentiate with respect to leaves; None for one that the outputs do not depend on.

    Args:
        outputs: What was computed.
        grads: Their gradients.
        inputs: Leaves whose gradients are answered.
        params: Parameters whose gradients are answered, unless `take` gets them.
        take: Gets a parameter's gradient while autograd goes on: only one of a block's weights has a gradient at a
            time. The parameters must be nobody else's, and have no gradients of their own.

    Returns:
        Gradients of the inputs and of the parameters.
    """
    if take is None:
        # autograd.grad, not backward: a parameter's hooks must fire once per step, after the sum over all parts.
        found = torch.autograd.grad(outputs, [*inputs, *params], grads, allow_unused=True)
        return list(found[: len(inputs)]), list(found[len(inputs) :])
    hooks = [
        param.register_post_accumulate_grad_hook(partial(_hand_on, take, number))  # type: ignore[no-untyped-call]
        for number, param in enumerate(params)
    ]
    try:
        torch.autograd.backward(outputs, grads, inputs=[*inputs, *params])
    finally:
        for hook in hooks:
            hook.remove()
    gradients = [value.grad for value in inputs]
    for value in inputs:
        value.grad = None
    return gradients, [None] * len(params)


def _hand_on(take: TakeGradient, number: int, param: Tensor) -> None:
    grad, param.grad = param.grad, None
    assert grad is not None
    take(number, grad)


__all__ = ["TakeGradient", "differentiate"]
