"""What one tile of the head is: its size, the logits it holds and the buffers they are computed in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowmem import host_memory
from lowmem.host_memory import is_skinny, product_of_few
from lowmem.planning.limits import HeadTiles

_HALF_TYPES = (torch.bfloat16, torch.float16)


_FEW_ROWS = 32
"""Rows whose product may have memory of its own, at most 2 MiB of it."""


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
        # CPUs multiply half types up to 100 times slower than fp32; in fp32 the product of the rounded inputs is exact.
        on_cpu = self.weight.device.type == "cpu"
        return torch.float32 if on_cpu and self.options.round_dtype in _HALF_TYPES else self.options.round_dtype

    @property
    def sum_dtype(self) -> torch.dtype:
        """What everything but the product is computed in."""
        return torch.float64 if self.options.round_dtype == torch.float64 else torch.float32

    @property
    def num_product_buffers(self) -> int:
        """Buffers of a tile besides those of the sums: a product in a half type needs its own."""
        return 0 if self.tile_dtype == self.sum_dtype else 1

    def hidden_tile(self, hidden: Tensor, rows: Tensor | slice) -> Tensor:
        """Rows of the hidden states, rounded as autocast would, in the product's type: [tokens, H]."""
        return hidden[rows].to(self.options.round_dtype).to(self.tile_dtype)


class TileBuffers:
    """The reused memory of one pass over all tiles."""

    def __init__(self, head: Projection, *, tiles: HeadTiles, num_rows: int, num_spare: int) -> None:
        vocab, width = head.weight.shape
        device = head.weight.device
        num_tokens = max(1, min(tiles.num_tokens, num_rows))
        logit_bytes = head.sum_dtype.itemsize * (1 + num_spare) + head.tile_dtype.itemsize * head.num_product_buffers
        converts = head.weight.dtype != head.tile_dtype or head.options.round_dtype != head.tile_dtype
        self.num_tokens = num_tokens
        self.num_words = tiles.num_words(
            num_tokens=num_tokens,
            vocab=vocab,
            bytes_per_logit=logit_bytes,
            bytes_per_word=width * head.tile_dtype.itemsize if converts else 0,
        )
        size = num_tokens * self.num_words
        make = partial(host_memory.empty, device=device)
        self._logits = make((size,), dtype=head.sum_dtype)
        self._spare = [make((size,), dtype=head.sum_dtype) for _ in range(num_spare)]
        self._product = make((size,), dtype=head.tile_dtype) if head.num_product_buffers else None
        self._weight = make((self.num_words * width,), dtype=head.tile_dtype) if converts else None
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
        # One factor before the product's end: the cap is a factor before and after its tanh, the rest is linear.
        scale = options.logit_scale / (options.temperature if options.softcap is None else options.softcap)
        product = self.product(torch.Size((hidden.shape[0], end - start)))
        if hidden.shape[0] <= _FEW_ROWS and is_skinny(hidden, weight):
            torch.mul(product_of_few(hidden, weight), scale, out=product)
            if head.bias is not None:
                product.add_(head.bias[start:end].to(head.options.round_dtype).to(head.tile_dtype), alpha=scale)
        elif head.bias is None:
            torch.addmm(product, hidden, weight.t(), beta=0, alpha=scale, out=product)
        else:
            bias = head.bias[start:end].to(head.options.round_dtype).to(head.tile_dtype)
            torch.addmm(bias, hidden, weight.t(), beta=scale, alpha=scale, out=product)
        logits = self._logits[: product.numel()].view(product.shape)
        if logits.data_ptr() != product.data_ptr():
            logits.copy_(product)
        if options.softcap is not None:
            logits.tanh_().mul_(options.softcap / options.temperature)
        return logits
