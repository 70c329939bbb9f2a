"""Unpacking of one matrix in every format that is read in place: weights per second on this processor.

    python -m benchmarks.dequantisation [--size 4096] [--threads 1]

Codes are random. Beside them a cast from bf16 to fp32, which is what an ordinary checkpoint takes.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import emit, sample
from lowmem.quantization.float8 import dequantise_float8
from lowmem.quantization.four_bit import NibbleState, dequantise
from lowmem.quantization.int4 import dequantise_awq, dequantise_gptq
from lowmem.quantization.kernels import CODES
from lowmem.quantization.mxfp4 import dequantise_mxfp4

NUM_REPEATS = 7
NUM_WARMUP = 2


def cases(size: int) -> dict[str, Callable[[Tensor], None]]:
    """What writes the values of a square matrix, by format."""
    codes = torch.randint(0, 127, (size, size), dtype=torch.uint8)
    packed, scales = codes.view(torch.float8_e4m3fn), torch.rand(size // 128, size // 128)
    exponents = torch.randint(110, 130, (size, size // 32), dtype=torch.uint8)
    blocks = torch.randint(0, 256, (size, size // 32, 16), dtype=torch.uint8)
    words, columns = (
        torch.randint(0, 1 << 30, (size // 8, size)).int(),
        torch.randint(0, 1 << 30, (size, size // 8)).int(),
    )
    groups, zeros = torch.rand(size // 128, size).half(), torch.randint(0, 1 << 30, (size // 128, size // 8)).int()
    state = NibbleState(code="nf4", block_size=64, shape=(size, size))
    nibbles, absmax, table = blocks.view(-1), torch.rand(size * size // 64), torch.tensor(CODES["nf4"])
    wide = torch.randn(size, size).bfloat16()

    def cast(out: Tensor) -> None:
        out.copy_(wide)

    return {
        "bf16": cast,
        "nf4": lambda out: dequantise(state, [nibbles, absmax, table], out),
        "fp8": lambda out: dequantise_float8(packed, scales, tile=(128, 128), out=out),
        "mxfp8": lambda out: dequantise_float8(packed, exponents, tile=(1, 32), out=out),
        "mxfp4": lambda out: dequantise_mxfp4(blocks, exponents, out=out),
        "mxfp4 transposed": lambda out: dequantise_mxfp4(blocks, exponents, out=out.t()),
        "gptq": lambda out: dequantise_gptq(
            [words, zeros, groups], out, group_of_input=None, zero_offset=1, group_size=128
        ),
        "awq": lambda out: dequantise_awq([columns, zeros, groups], out, group_size=128),
    }


def measure(write: Callable[[Tensor], None], out: Tensor) -> list[float]:
    """Seconds of each repeat."""
    seconds = []
    for _ in range(NUM_WARMUP + NUM_REPEATS):
        start_s = time.perf_counter()
        write(out)
        seconds.append(time.perf_counter() - start_s)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name, write in cases(arguments.size).items():
        for dtype in (torch.float32, torch.bfloat16):
            taken = sample(
                measure(write, torch.empty(arguments.size, arguments.size, dtype=dtype)), num_warmup=NUM_WARMUP
            )
            emit(
                "dequantisation",
                f"{name}-{str(dtype).removeprefix('torch.')}",
                size=arguments.size,
                seconds=taken.to_dict(),
                weights_per_s=arguments.size**2 / taken.median,
            )


if __name__ == "__main__":
    main()
