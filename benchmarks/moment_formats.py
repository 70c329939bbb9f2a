"""How closely Adam follows fp32 when its moments are stored in fewer bits, and what storing them costs.

    python -m benchmarks.moment_formats

Gradients of 64 blocks of 256 values, their sizes spread over two decades within each block, with a mean that persists;
half way they shrink to 0.3. Printed per format: relative error of the direction m / sqrt(v) after the last step, and
the median ratio of v to fp32's. Then what AdamW's update takes of each parameter with masters and moments in each type,
on flat buffers in memory, beside fp32's.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from benchmarks.harness import emit, emit_skip
from lowmem.full.flat import (
    EXP_AVG,
    EXP_AVG_SQ,
    FlatBuffers,
    FlatMoment,
    ParamUpdate,
    Segment,
    lay_out_moments,
    update_runs,
)
from lowmem.optim.rule import Hyper, generator
from lowmem.optim.state import STATE_DTYPES, decode, encode, round_to_bf16
from offload import StagingBuffer

BENCHMARK = "moment_formats"
NUM_VALUES, NUM_STEPS = 64 * 256, 1200
NUM_UPDATED, NUM_UPDATES = 1 << 23, 7
Store = Callable[[Tensor, bool, int], Tensor]
"""What is read back after storing values; whether they are signed; the step."""


def eight_bit(values: Tensor, signed: bool, _: int) -> Tensor:
    return decode(*encode(values, signed=signed))


def eight_bit_stochastic(values: Tensor, signed: bool, step: int) -> Tensor:
    """The levels of lowmem, each value rounded to one of its two neighbours so that it is right on average."""
    levels, power = (127, 2) if signed else (255, 4)
    blocks = values.view(-1, 256)
    largest = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    exact = (blocks.abs() / largest) ** (1 / power) * levels
    lower = exact.floor().clamp_max(levels - 1)
    share = (exact**power - lower**power) / ((lower + 1) ** power - lower**power)
    noise = torch.rand(share.shape, generator=generator(2 * step + signed, values.device))
    rounded = lower + (noise < share)
    rounded = rounded if signed else rounded.clamp_min(1)
    return ((rounded / levels) ** power * largest * blocks.sign()).view(-1)


def bf16_stochastic(values: Tensor, signed: bool, step: int) -> Tensor:
    return round_to_bf16(values, seed=2 * step + signed).float()


def bf16_nearest(values: Tensor, _: bool, __: int) -> Tensor:
    return values.bfloat16().float()


def dynamic_code() -> Store:
    """The dynamic-exponent code of bitsandbytes, blocks of 256.

    Raises:
        ImportError: It is not installed.
    """
    from bitsandbytes import functional

    codes = {signed: functional.create_dynamic_map(signed) for signed in (True, False)}

    def store(values: Tensor, signed: bool, _: int) -> Tensor:
        quantised, state = functional.quantize_blockwise(values, code=codes[signed], blocksize=256)
        read: Tensor = functional.dequantize_blockwise(quantised, state)
        return read

    return store


def measure(name: str, store: Store) -> None:
    """Run Adam's moments in fp32 and in one format on the same gradients."""
    torch.manual_seed(0)
    sizes = 10 ** (2 * torch.rand(NUM_VALUES) - 1)
    exact = [torch.zeros(NUM_VALUES), torch.zeros(NUM_VALUES)]
    stored = [torch.zeros(NUM_VALUES), torch.zeros(NUM_VALUES)]
    store_s, error, ratio = 0.0, 0.0, 0.0
    for step in range(NUM_STEPS):
        gradient = (torch.randn(NUM_VALUES) + 0.3) * sizes * (1.0 if step < NUM_STEPS // 2 else 0.3)
        for index, beta in enumerate((0.9, 0.999)):
            value = gradient ** (index + 1)
            exact[index].lerp_(value, 1 - beta)
            stored[index] = stored[index].lerp(value, 1 - beta)
        expected, got = (first / second.sqrt() for first, second in (exact, stored))
        error = ((got - expected).norm() / expected.norm()).item()
        ratio = (stored[1] / exact[1]).median().item()
        start_s = time.perf_counter()
        stored = [store(stored[0], True, step), store(stored[1], False, step)]
        store_s += time.perf_counter() - start_s
    ns_per_value = store_s / NUM_STEPS / (2 * NUM_VALUES) * 1e9
    emit(BENCHMARK, name, direction_error=error, second_moment_ratio=ratio, ns_per_value_stored_and_read=ns_per_value)


def update_s(masters: torch.dtype, moments: str) -> float:
    """Seconds of AdamW's update of one parameter, the median of some."""
    layout = lay_out_moments(moments, NUM_UPDATED, num_wide=NUM_UPDATED)
    stored = layout.views(StagingBuffer(layout.nbytes).tensor)
    at = FlatBuffers(
        weight=torch.randn(NUM_UPDATED).to(masters),
        exp_avg=FlatMoment(EXP_AVG, stored),
        exp_avg_sq=FlatMoment(EXP_AVG_SQ, stored),
        gradient=torch.randn(NUM_UPDATED),
    )
    hyper = Hyper(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, clock=0)
    seed = None if masters == torch.float32 and moments == "fp32" else 1
    times = []
    for step in range(1, NUM_UPDATES + 1):
        run = Segment(start=0, stop=NUM_UPDATED, update=ParamUpdate(hyper=hyper, step=step, seed=seed))
        start_s = time.perf_counter()
        update_runs(at, [run])
        times.append(time.perf_counter() - start_s)
    return statistics.median(times) / NUM_UPDATED


def measure_updates() -> None:
    """Time the update with everything in each type that it may be in."""
    fp32_s = update_s(torch.float32, "fp32")
    for (name, dtype), moments in product((("fp32", torch.float32), ("bf16", torch.bfloat16)), STATE_DTYPES):
        seconds = update_s(dtype, moments)
        emit(
            BENCHMARK,
            f"update, {name} masters, {moments} moments",
            ns_per_param=seconds * 1e9,
            beside_fp32=seconds / fp32_s,
            num_threads=torch.get_num_threads(),
        )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    measure("8 bits, lowmem", eight_bit)
    measure("8 bits, stochastic", eight_bit_stochastic)
    measure("bf16, stochastic", bf16_stochastic)
    measure("bf16, nearest", bf16_nearest)
    measure_updates()
    try:
        dynamic = dynamic_code()
    except ImportError:
        emit_skip(BENCHMARK, "8 bits, bitsandbytes", "bitsandbytes is not installed")
        return
    measure("8 bits, bitsandbytes", dynamic)


if __name__ == "__main__":
    main()
