"""Our attention among transformers' implementations: masks stay rules, and a chunk sees its prefix through a carrier.

transformers looks both its attention and its mask function up by one name in the model's configuration. Two names are
registered here, one for each implementation that they stand in for: short sequences and everything that is no training
pass (generation with a cache, dense masks of a user's own) go to that implementation unchanged.

On a CPU a chunk attends part by part (`parts`). On devices whose fused kernels take masks, prefix and chunk are joined:
one copy of the keys and values that the chunk sees is made for the time of the attention, and plain causal masks go to
the kernels as lower-right aligned causal ones, without a mask tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from lowmem.errors import UnsupportedError
from lowmem.internals.attention import (
    AttentionFunction,
    attention_implementation,
    check_mask_arguments,
    set_attention_implementation,
    shipped_attention,
    shipped_mask,
)
from lowmem.internals.transformers import collected_keys
from lowmem.models.blocks import IMPLEMENTATIONS, can_chunk
from lowmem.streaming.chunking.carrier import KVCarrier, Prefix
from lowmem.streaming.chunking.mask import CausalMask, MaskRule, find_tiles, is_causal
from lowmem.streaming.chunking.parts import AttentionJob, PartwiseAttention

_HALF_TYPES = (torch.bfloat16, torch.float16)


class _JoinContext(FunctionCtx):
    job: AttentionJob
    first: int


class JoinPrefix(torch.autograd.Function):
    """Keys and values of the prefix from some token on, followed by the chunk's own.

    Args of `apply`:
        key, value: The chunk's own: (sequences, key heads, tokens, head).
        job: Knows the prefix; gradients of its part go there.
        first: First token wanted, at most the job's start.
    """

    @staticmethod
    def forward(ctx: _JoinContext, key: Tensor, value: Tensor, job: AttentionJob, first: int) -> tuple[Tensor, Tensor]:
        ctx.job, ctx.first = job, first
        if job.prefix is None or first == job.start:
            return key.clone(), value.clone()
        before = (job.prefix.key[:, :, first:].to(key.dtype), job.prefix.value[:, :, first:].to(value.dtype))
        return torch.cat((before[0], key), dim=2), torch.cat((before[1], value), dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: _JoinContext, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        job, num_before = ctx.job, ctx.job.start - ctx.first
        if job.prefix is not None and num_before:
            job.prefix.memory.add_gradient(ctx.first, grad_key[:, :, :num_before], grad_value[:, :, :num_before])
        return grad_key[:, :, num_before:], grad_value[:, :, num_before:], None, None


def joined_attention(query: Tensor, key: Tensor, value: Tensor, job: AttentionJob) -> Tensor:
    """As `PartwiseAttention.apply`, without sinks and softcap.

    Args:
        query: (sequences, heads, tokens, head).
        key: Of the same tokens: (sequences, key heads, tokens, head).
        value: As `key`.
        job: The rest.

    Returns:
        (sequences, tokens, heads, value head).
    """
    start, end = job.start, job.start + query.shape[2]
    tiles = job.mask.tiles(start, end)
    lowest = min(part.start for tile in tiles for part in tile.parts)
    keys, values = JoinPrefix.apply(key, value, job, lowest)  # type: ignore[no-untyped-call]
    groups = query.shape[1] // key.shape[1]
    plain = job.mask.rule.plain
    if groups > 1 and not (plain and query.dtype in _HALF_TYPES):
        # Only the flash kernels share a key head among heads; they take half types and no mask.
        keys, values = (tensor.repeat_interleave(groups, dim=1) for tensor in (keys, values))
        groups = 1
    if plain:
        bias = causal_lower_right(query.shape[2], keys.shape[2])
        out = scaled_dot_product_attention(
            query, keys, values, attn_mask=bias, dropout_p=job.dropout, scale=job.scale, enable_gqa=groups > 1
        )
        return out.transpose(1, 2)
    parts = []
    for tile in tiles:
        seen = range(min(part.start for part in tile.parts), tile.end)
        rows, columns = slice(tile.start - start, tile.end - start), slice(seen.start - lowest, seen.stop - lowest)
        parts.append(
            scaled_dot_product_attention(
                query[:, :, rows],
                keys[:, :, columns],
                values[:, :, columns],
                attn_mask=job.mask.evaluate(range(tile.start, tile.end), seen),
                dropout_p=job.dropout,
                scale=job.scale,
            ).transpose(1, 2)
        )
    return torch.cat(parts, dim=1)


# Bytes of the largest mask that is built whole, to give the very results of the implementation stood in for.
_DENSE_BYTES = 4 * 1024**2
AttentionOutput = tuple[Tensor, Tensor | None]


class ChunkMask:
    """What a block in chunks gets as its mask: the rule, and the carrier that knows the chunk and its prefix."""

    def __init__(self, mask: CausalMask, carrier: KVCarrier) -> None:
        self.mask = mask
        self.carrier = carrier


def register() -> None:
    """Make our names known to transformers; doing it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for implementation, name in IMPLEMENTATIONS.items():
        AttentionInterface.register(name, partial(attend, implementation))
        AttentionMaskInterface.register(name, partial(_mask, implementation))


def enable_chunks(model: nn.Module) -> None:
    """Let a model attend through this module; doing it again changes nothing.

    Raises:
        ValueError: `can_chunk` says why not.
    """
    reason = can_chunk(model)
    if reason is not None:
        raise ValueError(f"{type(model).__name__} cannot be chunked: {reason}")
    register()
    implementation = attention_implementation(model)
    set_attention_implementation(model, IMPLEMENTATIONS.get(implementation, implementation))


def _mask(implementation: str, **arguments: object) -> CausalMask | Tensor | None:
    rule = _causal_rule(arguments)
    return shipped_mask(implementation, arguments) if rule is None else rule


def _causal_rule(kwargs: dict[str, object]) -> CausalMask | None:
    """The rule of a training pass's causal mask; None for every other mask, which is then built as usual.

    Raises:
        UnsupportedError: This transformers describes its masks otherwise.
    """
    check_mask_arguments(kwargs)
    tokens, batch = kwargs["q_length"], kwargs["batch_size"]
    offsets = (kwargs["q_offset"], kwargs["kv_offset"])
    whole = kwargs["kv_length"] == tokens and offsets == (0, 0)
    if not whole or kwargs["use_vmap"] or not isinstance(tokens, int) or not isinstance(batch, int):
        # use_vmap says that the caller added a mask function of its own.
        return None
    function, padding, window = kwargs["mask_function"], kwargs.get("attention_mask"), kwargs.get("local_size")
    assert callable(function)
    if isinstance(padding, Tensor) and bool(padding.all()):
        padding = None
    window = window if isinstance(window, int) and window <= tokens else None
    plain = bool(kwargs.get("allow_is_causal_skip", True)) and padding is None and window is None
    device = torch.device(kwargs["device"]) if isinstance(kwargs["device"], str) else kwargs["device"]
    assert isinstance(device, torch.device)
    rule = MaskRule(
        allowed=function,
        padding=padding if isinstance(padding, Tensor) else None,
        window=window,
        num_tokens=tokens,
        plain=plain,
        device=device,
    )
    mask = CausalMask(rule, torch.arange(batch).unsqueeze(-1))
    return mask if plain or is_causal(mask) else None


def attend(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ChunkMask | CausalMask | Tensor | None,
    **kwargs: object,
) -> AttentionOutput:
    """Attention as transformers calls it, in the place of one of its implementations.

    Args:
        implementation: The one stood in for, "sdpa" or "eager".
        module: The attention.
        query: (sequences, heads, tokens, head).
        key: (sequences, key heads, tokens, head).
        value: As `key`.
        attention_mask: Ours, or whatever the implementation takes.
        **kwargs: What else the implementation takes.

    Returns:
        The output, (sequences, tokens, heads, head), and attention weights where the implementation gives them.
    """
    if isinstance(attention_mask, ChunkMask):
        prefix = attention_mask.carrier.take(key, value)
        return _by_parts(query, key, value, attention_mask.mask, attention_mask.carrier.start, prefix, kwargs), None
    shipped: AttentionFunction = shipped_attention(implementation, module)
    if not isinstance(attention_mask, CausalMask):
        return shipped(module, query, key, value, attention_mask, **kwargs)
    mask = attention_mask
    if implementation == "sdpa" and mask.rule.plain:
        return shipped(module, query, key, value, None, **kwargs)
    if _is_dense(mask):
        dense = mask.dense()
        if implementation == "eager":
            # As eager_mask of transformers makes it of a boolean one.
            zero = torch.zeros((), dtype=query.dtype, device=mask.rule.device)
            dense = torch.where(dense, zero, torch.finfo(query.dtype).min)
        return shipped(module, query, key, value, dense, **kwargs)
    if implementation == "eager" and "attentions" in collected_keys():
        raise UnsupportedError(
            f"output_attentions=True with {mask.num_tokens} tokens",
            reason="attention of long sequences is computed by parts, which leaves no matrix of weights",
            instead="shorter sequences or a smaller micro_batch",
        )
    return _by_parts(query, key, value, mask, 0, None, kwargs), None


def find_mask_tiles(masks: Iterable[CausalMask], rows: Sequence[slice], *, chunk_tokens: int | None) -> None:
    """Find the tiles that attention by parts will ask for, with one question to the device.

    Args:
        masks: Of one call of a block.
        rows: Sequences of each micro-batch.
        chunk_tokens: Tokens that go through the block at a time; None for whole sequences.
    """
    wanted = []
    for mask in masks:
        if mask.rule.plain:
            continue
        step = chunk_tokens or mask.num_tokens
        for some in rows:
            part = CausalMask(mask.rule, mask.rows[some])
            if chunk_tokens is None and _is_dense(part):
                continue
            spans = ((start, min(start + step, mask.num_tokens)) for start in range(0, mask.num_tokens, step))
            wanted += [(part, start, end) for start, end in spans if not part.has_tiles(start, end)]
    if wanted:
        find_tiles(wanted)


def _is_dense(mask: CausalMask) -> bool:
    """Whether the mask of whole sequences is built, to be given to the implementation stood in for."""
    return mask.rows.shape[0] * mask.num_tokens**2 <= _DENSE_BYTES


def _by_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: CausalMask,
    start: int,
    prefix: Prefix | None,
    kwargs: dict[str, object],
) -> Tensor:
    """Attention of the tokens from `start` on, a chunk or all: (sequences, tokens, heads, head)."""
    if kwargs.get("position_bias") is not None:
        raise RuntimeError("attention with a position bias cannot be computed by parts")
    dropout, scaling, softcap = kwargs.get("dropout"), kwargs.get("scaling"), kwargs.get("softcap")
    sinks = kwargs.get("s_aux")
    dropout = dropout if isinstance(dropout, float) else 0.0
    job = AttentionJob(
        mask=mask,
        start=start,
        prefix=prefix,
        scale=scaling if isinstance(scaling, float) else query.shape[-1] ** -0.5,
        softcap=float(softcap) if isinstance(softcap, int | float) else None,
        dropout=dropout,
        seed=int(torch.randint(2**62, ())) if dropout else 0,
    )
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if kind != "cpu" and job.softcap is None and not isinstance(sinks, Tensor):
        return joined_attention(query, key, value, job)
    with torch.autocast(kind, enabled=False):
        out: Tensor = PartwiseAttention.apply(  # type: ignore[no-untyped-call]
            query, key, value, sinks if isinstance(sinks, Tensor) else None, job
        )
    return out
