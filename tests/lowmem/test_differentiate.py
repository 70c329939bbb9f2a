"""Gradients handed on one by one equal those that autograd answers together."""

import torch
from torch import Tensor

from lowmem.streaming.recompute import differentiate


def _graph() -> tuple[Tensor, list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    hidden = torch.randn(4, 6, requires_grad=True)
    unused = torch.randn(4, requires_grad=True)
    params = [torch.nn.Parameter(torch.randn(6, 6)) for _ in range(3)]
    out = torch.tanh(hidden @ params[0]) @ params[1] + hidden @ params[0]
    return out, [hidden, unused], params


def test_gradients_are_the_same_and_nothing_stays_on_the_leaves() -> None:
    out, inputs, params = _graph()
    grad = torch.randn_like(out)
    want_inputs, want_params = differentiate([out], [grad], inputs=inputs, params=params)
    out, inputs, params = _graph()
    taken: dict[int, Tensor] = {}
    got_inputs, got_params = differentiate([out], [grad], inputs=inputs, params=params, take=taken.__setitem__)
    assert got_params == [None] * 3
    # The third is used by nobody.
    assert sorted(taken) == [0, 1]
    assert want_params[2] is None
    for number, value in taken.items():
        assert torch.equal(value, want_params[number])
    assert torch.equal(got_inputs[0], want_inputs[0])
    assert got_inputs[1] is want_inputs[1] is None
    assert all(leaf.grad is None for leaf in (*inputs, *params))


def test_only_one_weight_has_a_gradient_at_a_time() -> None:
    out, inputs, params = _graph()
    alive: list[int] = []
    differentiate(
        [out],
        [torch.ones_like(out)],
        inputs=inputs,
        params=params,
        take=lambda number, grad: alive.append(sum(param.grad is not None for param in params)),
    )
    assert alive == [0, 0]
