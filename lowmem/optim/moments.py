"""Moments as they are stored: fp32, bf16 by stochastic rounding, or 8 bits in blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowmem.optim.eight_bit import decode, encode, num_scales
from lowmem.optim.randomness import generator, mix
from lowmem.optim.rounding import round_to_bf16
from lowmem.optim.rule import State

# Below this, 8 bits would save nothing worth its error.
SMALLEST_8BIT_VALUES = 4096
STATE_DTYPES = ("fp32", "bf16", "8bit")


def new_moment(name: str, shape: Sequence[int], *, state_dtype: str, signed: bool, device: torch.device) -> State:
    """A zero moment: `name`, and `name`_scale where it is stored in 8 bits."""
    num_values = torch.Size(shape).numel()
    if state_dtype == "8bit" and num_values >= SMALLEST_8BIT_VALUES:
        codes = torch.zeros(num_values, dtype=torch.int8 if signed else torch.uint8, device=device)
        return {name: codes, f"{name}_scale": torch.zeros(num_scales(num_values), device=device)}
    dtype = torch.bfloat16 if state_dtype == "bf16" else torch.float32
    return {name: torch.zeros(tuple(shape), dtype=dtype, device=device)}


def read_moment(state: State, name: str, shape: Sequence[int]) -> Tensor:
    """The moment in fp32: the stored tensor itself if that is what it is, otherwise a new one."""
    stored = state[name]
    if stored.dtype in (torch.int8, torch.uint8):
        return decode(stored, state[f"{name}_scale"]).view(tuple(shape))
    return stored if stored.dtype == torch.float32 else stored.float()


def write_moment(state: State, name: str, value: Tensor, *, seed: int) -> None:
    """Store a moment that `read_moment` gave and that was changed in place."""
    stored = state[name]
    if stored.dtype in (torch.int8, torch.uint8):
        codes, scales = encode(value, signed=stored.dtype == torch.int8)
        stored.copy_(codes)
        state[f"{name}_scale"].copy_(scales)
    elif stored.dtype == torch.bfloat16:
        # To nearest, a second moment would stand still: one step changes it by less than bf16's spacing.
        stored.copy_(round_to_bf16(value, generator(mix(seed, len(name)), value.device)))
    elif stored is not value:
        stored.copy_(value)
