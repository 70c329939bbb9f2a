"""int8 as bitsandbytes stores it: one byte a weight, and the largest magnitude of each row.

Of a weight `p.weight` of shape (N, K):

    p.weight          I8 (N, K)
    p.SCB             F32 (N)
    p.weight_format   U8 scalar, 0 for rows as they are

A stack of experts `p` of shape (E, N, K), which bitsandbytes does not have, lies in the same way: p, p.SCB (E, N).

A value is `weight * SCB / 127`, with the reciprocal as bitsandbytes' `int8_vectorwise_dequant` multiplies it: 8.0 bits
a weight. Its own forward on a GPU also quantises activations, except outliers; ours is the product with these values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.quantization.format import Format, PackedWeight, ReadBytes, along_first, part_of, refuse_weight
from lowmem.quantization.kernels import rows
from offload import TensorSpec

RECIPROCAL = 7.874015718698502e-3
"""1 / 127 as bitsandbytes writes it."""

_SCALES, _LAYOUT, _WEIGHT = ".SCB", ".weight_format", ".weight"


@dataclass(frozen=True, kw_only=True)
class Int8(Format):
    """bitsandbytes in 8 bits."""

    reads: ClassVar[tuple[str, ...]] = ("bitsandbytes int8",)
    name: str = "int8"

    @classmethod
    def from_config(cls, quantization: Mapping[str, object]) -> Self | None:
        """Recognise `{"quant_method": "bitsandbytes", "load_in_8bit": true, ...}`.

        Raises:
            UnsupportedError: The weights would be kept in 16 bits.
        """
        method = quantization.get("quant_method", "bitsandbytes")
        if method != "bitsandbytes" or not quantization.get("load_in_8bit", quantization.get("_load_in_8bit")):
            return None
        if quantization.get("llm_int8_has_fp16_weight"):
            raise UnsupportedError(
                "llm_int8_has_fp16_weight=True",
                reason="it keeps weights in 16 bits and rounds them in every forward",
                instead="a checkpoint without it, or the one that is not quantised",
            )
        return cls()

    def find(self, tensors: Mapping[str, TensorSpec], read: ReadBytes) -> dict[str, PackedWeight]:
        """The weights that have row scales beside them; see `Format.find`."""
        found = {}
        for key, scales in tensors.items():
            if key.endswith(_SCALES):
                stem = key.removesuffix(_SCALES)
                name = stem if stem in tensors else stem + _WEIGHT
                found[name] = _weight(name, scales, tensors=tensors, read=read)
        for key, spec in tensors.items():
            if spec.dtype == torch.int8 and key not in found:
                refuse_weight(
                    key, spec, f"expected {key.removesuffix(_WEIGHT)}{_SCALES} beside it, which no file holds"
                )
        return found


def _weight(name: str, scales: TensorSpec, *, tensors: Mapping[str, TensorSpec], read: ReadBytes) -> PackedWeight:
    codes = part_of(tensors, name, weight=scales, dtypes=(torch.int8,))
    if len(codes.shape) < 2:
        refuse_weight(name, codes, f"expected rows and columns, got shape {list(codes.shape)}")
    num_rows = math.prod(codes.shape[:-1])
    part_of(tensors, scales.name, weight=codes, dtypes=(torch.float32,), num_elements=num_rows)
    layout = tensors.get(name.removesuffix(_WEIGHT) + _LAYOUT)
    if layout is not None and any(read(layout)):
        raise UnsupportedError(
            f"{layout.name}={read(layout)[0]}",
            reason="its weight is stored in tiles of one kind of GPU, as versions of bitsandbytes before 0.43 did",
            instead="the checkpoint saved again by a newer bitsandbytes, or the one that is not quantised",
        )
    return row_scaled(name, codes, scales, layout)


def row_scaled(name: str, codes: TensorSpec, scales: TensorSpec, layout: TensorSpec | None) -> PackedWeight:
    """A weight, or a stack of them whose entries can be unpacked one by one, from its stored tensors."""
    made = PackedWeight(
        name=name,
        shape=tuple(codes.shape),
        parts=(codes, scales),
        read_once=() if layout is None else (layout,),
        format="int8",
        dequantise=dequantise,
    )
    is_stack = len(codes.shape) == 3 and scales.shape[:1] == codes.shape[:1]
    return along_first(made) if is_stack else made


def dequantise(parts: Sequence[Tensor], out: Tensor) -> None:
    """Write a weight's values; see `format.Dequantise`."""
    codes, scales = parts
    num_columns = codes.shape[-1]
    rows(codes.view(-1, num_columns), scales.view(-1), RECIPROCAL, out.view(-1, num_columns))
