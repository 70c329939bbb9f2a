"""Sizes of llama-like models as plain numbers, for tests of the planner that need no model."""

from __future__ import annotations

from lowmem.planning.shapes import BlockShape, LinearShape, ModelShapes, Part


def llama_block(
    *, hidden: int = 256, mlp: int = 512, heads: int = 4, key_heads: int = 2, rank: int = 8, stored_itemsize: int = 2
) -> BlockShape:
    """One block with a LoRA on every linear layer, computed in fp32, stored in bf16 unless `stored_itemsize` is 4."""
    key = hidden // heads * key_heads
    sizes = (
        (Part.ATTENTION_IN, hidden, hidden),
        (Part.ATTENTION_IN, hidden, key),
        (Part.ATTENTION_IN, hidden, key),
        (Part.ATTENTION_OUT, hidden, hidden),
        (Part.MLP_IN, hidden, mlp),
        (Part.MLP_IN, hidden, mlp),
        (Part.MLP_OUT, mlp, hidden),
    )
    linears = tuple(LinearShape(part=part, in_features=i, out_features=o, rank=rank) for part, i, o in sizes)
    num_params = sum(i * o for _, i, o in sizes) + 2 * hidden
    num_adapter_params = sum(rank * (i + o) for _, i, o in sizes)
    return BlockShape(
        buffer_bytes=-(-num_params * stored_itemsize // 4096) * 4096,
        num_params=num_params,
        num_active_params=num_params,
        workspace_bytes=0 if stored_itemsize == 4 else num_params * 4,
        hidden_size=hidden,
        query_size=hidden,
        key_size=key,
        value_size=key,
        num_heads=heads,
        linears=linears,
        num_adapter_params=num_adapter_params,
        adapter_bytes=4 * num_adapter_params,
    )


def llama(
    *, num_blocks: int = 8, vocab: int = 1000, tied: bool = False, stored_itemsize: int = 2, hidden: int = 256
) -> ModelShapes:
    """A model of equal blocks."""
    block = llama_block(stored_itemsize=stored_itemsize, hidden=hidden, mlp=2 * hidden)
    return ModelShapes(
        name="llama",
        blocks=(block,) * num_blocks,
        vocab_size=vocab,
        embedding_bytes=0 if tied else vocab * hidden * 4,
        embedding_stored_bytes=0 if tied else vocab * hidden * stored_itemsize,
        embedding_gatherable=not tied,
        head_bytes=vocab * hidden * 4,
        num_head_params=vocab * hidden,
        other_bytes=hidden * 4,
        compute_dtype="float32",
        stored_dtypes=("bfloat16" if stored_itemsize == 2 else "float32",),
        adapter="LoRA r=8 on all-linear",
    )
