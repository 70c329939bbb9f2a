"""Products of few tokens with large matrices on a CPU, in the order in which its library uses all cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FEWEST_TOKENS, _MOST_TOKENS = 2, 128
_FEWEST_WEIGHTS = 1 << 20


class SkinnyProducts(TorchFunctionMode):
    """Computes `linear` as (W x^T)^T where x has few rows.

    MKL runs x W^T of up to some hundred rows on one core, and W x^T on all of them: 17 against 9 ms for 32 rows and a
    5632 x 2048 fp32 matrix on two cores. The values are the same sums in another order.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Replace large products by few rows; let everything else pass."""
        if func is torch.nn.functional.linear and len(args) >= 2 and not kwargs:
            x, weight = args[0], args[1]
            if isinstance(x, Tensor) and isinstance(weight, Tensor) and _is_skinny(x, weight):
                bias = args[2] if len(args) > 2 else None
                return _product(x, weight, bias if isinstance(bias, Tensor) else None)
        return func(*args, **(kwargs or {}))


def _is_skinny(x: Tensor, weight: Tensor) -> bool:
    num_rows = x.numel() // max(1, x.shape[-1])
    return (
        _FEWEST_TOKENS <= num_rows <= _MOST_TOKENS
        and weight.numel() >= _FEWEST_WEIGHTS
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = torch.mm(weight, rows.t()).t().contiguous().view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out.add_(bias)


def products_for(device: torch.device, *, num_tokens: int) -> AbstractContextManager[object]:
    """What a block that takes so many tokens should run in: `SkinnyProducts` where that helps."""
    few = _FEWEST_TOKENS <= num_tokens <= _MOST_TOKENS
    if device.type != "cpu" or not few or torch.get_num_threads() < 2:
        return nullcontext()
    return SkinnyProducts()


__all__ = ["SkinnyProducts", "products_for"]
