"""Exact attention over parts of the keys, each by a kernel that also gives the log-sum-exp of its scores.

softmax over all keys is the parts' softmaxes weighted by exp(lse_part - lse): the merge of blockwise attention (Liu and
Abbeel, "Blockwise Parallel Transformer", arXiv 2305.19370; Rabe and Staats, arXiv 2112.05682). Backward needs only the
output and the log-sum-exp of the whole (Dao, FlashAttention-2, arXiv 2307.08691, section 3.1), so each part's gradient
comes from the same kernel's backward. An attention sink is a part with one key whose value is zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import pad

from lowmem.internals.torch import cpu_attention, cpu_attention_backward
from lowmem.planning.job import kind_of
from lowmem.planning.limits import PART_BYTES, PART_KEYS
from lowmem.streaming.chunking.carrier import Prefix
from lowmem.streaming.chunking.mask import CausalMask, KeyPart, PartKind, QueryTile, split_part
from lowmem.streaming.recompute import sum_dtype


@dataclass(frozen=True, kw_only=True)
class AttentionJob:
    """Everything about one attention but its tensors."""

    mask: CausalMask
    start: int
    """Token of the first query, which is also that of the first key among the function's own."""

    prefix: Prefix | None
    scale: float
    softcap: float | None
    dropout: float
    seed: int
    """Of the dropout; drawn from the generator that a recomputation restores."""


class _AttentionContext(FunctionCtx):
    """What forward leaves for backward."""

    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]
    needs_input_grad: tuple[bool, ...]
    job: AttentionJob


class PartwiseAttention(torch.autograd.Function):
    """Attention of a chunk's queries to the prefix and to the chunk itself.

    On a CPU by torch's fused kernel wherever that can do it; else, and elsewhere, from scores of a bounded size.

    Args of `apply`:
        query: (sequences, heads, tokens, head).
        key, value: Of the same tokens: (sequences, key heads, tokens, head); heads are a multiple of key heads.
        sinks: (heads,) scores of a key that every query sees and that has no value, or None.
        job: The rest. Gradients of its prefix are added to it in backward.

    Returns:
        (sequences, tokens, heads, value head): contiguous, in the type of the query. Zero where a query sees no key.
    """

    @staticmethod
    def forward(
        ctx: _AttentionContext, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, job: AttentionJob
    ) -> Tensor:
        batch, heads, tokens, _ = query.shape
        out_BTHD = query.new_empty(batch, tokens, heads, value.shape[-1])
        lse = query.new_empty(batch, heads, tokens, dtype=sum_dtype(query.dtype))
        for tile in job.mask.tiles(job.start, job.start + tokens):
            rows = slice(tile.start - job.start, tile.end - job.start)
            merged = _Merge()
            for part in _pieces(tile, query, job):
                keys, values = _part_tensors(part, key, value, job, dtype=query.dtype)
                merged.add(*_part_forward(query[:, :, rows], keys, values, tile=tile, part=part, job=job))
            tile_out, tile_lse = merged.result(sinks)
            out_BTHD[:, rows] = tile_out.transpose(1, 2)
            lse[:, :, rows] = tile_lse
        ctx.job = job
        saved = (query, key, value, sinks, out_BTHD, lse)
        ctx.save_for_backward(*saved)  # type: ignore[arg-type]  # torch takes None as well
        return out_BTHD

    @staticmethod
    @once_differentiable
    def backward(ctx: _AttentionContext, grad_BTHD: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out_BTHD, lse = ctx.saved_tensors
        job = ctx.job
        grad_out, out = grad_BTHD.transpose(1, 2).to(query.dtype), out_BTHD.transpose(1, 2)
        grad_query = torch.zeros_like(query, dtype=sum_dtype(query.dtype))
        own = _OwnGradients(key, value, start=job.start)
        for tile in job.mask.tiles(job.start, job.start + query.shape[2]):
            rows = slice(tile.start - job.start, tile.end - job.start)
            state = _TileState(query[:, :, rows], grad_out[:, :, rows], out[:, :, rows], lse[:, :, rows])
            for part in _pieces(tile, query, job):
                keys, values = _part_tensors(part, key, value, job, dtype=query.dtype)
                found = _part_backward(state, keys, values, tile=tile, part=part, job=job)
                grad_query[:, :, rows] += found[0]
                if part.start >= job.start:
                    own.add_gradient(part.start, found[1], found[2])
                elif job.prefix is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
                    job.prefix.memory.add_gradient(part.start, found[1], found[2])
        grad_sinks = None
        if sinks is not None:
            delta = (grad_out * out).sum(-1, dtype=lse.dtype)
            grad_sinks = -(delta * (sinks.to(lse.dtype).view(1, -1, 1) - lse).exp_()).sum((0, 2)).to(sinks.dtype)
        return grad_query.to(query.dtype), own.key.to(key.dtype), own.value.to(value.dtype), grad_sinks, None


class _OwnGradients:
    """Sums the gradients of a chunk's own keys and values over its tiles."""

    def __init__(self, key: Tensor, value: Tensor, *, start: int) -> None:
        self.key = torch.zeros_like(key, dtype=sum_dtype(key.dtype))
        self.value = torch.zeros_like(value, dtype=sum_dtype(value.dtype))
        self._start = start

    def add_gradient(self, start: int, key: Tensor, value: Tensor) -> None:
        first = start - self._start
        self.key[:, :, first : first + key.shape[2]] += key
        self.value[:, :, first : first + value.shape[2]] += value


class _Merge:
    """The attention over the parts added so far."""

    def __init__(self) -> None:
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, out: Tensor, lse: Tensor) -> None:
        """Add a part's output, (sequences, heads, tokens, head), and log-sum-exp, -inf where a query saw nothing."""
        if self._out is None or self._lse is None:
            self._out, self._lse = out.to(sum_dtype(out.dtype)), lse
            return
        total = torch.logaddexp(self._lse, lse)
        # Where neither saw a key both weights are exp(-inf - -inf), that is nan.
        old, new = ((part - total).exp_().nan_to_num_(nan=0.0).unsqueeze(-1) for part in (self._lse, lse))
        self._out = self._out.mul_(old).add_(out * new)
        self._lse = total

    def result(self, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        assert self._out is not None
        assert self._lse is not None
        out, lse = self._out, self._lse
        if sinks is not None:
            total = torch.logaddexp(lse, sinks.to(lse.dtype).view(1, -1, 1))
            out = out.mul_((lse - total).exp_().unsqueeze(-1))
            lse = total
        # Queries that see nothing: any finite number makes exp(-inf - lse) zero in backward.
        return out, lse.masked_fill(lse == -torch.inf, 0.0)


def _uses_scores(query: Tensor, job: AttentionJob) -> bool:
    """Whether the fused kernel cannot do it, so that scores are computed."""
    return job.softcap is not None or job.dropout > 0 or query.device.type != "cpu"


def _pieces(tile: QueryTile, query: Tensor, job: AttentionJob) -> Iterator[KeyPart]:
    """The parts of a tile, cut so that no mask and no scores outgrow their bound."""
    num_queries = tile.end - tile.start
    part_bytes = PART_BYTES[kind_of(query.device)]
    for part in tile.parts:
        num_keys = PART_KEYS
        if _uses_scores(query, job):
            num_keys = part_bytes // (query.shape[0] * query.shape[1] * num_queries * sum_dtype(query.dtype).itemsize)
        elif part.kind is PartKind.MASKED:
            num_keys = part_bytes // (query.shape[0] * num_queries * query.dtype.itemsize)
        yield from split_part(part, at=job.start, num_keys=max(16, min(num_keys, PART_KEYS)))


def _part_tensors(
    part: KeyPart, key: Tensor, value: Tensor, job: AttentionJob, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if part.start >= job.start:
        rows = slice(part.start - job.start, part.end - job.start)
        return key[:, :, rows].to(dtype), value[:, :, rows].to(dtype)
    assert job.prefix is not None
    rows = slice(part.start, part.end)
    return job.prefix.key[:, :, rows].to(dtype), job.prefix.value[:, :, rows].to(dtype)


def _part_mask(tile: QueryTile, part: KeyPart, job: AttentionJob) -> Tensor | None:
    """bool, (sequences, 1, queries, keys), or None where the kernel needs none."""
    if part.kind is PartKind.MASKED:
        return job.mask.evaluate(range(tile.start, tile.end), range(part.start, part.end))
    return None


@dataclass(frozen=True)
class _TileState:
    """What backward knows of a tile's queries: (sequences, heads, tokens, head), and (sequences, heads, tokens)."""

    query: Tensor
    grad_out: Tensor
    out: Tensor
    lse: Tensor


def _part_forward(
    query: Tensor, key: Tensor, value: Tensor, *, tile: QueryTile, part: KeyPart, job: AttentionJob
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one part."""
    mask = _part_mask(tile, part, job)
    causal = part.kind is PartKind.CAUSAL
    if _uses_scores(query, job):
        scores, _ = _scores(query, key, mask, causal=causal, job=job)
        lse = scores.logsumexp(-1)
        probs = torch.sub(scores, lse.unsqueeze(-1), out=scores).exp_().nan_to_num_(nan=0.0)
        kept = _dropped(probs, tile, part, job)
        grouped = kept.view(*key.shape[:2], -1, key.shape[2]) @ value.to(kept.dtype)
        return grouped.view(*query.shape[:3], -1), lse
    width = value.shape[-1]
    query, key, value = _same_width(query, key, value)
    out, lse = cpu_attention(query, key, value, causal=causal, mask=_additive(mask, query.dtype), scale=job.scale)
    if mask is not None:
        # The kernel gives 0 for a query that sees none of these keys.
        lse = lse.masked_fill(~mask.any(-1), -torch.inf)
    return out[..., :width], lse


def _part_backward(
    state: _TileState, key: Tensor, value: Tensor, *, tile: QueryTile, part: KeyPart, job: AttentionJob
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values through one part."""
    mask = _part_mask(tile, part, job)
    causal = part.kind is PartKind.CAUSAL
    if _uses_scores(state.query, job):
        return _scores_backward(state, key, value, mask, tile=tile, part=part, job=job)
    widths = key.shape[-1], value.shape[-1]
    query, wide_key, wide_value = _same_width(state.query, key, value)
    grad_out, out = (pad(tensor, (0, query.shape[-1] - widths[1])) for tensor in (state.grad_out, state.out))
    additive = _additive(mask, query.dtype)
    grads = cpu_attention_backward(
        grad_out, query, wide_key, wide_value, out, state.lse, causal=causal, mask=additive, scale=job.scale
    )
    return grads[0][..., : widths[0]], grads[1][..., : widths[0]], grads[2][..., : widths[1]]


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def _same_width(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latent attention has wider keys than values; the kernel has not, and zeros change neither scores nor outputs."""
    width = max(key.shape[-1], value.shape[-1])
    if key.shape[-1] == value.shape[-1]:
        return query, key, value
    return (
        pad(query, (0, width - query.shape[-1])),
        pad(key, (0, width - key.shape[-1])),
        pad(value, (0, width - value.shape[-1])),
    )


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, *, causal: bool, job: AttentionJob
) -> tuple[Tensor, Tensor | None]:
    """Scaled, capped and masked scores, (sequences, heads, queries, keys), and the cap's slope where there is a cap."""
    dtype = sum_dtype(query.dtype)
    batch, heads, num_queries, _ = query.shape
    grouped = query.to(dtype).reshape(batch, key.shape[1], -1, query.shape[-1])
    scores = torch.matmul(grouped, key.to(dtype).transpose(-1, -2)).view(batch, heads, num_queries, -1).mul_(job.scale)
    slope = None
    if job.softcap is not None:
        scores.div_(job.softcap).tanh_()
        slope = scores.square().neg_().add_(1.0)
        scores.mul_(job.softcap)
    if causal:
        mask = torch.ones(num_queries, num_queries, dtype=torch.bool, device=query.device).tril_()
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    return scores, slope


def _dropped(probs: Tensor, tile: QueryTile, part: KeyPart, job: AttentionJob) -> Tensor:
    """The probabilities after dropout, the same ones in forward and backward: one generator per tile and part."""
    if job.dropout == 0:
        return probs
    generator = torch.Generator(device=probs.device)
    generator.manual_seed((job.seed + tile.start * job.mask.num_tokens + part.start) % 2**63)
    kept = torch.rand(probs.shape, generator=generator, device=probs.device) >= job.dropout
    return probs * kept / (1 - job.dropout)


def _scores_backward(
    state: _TileState,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    tile: QueryTile,
    part: KeyPart,
    job: AttentionJob,
) -> tuple[Tensor, Tensor, Tensor]:
    scores, slope = _scores(state.query, key, mask, causal=part.kind is PartKind.CAUSAL, job=job)
    probs = torch.sub(scores, state.lse.unsqueeze(-1), out=scores).exp_()
    grad_out, dtype = state.grad_out.to(probs.dtype), probs.dtype
    delta = (grad_out * state.out).sum(-1, keepdim=True, dtype=dtype)

    def by_key_head(tensor: Tensor) -> Tensor:
        return tensor.reshape(*key.shape[:2], -1, tensor.shape[-1])

    grad_value = by_key_head(_dropped(probs, tile, part, job)).transpose(-1, -2) @ by_key_head(grad_out)
    grad_probs = (by_key_head(grad_out) @ value.to(dtype).transpose(-1, -2)).view(probs.shape)
    grad_scores = _dropped(grad_probs, tile, part, job).sub_(delta).mul_(probs).mul_(job.scale)
    if slope is not None:
        grad_scores.mul_(slope)
    grad_query = (by_key_head(grad_scores) @ key.to(dtype)).view(state.query.shape)
    grad_key = by_key_head(grad_scores).transpose(-1, -2) @ by_key_head(state.query.to(dtype))
    return grad_query, grad_key, grad_value
