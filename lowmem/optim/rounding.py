"""Stochastic rounding of fp32 to bf16: right on average, so that small changes are not lost."""

import torch
from torch import Tensor


def round_to_bf16(values: Tensor, source: torch.Generator) -> Tensor:
    """Round each fp32 value to one of its two bf16 neighbours, the nearer one more often.

    bf16 is the upper half of fp32: adding 16 random bits and cutting the lower half off carries with the probability of
    the distance. Infinities and NaN stay what they are.
    """
    bits = values.float().contiguous().view(torch.int32)
    noise = torch.randint(1 << 16, bits.shape, generator=source, dtype=torch.int32, device=bits.device)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return torch.where(torch.isfinite(values), rounded, values).to(torch.bfloat16)
