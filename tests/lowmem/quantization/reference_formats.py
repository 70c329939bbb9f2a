"""Dequantisation written from the formats' specifications, one weight at a time in Python's floats: slow and plain.

Sources: OCP Microscaling Formats (MX) 1.0 for E4M3, E2M1 and E8M0; DeepSeek-V3's report, section 3.3, for tiles;
AutoGPTQ's and AutoAWQ's descriptions of `qweight`, `qzeros`, `scales` and `g_idx`.
"""

import math

import torch
from torch import Tensor


def e4m3(byte: int) -> float:
    sign, exponent, fraction = byte >> 7, byte >> 3 & 15, byte & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    size = (fraction / 8) * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def e2m1(code: int) -> float:
    sign, exponent, fraction = code >> 3, code >> 1 & 3, code & 1
    size = fraction / 2 if exponent == 0 else (1 + fraction / 2) * 2.0 ** (exponent - 1)
    return -size if sign else size


def e8m0(byte: int) -> float:
    return math.nan if byte == 255 else 2.0 ** (byte - 127)


def nibble(word: int, number: int) -> int:
    return (word & 0xFFFFFFFF) >> (4 * number) & 15


def float8_tiles(codes: Tensor, scales: Tensor, tile: tuple[int, int]) -> Tensor:
    """Codes uint8 (rows, columns), scales in fp32 (or bytes of E8M0): fp32."""
    rows, columns = codes.shape
    out = torch.empty(rows, columns, dtype=torch.float64)
    for r in range(rows):
        for c in range(columns):
            scale = scales[r // tile[0], c // tile[1]].item()
            out[r, c] = e4m3(int(codes[r, c])) * (e8m0(int(scale)) if scales.dtype == torch.uint8 else scale)
    return out.float()


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Blocks (experts, rows, columns / 32, 16), scales (experts, rows, columns / 32): fp32 (experts, columns, rows)."""
    experts, rows, groups, _ = blocks.shape
    out = torch.empty(experts, groups * 32, rows)
    for e in range(experts):
        for r in range(rows):
            for g in range(groups):
                scale = e8m0(int(scales[e, r, g]))
                for b in range(16):
                    byte = int(blocks[e, r, g, b])
                    out[e, 32 * g + 2 * b, r] = e2m1(byte & 15) * scale
                    out[e, 32 * g + 2 * b + 1, r] = e2m1(byte >> 4) * scale
    return out


def gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, *, first_version: bool) -> Tensor:
    """fp32 (outputs, inputs)."""
    num_inputs, num_outputs = qweight.shape[0] * 8, qweight.shape[1]
    out = torch.empty(num_outputs, num_inputs, dtype=torch.float64)
    for k in range(num_inputs):
        group = int(g_idx[k])
        for n in range(num_outputs):
            code = nibble(int(qweight[k // 8, n]), k % 8)
            zero = nibble(int(qzeros[group, n // 8]) + (0x11111111 if first_version else 0), n % 8)
            out[n, k] = float(scales[group, n]) * (code - zero)
    return out.float()


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, group_size: int) -> Tensor:
    """fp32 (outputs, inputs)."""
    num_inputs, num_outputs = qweight.shape[0], qweight.shape[1] * 8
    place = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}
    out = torch.empty(num_outputs, num_inputs, dtype=torch.float64)
    for k in range(num_inputs):
        for n in range(num_outputs):
            code = nibble(int(qweight[k, n // 8]), place[n % 8])
            zero = nibble(int(qzeros[k // group_size, n // 8]), place[n % 8])
            out[n, k] = float(scales[k // group_size, n]) * (code - zero)
    return out.float()
