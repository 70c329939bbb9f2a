"""Blocks of every architecture in chunks against torch's checkpointing of the same blocks, in fp64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lowmem.models.blocks import ARCHITECTURES
from lowmem.streaming.chunking.chunks import NotChunkable
from tests.lowmem.chunked_blocks import (
    CHUNKS,
    PADDINGS,
    RecordedCall,
    assert_close,
    batch_of,
    checkpointed,
    chunked,
    has_attention,
    record_calls,
    tiny,
)

# Their own code computes norms, routers or softmax in fp32 whatever the model's type, and rounds gradients to it.
FP32_INSIDE = frozenset(
    """
    afmoe axk1 beam cohere cohere2 cohere2_moe cohere_compass_text deepseek_v2 deepseek_v3 diffllama dots1 ernie4_5_moe
    exaone_moe flint gemma gemma2 gemma3_text glm4_moe glm4_moe_lite granite_swa granitemoe_swa helium hy_v3 kolibri1
    laguna llama4_text longcat_flash mimo_v2_flash minimax_m2 moshi qwen3_5_moe_text qwen3_5_text qwen3_next
    recurrent_gemma solar_open vaultgemma bailing_hybrid kimi_linear nemotron_h lfm2_moe minimax
    """.split()  # noqa: SIM905
)
FAMILIES = tuple(
    """
    cohere2 deepseek_v3 gemma2 gemma3_text glm4 gpt2 gpt_neox gpt_oss granite llama llama4_text mistral mixtral olmo2
    phi3 qwen2 qwen3 qwen3_moe smollm3
    """.split()  # noqa: SIM905
)


def check_block(name: str, call: RecordedCall, valid: Tensor, *, chunks: Sequence[int]) -> bool:
    """Compare one block, in chunks of several sizes; whether it could be chunked."""
    params = [param for param in call.block.parameters() if param.requires_grad]
    grad = torch.randn(call.hidden.shape, dtype=torch.float64) * valid.unsqueeze(-1)
    output, grads = checkpointed(call, params, grad)
    tolerance = 5e-6 if name in FP32_INSIDE else 1e-12
    for chunk_tokens in chunks:
        try:
            got, found, _ = chunked(call, params, grad, chunk_tokens=chunk_tokens)
        except NotChunkable:
            # Of a hybrid model's blocks, those without attention; one class serves for all of nemotron_h's.
            assert not has_attention(call.block) or name == "nemotron_h"
            return False
        assert_close([got[valid]], [output[valid]], tolerance=tolerance)
        assert_close([found[0][valid], *found[1:]], [grads[0][valid], *grads[1:]], tolerance=tolerance)
    return True


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_those_of_checkpointing(name: str) -> None:
    model = tiny(name)
    for padding, chunks in (("none", (64,)), ("left", (5,)), ("right", (5,)), ("packed", (1, 5))):
        inputs, valid = batch_of(padding)
        calls = record_calls(model, inputs)
        for call in (calls[0], calls[-1]):
            assert check_block(name, call, valid, chunks=chunks)


@pytest.mark.slow
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_gradients_equal_those_of_checkpointing_for_every_architecture_named(name: str, padding: str) -> None:
    inputs, valid = batch_of(padding)
    compared = [check_block(name, call, valid, chunks=CHUNKS) for call in record_calls(tiny(name), inputs)]
    assert any(compared)
