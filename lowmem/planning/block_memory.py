"""What one block's recomputation and backward hold at their largest, from its widths. Pure arithmetic.

The recomputation of a micro-batch with gradients keeps what autograd saves; on top of that come the temporaries of the
moment. Two moments compete: the end of the forward, when the adapter of the last projection adds its parts, and the
start of the backward, when the gradients of the expanded states appear before anything saved is released. A third one,
the backward of attention, counts where heads are wide and the MLP is narrow.

What walking one block in chunks holds at its largest, from its widths. Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from lowmem.planning.job import DeviceKind
from lowmem.planning.limits import PART_BYTES, PART_KEYS
from lowmem.planning.shapes import BlockShape, ExpertsShape, LinearShape, Part, itemsize

_FP32_BYTES = 4


_INDEX_BYTES = 8


_DORA_TILE_BYTES = 16 << 20


_MLP = (Part.MLP_IN, Part.MLP_OUT)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The sequences that go through a block together, and how."""

    num_sequences: int
    """Sequences."""
    seq_len: int
    """Tokens of each, padding included."""
    dtype: str
    """Compute dtype, by torch's name."""
    device: DeviceKind = "cpu"
    """What computes."""
    has_mask: bool = False
    """Whether attention gets a mask: padding, packing or a sliding window."""
    autocast: bool = False
    """Whether products are autocast's: LoRA's layers then take their inputs as they are, and give that type."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences together."""
        return self.num_sequences * self.seq_len


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """Bytes that autograd keeps, by where they are released in the backward."""

    attention: int
    """Up to the second residual: norms, projections' inputs, q, k, v and the heads' output."""
    expanded: int
    """Inputs of the MLP's first projections and the states they expand to."""
    product: int
    """Input of the MLP's last projection, where its adapter needs it."""

    @property
    def total(self) -> int:
        return self.attention + self.expanded + self.product


def block_recompute_bytes(block: BlockShape, batch: MicroBatch) -> int:
    """Bytes that recomputing one block for one micro-batch and differentiating it holds at its largest.

    Without the block's weights, its input, the gradient that arrives and anything outside the block. Covers the dense
    attention kernels of torch (`scaled_dot_product_attention`), LoRA and DoRA on any of its linear layers, and routed
    experts computed as grouped products.

    Args:
        block: The block's widths.
        batch: The micro-batch.
    """
    compute, adapter = itemsize(batch.dtype), _moment_itemsize(block, batch)
    wide, is_mixed = max(compute, adapter), adapter > compute
    saved = _saved_per_token(block, batch)
    hidden, (_, product) = block.hidden_size, block.mlp_sizes
    # End of the forward: the base's result, the adapter's, its scaled form and their sum, next to the residual.
    tail = 4 * wide * hidden + compute * product + (5 * compute * hidden if is_mixed else 0)
    if block.num_norms > 2:
        tail += 3 * _FP32_BYTES * hidden
    # Start of the backward: two gradients of the last projection's input; then one, with those of gate and up.
    head = (3 if is_mixed else 2) * compute * hidden
    head += max((2 * wide + (compute if is_mixed else 0)) * product, 3 * compute * product - saved.product)
    experts = _experts_transient(block.experts, hidden, compute)
    # Backward of attention: gradients of q, k, v before and after the rotation, with the MLP's share released.
    heads = block.query_size + block.key_size + block.value_size
    attention = saved.attention + 3 * compute * heads + 4 * wide * hidden
    dora = max(
        (wide * linear.out_features for linear in block.linears if linear.is_dora and linear.part in _MLP), default=0
    )
    peak = batch.num_tokens * (max(saved.total + max(tail, head, experts), attention) + dora)
    if block.experts is not None and block.experts.adapted_bytes:
        stacks = block.experts.adapted_bytes
        # PEFT forms each adapted stack of experts as a whole. In the backward, from the last stack to the first, the
        # gradient of one comes on top; by then the forward's temporaries are gone.
        at_gradient = batch.num_tokens * (saved.total + 2 * compute * hidden * block.experts.num_per_token)
        held = max(sum(stacks[: index + 1]) + stack for index, stack in enumerate(stacks))
        peak = max(peak + sum(stacks), at_gradient + held)
    peak += _mask_bytes(batch) + block.adapter_bytes + _dora_tile_bytes(block, is_mixed=is_mixed)
    return ceil(peak * block.correction)


def _adapter_itemsize(block: BlockShape) -> int:
    return block.adapter_bytes // block.num_adapter_params if block.num_adapter_params else 0


def _moment_itemsize(block: BlockShape, batch: MicroBatch) -> int:
    """Bytes of an element of what adapters make for a moment: autocast's where all they do is multiply."""
    own = _adapter_itemsize(block)
    does_more = any(_does_more(linear) for linear in block.linears)
    return own if does_more or not batch.autocast else min(own, itemsize(batch.dtype))


def _does_more(linear: LinearShape) -> bool:
    """Whether an adapter does more with its input than multiply it, and has it converted to its own type first."""
    return linear.is_dora or linear.has_dropout


def _saved_per_token(block: BlockShape, batch: MicroBatch) -> _Saved:
    compute = itemsize(batch.dtype)
    # A norm computes in fp32: it keeps a copy in other types, and in fp32 the tensor itself, of which the first is the
    # block's own input.
    norms = (block.num_norms - (1 if compute == _FP32_BYTES else 0)) * _FP32_BYTES * block.hidden_size
    if block.has_query_key_norm:
        norms += _FP32_BYTES * (block.query_size + block.key_size)
    attention = norms + compute * _attention_states(block, batch) + _FP32_BYTES * block.num_heads
    attention += _input_bytes(block, Part.ATTENTION_IN, batch) + _input_bytes(block, Part.ATTENTION_OUT, batch)
    expanded = compute * _expanded_states(block) + _input_bytes(block, Part.MLP_IN, batch)
    return _Saved(
        attention=attention,
        expanded=expanded + _experts_saved(block.experts, block.hidden_size, compute),
        product=_input_bytes(block, Part.MLP_OUT, batch),
    )


def _attention_states(block: BlockShape, batch: MicroBatch) -> int:
    """Elements per token that attention keeps: q, k, v and the output; a mask makes it repeat keys and values."""
    keys, values = block.key_size, block.value_size
    if batch.has_mask and keys < block.query_size:
        keys, values = block.query_size, block.query_size * values // keys
    outs = [linear.in_features for linear in block.of_part(Part.ATTENTION_OUT)]
    return block.query_size + keys + values + max(outs, default=block.query_size)


def _expanded_states(block: BlockShape) -> int:
    """Elements per token that the activation and the gate keep: gate, activated gate and up, or one plain state."""
    expanded, product = block.mlp_sizes
    if expanded >= 2 * product:
        return expanded + product * block.activation_copies
    return expanded * block.activation_copies


def _input_bytes(block: BlockShape, part: Part, batch: MicroBatch) -> int:
    """Bytes per token kept of the inputs of adapted layers in one place, and of what their first factor makes."""
    compute, own = itemsize(batch.dtype), _adapter_itemsize(block)
    # What a product under autocast keeps is in its type, whatever it was made of.
    kept = min(own, compute) if batch.autocast else own
    adapted = [linear for linear in block.of_part(part) if linear.rank]
    nbytes = sum(kept * linear.rank + _dora_bytes(linear, max(compute, kept)) for linear in adapted)
    mask = 1 if batch.device == "cuda" else own
    dropped = [linear for linear in adapted if linear.has_dropout]
    nbytes += sum((kept + mask) * linear.in_features for linear in dropped)
    plain = [linear for linear in adapted if not linear.has_dropout]
    # Each of these converts its input for itself.
    converts = [linear for linear in plain if own != compute and (linear.is_dora or not batch.autocast)]
    nbytes += kept * sum(linear.in_features for linear in converts)
    # One tensor serves all layers that read it; the heads' output is kept by attention already.
    shared = [linear.in_features for linear in plain if linear not in converts]
    return nbytes + (0 if part == Part.ATTENTION_OUT else kept * max(shared, default=0))


def _dora_bytes(linear: LinearShape, wide: int) -> int:
    """Bytes per token that the row scale's gradient needs: the unscaled sum, or its two parts apart with dropout."""
    return linear.out_features * wide * (2 if linear.has_dropout else 1) if linear.is_dora else 0


def _experts_saved(experts: ExpertsShape | None, hidden: int, compute: int) -> int:
    if experts is None:
        return 0
    states = experts.expanded_size + experts.product_size + hidden
    if experts.adapted_bytes:
        states += hidden + experts.product_size
    router = 4 * _FP32_BYTES * experts.num_experts
    return experts.num_per_token * (compute * states + 4 * _INDEX_BYTES) + router


def _experts_transient(experts: ExpertsShape | None, hidden: int, compute: int) -> int:
    if experts is None:
        return 0
    return compute * (2 * hidden + experts.num_per_token * max(3 * hidden, hidden + 3 * experts.product_size))


def _dora_tile_bytes(block: BlockShape, *, is_mixed: bool) -> int:
    """The part of a frozen weight that DoRA converts at a time where adapters are wider than weights."""
    weights = [linear.num_weights for linear in block.linears if linear.is_dora and linear.part in _MLP]
    return min(_DORA_TILE_BYTES, _FP32_BYTES * max(weights)) if weights and is_mixed else 0


def _mask_bytes(batch: MicroBatch) -> int:
    """The mask in the compute type, which torch makes of the boolean one for each call."""
    return batch.num_sequences * batch.seq_len**2 * (1 + itemsize(batch.dtype)) if batch.has_mask else 0


def block_forward_bytes(block: BlockShape, batch: MicroBatch, chunk_tokens: int | None = None) -> int:
    """Bytes that one block's forward without gradients holds at its largest, its weights and its input aside.

    Args:
        block: The block's widths.
        batch: The micro-batch.
        chunk_tokens: Tokens of a chunk, at least 1; None for whole sequences.
    """
    if chunk_tokens is not None:
        chunk = replace(batch, seq_len=min(chunk_tokens, batch.seq_len), has_mask=False)
        kept = chunk_bytes(block, batch, chunk_tokens).keys_values
        return block_forward_bytes(block, chunk) + kept + joined_bytes(block, batch)[0]
    compute = itemsize(batch.dtype)
    wide, hidden, (expanded, product) = max(compute, _moment_itemsize(block, batch)), block.hidden_size, block.mlp_sizes
    # The residual, a norm's fp32 copies, the normed states; then the heads' states, rotated copies included, or the
    # expanded ones with the adapter's input and result next to them.
    stream = compute * 2 * hidden + 2 * _FP32_BYTES * hidden
    heads = block.query_size + block.key_size + block.value_size
    attention = 3 * compute * heads + 3 * wide * max(block.query_size, hidden)
    mlp = compute * (expanded + 2 * product) + 3 * wide * max(hidden, product)
    experts = 0
    if block.experts is not None:
        sizes = block.experts.expanded_size + 2 * block.experts.product_size + 3 * hidden
        experts = compute * block.experts.num_per_token * sizes + _experts_saved(block.experts, 0, 0)
    stacks = () if block.experts is None else block.experts.adapted_bytes
    peak = batch.num_tokens * (stream + max(attention, mlp, experts)) + _mask_bytes(batch) + sum(stacks)
    return ceil(peak * block.correction)


# Heap that glibc holds over what lives, as multiples of temporaries without and with gradients: torch asks for
# aligned memory, and glibc does not give it a freed piece of the same size. All of these are fitted to the jobs of
# benchmarks/plan_accuracy.py, with what lies between live pieces (`held_heap_bytes`) next to them.
_FORWARD_HEAP = 0.4
_BACKWARD_HEAP = 2.07
_CHUNKS_HEAP = 2.2

# With DoRA, whose weights are read when adapters are made (`host_memory.weight_is_read`), in one type or under
# autocast. Large pieces leave no more than so much (there, 2 x 512 with hidden 1024).
_DORA_HEAP, _MOST_DORA_HEAP_BYTES = 0.95, 135 << 20
_DORA_CHUNKS_HEAP = 1.4

# Under autocast to a half type: what is converted for each product is as large as what is kept.
_HALF_HEAP = 1.4

# Of routed experts, whose tokens are gathered in pieces of any size.
_EXPERTS_HEAP = 2.7
_EXPERTS_CHUNKS_HEAP = 4.0

# Adapters wider than the blocks: what is converted for them goes at once in whole sequences, and passes between chunks.
_MIXED_HEAP = 1.1
_MIXED_DORA_HEAP = 0.66
_MIXED_CHUNKS_HEAP = 2.8

# How many times as much DoRA with dropout leaves, which multiplies what it has dropped by the weight itself.
_DORA_DROPOUT = 1.65

# What is held between pieces that live, however often freed memory is given back: adapters, their gradients and the
# optimizer's state came to lie there; and what libraries of products hold, which is more for half types (oneDNN: 8 MiB
# more at the first product than MKL).
_HELD_TIMES_TRAINED, _MOST_HELD_BYTES, _HELD_HALF_BYTES = 7, 18 << 20, 8 << 20

# Of AdamW on every weight with its state in RAM, where freed memory is given back after each block, what is there all
# the same.
_MOST_TRIMMED_BYTES = 16 << 20

# What updates by a projection of the gradient leave, as multiples of what the largest takes: their state is made
# between them (there, GaLore, Fira and APOLLO).
UPDATE_HEAP = 5

# Larger pieces are mappings of their own, which go back to the system at once (glibc's DEFAULT_MMAP_THRESHOLD_MAX).
LARGEST_ON_HEAP_BYTES = 32 << 20


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
    one_part = states * min(batch.seq_len, PART_KEYS) * compute
    queries = chunk.num_tokens * block.query_size * (compute + gradient_bytes)
    return ChunkBytes(
        activations=block_recompute_bytes(block, chunk),
        keys_values=states * batch.seq_len * compute,
        keys_values_grads=states * batch.seq_len * gradient_bytes,
        attention=max(one_part, joined_bytes(block, batch)[1])
        + queries
        + (_part_mask_bytes(batch, chunk) if batch.has_mask else 0),
    )


def joined_bytes(block: BlockShape, batch: MicroBatch) -> tuple[int, int]:
    """Bytes that attention of a chunk on a GPU takes for the keys and values it sees, without gradients and with.

    They are joined there. Where several heads share one, flash attention's backward makes gradients for each and adds
    them up; kernels that take fp32 or a mask want the keys and values repeated as well.

    Args:
        block: The block's widths.
        batch: The micro-batch, whose last chunk sees all.
    """
    if batch.device == "cpu" or not block.key_size:
        return 0, 0
    compute = itemsize(batch.dtype)
    each = batch.num_tokens * compute
    joined, repeated = (block.key_size + block.value_size) * each, 0
    if block.key_size < block.query_size:
        repeated = (block.query_size + block.query_size * block.value_size // block.key_size) * each
    if compute < _FP32_BYTES and not batch.has_mask:
        return joined, 2 * joined + repeated
    # A masked tile is of some of the keys, and gives gradients for all.
    return joined + repeated, joined + (3 if batch.has_mask else 2) * (repeated or joined)


def _part_mask_bytes(batch: MicroBatch, chunk: MicroBatch) -> int:
    """The mask of one part of the keys, as it is and as the kernel gets it."""
    dense = chunk.num_tokens * min(batch.seq_len, PART_KEYS) * itemsize(batch.dtype)
    return 2 * min(dense, PART_BYTES[batch.device])


def heap_bytes(block: BlockShape, batch: MicroBatch, chunk_tokens: int | None) -> tuple[int, int]:
    """Freed memory that the C library keeps between temporaries, on a CPU: in a block's forward, and in its backward.

    Args:
        block: The block's widths.
        batch: The micro-batch.
        chunk_tokens: Tokens of a chunk; None for whole sequences.
    """
    if batch.device != "cpu":
        return 0, 0
    times = _times_for_dropout(block)
    # What dropout keeps lives until the block's backward: it leaves no holes (benchmarks/plan_accuracy.py).
    block = replace(block, linears=tuple(replace(linear, has_dropout=False) for linear in block.linears))
    if chunk_tokens is not None:
        parts = chunk_bytes(block, batch, chunk_tokens)
        forward = block_forward_bytes(block, batch, chunk_tokens) - parts.keys_values
        temporaries = parts.activations + parts.attention
        return int(_FORWARD_HEAP * forward), _heap_of_backward(block, batch, temporaries, times=times, in_chunks=True)
    share = _share_on_heap(block, batch)
    forward, backward = block_forward_bytes(block, batch), block_recompute_bytes(block, batch)
    # One mask serves the whole visit, and one tile all of DoRA's norms: neither leaves holes.
    is_mixed = _moment_itemsize(block, batch) > itemsize(batch.dtype)
    scores = batch.num_sequences * block.num_heads * batch.seq_len**2 * itemsize(batch.dtype)
    if block.correction > 1 and scores >= LARGEST_ON_HEAP_BYTES:
        # Scores as they are where attention makes them whole, which is what such a block's correction is of.
        forward, backward = int(forward / block.correction), int(backward / block.correction)
        block = replace(block, correction=1.0)
    backward -= ceil(block.correction * (_mask_bytes(batch) + _dora_tile_bytes(block, is_mixed=is_mixed)))
    freed = _heap_of_backward(block, batch, share * backward, times=times, in_chunks=False)
    return int(_FORWARD_HEAP * share * forward), freed


def _times_for_dropout(block: BlockShape) -> float:
    """How many times as much a backward leaves where DoRA drops some of its input."""
    return _DORA_DROPOUT if any(linear.is_dora and linear.has_dropout for linear in block.linears) else 1.0


def _heap_of_backward(
    block: BlockShape, batch: MicroBatch, temporaries: float, *, times: float, in_chunks: bool
) -> int:
    """Bytes that a backward with so many bytes of temporaries leaves."""
    freed = _heap_multiple(block, batch, in_chunks=in_chunks) * temporaries
    if _is_dora(block) and block.experts is None and not in_chunks:
        freed = min(freed, _MOST_DORA_HEAP_BYTES)
    return int(times * freed)


def _heap_multiple(block: BlockShape, batch: MicroBatch, *, in_chunks: bool) -> float:
    """Which multiple of a backward's temporaries it is."""
    if block.experts is not None:
        return _EXPERTS_CHUNKS_HEAP if in_chunks else _EXPERTS_HEAP
    is_mixed = _moment_itemsize(block, batch) > itemsize(batch.dtype)
    if _is_dora(block):
        if in_chunks:
            return _MIXED_CHUNKS_HEAP if is_mixed or batch.autocast else _DORA_CHUNKS_HEAP
        return _MIXED_DORA_HEAP if is_mixed and not batch.autocast else _DORA_HEAP
    if is_mixed or batch.autocast:
        if in_chunks:
            return _MIXED_CHUNKS_HEAP
        return _HALF_HEAP if batch.autocast else _MIXED_HEAP
    return _CHUNKS_HEAP if in_chunks else _BACKWARD_HEAP


def _is_dora(block: BlockShape) -> bool:
    return any(linear.is_dora for linear in block.linears)


def held_heap_bytes(trained_bytes: int, *, half: bool) -> int:
    """What is held between live pieces on a CPU in every phase of a step.

    Args:
        trained_bytes: Of all that is trained, in fp32.
        half: Whether products are computed in a half type.
    """
    return min(_MOST_HELD_BYTES + (_HELD_HALF_BYTES if half else 0), _HELD_TIMES_TRAINED * trained_bytes)


def trimmed_heap_bytes(kept: int) -> int:
    """What of a backward's freed pieces is there although freed memory was given back after each block.

    Args:
        kept: What would be there otherwise.
    """
    return min(kept, _MOST_TRIMMED_BYTES)


def _share_on_heap(block: BlockShape, batch: MicroBatch) -> float:
    """Which part of a block's temporaries lies on the heap: that of states as wide as the block, or of all."""
    nbytes = batch.num_tokens * itemsize(batch.dtype)
    if nbytes * block.hidden_size >= LARGEST_ON_HEAP_BYTES:
        return 0.0
    if nbytes * block.mlp_sizes[1] < LARGEST_ON_HEAP_BYTES:
        return 1.0
    saved = _saved_per_token(block, batch)
    return saved.attention / saved.total
