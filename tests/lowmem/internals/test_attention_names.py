"""transformers describes masks and attention as lowmem.internals.attention reads them; else a model is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import AttentionMaskInterface, LlamaConfig, MistralConfig, masking_utils
from transformers.models.llama import modeling_llama

from lowmem.errors import UnsupportedError
from lowmem.internals import attention
from lowmem.internals.attention import (
    attention_implementation,
    check_mask_arguments,
    set_attention_implementation,
    shipped_attention,
    shipped_mask,
)
from lowmem.streaming.chunking.attention import register

HIDDEN = torch.zeros(2, 6, 8)


def asked_with(config: object, make: Callable[..., object]) -> dict[str, object]:
    """What transformers asks a registered mask function with."""
    seen: dict[str, object] = {}
    AttentionMaskInterface.register("lowmem_spy", lambda **arguments: seen.update(arguments))
    config._attn_implementation = "lowmem_spy"  # type: ignore[attr-defined]
    make(
        config=config,
        inputs_embeds=HIDDEN,
        attention_mask=torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]),
        past_key_values=None,
        position_ids=None,
    )
    return seen


def test_masks_are_described_by_the_arguments_that_are_known() -> None:
    full = asked_with(LlamaConfig(), masking_utils.create_causal_mask)
    sliding = asked_with(MistralConfig(sliding_window=3), masking_utils.create_sliding_window_causal_mask)
    for arguments in (full, sliding):
        check_mask_arguments(arguments)
    assert full.keys() <= attention._MASK_ARGUMENTS
    assert (full["q_offset"], full["kv_offset"], full["use_vmap"]) == (0, 0, False)
    assert "local_size" not in full
    assert sliding["local_size"] == 3, "a window that has no name of its own would be a plain causal mask"
    seen = sliding["mask_function"](torch.tensor(0), torch.tensor(0), torch.tensor(5), torch.arange(6))  # type: ignore[operator]
    assert seen.tolist() == [False, False, False, True, True, True]


@pytest.mark.parametrize("old", ["local_size", "q_offset", "kv_offset", "use_vmap", "mask_function"])
def test_a_renamed_argument_is_refused(old: str) -> None:
    """As if transformers had renamed it: the mask function that is registered must not guess."""
    arguments = asked_with(MistralConfig(sliding_window=3), masking_utils.create_sliding_window_causal_mask)
    register()
    arguments[f"new_{old}"] = arguments.pop(old)
    with pytest.raises(UnsupportedError, match=rf"transformers 5.*new_{old}.* unknown"):
        AttentionMaskInterface()["lowmem_sdpa"](**arguments)


def test_an_argument_that_is_left_out_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"'use_vmap'\] are missing"):
        check_mask_arguments(dict.fromkeys(attention._ALWAYS_GIVEN - {"use_vmap"}))


def test_the_implementation_is_read_and_set_where_transformers_looks_it_up() -> None:
    with torch.device("meta"):
        model = modeling_llama.LlamaForCausalLM(
            LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=8, intermediate_size=8)
        )
    assert attention_implementation(model) == "sdpa"
    set_attention_implementation(model, "eager")
    assert attention_implementation(model) == model.config._attn_implementation == "eager"
    assert "_attn_implementation" in inspect.getsource(modeling_llama.LlamaAttention.forward)
    with pytest.raises(TypeError, match="no config"):
        attention_implementation(nn.Linear(1, 1))


def test_shipped_functions_are_transformers_own() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    with torch.device("meta"):
        module = modeling_llama.LlamaAttention(LlamaConfig(), layer_idx=0)
    assert shipped_attention("sdpa", module) is sdpa_attention_forward
    assert shipped_attention("eager", module) is modeling_llama.eager_attention_forward
    with pytest.raises(UnsupportedError, match="eager_attention_forward"):
        shipped_attention("eager", nn.Linear(1, 1))


def test_shipped_masks_are_those_of_the_implementation() -> None:
    arguments: dict[str, object] = {
        "batch_size": 1,
        "q_length": 3,
        "kv_length": 3,
        "mask_function": masking_utils.causal_mask_function,
        "allow_is_causal_skip": False,
    }
    causal = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    dense = shipped_mask("sdpa", arguments)
    additive = shipped_mask("eager", arguments | {"dtype": torch.float32})
    assert dense is not None
    assert additive is not None
    assert torch.equal(dense, causal)
    assert torch.equal(additive == 0, causal)
