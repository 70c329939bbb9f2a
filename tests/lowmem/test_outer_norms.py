"""The final norm in tiles: the same values and gradients, with its input alone kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lowmem.planning.limits import HeadTiles
from lowmem.streaming.norms import TiledNorm, tile_outer_norms
from tests.zoo.architectures import tiny_model

TOKENS = 2 * HeadTiles().num_tokens + 3


def gradients(norm: nn.Module, hidden: Tensor, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaf = hidden.detach().clone().requires_grad_()
    out = norm(leaf)
    return out.detach(), list(torch.autograd.grad(out, [leaf, *norm.parameters()], grad))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "olmo2"])
def test_values_are_bitwise_and_gradients_those_of_the_norm(name: str) -> None:
    model = tiny_model(name)
    plain = copy.deepcopy(model)
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    (norm_name,) = tile_outer_norms(model, blocks)
    norm, expected = model.get_submodule(norm_name), plain.get_submodule(norm_name)
    assert isinstance(norm, TiledNorm)
    assert type(norm).__name__ == type(expected).__name__
    torch.manual_seed(0)
    hidden, grad = torch.randn(2, 1, TOKENS, 32).unbind()
    got, want = gradients(norm, hidden, grad), gradients(expected, hidden, grad)
    assert torch.equal(got[0], want[0])
    for found, right in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def test_nothing_but_the_input_is_kept() -> None:
    model = tiny_model("llama").requires_grad_(False)
    tile_outer_norms(model, model.model.layers)
    hidden = torch.randn(1, TOKENS, 32, requires_grad=True)
    kept: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model.model.norm(hidden)
    assert kept == [hidden.numel()]


def test_a_copy_runs_itself() -> None:
    model = tiny_model("llama")
    tile_outer_norms(model, model.model.layers)
    copied = copy.deepcopy(model.model.norm)
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        copied.weight.fill_(2.0)
    hidden = torch.randn(1, TOKENS, 32)
    torch.testing.assert_close(copied(hidden), 2 * model.model.norm(hidden))


def test_norms_inside_blocks_are_left_alone() -> None:
    model = tiny_model("llama")
    assert tile_outer_norms(model, model.model.layers) == ("model.norm",)
    assert not any(isinstance(module, TiledNorm) for module in model.model.layers.modules())
    assert tile_outer_norms(model, model.model.layers) == ()
