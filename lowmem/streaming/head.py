"""The head in tiles: per-token log-probabilities and their gradient in memory independent of vocabulary and sequence.

TRL's trainers compute their losses through one Function, `trl.kernels.ChunkedLogProbFunction`. It is exact, but its
tile is 4096 tokens by 32768 words, and on a CPU each element-wise step over it allocates another: the head alone can
outweigh a streamed model. `TiledLogProbFunction` takes the same arguments and returns the same outputs from two or
three reused buffers, a tile of tokens by a tile of vocabulary at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lowmem import host_memory
from lowmem.host_memory import is_skinny, product_of_few
from lowmem.planning.limits import HeadTiles
from lowmem.streaming.recompute import sum_dtype

_HALF_TYPES = (torch.bfloat16, torch.float16)

_FEW_ROWS = 32
"""Rows whose product may have memory of its own, at most 2 MiB of it."""


@cache
def _multiplies_bf16() -> bool:
    """Whether this processor has instructions for products of bf16."""
    there = torch.cpu.get_capabilities()
    return any(there.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """What is done to the product of hidden states and weight: scale, cap, temper, in this order."""

    round_dtype: torch.dtype
    """Type the inputs are rounded to before the product: autocast's, or that of the hidden states."""

    temperature: float
    softcap: float | None
    logit_scale: float


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A head and the types it is computed in."""

    weight: Tensor  # [V, H], as stored
    bias: Tensor | None  # [V]
    options: HeadOptions

    @property
    def tile_dtype(self) -> torch.dtype:
        """What the product is computed in."""
        # Without instructions for it, CPUs multiply half types up to 100 times slower than fp32, in which the product
        # of the rounded inputs is exact; with them, two to three times faster.
        half, on_cpu = self.options.round_dtype, self.weight.device.type == "cpu"
        is_slow = on_cpu and half in _HALF_TYPES and not (half == torch.bfloat16 and _multiplies_bf16())
        return torch.float32 if is_slow else half

    @property
    def sum_dtype(self) -> torch.dtype:
        """What everything but the product is computed in."""
        return sum_dtype(self.options.round_dtype)

    @property
    def gradient_dtype(self) -> torch.dtype:
        """What products with a gradient are computed in; CPUs give no product in another type than its factors."""
        return self.sum_dtype if self.weight.device.type == "cpu" else self.tile_dtype

    @property
    def num_product_buffers(self) -> int:
        """Buffers of a tile besides those of the sums: a product in a half type needs its own."""
        return 0 if self.tile_dtype == self.sum_dtype else 1

    def hidden_tile(self, hidden: Tensor, rows: Tensor | slice) -> Tensor:
        """Rows of the hidden states, rounded as autocast would, in the product's type: [tokens, H]."""
        return hidden[rows].to(self.options.round_dtype).to(self.tile_dtype)


class TileBuffers:
    """The reused memory of one pass over all tiles."""

    def __init__(
        self, head: Projection, *, tiles: HeadTiles, num_rows: int, num_spare: int, has_gradient: bool = False
    ) -> None:
        vocab, width = head.weight.shape
        device = head.weight.device
        num_tokens = max(1, min(tiles.num_tokens, num_rows))
        logit_bytes = head.sum_dtype.itemsize * (1 + num_spare) + head.tile_dtype.itemsize * head.num_product_buffers
        converts = head.weight.dtype != head.tile_dtype or head.options.round_dtype != head.tile_dtype
        widens = has_gradient and head.gradient_dtype != head.tile_dtype
        self.num_tokens = num_tokens
        self.num_words = tiles.num_words(
            num_tokens=num_tokens,
            vocab=vocab,
            bytes_per_logit=logit_bytes,
            bytes_per_word=width * (converts * head.tile_dtype.itemsize + widens * head.gradient_dtype.itemsize),
        )
        size = num_tokens * self.num_words
        make = partial(host_memory.empty, device=device)
        self._logits = make((size,), dtype=head.sum_dtype)
        self._spare = [make((size,), dtype=head.sum_dtype) for _ in range(num_spare)]
        self._product = make((size,), dtype=head.tile_dtype) if head.num_product_buffers else None
        self._weight = make((self.num_words * width,), dtype=head.tile_dtype) if converts else None
        self._wide = make((self.num_words * width,), dtype=head.gradient_dtype) if widens else None
        self._head = head

    def word_tiles(self) -> Iterator[tuple[int, int]]:
        """Start and end of each tile of the vocabulary."""
        vocab = self._head.weight.shape[0]
        for start in range(0, vocab, self.num_words):
            yield start, min(start + self.num_words, vocab)

    def weight(self, start: int, end: int) -> Tensor:
        """Rows of the weight in the product's type, [words, H]; overwritten by the next call."""
        rows = self._head.weight[start:end]
        if self._weight is None:
            return rows
        tile = self._weight[: rows.numel()].view(rows.shape)
        if self._head.options.round_dtype.itemsize < rows.dtype.itemsize:
            # autocast computes with rounded weights, whatever they are multiplied in
            return tile.copy_(rows.to(self._head.options.round_dtype))
        return tile.copy_(rows)

    def for_gradient(self, weight: Tensor) -> Tensor:
        """A tile of the weight in the type of products with gradients; overwritten by the next call."""
        return weight if self._wide is None else self._wide[: weight.numel()].view(weight.shape).copy_(weight)

    def spare(self, like: Tensor, index: int = 0) -> Tensor:
        """A buffer of the shape of `like` in the sums' type, besides the one of the logits."""
        return self._spare[index][: like.numel()].view(like.shape)

    def product(self, shape: torch.Size) -> Tensor:
        """Where a product of the given shape goes before it is widened; the logits themselves if it is not."""
        flat = self._logits if self._product is None else self._product
        return flat[: shape.numel()].view(shape)

    def logits(self, hidden: Tensor, weight: Tensor, start: int, end: int) -> Tensor:
        """Scaled, capped and tempered logits of a tile, [tokens, words]; overwritten by the next call."""
        head, options = self._head, self._head.options
        # One factor before the product's end: the cap is a factor before and after its tanh, the rest is linear. A
        # product that is rounded is rounded before it, as by transformers.
        scale = options.logit_scale / (options.temperature if options.softcap is None else options.softcap)
        at_once = scale if head.tile_dtype == head.sum_dtype else 1.0
        product = self.product(torch.Size((hidden.shape[0], end - start)))
        if hidden.shape[0] <= _FEW_ROWS and is_skinny(hidden, weight):
            torch.mul(product_of_few(hidden, weight), at_once, out=product)
            if head.bias is not None:
                product.add_(head.bias[start:end].to(head.options.round_dtype).to(head.tile_dtype), alpha=at_once)
        elif head.bias is None:
            torch.addmm(product, hidden, weight.t(), beta=0, alpha=at_once, out=product)
        else:
            bias = head.bias[start:end].to(head.options.round_dtype).to(head.tile_dtype)
            torch.addmm(bias, hidden, weight.t(), beta=at_once, alpha=at_once, out=product)
        logits = self._logits[: product.numel()].view(product.shape)
        if logits.data_ptr() != product.data_ptr():
            logits.copy_(product)
            if scale != at_once:
                logits.mul_(scale)
        if options.softcap is not None:
            logits.tanh_().mul_(options.softcap / options.temperature)
        return logits


_ARGMAX_ROWS = 16
"""Rows that are copied at a time to find their maximum's place."""

_LOGGED = ("log_sum_sq_probs", "mean_logits", "is_top1")


class _HeadContext(FunctionCtx):
    """What forward leaves for backward."""

    saved_tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]
    needs_input_grad: tuple[bool, ...]
    options: HeadOptions
    tiles: HeadTiles


class _Statistics:
    """Online sums over the vocabulary for one tile of tokens; every field is [tokens] in the sums' type."""

    def __init__(self, targets: Tensor, *, dtype: torch.dtype, outputs: tuple[str, ...]) -> None:
        def filled(value: float) -> Tensor:
            return torch.full(targets.shape, value, dtype=dtype, device=targets.device)

        self.targets = targets
        self.max = filled(-math.inf)
        self.sum_exp = filled(0.0)
        self.target_logit = filled(0.0)
        self.logit_sum_exp = filled(0.0) if "entropy" in outputs else None
        self.sq_sum_exp = filled(0.0) if "log_sum_sq_probs" in outputs else None
        self.logit_sum = filled(0.0) if "mean_logits" in outputs else None
        self.argmax = torch.zeros_like(targets) if "is_top1" in outputs else None

    def fold(self, logits: Tensor, spare: Tensor, *, start: int) -> None:
        """Add a tile of logits, [tokens, words] from word `start`. Overwrites `spare` (same shape) and `logits`."""
        self._gather_targets(logits, start=start)
        if self.logit_sum is not None:
            self.logit_sum += logits.sum(-1)
        new_max = logits.amax(-1)
        if self.argmax is not None:
            self._move_argmax(logits, new_max, start=start)
        torch.maximum(new_max, self.max, out=new_max)
        rescale = (self.max - new_max).exp_()
        self.max = new_max
        exp = torch.sub(logits, new_max.unsqueeze(-1), out=spare).exp_()
        self.sum_exp.mul_(rescale).add_(exp.sum(-1))
        if self.logit_sum_exp is not None:
            self.logit_sum_exp.mul_(rescale).add_(logits.mul_(exp).sum(-1))
        if self.sq_sum_exp is not None:
            self.sq_sum_exp.mul_(rescale.square_()).add_(exp.square_().sum(-1))

    def _gather_targets(self, logits: Tensor, *, start: int) -> None:
        local = self.targets - start
        inside = (local >= 0) & (local < logits.shape[1])
        found = logits.gather(-1, local.clamp_(0, logits.shape[1] - 1).unsqueeze(-1)).squeeze(-1)
        self.target_logit = torch.where(inside, found, self.target_logit)

    def _move_argmax(self, logits: Tensor, tile_max: Tensor, *, start: int) -> None:
        """Keep the first maximum, as `argmax` does: a tie with an earlier word does not move it."""
        assert self.argmax is not None
        better = tile_max > self.max
        if logits.device.type != "cpu":
            self.argmax = torch.where(better, logits.argmax(-1) + start, self.argmax)
            return
        # argmax costs a CPU ten times what amax does, and few tiles after the first hold a new maximum
        found = better.nonzero().squeeze(-1)
        for start_row in range(0, found.numel(), _ARGMAX_ROWS):
            rows = found[start_row : start_row + _ARGMAX_ROWS]
            self.argmax[rows] = logits[rows].argmax(-1) + start


@dataclass(frozen=True, kw_only=True)
class _RowGradients:
    """Incoming gradients of the rows of one token tile, each [tokens, 1], and what the rows' softmax needs."""

    targets: Tensor  # [tokens]
    log_z: Tensor
    logprob: Tensor | None
    entropy: Tensor | None
    entropy_value: Tensor

    def fold(self, logits: Tensor, buffers: TileBuffers, *, start: int, head: Projection) -> Tensor:
        """Turn a tile of logits into the gradient of the raw product, in `logits` or a spare buffer.

        With p the softmax, H the entropy: d logprob / dz_j = [j = target] - p_j and d H / dz_j = -p_j (log p_j + H).
        """
        log_p = torch.sub(logits, self.log_z, out=logits if head.options.softcap is None else buffers.spare(logits))
        if self.entropy is None:
            assert self.logprob is not None
            grad = log_p.exp_().mul_(self.logprob).neg_()
        else:
            p = torch.exp(log_p, out=buffers.spare(logits, 0 if head.options.softcap is None else 1))
            grad = log_p.add_(self.entropy_value).mul_(self.entropy)
            if self.logprob is not None:
                grad.add_(self.logprob)
            grad.mul_(p).neg_()
        if self.logprob is not None:
            local = (self.targets - start).unsqueeze(-1)
            inside = (local >= 0) & (local < logits.shape[1])
            grad.scatter_add_(-1, local.clamp_(0, logits.shape[1] - 1), torch.where(inside, self.logprob, 0.0))
        if head.options.softcap is not None:
            # d tanh = 1 - tanh^2, and the logits are softcap * tanh / temperature
            slope = logits.mul_(head.options.temperature / head.options.softcap).square_().neg_().add_(1.0)
            grad.mul_(slope)
        return grad


def _row_tiles(active: Tensor | None, *, num_rows: int, num_tokens: int) -> Iterator[Tensor | slice]:
    """Tiles of rows: slices of all rows, or index tensors of the active ones."""
    count = num_rows if active is None else active.numel()
    for start in range(0, count, num_tokens):
        end = min(start + num_tokens, count)
        yield slice(start, end) if active is None else active[start:end]


def _active_rows(*grads: Tensor | None) -> Tensor | None:
    """Indices of rows with a non-zero incoming gradient; None if that is all of them."""
    nonzero = [grad != 0 for grad in grads if grad is not None]
    active = nonzero[0] if len(nonzero) == 1 else nonzero[0] | nonzero[1]
    rows = active.nonzero().squeeze(-1)
    return None if rows.numel() == active.numel() else rows


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """`total (+)= a @ b` in the type of `total`, without rounding the product to a half type first."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    else:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)


class TiledLogProbFunction(torch.autograd.Function):
    """Per-token log-probabilities of `hidden @ weight.T`, and what else is asked for, without [N, V] logits.

    A drop-in for `trl.kernels.ChunkedLogProbFunction` (TRL 1.16), differentiable in the log-probabilities and the
    entropy. Sums are fp32 (fp64 for fp64 inputs). Memory besides inputs, outputs and their gradients: `tiles.max_bytes`
    and vectors of N numbers. Backward computes each logit again, and only for rows with a non-zero gradient.

    Args of `apply`:
        hidden: [N, H].
        weight: [V, H], in any floating type; another type than the hidden states' is converted a tile at a time.
        bias: [V] or None.
        targets: [N], word indices in [0, V).
        temperature: Divides the logits, after the cap.
        chunk_size: TRL's vocabulary tile; not used, `tiles` decides.
        final_logit_softcapping: z -> cap * tanh(z / cap), or None.
        logit_scale: Multiplies the product, before the cap.
        outputs: Which of "entropy", "log_sum_sq_probs", "mean_logits", "is_top1" to compute; the others are None.
        tiles: Tile sizes, or None for those of the device.

    Returns:
        logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1: each [N].
    """

    @staticmethod
    def forward(
        ctx: _HeadContext,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
        tiles: HeadTiles | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        del chunk_size
        kind = hidden.device.type
        tiles = tiles or HeadTiles.on("cpu" if kind == "cpu" else "cuda")
        ctx.set_materialize_grads(False)
        ctx.options = HeadOptions(
            round_dtype=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
        )
        ctx.tiles = tiles
        head = Projection(weight=weight.detach(), bias=None if bias is None else bias.detach(), options=ctx.options)
        with torch.autocast(kind, enabled=False):
            values = _forward(hidden, targets, head=head, outputs=outputs, tiles=tiles)
        log_z, target_logit = values["log_z"], values["target_logit"]
        assert log_z is not None
        assert target_logit is not None
        entropy = values["entropy"]
        # log_z only fills the entropy's slot where there is none, and so no gradient of it
        saved = (hidden, weight, bias, targets, log_z, log_z if entropy is None else entropy)
        ctx.save_for_backward(*saved)  # type: ignore[arg-type]  # torch takes None as well
        logged = (values["log_sum_sq_probs"], values["mean_logits"], values["is_top1"])
        ctx.mark_non_differentiable(*(value for value in logged if value is not None))
        return target_logit - log_z, entropy, *logged

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _HeadContext, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_z, entropy = ctx.saved_tensors
        absent: tuple[None, ...] = (None,) * 7
        if grad_logprobs is None and grad_entropy is None:
            return (None, None, None, *absent)
        head = Projection(weight=weight.detach(), bias=None if bias is None else bias.detach(), options=ctx.options)
        with torch.autocast(hidden.device.type, enabled=False):
            grads = _Backward(hidden, head=head, needs=ctx.needs_input_grad[:3], tiles=ctx.tiles)
            grads.run(targets, log_z=log_z, entropy=entropy, grad_logprobs=grad_logprobs, grad_entropy=grad_entropy)
        return (
            grads.hidden,
            None if grads.weight is None else grads.weight.to(weight.dtype),
            None if grads.bias is None or bias is None else grads.bias.to(bias.dtype),
            *absent,
        )


def _forward(
    hidden: Tensor, targets: Tensor, *, head: Projection, outputs: tuple[str, ...], tiles: HeadTiles
) -> dict[str, Tensor | None]:
    """Every per-row value of the head, [N] each."""
    num_rows, vocab = hidden.shape[0], head.weight.shape[0]
    buffers = TileBuffers(head, tiles=tiles, num_rows=num_rows, num_spare=1)
    found: dict[str, Tensor | None] = {
        name: torch.empty(num_rows, dtype=head.sum_dtype, device=hidden.device)
        for name in ("log_z", "target_logit", "entropy", "log_sum_sq_probs", "mean_logits")
        if name in (*outputs, "log_z", "target_logit")
    }
    if "is_top1" in outputs:
        found["is_top1"] = torch.empty(num_rows, dtype=torch.bool, device=hidden.device)
    for rows in _row_tiles(None, num_rows=num_rows, num_tokens=buffers.num_tokens):
        statistics = _Statistics(targets[rows], dtype=head.sum_dtype, outputs=outputs)
        hidden_tile = head.hidden_tile(hidden, rows)
        for start, end in buffers.word_tiles():
            logits = buffers.logits(hidden_tile, buffers.weight(start, end), start, end)
            statistics.fold(logits, buffers.spare(logits), start=start)
        for name, value in _finish(statistics, vocab=vocab).items():
            row_values = found.get(name)
            if row_values is not None:
                row_values[rows] = value
    return {name: found.get(name) for name in ("log_z", "target_logit", "entropy", *_LOGGED)}


def _finish(sums: _Statistics, *, vocab: int) -> dict[str, Tensor]:
    log_sum = sums.sum_exp.log()
    log_z = sums.max + log_sum
    values = {"log_z": log_z, "target_logit": sums.target_logit}
    if sums.logit_sum_exp is not None:
        values["entropy"] = log_z - sums.logit_sum_exp / sums.sum_exp
    if sums.sq_sum_exp is not None:
        values["log_sum_sq_probs"] = sums.sq_sum_exp.log() - 2 * log_sum
    if sums.logit_sum is not None:
        values["mean_logits"] = sums.logit_sum / vocab
    if sums.argmax is not None:
        values["is_top1"] = sums.argmax == sums.targets
    return values


class _Backward:
    """The gradients of one head, filled tile by tile. None where not needed."""

    def __init__(self, hidden: Tensor, *, head: Projection, needs: tuple[bool, ...], tiles: HeadTiles) -> None:
        def zeros(shape: torch.Size) -> Tensor:
            return torch.zeros(shape, dtype=head.sum_dtype, device=hidden.device)

        self.hidden = host_memory.empty_like(hidden).zero_() if needs[0] else None
        self.weight = zeros(head.weight.shape) if needs[1] else None
        self.bias = zeros(head.bias.shape) if needs[2] and head.bias is not None else None
        self._source = hidden
        self._head = head
        self._tiles = tiles

    def run(
        self,
        targets: Tensor,
        *,
        log_z: Tensor,
        entropy: Tensor,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
    ) -> None:
        head = self._head
        num_rows = self._source.shape[0]
        num_spare = (0 if grad_entropy is None else 1) + (0 if head.options.softcap is None else 1)
        active = _active_rows(grad_logprobs, grad_entropy)
        num_active = num_rows if active is None else active.numel()
        buffers = TileBuffers(
            head, tiles=self._tiles, num_rows=num_active, num_spare=num_spare, has_gradient=self.hidden is not None
        )
        # The constant slopes of the transform go into the row gradients, which are few.
        slope = head.options.logit_scale / head.options.temperature

        def column(values: Tensor | None, rows: Tensor | slice) -> Tensor | None:
            return None if values is None else values[rows].to(head.sum_dtype).mul(slope).unsqueeze(-1)

        for rows in _row_tiles(active, num_rows=num_rows, num_tokens=buffers.num_tokens):
            row_gradients = _RowGradients(
                targets=targets[rows],
                log_z=log_z[rows].unsqueeze(-1),
                logprob=column(grad_logprobs, rows),
                entropy=column(grad_entropy, rows),
                entropy_value=entropy[rows].unsqueeze(-1),
            )
            self._add_rows(rows, row_gradients, buffers=buffers)

    def _add_rows(self, rows: Tensor | slice, row_gradients: _RowGradients, *, buffers: TileBuffers) -> None:
        head = self._head
        hidden_tile = head.hidden_tile(self._source, rows)
        # Products are added up in the sums' type; straight into the result where that is its type.
        direct = self.hidden is not None and isinstance(rows, slice) and self.hidden.dtype == head.sum_dtype
        total = (
            self.hidden[rows]
            if direct and self.hidden is not None
            else hidden_tile.new_empty(hidden_tile.shape if self.hidden is not None else (0,), dtype=head.sum_dtype)
        )
        for start, end in buffers.word_tiles():
            weight_tile = buffers.weight(start, end)
            logits = buffers.logits(hidden_tile, weight_tile, start, end)
            grad = row_gradients.fold(logits, buffers, start=start, head=head)
            if self.bias is not None:
                self.bias[start:end] += grad.sum(0)
            if head.gradient_dtype != head.sum_dtype:
                grad = buffers.product(grad.shape).copy_(grad)
            if self.hidden is not None:
                _add_product(total, grad, buffers.for_gradient(weight_tile), first=start == 0)
            if self.weight is not None:
                _add_product(self.weight[start:end], grad.t(), hidden_tile.to(head.gradient_dtype), first=False)
        if self.hidden is not None and not direct:
            self.hidden[rows] = total.to(self.hidden.dtype)
