"""What each tensor role takes in each tier for one step, everything but the blocks' own bytes. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from lowmem.host_memory import LEAVES_LITTLE_BYTES
from lowmem.internals.unread import is_attention_ever_kept, is_ever_kept, is_worth_putting_off
from lowmem.models.absent import ROWS_PER_READ
from lowmem.planning.block_memory import (
    LARGEST_ON_HEAP_BYTES,
    UPDATE_HEAP,
    MicroBatch,
    block_forward_bytes,
    block_recompute_bytes,
    chunk_bytes,
    heap_bytes,
    held_heap_bytes,
    trimmed_heap_bytes,
)
from lowmem.planning.job import Job
from lowmem.planning.limits import (
    DENSE_MASK_BYTES,
    NUM_BASIS_MATRICES,
    NUM_CHUNK_BUFFERS,
    NUM_CONVERTED_PIECES,
    NUM_LANDING_BLOCKS,
    NUM_MASTER_STAGING,
    NUM_UPDATE_PIECES,
    UPDATE_PIECE_BYTES,
    HeadTiles,
    state_chunk_bytes,
)
from lowmem.planning.shapes import BlockShape, LinearShape, ModelShapes, Part, itemsize
from offload import PAGE_BYTES, PlacementPlan, ceil_div

Tier = Literal["device", "host", "disk"]
"""Where bytes are."""


Moment = Literal["embedding", "forward", "generation", "head", "block", "update"]
"""Parts of a step that exclude each other: rows are looked up; a micro-batch goes through a block without gradients;
tokens are generated; the head and its loss run; a block is recomputed and differentiated; the optimizer steps."""


Phase = Literal[Moment, "always"]
"""When bytes are held: in one of the moments, or throughout a step."""


ALWAYS: Literal["always"] = "always"


_MOMENTS: tuple[Moment, ...] = get_args(Moment)


_BEFORE_AND_AFTER_HEAD: tuple[Moment, ...] = ("forward", "block")
"""When a processor has buffers of boundary activations: they are let go of while the head runs."""


BOUNDARY_BUFFERS = "boundary buffers"
"""Role of the RAM that boundary activations pass through on their way to disk."""


PRODUCT_BUFFERS = "product buffers"
"""Role of the RAM that kept products pass through on their way to disk."""


KEPT_PRODUCTS = "kept products"
"""Role of what blocks multiplied in the forward, where it waits for the backward."""


FREED_HEAP = "freed heap"
"""Role of what the C library keeps of a CPU's memory between temporaries."""


STAGING_BUFFERS = "staging buffers"
"""Role of the RAM that stored bytes pass through on their way to a GPU."""


_FP32_BYTES = 4


_TOKEN_ID_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class RoleBytes:
    """What one tensor role takes in one tier."""

    role: str
    """What it is, in words."""
    tier: Tier
    """Where it is."""
    nbytes: int
    """Bytes."""
    phase: Phase = ALWAYS
    """When they are held."""

    def __post_init__(self) -> None:
        if self.tier not in get_args(Tier) or self.phase not in (ALWAYS, *_MOMENTS) or self.nbytes < 0:
            raise ValueError(f"{self.role}: tier {self.tier!r}, phase {self.phase!r}, {self.nbytes} bytes")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a planner decides besides the blocks' places."""

    micro_batch: int
    """Sequences that go through a block at a time in training."""
    chunk_tokens: int | None
    """Tokens of a sequence that go through a block at a time; None for all."""
    boundary_tier: Tier
    """Where block inputs wait for the backward."""
    keeps_keys_values: bool
    """Whether keys and values of a block in chunks wait for the backward where its input does."""
    keeps_products: bool = False
    """Whether large products of blocks, computed on whole sequences, wait for the backward where their inputs do."""
    embedding_on_disk: bool
    """Whether the embedding table stays in the checkpoint and only a batch's rows are read."""
    state_tier: Tier = "device"
    """Where master weights, gradients and moments are, where every weight is trained."""
    update_share: float = 0.0
    """Which part of the blocks' state a GPU updates, while the processor updates the rest."""
    reduces_gradients: bool = False
    """Whether gradients are reduced on a GPU before they leave it, where that is all their optimizer wants of them."""
    takes_bases: bool = False
    """Whether what they are projected with is read off them on a GPU."""


def peak_bytes(roles: Iterable[RoleBytes], tier: Tier) -> int:
    """Largest bytes held in a tier at any moment: what is always there, and the largest phase."""
    by_phase = _by_phase(roles, tier)
    return by_phase.pop(ALWAYS) + max(by_phase.values())


def peak_phase(roles: Iterable[RoleBytes], tier: Tier) -> Moment:
    """The phase in which a tier holds most."""
    by_phase = _by_phase(roles, tier)
    return max(_MOMENTS, key=lambda moment: by_phase[moment])


def _by_phase(roles: Iterable[RoleBytes], tier: Tier) -> dict[Phase, int]:
    by_phase: dict[Phase, int] = dict.fromkeys((ALWAYS, *_MOMENTS), 0)
    for role in roles:
        if role.tier == tier:
            by_phase[role.phase] += role.nbytes
    return by_phase


def counted_host_bytes(roles: Iterable[RoleBytes], *, budget_bytes: int) -> int:
    """What counts against a host budget: everything; with one of 0, all but the buffers that transfers pass through."""
    passing = () if budget_bytes else (STAGING_BUFFERS, BOUNDARY_BUFFERS)
    return peak_bytes((role for role in roles if role.role not in passing), "host")


def as_moved(shapes: ModelShapes, placement: PlacementPlan) -> PlacementPlan:
    """The same placement of what visits bring to a device, which may be fewer bytes than blocks take."""
    return placement if shapes.moved_dtype is None else replace(placement, block_bytes=shapes.moved_bytes)


def step_roles(shapes: ModelShapes, job: Job, choice: Choice) -> tuple[RoleBytes, ...]:
    """Every role of a step but the blocks' stored bytes and their buffers; roles of no bytes are left out."""
    roles = (*_weights(shapes, job, choice), *_activations(shapes, job, choice), *_phases(shapes, job, choice))
    return tuple(role for role in roles if role.nbytes)


def _device(role: str, nbytes: int, *, phase: Phase = ALWAYS) -> RoleBytes:
    return RoleBytes(role=role, tier="device", nbytes=nbytes, phase=phase)


def _weights(shapes: ModelShapes, job: Job, choice: Choice) -> Iterable[RoleBytes]:
    yield _device("unpacked block", shapes.workspace_bytes)
    if choice.embedding_on_disk:
        yield RoleBytes(role="embedding", tier="disk", nbytes=shapes.embedding_stored_bytes)
    else:
        yield _device("embedding", shapes.embedding_bytes)
    yield _device("head", shapes.head_bytes)
    yield _device("norms and buffers", shapes.other_bytes)
    if job.tuning == "full":
        yield from full_state(shapes, choice, on_gpu=job.device != "cpu", num_sharing=job.num_sharing)
        if job.num_backwards > 1:
            # A later batch's gradient of the head is whole before it is added to that of the earlier ones.
            yield _device("gradient to be added", shapes.head_bytes, phase="head")
        if (width := itemsize(shapes.compute_dtype)) < _FP32_BYTES:
            # It is summed in fp32 and then brought into its own type.
            yield _device("head's gradient in fp32", shapes.head_bytes // width * _FP32_BYTES, phase="head")
        return
    yield _device("adapters", shapes.adapter_bytes)
    if job.trains:
        yield _device("adapter gradients", shapes.adapter_bytes)
        # AdamW: first and second moments in the parameters' own dtype.
        state_bytes = 2 * shapes.adapter_bytes if shapes.optimizer is None else shapes.optimizer.state_bytes
        yield _device("optimizer state", state_bytes)


def full_state(
    shapes: ModelShapes, choice: Choice, *, on_gpu: bool = False, num_sharing: int = 1
) -> Iterable[RoleBytes]:
    """Gradients of every weight and what the optimizer keeps; the master weights are the decoder blocks themselves.

    AdamW's moments in fp32 lie in the tier of the weights; what another optimizer keeps is in RAM wherever these are,
    unless `lowmem.full.state_on_disk` brings it there.

    Gradients of what is outside the blocks are ordinary ones, on the device; of a block's weights, one has a gradient
    of its own at a time. On a GPU those of a whole block may be on their way down, what is outside the blocks has its
    master weights on the host, and weights and gradients pass page-locked memory.

    Ranks that share a machine have one copy in all, of which each counts its part.
    """
    widest_bytes = max(block.fp32_bytes for block in shapes.blocks)
    yield _device("gradients", shapes.outer_bytes)
    tier = choice.state_tier
    if on_gpu:
        lent_bytes = max(shapes.moved_bytes)
        yield _device("weight gradients", lent_bytes, phase="block")
        if choice.takes_bases:
            # Weight, gradient and state of the largest matrix, and what its decomposition makes of it.
            widest = max(map(_largest_weight_bytes, shapes.blocks))
            yield _device("new basis", NUM_BASIS_MATRICES * widest, phase="update")
        if choice.reduces_gradients and shapes.optimizer is not None:
            # The largest gradient in fp32, and its projection.
            widest = 2 * max(map(_largest_weight_bytes, shapes.blocks))
            each = ceil_div(shapes.optimizer.reduction.basis_bytes, len(shapes.blocks))
            yield _device("bases", each + widest, phase="block")
        passing = NUM_LANDING_BLOCKS * widest_bytes
        if tier == "host":
            outer_bytes = ceil_div(shapes.outer_bytes, num_sharing)
            yield RoleBytes(role="master weights outside the blocks", tier="host", nbytes=outer_bytes)
            passing += NUM_MASTER_STAGING * lent_bytes
        if choice.update_share:
            converted = 0 if shapes.state_bytes_each == 3 * _FP32_BYTES else NUM_CONVERTED_PIECES
            yield _device("state that is updated", (NUM_UPDATE_PIECES + converted) * UPDATE_PIECE_BYTES)
        yield RoleBytes(role=STAGING_BUFFERS, tier="host", nbytes=passing)
    else:
        yield _device("weight gradient", max(map(_largest_weight_bytes, shapes.blocks)), phase="block")
    yield RoleBytes(role="gradients", tier=tier, nbytes=ceil_div(shapes.fp32_bytes, num_sharing))
    near: Tier = "host" if on_gpu else "device"
    optimizer = shapes.optimizer
    if optimizer is not None:
        yield RoleBytes(role="update of one weight", tier=near, nbytes=optimizer.temporary_bytes, phase="update")
    if optimizer is not None and not optimizer.is_flat:
        kept: Tier = tier if tier != "disk" else near
        yield RoleBytes(role="optimizer state", tier=kept, nbytes=optimizer.state_bytes)
    else:
        for moment in ("exp_avg", "exp_avg_sq"):
            yield RoleBytes(role=moment, tier=tier, nbytes=ceil_div(shapes.moments_bytes // 2, num_sharing))
    if tier == "disk":
        yield RoleBytes(role="gradient buffer", tier=near, nbytes=widest_bytes)
        # Weight, both moments and gradient of the chunks that are read, updated and written.
        chunks = NUM_CHUNK_BUFFERS * 4 * state_chunk_bytes(widest_bytes)
        yield RoleBytes(role="state chunks", tier=near, nbytes=chunks)


def exchange_bytes(shapes: ModelShapes, *, num_sharing: int, on_gpu: bool) -> int:
    """RAM that one of several ranks which train every weight takes besides.

    A block's gradients, of its own alone; and its part of the weights outside the blocks, which ranks copy from each
    other, and which are on the host anyway where blocks are computed on GPUs.
    """
    widest_bytes = max(block.fp32_bytes for block in shapes.blocks)
    outer_bytes = 0 if on_gpu else shapes.outer_bytes * _FP32_BYTES // itemsize(shapes.compute_dtype)
    return widest_bytes + ceil_div(outer_bytes, num_sharing)


def _largest_weight_bytes(block: BlockShape) -> int:
    if block.experts is not None:
        return block.buffer_bytes
    return max(linear.num_weights for linear in block.linears) * _FP32_BYTES


def boundary_bytes(shapes: ModelShapes, job: Job) -> int:
    """Bytes of all block inputs of one training forward."""
    if not job.trains:
        return 0
    return len(shapes.blocks) * job.num_tokens * shapes.hidden_size * itemsize(shapes.compute_dtype)


def key_value_bytes(shapes: ModelShapes, job: Job) -> int:
    """Bytes of all blocks' keys and values of one training forward."""
    return job.num_tokens * shapes.key_value_bytes_per_token if job.trains else 0


def kept_bytes(shapes: ModelShapes, job: Job, choice: Choice) -> int:
    """Bytes that one training forward leaves for its backward: block inputs, and what is kept to spare it work."""
    keys_values = key_value_bytes(shapes, job) if choice.keeps_keys_values else 0
    products = product_bytes(shapes, job, only_read=True) if choice.keeps_products else 0
    return boundary_bytes(shapes, job) + keys_values + products


def kept_linears(block: BlockShape, *, only_read: bool) -> tuple[LinearShape, ...]:
    """Linear layers whose products a processor keeps for the backward; what routed experts give is never kept.

    Args:
        block: The block's widths.
        only_read: Without the last layers, where their product is added to the residual stream as it is: the first step
            finds out that nobody reads it, and later ones do not keep it.
    """
    if block.experts is not None:
        return ()
    wide = (one for one in block.linears if is_ever_kept(one.in_features, one.out_features))
    return tuple(one for one in wide if not (only_read and one.part == Part.MLP_OUT and block.num_norms <= 2))


def can_keep_products(shapes: ModelShapes, job: Job, *, micro_batch: int) -> bool:
    """Whether large products can be kept of whole sequences: on a processor, of large dense blocks.

    Args:
        shapes: The model.
        job: The step.
        micro_batch: Sequences that go through a block at a time.
    """
    if not job.trains or job.device != "cpu" or any(block.experts is not None for block in shapes.blocks):
        return False
    weights = [torch.Size((one.out_features, one.in_features)) for one in shapes.blocks[0].linears]
    num_tokens = micro_batch * job.seq_len
    is_worth_it = is_worth_putting_off(torch.device(job.device), weights, num_tokens=num_tokens)
    return is_worth_it and product_bytes(shapes, job) > 0


def product_bytes(shapes: ModelShapes, job: Job, *, only_read: bool = False) -> int:
    """Bytes of all blocks' large products of one training forward, without those that no backward reads if asked.

    With them, what heads give, and their sums in fp32.
    """
    widths = sum(one.out_features for block in shapes.blocks for one in kept_linears(block, only_read=only_read))
    nbytes = job.num_tokens * widths * itemsize(shapes.compute_dtype)
    if nbytes and is_attention_ever_kept(job.seq_len):
        width = itemsize(shapes.compute_dtype)
        each = sum(block.query_size * width + block.num_heads * _FP32_BYTES for block in shapes.blocks)
        nbytes += job.num_tokens * each
    return nbytes


NUM_PRODUCT_BUFFERS = 10
"""Buffers through which kept products go to disk and come back: those of one part of a batch, read while the part
before it is differentiated."""


def num_boundary_buffers(device: str) -> int:
    """Buffers through which boundary activations go to disk and come back, each of the largest one's size.

    Reading one takes a GPU longer than it should wait, so there the next is read ahead; to a CPU it is nothing.
    """
    return 1 if device == "cpu" else 2


def _activations(shapes: ModelShapes, job: Job, choice: Choice) -> Iterable[RoleBytes]:
    compute = itemsize(shapes.compute_dtype)
    hidden_bytes = job.num_tokens * shapes.hidden_size * compute
    yield RoleBytes(role="boundary activations", tier=choice.boundary_tier, nbytes=boundary_bytes(shapes, job))
    if choice.keeps_keys_values:
        kept = key_value_bytes(shapes, job)
        yield RoleBytes(role="keys and values", tier=choice.boundary_tier, nbytes=kept)
    if choice.keeps_products:
        kept = product_bytes(shapes, job)
        yield RoleBytes(role=KEPT_PRODUCTS, tier=choice.boundary_tier, nbytes=kept)
        if choice.boundary_tier == "disk":
            widest = max(one.out_features for block in shapes.blocks for one in kept_linears(block, only_read=False))
            passing = choice.micro_batch * job.seq_len * widest * compute
            buffers = NUM_PRODUCT_BUFFERS * passing
            yield from (_device(PRODUCT_BUFFERS, buffers, phase=phase) for phase in _BEFORE_AND_AFTER_HEAD)
    for phase, num in _num_in_flight(job, choice).items():
        yield _device("batch in flight", num * hidden_bytes, phase=phase)
    if job.num_beside:
        # The first inputs, to compare with; of each evaluation beside, its hidden states and a block's output.
        yield _device("reference in flight", (1 + 2 * job.num_beside) * hidden_bytes)
    if choice.boundary_tier == "disk":
        buffers = num_boundary_buffers(job.device) * hidden_bytes
        if job.device == "cpu":
            yield from (_device(BOUNDARY_BUFFERS, buffers, phase=phase) for phase in _BEFORE_AND_AFTER_HEAD)
        else:
            yield RoleBytes(role=BOUNDARY_BUFFERS, tier="host", nbytes=buffers)
    mask = _mask_bytes(shapes, job)
    # Ids, labels, mask and positions; cosines and sines of the widest heads.
    head_width = max(block.query_size // block.num_heads for block in shapes.blocks)
    per_token = 4 * _TOKEN_ID_BYTES + 2 * head_width * compute
    yield _device("inputs and masks", job.num_tokens * per_token + mask)


def _num_in_flight(job: Job, choice: Choice) -> dict[Moment, int]:
    """Tensors as large as the batch's hidden states, by phase, boundary activations and their buffers aside."""
    if not job.trains:
        return {"generation": 2}
    is_split = choice.micro_batch < job.num_sequences
    # The embeddings, which the model holds until its forward ends, a block's input and its output; that in parts, too.
    # At the head, the last output. In the backward, the gradient that arrives and the one that leaves, which takes its
    # place where the whole batch goes in chunks; on a GPU also the input, where that comes from another tier.
    came_back = choice.boundary_tier != "device" and job.device != "cpu"
    in_place = choice.chunk_tokens is not None and not is_split
    return {"forward": 3 + is_split, "head": 1, "block": (1 if in_place else 2) + came_back}


def _phases(shapes: ModelShapes, job: Job, choice: Choice) -> Iterable[RoleBytes]:
    if choice.embedding_on_disk:
        yield _device("embedding rows", _gathered_bytes(shapes, job), phase="embedding")
    if job.trains:
        batch = _batch(shapes, job, num_sequences=choice.micro_batch)
        widest = max(block_forward_bytes(block, batch, choice.chunk_tokens) for block in set(shapes.blocks))
        yield _device("block without gradients", widest, phase="forward")
    if job.generates:
        # With a cache, a block takes whole sequences.
        whole = _batch(shapes, job, num_sequences=max(job.num_sequences, job.num_generated))
        widest = max(block_forward_bytes(block, whole) for block in set(shapes.blocks))
        yield _device("block forward", widest, phase="generation")
        cache = job.num_generated * job.seq_len * shapes.key_value_bytes_per_token
        yield _device("K/V cache", cache, phase="generation")
        # The last token's logits, and the copies that sampling sorts.
        yield _device("logits", 4 * _FP32_BYTES * job.num_generated * shapes.vocab_size, phase="generation")
    if job.trains:
        yield _device("head and loss", _head_bytes(shapes, job), phase="head")
        yield _device("block recomputation", recompute_bytes(shapes, job, choice), phase="block")
        yield from _freed_heap(shapes, job, choice)


_NUM_BETWEEN = {(False, False): (0, 0), (False, True): (3, 2), (True, False): (2, 4), (True, True): (4, 5)}
"""By whether a batch is split and goes in chunks: hidden states that freed pieces lie between, in forward and block."""


def _freed_heap(shapes: ModelShapes, job: Job, choice: Choice) -> Iterable[RoleBytes]:
    """What the C library keeps of freed memory, by phase.

    It is given back before the head runs and after it. A forward finds what the last step's backward left.
    """
    batch = _batch(shapes, job, num_sequences=choice.micro_batch)
    heaps = [heap_bytes(block, batch, choice.chunk_tokens) for block in set(shapes.blocks)]
    in_forward, in_block = (max(kept) for kept in zip(*heaps, strict=True))
    if job.device != "cpu":
        yield _device(FREED_HEAP, in_forward, phase="forward")
        yield _device(FREED_HEAP, in_block, phase="block")
        return
    if job.tuning == "full" and choice.state_tier != "disk" and (shapes.optimizer is None or shapes.optimizer.is_flat):
        in_block = trimmed_heap_bytes(in_block)
    # The batch's hidden states come and go between the temporaries of its parts; larger ones are mappings of their
    # own. benchmarks/plan_accuracy.py: 4 x 512 in micro-batches, by 128 tokens, and 4096 tokens by 128.
    is_split, in_chunks = choice.micro_batch < job.num_sequences, choice.chunk_tokens is not None
    before, between = _NUM_BETWEEN[is_split, in_chunks]
    hidden_bytes = job.num_tokens * shapes.hidden_size * itemsize(shapes.compute_dtype)
    gradients = 0
    if choice.state_tier == "disk":
        # Gradients come and go one by one there, with several passes once more: benchmarks/plan_accuracy.py, 4 x 128
        # and 2 x (1 x 256) of every weight.
        gradients = (4 if job.gradient_accumulation_steps == 1 else 6) * _heap_gradient_bytes(shapes, job)
    is_half = itemsize(shapes.compute_dtype) < _FP32_BYTES
    held = held_heap_bytes(shapes.num_trainable * _FP32_BYTES, half=is_half)
    held += _heap_of_update(shapes, job)
    after_block = in_block + gradients + held
    before, between = before * _on_heap(hidden_bytes), between * _on_heap(hidden_bytes)
    yield _device(FREED_HEAP, max(in_forward + held, after_block + before), phase="forward")
    yield _device(FREED_HEAP, after_block + between, phase="block")
    at_head = held + _heap_of_head(shapes, job)
    if hidden_bytes < LEAVES_LITTLE_BYTES:
        at_head += in_block + gradients + between + recompute_bytes(shapes, job, choice)
    yield _device(FREED_HEAP, at_head, phase="head")


def _heap_gradient_bytes(shapes: ModelShapes, job: Job) -> int:
    """The largest weight's gradient where every weight is trained on a CPU, and it is small enough for the heap."""
    if job.tuning != "full" or job.device != "cpu":
        return 0
    return _on_heap(max(map(_largest_weight_bytes, shapes.blocks)))


def _heap_of_update(shapes: ModelShapes, job: Job) -> int:
    """What updates of one weight after another leave on a CPU's heap."""
    optimizer = shapes.optimizer
    if optimizer is None or optimizer.is_flat or job.device != "cpu":
        return 0
    return UPDATE_HEAP * max(_on_heap(optimizer.temporary_bytes), _heap_gradient_bytes(shapes, job))


def _on_heap(nbytes: int) -> int:
    """Bytes that are small enough for the heap; larger ones go back to the system at once."""
    return nbytes if nbytes < LARGEST_ON_HEAP_BYTES else 0


def _batch(shapes: ModelShapes, job: Job, *, num_sequences: int) -> MicroBatch:
    # On a GPU what autocast spares is left to the allocator, whose fragments had as much: 9 to 19% of what was
    # allocated (benchmarks/results/2026-11-27-gpu-check-h200.jsonl).
    spares = job.autocast and job.device == "cpu" and itemsize(shapes.compute_dtype) < _FP32_BYTES
    return MicroBatch(
        num_sequences=num_sequences,
        seq_len=job.seq_len,
        dtype=shapes.compute_dtype,
        device=job.device,
        has_mask=bool(job.has_mask),
        autocast=spares,
    )


def recompute_bytes(shapes: ModelShapes, job: Job, choice: Choice) -> int:
    """Bytes of the largest block's recomputation and backward for one micro-batch.

    Several micro-batches or chunks add up a block's adapter gradients in fp32 before autograd gets them.
    """
    batch = _batch(shapes, job, num_sequences=choice.micro_batch)
    sums = max(block.num_adapter_params for block in shapes.blocks) * _FP32_BYTES
    is_split = choice.micro_batch < job.num_sequences or choice.chunk_tokens is not None
    # Blocks of one shape are computed once.
    widest = max(
        block_recompute_bytes(block, batch)
        if choice.chunk_tokens is None
        else chunk_bytes(block, batch, choice.chunk_tokens).total
        for block in set(shapes.blocks)
    )
    return widest + (sums if is_split else 0)


def _mask_bytes(shapes: ModelShapes, job: Job) -> int:
    """A dense mask for the whole batch; where attention is ours, only those of short sequences are built."""
    dense = job.num_sequences * job.seq_len**2 if job.has_mask else 0
    return dense if shapes.unchunkable else min(dense, DENSE_MASK_BYTES)


def _gathered_bytes(shapes: ModelShapes, job: Job) -> int:
    row_bytes = ceil_div(shapes.embedding_stored_bytes, shapes.vocab_size)
    num_rows = min(job.num_tokens, shapes.vocab_size)
    rows = num_rows * shapes.hidden_size * itemsize(shapes.compute_dtype)
    return rows + min(num_rows, ROWS_PER_READ) * (row_bytes + 2 * PAGE_BYTES)


_LOGIT_BYTES = 3 * _FP32_BYTES
"""A logit, what it is turned into, and one more for a cap."""


def _head_tile(shapes: ModelShapes, job: Job) -> tuple[int, int, int]:
    """Tokens and words of a tile of the head, and what a word's weight takes that is converted for it."""
    tiles = HeadTiles.on(job.device)
    bytes_per_word = shapes.hidden_size * _FP32_BYTES if itemsize(shapes.compute_dtype) < _FP32_BYTES else 0
    num_tokens = min(tiles.num_tokens, job.num_tokens)
    num_words = tiles.num_words(
        num_tokens=num_tokens, vocab=shapes.vocab_size, bytes_per_logit=_LOGIT_BYTES, bytes_per_word=bytes_per_word
    )
    return num_tokens, num_words, bytes_per_word


_MOST_HEAD_HEAP_BYTES = 4 << 20


def _heap_of_head(shapes: ModelShapes, job: Job) -> int:
    """What tiles of the head leave, half as much again where they are converted.

    benchmarks/plan_accuracy.py, 1 x 128, whose logits take 4 MiB, and 4 x 512 in bf16.
    """
    num_tokens, num_words, _ = _head_tile(shapes, job)
    times = 1.5 if itemsize(shapes.compute_dtype) < _FP32_BYTES else 1
    return int(times * min(_MOST_HEAD_HEAP_BYTES, num_tokens * num_words * _FP32_BYTES))


def _head_bytes(shapes: ModelShapes, job: Job) -> int:
    """The final norm and the head, both in tiles: normed states, their gradient, and one tile.

    Of several sequences, the tokens that predict one are copied together, but not while there are gradients; when the
    norm's input gets its gradient, the normed states are gone.
    """
    compute = itemsize(shapes.compute_dtype)
    per_token = shapes.hidden_size * 2 * compute + 16 * _FP32_BYTES
    num_tokens, num_words, bytes_per_word = _head_tile(shapes, job)
    tile = num_words * (num_tokens * _LOGIT_BYTES + bytes_per_word)
    # The norm's backward, in fp32: what it kept, and the terms of its input's gradient.
    norm = 5 * num_tokens * shapes.hidden_size * _FP32_BYTES
    # A trained head's gradient is summed in fp32 and then brought into its own type.
    return job.num_tokens * per_token + max(tile, norm) + 2 * shapes.outer_adapter_bytes
