"""Norms outside the blocks, over long sequences: in tiles of tokens, keeping nothing but their input.

Written out in Python, a norm keeps several tensors as large as the hidden states. The last one does so just when the
head runs, and the gradients of those tensors come on top. Each token is normed by itself, so tiles change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from lowmem import host_memory
from lowmem.internals.torch import change_class
from lowmem.planning.limits import HeadTiles
from lowmem.streaming.recompute import GradientSums, differentiate

RunTokens = Callable[[Tensor], Tensor]


class _TokenwiseContext(FunctionCtx):
    """What forward leaves for backward."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    run: RunTokens
    tile_tokens: int


class TokenwiseFunction(torch.autograd.Function):
    """Run a function of single tokens over tiles; backward runs it again, a tile at a time.

    Args of `apply`:
        run: Maps (tokens, hidden) to (tokens, hidden), each token by itself, with no random numbers.
        tile_tokens: Tokens of a tile.
        hidden: (..., hidden).
        params: Parameters that `run` uses and that are trained. Their gradients are summed in fp32 (fp64 in fp64).

    Returns:
        Of the shape of `hidden`.
    """

    @staticmethod
    def forward(ctx: _TokenwiseContext, run: RunTokens, tile_tokens: int, hidden: Tensor, *params: Tensor) -> Tensor:
        ctx.run, ctx.tile_tokens = run, tile_tokens
        ctx.save_for_backward(hidden, *params)
        rows = hidden.reshape(-1, hidden.shape[-1])
        out: Tensor | None = None
        for start in range(0, rows.shape[0], tile_tokens):
            part = run(rows[start : start + tile_tokens])
            if out is None:
                out = host_memory.empty((rows.shape[0], part.shape[-1]), dtype=part.dtype, device=part.device)
            out[start : start + tile_tokens] = part
        return run(rows).view(hidden.shape) if out is None else out.view(*hidden.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: _TokenwiseContext, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *params = ctx.saved_tensors
        rows, grads = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (hidden, grad_out))
        # Not a view is what goes on: the next block writes over it if nothing else sees its memory.
        grad_hidden = host_memory.empty_like(hidden) if ctx.needs_input_grad[2] else None
        grad_rows = None if grad_hidden is None else grad_hidden.view(rows.shape)
        trained = [param for param in params if param.requires_grad]
        sums = GradientSums(len(trained))
        for start in range(0, rows.shape[0], ctx.tile_tokens):
            tile = slice(start, start + ctx.tile_tokens)
            leaf = rows[tile].detach().requires_grad_(grad_rows is not None)
            with torch.enable_grad():
                out = ctx.run(leaf)
            sought = [leaf] if grad_rows is not None else []
            found, of_params = differentiate([out], [grads[tile]], inputs=sought, params=trained)
            if grad_rows is not None:
                _write(grad_rows[tile], found[0])
            sums.add_all(of_params)
        gradients = iter(sums.like(trained))
        return (None, None, grad_hidden, *(next(gradients) if param.requires_grad else None for param in params))


def _write(target: Tensor, grad: Tensor | None) -> None:
    if grad is None:
        target.zero_()
    else:
        target.copy_(grad)


def tokenwise(run: RunTokens, hidden: Tensor, *, params: Sequence[Tensor] = (), tile_tokens: int = 256) -> Tensor:
    """Run a function of single tokens over tiles, keeping nothing but its input for the backward.

    Args:
        run: Maps (tokens, hidden) to (tokens, hidden), each token by itself.
        hidden: (..., hidden).
        params: Parameters that `run` uses.
        tile_tokens: Tokens of a tile.
    """
    trained = [param for param in params if param.requires_grad]
    out: Tensor = TokenwiseFunction.apply(run, tile_tokens, hidden, *trained)  # type: ignore[no-untyped-call]
    return out


class TiledNorm(nn.Module):
    """Mixed in front of a norm's own class: the same module, walked in tiles where there are many tokens."""

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The norm's own forward, of one tensor (..., tokens, hidden)."""
        whole: Callable[..., Tensor] = super().forward
        # The head's: the plan counts both with these.
        tile_tokens = HeadTiles.on("cpu" if hidden.device.type == "cpu" else "cuda").num_tokens
        if args or kwargs or not torch.is_grad_enabled() or hidden.shape[:-1].numel() <= tile_tokens:
            return whole(hidden, *args, **kwargs)
        return tokenwise(whole, hidden, params=list(self.parameters()), tile_tokens=tile_tokens)


def tile_outer_norms(model: nn.Module, blocks: Iterable[nn.Module]) -> tuple[str, ...]:
    """Let the norms outside the blocks run in tiles; returns their names.

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
        is_norm = kind.__name__.endswith(("RMSNorm", "LayerNorm"))
        if id(module) in inside or not is_norm or issubclass(kind, TiledNorm):
            continue
        change_class(module, _tiled(kind))  # type: ignore[arg-type]  # classes are hashable
        names.append(name)
    return tuple(names)


@cache
def _tiled(kind: type[nn.Module]) -> type[nn.Module]:
    """One class for each kind of norm: a class of each model's own would be garbage that refers to itself."""
    return type(kind.__name__, (TiledNorm, kind), {"__module__": kind.__module__})
