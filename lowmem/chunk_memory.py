"""What walking one block in chunks holds at its largest, from its widths. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowmem.activations import MicroBatch, block_forward_bytes, block_recompute_bytes
from lowmem.shapes import BlockShape, itemsize

_FP32_BYTES = 4
# As lowmem.streaming.attention_parts bounds them.
_PART_KEYS = 4096
_PART_BYTES = 8 << 20
# Over what a chunk's temporaries take, without and with gradients: torch asks for aligned memory, and glibc does not
# give it a freed piece of the same size. With chunks of 128 to 1024 tokens 0.2 to 0.4 and 0.1 to 1.2 were seen.
_FORWARD_HEAP, _BACKWARD_HEAP = 0.4, 1.0
# Seen with 16 and more chunks. Below these it is not counted: whole sequences then take less than the smaller chunk.
_FEWEST_CHUNKS = 8


@dataclass(frozen=True, kw_only=True)
class ChunkBytes:
    """Bytes of one block's visit in chunks, besides its weights, its input and the gradients that come and go."""

    activations: int
    """Of one chunk, recomputed with its graph."""

    keys_values: int
    """Of the whole sequence."""

    keys_values_grads: int
    """Their gradients in fp32."""

    attention: int
    """Masks and gradients of one part of the keys."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.activations + self.keys_values + self.keys_values_grads + self.attention


def chunk_bytes(block: BlockShape, batch: MicroBatch, chunk_tokens: int) -> ChunkBytes:
    """Bytes that a block's backward in chunks holds at its largest.

    Args:
        block: The block's widths.
        batch: The micro-batch.
        chunk_tokens: Tokens of a chunk, at least 1.

    Raises:
        ValueError: `chunk_tokens` is not positive.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; expected at least 1")
    chunk = replace(batch, seq_len=min(chunk_tokens, batch.seq_len), has_mask=False)
    states = batch.num_sequences * (block.key_size + block.value_size)
    compute = itemsize(batch.dtype)
    gradient_bytes = max(compute, _FP32_BYTES)
    one_part = states * min(batch.seq_len, _PART_KEYS) * compute
    queries = chunk.num_tokens * block.query_size * (compute + gradient_bytes)
    return ChunkBytes(
        activations=block_recompute_bytes(block, chunk),
        keys_values=states * batch.seq_len * compute,
        keys_values_grads=states * batch.seq_len * gradient_bytes,
        attention=one_part + queries + (2 * _PART_BYTES if batch.has_mask else 0),
    )


def heap_bytes(block: BlockShape, batch: MicroBatch, chunk_tokens: int) -> tuple[int, int]:
    """Freed memory that the C library keeps between a chunk's temporaries, on a CPU: in the forward, in the backward.

    Args:
        block: The block's widths.
        batch: The micro-batch.
        chunk_tokens: Tokens of a chunk.
    """
    if batch.device != "cpu" or batch.seq_len < _FEWEST_CHUNKS * chunk_tokens:
        return 0, 0
    parts = chunk_bytes(block, batch, chunk_tokens)
    forward = forward_chunk_bytes(block, batch, chunk_tokens) - parts.keys_values
    return int(_FORWARD_HEAP * forward), int(_BACKWARD_HEAP * (parts.activations + parts.attention))


def forward_chunk_bytes(block: BlockShape, batch: MicroBatch, chunk_tokens: int) -> int:
    """Bytes that a block's forward in chunks, without gradients, holds at its largest.

    Args:
        block: The block's widths.
        batch: The micro-batch.
        chunk_tokens: Tokens of a chunk, at least 1.
    """
    chunk = replace(batch, seq_len=min(chunk_tokens, batch.seq_len), has_mask=False)
    return block_forward_bytes(block, chunk) + chunk_bytes(block, batch, chunk_tokens).keys_values
