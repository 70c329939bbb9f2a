"""Sizes of the tiny models: one table of fields that many configurations share, and what differs by architecture."""

from __future__ import annotations

SLIDING_WINDOW = 8
"""Tokens; smaller than any sequence the tests use."""

COMMON: dict[str, object] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "sliding_window": SLIDING_WINDOW,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_layer": 3,
    "n_head": 4,
    "n_embd": 32,
    "n_positions": 64,
}
"""Values by field name, used where a configuration has the field."""

HYBRID = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

OVERRIDES: dict[str, dict[str, object]] = {
    "cohere2": {"num_hidden_layers": 4, "layer_types": HYBRID},
    "deepseek_v3": {"num_key_value_heads": 4},
    "falcon": {},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"num_hidden_layers": 4, "layer_types": HYBRID, "query_pre_attn_scalar": 8},
    "glm4": {},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_oss": {},
    "granite": {},
    "llama": {},
    "mistral": {},
    "mixtral": {},
    "olmo2": {},
    "phi3": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {},
    "qwen3_moe": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}
