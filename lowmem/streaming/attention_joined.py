"""Attention of a chunk to prefix and chunk joined, by torch's own fused kernels: for devices whose kernels take masks.

One copy of the keys and values that the chunk sees is made for the time of the attention. Plain causal masks go to the
kernels as lower-right aligned causal ones, without a mask tensor.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from lowmem.streaming.attention_parts import AttentionJob

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
    def forward(  # noqa: D102
        ctx: _JoinContext, key: Tensor, value: Tensor, job: AttentionJob, first: int
    ) -> tuple[Tensor, Tensor]:
        ctx.job, ctx.first = job, first
        if job.prefix is None or first == job.start:
            return key.clone(), value.clone()
        before = (job.prefix.key[:, :, first:].to(key.dtype), job.prefix.value[:, :, first:].to(value.dtype))
        return torch.cat((before[0], key), dim=2), torch.cat((before[1], value), dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: _JoinContext, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        job, num_before = ctx.job, ctx.job.start - ctx.first
        if job.prefix is not None and num_before:
            job.prefix.add_gradient(ctx.first, grad_key[:, :, :num_before], grad_value[:, :, :num_before])
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
