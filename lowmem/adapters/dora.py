"""DoRA's weight norm in factored form, installed through PEFT's own variant objects.

DoRA (Liu et al. 2024, arXiv:2402.09353) scales each output row of W + s B A by m / ||W + s B A||. PEFT forms
`eye @ A @ B`, `s B A` and `W + s B A`, three tensors of W's size per layer and pass. The square of the norm expands to

    ||W||^2 + 2 s rowsum((W A^T) o B) + s^2 rowsum((B (A A^T)) o B)

whose largest intermediate is (out_features, r). Everything else is as in PEFT: the norm takes no gradient (section 4.3
of the paper), and adapters keep PEFT's names, so they are saved, loaded and merged as ordinary PEFT adapters.

Imports PEFT: import this module where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, Linear
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import Tensor, nn

from lowmem.internals.peft import embed, embed_scale, those_that_apply_adapters
from lowmem.internals.torch import modules_in

# Converted weight held at a time where the weight is not stored in the type that the norm is computed in.
_TILE_BYTES = 16 << 20

# A squared norm below this part of its positive terms has lost digits to cancellation: compute that row directly.
_CANCELLED = 1 / 16


def row_norms(
    weight_OI: Tensor, lora_A_RI: Tensor, *, lora_B_OR: Tensor, scaling: float, base_squares_O: Tensor | None = None
) -> Tensor:
    """Compute the norms of the output rows of W + s B A without a tensor of W's size.

    Accumulates in fp32 (fp64 where an argument is fp64). On a CPU, rows whose factored sum cancels are computed from
    W + s B A itself, a tile at a time. A GPU computes all rows so: to find those that cancel, the host would have to
    wait for it in every layer, and a weight that is stored in bf16 is converted tile by tile for either way.

    Args:
        weight_OI: W, shape (out_features, in_features), any floating dtype; a transposed view is fine.
        lora_A_RI: A, shape (r, in_features).
        lora_B_OR: B, shape (out_features, r).
        scaling: s.
        base_squares_O: `base_squares(weight_OI)` where the caller has kept it.

    Returns:
        Tensor of shape (out_features,) in the accumulation dtype, without gradient.
    """
    dtype = _accumulation_dtype(weight_OI, lora_A_RI, lora_B_OR)
    with torch.no_grad(), torch.autocast(weight_OI.device.type, enabled=False):
        lora_A_RI, lora_B_OR = lora_A_RI.to(dtype), lora_B_OR.to(dtype)
        step = max(1, _TILE_BYTES // (weight_OI.shape[1] * dtype.itemsize))
        if weight_OI.device.type != "cpu":
            norms = [
                _direct_norms(weight_OI[rows].to(dtype), lora_A_RI, lora_B_OR=lora_B_OR[rows], scaling=scaling)
                for rows in (slice(start, start + step) for start in range(0, weight_OI.shape[0], step))
            ]
            return torch.cat(norms)
        cross_OR = lora_B_OR.new_zeros(lora_B_OR.shape)
        for rows, columns, tile in _tiles(weight_OI, dtype):
            cross_OR[rows] += tile @ lora_A_RI[:, columns].T
        squares_O = base_squares(weight_OI, dtype=dtype) if base_squares_O is None else base_squares_O
        mixed_O = 2 * scaling * (cross_OR * lora_B_OR).sum(dim=1)
        update_O = scaling**2 * ((lora_B_OR @ (lora_A_RI @ lora_A_RI.T)) * lora_B_OR).sum(dim=1)
        total_O = squares_O + mixed_O + update_O
        norms_O = total_O.clamp_min(0).sqrt()
        cancelled = (total_O < _CANCELLED * (squares_O + update_O)).nonzero().squeeze(1)
        for start in range(0, cancelled.numel(), step):
            some = cancelled[start : start + step]
            norms_O[some] = _direct_norms(
                weight_OI[some].to(dtype), lora_A_RI, lora_B_OR=lora_B_OR[some], scaling=scaling
            )
    return norms_O


def _direct_norms(weight_OI: Tensor, lora_A_RI: Tensor, *, lora_B_OR: Tensor, scaling: float) -> Tensor:
    norms_O: Tensor = torch.linalg.vector_norm(torch.addmm(weight_OI, lora_B_OR, lora_A_RI, alpha=scaling), dim=1)
    return norms_O


def base_squares(weight_OI: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Squared norms of a weight's rows, shape (out_features,), accumulated in `dtype` (default fp32, fp64 for fp64)."""
    dtype = dtype or _accumulation_dtype(weight_OI)
    squares_O = torch.zeros(weight_OI.shape[0], dtype=dtype, device=weight_OI.device)
    with torch.no_grad():
        for rows, _, tile in _tiles(weight_OI, dtype):
            squares_O[rows] += torch.linalg.vector_norm(tile, dim=1).square()
    return squares_O


def _accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _tiles(weight_OI: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and values of a weight in `dtype`: whole where that is free, else contiguous parts of it."""
    num_rows, num_columns = weight_OI.shape
    everything = slice(None)
    if weight_OI.dtype == dtype:
        yield everything, everything, weight_OI
    elif weight_OI.stride(1) == 1:
        step = max(1, _TILE_BYTES // (num_columns * dtype.itemsize))
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            yield rows, everything, weight_OI[rows].to(dtype)
    else:
        step = max(1, _TILE_BYTES // (num_rows * dtype.itemsize))
        for start in range(0, num_columns, step):
            columns = slice(start, start + step)
            yield everything, columns, weight_OI[:, columns].to(dtype)


class _FrozenLinear(torch.autograd.Function):
    """x W^T for a frozen weight stored in another dtype than x, converting it a tile at a time in both directions."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(weight_OI)
        out = x.new_zeros(*x.shape[:-1], weight_OI.shape[0])
        for rows, columns, tile in _tiles(weight_OI, x.dtype):
            out[..., rows] += x[..., columns] @ tile.T
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        (weight_OI,) = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = grads[0]
        grad_x = grad.new_zeros(*grad.shape[:-1], weight_OI.shape[1])
        for rows, columns, tile in _tiles(weight_OI, grad.dtype):
            grad_x[..., columns] += grad[..., rows] @ tile
        return grad_x, None


def _frozen_linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    if x.dtype == weight_OI.dtype or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight_OI)
    result: Tensor = _FrozenLinear.apply(x, weight_OI)  # type: ignore[no-untyped-call]
    return result


class _KeepsBaseSquares:
    """Keeps ||W||^2 per row of one layer.

    Args:
        frozen_base: The base weight never changes while this object lives; nothing is kept where it may.
    """

    def __init__(self, *, frozen_base: bool = False) -> None:
        self._frozen_base = frozen_base
        self._kept: Tensor | None = None

    def _norms(self, weight_OI: Tensor, lora_A_RI: Tensor, *, lora_B_OR: Tensor, scaling: float) -> Tensor:
        """`row_norms`, with the squares in the dtype that it accumulates in for these arguments where they are kept."""
        kept = None
        if self._frozen_base and weight_OI.device.type == "cpu":
            dtype, kept = _accumulation_dtype(weight_OI, lora_A_RI, lora_B_OR), self._kept
            if kept is None or kept.dtype != dtype or kept.device != weight_OI.device:
                self._kept = kept = base_squares(weight_OI, dtype=dtype)
        return row_norms(weight_OI, lora_A_RI, lora_B_OR=lora_B_OR, scaling=scaling, base_squares_O=kept)


class FactoredDoraLinear(_KeepsBaseSquares, DoraLinearVariant):
    """PEFT's DoRA for linear layers (and gpt2's Conv1D) with the factored norm."""

    def forward(self, module: Linear, active_adapter: str, x: Tensor, result: Tensor, **_: object) -> Tensor:
        """Add the adapter's part to the base layer's result, as `DoraLinearVariant.forward` does."""
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scaling, dropout = module.scaling[active_adapter], module.lora_dropout[active_adapter]
        base_layer = module.get_base_layer()
        weight_OI = transpose(dequantize_module_weight(base_layer), module.fan_in_fan_out).detach()
        norms_O = self._norms(weight_OI, lora_A.weight, lora_B_OR=lora_B.weight, scaling=scaling)
        scale_1O = (module.lora_magnitude_vector[active_adapter].weight / norms_O.to(x.dtype)).view(1, -1)
        if module.training and not isinstance(dropout, nn.Identity):
            x = dropout(x)
            update = lora_B(lora_A(x) * scaling)
            dropped: Tensor = result + ((scale_1O - 1) * _frozen_linear(x, weight_OI) + scale_1O * update)
            return dropped
        # PEFT's result + (scale - 1) (result - bias) + scale update, in fewer tensors of the activation's size.
        scaled: Tensor = scale_1O * (result + lora_B(lora_A(x) * scaling))
        return scaled if base_layer.bias is None else scaled + (1 - scale_1O) * base_layer.bias


class FactoredDoraEmbedding(_KeepsBaseSquares, DoraEmbeddingVariant):
    """PEFT's DoRA for embeddings with the factored norm: one norm per embedding dimension, over the vocabulary."""

    def forward(self, module: Embedding, active_adapter: str, x: Tensor, result: Tensor, **_: object) -> Tensor:
        """Scale the base layer's rows and add the adapter's part, as `DoraEmbeddingVariant.forward` does."""
        lora_A_RV, lora_B_DR = module.lora_embedding_A[active_adapter], module.lora_embedding_B[active_adapter]
        scaling = module.scaling[active_adapter]
        weight_DV = module.get_base_layer().weight.detach().T
        norms_D = self._norms(weight_DV, lora_A_RV, lora_B_OR=lora_B_DR, scaling=scaling)
        norms_D = norms_D.to(torch.promote_types(weight_DV.dtype, lora_A_RV.dtype))
        scale_D = module.lora_magnitude_vector[active_adapter].weight / norms_D
        update: Tensor = scale_D * (embed(module, x, lora_A_RV.T) @ lora_B_DR.T) * scaling
        times = embed_scale(module)
        if times is not None:
            update = update * times.to(update.dtype)
        scaled: Tensor = scale_D * result
        return scaled + update


def install(module: nn.Module, *, frozen_base: bool = False) -> int:
    """Give every DoRA adapter below a module the factored norm. Cheap to call again after adapters were added.

    Changes only the layers' own `lora_variant` entries; PEFT's classes and tables stay as they are.

    Args:
        module: A model, or one block of it.
        frozen_base: No base weight changes from now on (they are read from an immutable checkpoint), so that each
            row norm of the base is computed once.

    Returns:
        How many adapters were changed.
    """
    num_changed = 0
    for layer in those_that_apply_adapters(modules_in(module)):
        if not isinstance(layer, LoraLayer):
            continue
        for adapter, variant in layer.lora_variant.items():
            # Not isinstance: ours are subclasses, and a variant that somebody derived from PEFT's is theirs.
            if type(variant) is DoraLinearVariant:
                layer.lora_variant[adapter] = FactoredDoraLinear(frozen_base=frozen_base)
            elif type(variant) is DoraEmbeddingVariant:
                layer.lora_variant[adapter] = FactoredDoraEmbedding(frozen_base=frozen_base)
            else:
                continue
            num_changed += 1
    return num_changed
