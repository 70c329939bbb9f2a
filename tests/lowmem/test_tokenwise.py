"""A norm in token tiles against the norm."""

import pytest
import torch
from torch import nn

from lowmem.internals.torch import is_sole_owner
from lowmem.streaming.norms import tokenwise


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("tile_tokens", [1, 4, 100])
def test_outputs_and_gradients_equal_the_module(tile_tokens: int, trained: bool) -> None:
    norm = nn.RMSNorm(6).double().requires_grad_(trained)
    with torch.no_grad():
        norm.weight.normal_()
    hidden = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(hidden)
    leaves = [hidden, *(param for param in norm.parameters() if trained)]
    want = norm(hidden)
    got = tokenwise(norm, hidden, params=list(norm.parameters()), tile_tokens=tile_tokens)
    assert torch.allclose(got, want, rtol=1e-14)
    pairs = (torch.autograd.grad(value, leaves, grad) for value in (got, want))
    for found, expected in zip(*pairs, strict=True):
        assert torch.allclose(found, expected, rtol=1e-12)


def test_only_the_input_is_kept_for_backward() -> None:
    norm = nn.RMSNorm(6)
    hidden = torch.randn(3, 50, 6, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor.data_ptr()), tensor)[1], lambda x: x
    ):
        tokenwise(norm, hidden, params=[norm.weight], tile_tokens=8)
    assert set(kept) == {hidden.data_ptr(), norm.weight.data_ptr()}


def test_no_tokens_and_no_gradients_are_fine() -> None:
    norm = nn.RMSNorm(6)
    assert tokenwise(norm, torch.empty(2, 0, 6), params=[norm.weight]).shape == (2, 0, 6)
    with torch.no_grad():
        assert not tokenwise(norm, torch.randn(2, 3, 6), params=[norm.weight], tile_tokens=2).requires_grad


def test_the_gradient_that_goes_on_may_be_written_over() -> None:
    norm = nn.RMSNorm(512)
    seen: list[bool] = []

    class Before(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.clone()

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
            seen.append(is_sole_owner(grad, like=grad))
            return grad

    hidden = torch.randn(1, 600, 512, requires_grad=True)
    tokenwise(norm, Before.apply(hidden), params=list(norm.parameters())).sum().backward()
    assert seen == [True]
