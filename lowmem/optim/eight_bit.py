"""Moments in 8 bits: blocks of 256 values, one fp32 scale each, levels that crowd towards zero.

The levels are (k/127)^2 with a sign for first moments and (k/255)^4 for second moments, so that the square root of a
second moment has quadratic levels as well. A positive second moment never becomes zero: it is divided by. Rounding is
to nearest, which follows an fp32 Adam more closely here than stochastic rounding or a dynamic-exponent code
(docs/optimizers.md).
"""

import torch
from torch import Tensor

BLOCK_VALUES = 256
_SIGNED_LEVELS = 127
_UNSIGNED_LEVELS = 255


def num_scales(num_values: int) -> int:
    """Number of blocks that hold `num_values` values."""
    return -(-num_values // BLOCK_VALUES)


def encode(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (int8 if signed, else uint8; one per value, flat) and fp32 scales, one per block."""
    blocks = _blocks(values.reshape(-1).float())
    scales = blocks.abs().amax(dim=1)
    unit = blocks / torch.where(scales > 0, scales, 1.0)[:, None]
    if signed:
        codes = unit.abs().sqrt_().mul_(_SIGNED_LEVELS).round_().copysign_(unit).to(torch.int8)
    else:
        levels = unit.sqrt().sqrt_().mul_(_UNSIGNED_LEVELS).round_()
        codes = torch.where(unit > 0, levels.clamp_min_(1), 0).to(torch.uint8)
    return codes.view(-1)[: values.numel()], scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The fp32 values, flat; the codes' dtype says whether they are signed."""
    signed = codes.dtype == torch.int8
    unit = codes.float().div_(_SIGNED_LEVELS if signed else _UNSIGNED_LEVELS)
    unit = unit.mul_(unit.abs()) if signed else unit.square_().square_()
    blocks = _blocks(unit)
    return (blocks * scales[:, None]).view(-1)[: codes.numel()]


def _blocks(flat: Tensor) -> Tensor:
    """(num_blocks, 256), the last one filled with zeros."""
    padding = -flat.numel() % BLOCK_VALUES
    if padding:
        flat = torch.nn.functional.pad(flat, (0, padding))
    return flat.view(-1, BLOCK_VALUES)
