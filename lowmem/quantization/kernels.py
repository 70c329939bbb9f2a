"""From codes to values: bitsandbytes' kernels where it has one for the device, else the same arithmetic in torch.

Both give the same bits: a value is `table[code] * absmax`, one multiplication in float32, rounded once to the dtype of
the output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowmem.internals.bitsandbytes import Code, unpack_bytes, unpack_nibbles

CODES: dict[Code, tuple[float, ...]] = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    # Sign, two bits of exponent and one of mantissa, over the largest.
    "fp4": tuple(value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3)),
}
"""Values of a nibble (QLoRA, arXiv 2305.14314, appendix E; bitsandbytes' `get_4bit_type`)."""

_TORCH_ELEMENTS = 1 << 20
"""Values made at a time: temporaries of torch are 20 times as large in bytes."""


def nibbles(packed: Tensor, absmax: Tensor, table: Tensor, out: Tensor, *, code: Code, block_size: int) -> None:
    """Write the values of two codes to a byte, the first in the high half.

    Args:
        packed: uint8, contiguous, (ceil(n / 2),).
        absmax: float32, contiguous, (ceil(n / block_size),).
        table: The code's values: float32, (16,).
        out: n elements, contiguous, in float32, bfloat16 or float16.
        code: Which table it is.
        block_size: Weights that share an absmax.
    """
    if unpack_nibbles(packed, absmax, out, code=code, block_size=block_size):
        return

    def codes(start: int, stop: int) -> Tensor:
        both = packed[start // 2 : (stop + 1) // 2].to(torch.int32)
        return torch.stack((both >> 4, both & 15), dim=1).view(-1)[: stop - start]

    _in_torch(codes, absmax, table, out.view(-1), block_size=block_size)


def bytes_of_table(packed: Tensor, absmax: Tensor, table: Tensor, out: Tensor, *, block_size: int) -> None:
    """Write the values of one code to a byte.

    Args:
        packed: uint8, contiguous, (n,).
        absmax: float32, contiguous, (ceil(n / block_size),).
        table: float32, contiguous, (256,).
        out: n elements, contiguous, in float32, bfloat16 or float16.
        block_size: Elements that share an absmax.
    """
    if unpack_bytes(packed, absmax, table, out, block_size=block_size):
        return
    _in_torch(
        lambda start, stop: packed[start:stop].to(torch.int32), absmax, table, out.view(-1), block_size=block_size
    )


def _in_torch(
    codes: Callable[[int, int], Tensor], absmax: Tensor, table: Tensor, out: Tensor, *, block_size: int
) -> None:
    """Gather, multiply and round in runs of whole blocks."""
    run = max(1, _TORCH_ELEMENTS // block_size) * block_size
    for start in range(0, out.numel(), run):
        stop = min(start + run, out.numel())
        values = table[codes(start, stop)]
        scales = absmax[start // block_size : -(-stop // block_size)]
        # The last block of a weight may be a short one.
        whole = (stop - start) // block_size * block_size
        num_whole = whole // block_size
        values[:whole].view(-1, block_size).mul_(scales[:num_whole, None])
        values[whole:].mul_(scales[num_whole:])
        out[start:stop].copy_(values)


def rows(codes: Tensor, scales: Tensor, factor: float, out: Tensor) -> None:
    """Write `codes * scale of the row * factor`, in float32 in that order, rounded once.

    Args:
        codes: int8, (rows, columns).
        scales: float32, (rows,).
        factor: What all are multiplied with.
        out: (rows, columns), contiguous, in float32, bfloat16 or float16.
    """
    num_rows = max(1, _TORCH_ELEMENTS // max(1, codes.shape[1]))
    for start in range(0, codes.shape[0], num_rows):
        part = slice(start, start + num_rows)
        if out.dtype == torch.float32:
            torch.mul(codes[part], scales[part, None], out=out[part]).mul_(factor)
        else:
            out[part].copy_((codes[part] * scales[part, None]).mul_(factor))
