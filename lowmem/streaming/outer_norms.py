"""Norms outside the blocks, over long sequences: in tiles of tokens, keeping nothing but their input.

Written out in Python, a norm keeps several tensors as large as the hidden states. The last one does so just when the
head runs, and the gradients of those tensors come on top. Each token is normed by itself, so tiles change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from lowmem.streaming.tokenwise import tokenwise

TILE_TOKENS = 256


class _Norm(Protocol):
    def forward(self, hidden: Tensor) -> Tensor: ...


class TiledNorm(nn.Module):
    """Mixed in front of a norm's own class: the same module, walked in tiles where there are many tokens."""

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        """As the norm's own forward, of one tensor (..., tokens, hidden)."""
        whole: _Norm = super()  # type: ignore[assignment]
        if args or kwargs or not torch.is_grad_enabled() or hidden.shape[:-1].numel() <= TILE_TOKENS:
            return whole.forward(hidden, *args, **kwargs)
        return tokenwise(whole.forward, hidden, params=list(self.parameters()), tile_tokens=TILE_TOKENS)


def tile_outer_norms(model: nn.Module, blocks: Iterable[nn.Module]) -> tuple[str, ...]:
    """Have the norms outside the blocks run in tiles; answers their names.

    The class is changed rather than `forward` on the instance: a copy of the module, as PEFT makes them, must run
    itself and not the original.

    Args:
        model: A transformers model.
        blocks: Its decoder blocks.
    """
    inside = {id(module) for block in blocks for module in block.modules()}
    names = []
    for name, module in model.named_modules():
        kind = type(module)
        if id(module) in inside or not _norms_single_tokens(kind) or issubclass(kind, TiledNorm):
            continue
        module.__class__ = type(kind.__name__, (TiledNorm, kind), {"__module__": kind.__module__})
        names.append(name)
    return tuple(names)


def _norms_single_tokens(kind: type[nn.Module]) -> bool:
    return kind.__name__.endswith(("RMSNorm", "LayerNorm"))


__all__ = ["TILE_TOKENS", "TiledNorm", "tile_outer_norms"]
