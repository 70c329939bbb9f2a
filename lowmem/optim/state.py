"""Stochastic rounding of fp32 to bf16: right on average, so that small changes are not lost.

Moments in 8 bits: blocks of 256 values, one fp32 scale each, levels that crowd towards zero.

The levels are (k/127)^2 with a sign for first moments and (k/255)^4 for second moments, so that the square root of a
second moment has quadratic levels as well. A positive second moment never becomes zero: it is divided by. Rounding is
to nearest, which follows an fp32 Adam more closely here than stochastic rounding or a dynamic-exponent code
(docs/optimizers.md).

Moments as they are stored: fp32, bf16 by stochastic rounding, or 8 bits in blocks.

How a changed weight is written back: exactly in fp32, or into bf16 without losing small changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.optim.rule import Hyper, State, mix

ROUNDING_COPIES = 2.75
"""What stochastic rounding holds at its largest, as multiples of the fp32 values that are rounded."""


ENCODING_COPIES = 3.25
"""The same of moments that are stored in 8 bits."""


def rounding_of_moment(seed: int, name: str) -> int:
    """Seed of the random numbers with which a parameter's moment is rounded in one step.

    Args:
        seed: Of the parameter in this step.
        name: exp_avg or exp_avg_sq.
    """
    return mix(seed, len(name))


def rounding_of_weight(seed: int) -> int:
    """Seed of the random numbers with which a parameter itself is rounded in one step."""
    return mix(seed, _SALT)


def round_to_bf16(values: Tensor, *, seed: int, first: int = 0) -> Tensor:
    """Round each fp32 value to one of its two bf16 neighbours, the nearer one more often.

    bf16 is the upper half of fp32: adding 16 random bits and cutting the lower half off carries with the probability of
    the distance. Infinities and NaN stay what they are.

    Args:
        values: fp32.
        seed: What the random numbers follow from, together with each value's position alone: they are the same on every
            device, and in whatever pieces the values are rounded.
        first: Position of the first value; even.
    """
    bits = values.float().contiguous().view(torch.int32)
    noise = random_bits(bits.numel(), seed=seed, first=first, device=bits.device)
    rounded = noise.view(bits.shape).add_(bits).bitwise_and_(-65536).view(torch.float32)
    return torch.where(torch.isfinite(values), rounded, values).to(torch.bfloat16)


def random_bits(num_values: int, *, seed: int, first: int, device: torch.device) -> Tensor:
    """16 random bits for each of some positions, int32, flat.

    A finaliser of 32-bit hashes ("lowbias32", C. Wellons, 2018) of a counter, with half of the seed before it and half
    within. A word is the bits of two positions.
    """
    assert first % 2 == 0, "two positions share a word"
    mixed = mix(seed)
    before, within = mixed & 0x7FFFFFFF, mixed >> 32
    words = torch.arange(first // 2, (first + num_values + 1) // 2, dtype=torch.int32, device=device)
    words.bitwise_xor_(before)
    words.bitwise_xor_(_shifted(words, 16)).mul_(0x7FEB352D).add_(within)
    words.bitwise_xor_(_shifted(words, 15)).mul_(0x846CA68B - (1 << 32))
    words.bitwise_xor_(_shifted(words, 16))
    return words.view(torch.int16)[:num_values].to(torch.int32).bitwise_and_(0xFFFF)


def _shifted(words: Tensor, by: int) -> Tensor:
    # Of signed words the sign would come in from above.
    return (words >> by).bitwise_and_((1 << (32 - by)) - 1)


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
        stored.copy_(round_to_bf16(value, seed=rounding_of_moment(seed, name)))
    elif stored is not value:
        stored.copy_(value)


WRITERS = ("fp32", "stochastic", "kahan", "nearest")
_SALT = 0x57


def check_writable(weight: Tensor) -> None:
    """Refuse a weight of another type than fp32 and bf16.

    Raises:
        UnsupportedError: fp64, fp16 or anything else.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise UnsupportedError(
            f"a parameter of dtype {weight.dtype}",
            reason="updates are written to fp32 and bf16 weights only",
            instead="load the model in float32 or bfloat16",
        )


def new_writer_state(writer: str, weight: Tensor) -> State:
    """What the writer keeps for a weight: nothing for fp32 weights, which are always written exactly."""
    if weight.dtype == torch.float32 or writer in ("stochastic", "nearest"):
        return {}
    if writer == "kahan":
        return {"compensation": torch.zeros_like(weight, memory_format=torch.contiguous_format)}
    return {"master": weight.detach().to(torch.float32, copy=True)}


def read_weight(weight: Tensor, state: State) -> Tensor:
    """The weight in fp32, as exactly as it is known: the weight itself, its master, or a new tensor."""
    if weight.dtype == torch.float32:
        return weight
    if "master" in state:
        return state["master"]
    exact = weight.float()
    return exact.add_(state["compensation"]) if "compensation" in state else exact


def write_weight(writer: str, weight: Tensor, exact: Tensor, state: State, *, seed: int) -> None:
    """Write the changed fp32 value, which `read_weight` gave, back into the weight."""
    if exact is weight:
        return
    if writer == "stochastic":
        weight.copy_(round_to_bf16(exact, seed=rounding_of_weight(seed)))
        return
    weight.copy_(exact)  # to nearest: the master, or Kahan's compensation, has the rest
    if writer == "kahan":
        state["compensation"].copy_(exact.sub_(weight))


def descend(weight: Tensor, direction: Tensor, hyper: Hyper) -> None:
    """W <- (1 - lr * weight_decay) W - lr * direction, in fp32 and in place."""
    if hyper.weight_decay:
        weight.mul_(1 - hyper.lr * hyper.weight_decay)
    weight.add_(direction, alpha=-hyper.lr)
