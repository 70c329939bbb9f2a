"""MXFP4: E2M1 codes, two in a byte, with a power of two for each 32 in a row (OCP MX specification 1.0, section 5.3.3).

As gpt-oss stores its experts: `blocks` holds 16 bytes for each 32 weights of a row, `scales` the exponent. A row is an
output of the product; the model's parameter has inputs as rows, so what is written here is transposed where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from lowmem.quantization.format import Format, PackedWeight, ReadBytes, along_first, part_of, refuse_weight
from lowmem.quantization.settings import Settings
from lowmem.quantization.unpacking import PairLookup, power_scales, scale_columns, unpack_rows
from offload import TensorSpec

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the 16 codes stand for: a sign, two bits of exponent, one of fraction."""

GROUP = 32
"""Weights that share a scale."""


def dequantise_mxfp4(blocks: Tensor, scales: Tensor, *, out: Tensor) -> None:
    """Write the values of a matrix, or of a stack of them one by one.

    Args:
        blocks: Shape ([experts,] rows, columns / 32, 16), or (..., columns / 2), uint8; the low nibble comes first.
        scales: Shape ([experts,] rows, columns / 32), uint8.
        out: Shape ([experts,] rows, columns), any floating-point type and strides.
    """
    look_up = PairLookup(E2M1, device=out.device)
    rows, columns = out.shape[-2:]
    if out.ndim == 2:
        _dequantise_one(blocks.reshape(rows, columns // 2), power_scales(scales), look_up, out=out)
        return
    for one, exponents, into in zip(blocks, scales, out, strict=True):
        _dequantise_one(one.reshape(rows, columns // 2), power_scales(exponents), look_up, out=into)


def _dequantise_one(packed: Tensor, scales: Tensor, look_up: PairLookup, *, out: Tensor) -> None:
    def fill(rows: slice, into: Tensor) -> None:
        look_up(packed[rows], into=into)
        scale_columns(into, scales[rows], GROUP)

    unpack_rows(out, fill)


_BLOCKS, _SCALES = "_blocks", "_scales"
_KNOWN = frozenset({"quant_method", "modules_to_not_convert", "dequantize"})


@dataclass(frozen=True, kw_only=True)
class Mxfp4(Format):
    """Experts in MXFP4 and all else plain, as gpt-oss is published."""

    reads: ClassVar[tuple[str, ...]] = ("mxfp4",)
    name: str = "mxfp4"

    @classmethod
    def from_config(cls, quantization: Mapping[str, object]) -> Self | None:
        settings = Settings(quantization)
        if settings.method != "mxfp4":
            return None
        settings.refuse_unknown(_KNOWN)
        return cls()

    def find(self, tensors: Mapping[str, TensorSpec], read: ReadBytes) -> dict[str, PackedWeight]:
        """The packed weights among a checkpoint's tensors, by name: stacks (experts, inputs, outputs)."""
        del read
        found = {}
        for name, blocks in tensors.items():
            if not name.endswith(_BLOCKS) or blocks.dtype != torch.uint8:
                continue
            weight = name.removesuffix(_BLOCKS)
            if len(blocks.shape) != 4 or blocks.shape[-1] != GROUP // 2:
                refuse_weight(
                    name, blocks, f"expected shape [experts, outputs, inputs / 32, 16], got {list(blocks.shape)}"
                )
            experts, rows, groups, _ = blocks.shape
            scales = part_of(
                tensors, weight + _SCALES, weight=blocks, dtypes=[torch.uint8], shape=(experts, rows, groups)
            )
            found[weight] = along_first(
                PackedWeight(
                    name=weight,
                    shape=(experts, groups * GROUP, rows),
                    parts=(blocks, scales),
                    format=self.name,
                    dequantise=_dequantise_transposed,
                )
            )
        return found


def _dequantise_transposed(parts: Sequence[Tensor], out: Tensor) -> None:
    blocks, scales = parts
    dequantise_mxfp4(blocks, scales, out=out.transpose(-1, -2))
