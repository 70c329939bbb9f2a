"""Experts one at a time against transformers' own on the same weights: equal bits, forward and backward."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lowmem.experts.products import lend, run_experts, take_back
from lowmem.internals.experts import experts_traits, grouped_experts


class Slices:
    """A stack that is in memory, of which one expert at a time is lent: the ones before are overwritten."""

    def __init__(self, stack: Tensor) -> None:
        self.stack, self.shape, self.dtype = stack, stack.shape, stack.dtype
        self.lent: Tensor | None = None
        self.asked: list[int] = []

    def expect(self, experts: Sequence[int]) -> None:
        self.expected = list(experts)

    def expert(self, number: int) -> Tensor:
        assert self.expected.pop(0) == number
        if self.lent is not None:
            self.lent.fill_(torch.nan)
        self.asked.append(number)
        self.lent = self.stack[number].clone()
        return self.lent


def experts_of(architecture: str, dtype: torch.dtype) -> torch.nn.Module:
    if architecture == "gpt_oss":
        from transformers import GptOssConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

        module: torch.nn.Module = GptOssExperts(
            GptOssConfig(hidden_size=48, intermediate_size=40, num_local_experts=6, num_experts_per_tok=2)
        )
    else:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        module = Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=48, moe_intermediate_size=40, num_experts=6))
    for param in module.parameters():
        torch.nn.init.normal_(param, std=0.2)
        param.requires_grad_(False)
    return module.to(dtype)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 5, 64])
def test_values_and_gradients_are_those_of_whole_stacks(architecture: str, dtype: torch.dtype, num_tokens: int) -> None:
    module = experts_of(architecture, dtype)
    hidden, index = torch.randn(num_tokens, 48, dtype=dtype), torch.randint(0, 5, (num_tokens, 2))
    weights, grad = torch.rand(num_tokens, 2, dtype=dtype), torch.randn(num_tokens, 48, dtype=dtype)
    traits = experts_traits(module)
    assert traits is not None
    stacks = {name: Slices(getattr(module, name).detach()) for name in (traits.up, traits.down)}
    results = []
    for is_lent in (False, True):
        inputs = [hidden.clone().requires_grad_(), weights.clone().requires_grad_()]
        if is_lent:
            lend(module, stacks)
            out = run_experts(module, inputs[0], index, inputs[1])
            out.backward(grad)
            take_back(module)
        else:
            out = grouped_experts(module, inputs[0], index, inputs[1])
            out.backward(grad)
        results.append([out.detach(), inputs[0].grad, inputs[1].grad])
    for whole, one_by_one in zip(*results, strict=True):
        assert torch.equal(whole, one_by_one)
    hit = sorted(set(index.flatten().tolist()))
    assert stacks[traits.up].asked == hit + hit[::-1], "experts without a token are not made"
    assert stacks[traits.down].asked == hit[::-1] + hit, "those that were asked for last are there still"


def test_without_open_stacks_it_is_transformers_own() -> None:
    module = experts_of("qwen3_moe", torch.float32)
    hidden, index, weights = torch.randn(7, 48), torch.randint(0, 6, (7, 2)), torch.rand(7, 2)
    expected = grouped_experts(module, hidden, index, weights)
    assert torch.equal(run_experts(module, hidden, index, weights), expected)
