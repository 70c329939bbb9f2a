"""Sizes of the tiny models: one table of fields that many configurations share; `overrides.py` has what differs."""

from __future__ import annotations

SLIDING_WINDOW = 8
"""Tokens; smaller than `SEQUENCE`, so that the window matters."""

SEQUENCE = 16
"""Tokens a test's sequence has: Reformer takes no other length, xLSTM and Reformer only multiples of their chunks."""

MAX_POSITIONS = 64
"""Tokens; no test's sequence is longer."""

TRANSFORMER: dict[str, object] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": MAX_POSITIONS,
    "sliding_window": SLIDING_WINDOW,
    "type_vocab_size": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

OLDER_NAMES: dict[str, object] = {
    "n_layer": 3,
    "n_head": 4,
    "n_embd": 32,
    "n_positions": MAX_POSITIONS,
    "n_ctx": MAX_POSITIONS,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 3,
    "max_seq_len": MAX_POSITIONS,
    "num_layers": 3,
    "ffn_dim": 48,
    "dff": 48,
    "encoder_layers": 3,
    "encoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_layers": 3,
    "decoder_ffn_dim": 48,
    "decoder_attention_heads": 4,
    "decoder_start_token_id": 1,
}

EXPERTS: dict[str, object] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}

LATENT_ATTENTION: dict[str, object] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # The sparse indexers keep fewer tokens than a sequence has, so that the choice matters.
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
}

RECURRENT: dict[str, object] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "state_size": 8,
}

NO_NOISE: dict[str, object] = dict.fromkeys(
    (
        "activation_dropout",
        "attention_dropout",
        "attention_probs_dropout_prob",
        "attn_pdrop",
        "dropout",
        "dropout_p",
        "emb_pdrop",
        "embd_pdrop",
        "embed_dropout",
        "embedding_dropout",
        "hidden_dropout",
        "hidden_dropout_prob",
        "lsh_attention_probs_dropout_prob",
        "local_attention_probs_dropout_prob",
        "input_jitter_noise",
        "resid_dropout",
        "resid_pdrop",
        "residual_dropout",
        "router_jitter_noise",
    ),
    0.0,
)

COMMON: dict[str, object] = TRANSFORMER | OLDER_NAMES | EXPERTS | LATENT_ATTENTION | RECURRENT | NO_NOISE
"""Values by field name, used where a configuration has the field."""
