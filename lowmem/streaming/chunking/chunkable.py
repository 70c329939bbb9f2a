"""Which models can be walked in chunks, and the switch of one to our attention.

An architecture is taken by name, once the tests found its blocks in chunks equal to its blocks as they are: code that
looks alike can mix tokens where a chunk does not see it (a convolution, a shared cache, a mask it changes itself).
"""

from __future__ import annotations

import inspect

from torch import nn

from lowmem.streaming.chunking import attention

ARCHITECTURES: frozenset[str] = frozenset(
    # Names in alphabetical order.
    """
    afmoe apertus arcee aria_text axk1 bailing_hybrid bamba beam biogpt bitnet cohere cohere2 cohere2_moe
    cohere_compass_text cwm dbrx deepseek_v2 deepseek_v3 diffllama dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe
    flex_olmo flint gemma gemma2 gemma3_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox gpt_oss granite
    granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense
    hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lfm2 lfm2_moe
    lfm3 llama llama4_text longcat_flash mellum mimo_v2_flash minicpm3 minimax minimax_m2 ministral ministral3 mistral
    mixtral modernbert-decoder moshi nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe opt persimmon phi
    phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next recurrent_gemma
    seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma youtu
    """.split()  # noqa: SIM905
)
"""Values of `model_type`. Where only some blocks have attention, only those are chunked."""


class _Config:
    """What is read of a model's configuration; every field may be missing."""

    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        if config is None:
            raise TypeError(f"{type(model).__name__} has no config: give the transformers model itself")
        text = config.get_text_config()
        self.architecture: str = text.model_type
        self.implementation: str = text._attn_implementation
        self.is_causal: bool = getattr(text, "is_causal", True)
        self.returns_router_logits: bool = getattr(text, "output_router_logits", False) or False


def can_chunk(model: nn.Module) -> str | None:
    """Why a model's blocks cannot be walked along the sequence in chunks; None if they can.

    Reads the configuration only: nothing runs, and no weight is needed.

    Args:
        model: A transformers model for causal language modelling, without PEFT's wrapper.
    """
    config = _Config(model)
    if config.architecture not in ARCHITECTURES:
        return f"{config.architecture} is not among the architectures that were found exact in chunks"
    if not config.is_causal:
        return "its attention is bidirectional"
    if config.implementation not in (*attention.IMPLEMENTATIONS, *attention.IMPLEMENTATIONS.values()):
        return f"attn_implementation={config.implementation!r} has kernels of its own; use 'sdpa' or 'eager'"
    if config.returns_router_logits:
        return "output_router_logits=True collects routers' logits inside the blocks"
    return None


def enable_chunks(model: nn.Module) -> None:
    """Let a model attend through `lowmem.streaming.chunking.attention`; doing it again changes nothing.

    Raises:
        ValueError: `can_chunk` says why not.
    """
    reason = can_chunk(model)
    if reason is not None:
        raise ValueError(f"{type(model).__name__} cannot be chunked: {reason}")
    attention.register()
    implementation = _Config(model).implementation
    name = attention.IMPLEMENTATIONS.get(implementation, implementation)
    config = getattr(model, "config")  # noqa: B009 - nn.Module does not declare it
    config._attn_implementation = name


def has_attention(block: nn.Module) -> bool:
    """Whether a block computes attention that goes through transformers' registry, so that ours can be in its place."""
    return any(_names_registry(module) for module in block.modules())


def _names_registry(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
