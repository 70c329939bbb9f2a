"""Canaries: how transformers runs routed experts is as `lowmem.internals.experts` takes it to be."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from lowmem.errors import UnsupportedError
from lowmem.internals import experts


def tiny() -> torch.nn.Module:
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def test_modules_of_experts_have_their_notes() -> None:
    found = [experts.experts_traits(module) for module in tiny().modules()]
    (traits,) = [one for one in found if one is not None]
    assert (traits.up, traits.down) == ("gate_up_proj", "down_proj")
    assert (traits.is_transposed, traits.has_bias, traits.has_post_norm) == (False, False, False)
    assert traits.gate(torch.ones(2, 6)).shape == (2, 3)


def test_a_registered_function_runs_the_experts() -> None:
    model = tiny()
    assert experts.experts_implementation(model) == experts.GROUPED
    calls = []

    def forward(
        module: torch.nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        calls.append(tuple(index.shape))
        return experts.grouped_experts(module, hidden, index, weights)

    tokens = torch.arange(6).view(2, 3)
    expected = model(tokens).logits
    experts.use_experts_forward(model, "lowmem_test", forward)
    assert torch.equal(model(tokens).logits, expected)
    assert calls == [(6, 2)]


def test_a_model_that_keeps_its_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(model, "set_experts_implementation", lambda name: None)
    with pytest.raises(UnsupportedError, match="transformers"):
        experts.use_experts_forward(model, "lowmem_test", experts.grouped_experts)
