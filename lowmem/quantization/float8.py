"""Eight-bit floating-point weights: E4M3 codes with a scale per tile, per row, per matrix, or per 32 in a row (MXFP8).

A weight is its code times its scale, in fp32 (DeepSeek-V3 technical report, section 3.3; OCP MX specification 1.0).
Tiles have the size that the configuration says: the last ones of a row or column are smaller where a matrix does not
divide, which the shapes alone do not tell. Scales of activations are for kernels that quantise those too, and are not
read: activations stay in the compute dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from lowmem.quantization.format import Format, PackedWeight, ReadBytes, along_first, refuse_weight
from lowmem.quantization.mxfp4 import GROUP, dequantise_mxfp4
from lowmem.quantization.settings import Settings
from lowmem.quantization.unpacking import power_scales, scale_columns, unpack_rows
from offload import TensorSpec, ceil_div

Tile = tuple[int, int]
"""Rows and columns of a matrix that share a scale."""

_TO_FP32_EXPONENT = 2.0 ** (127 - 7)
"""E4M3's exponent is biased by 7, that of fp32 by 127."""
_NO_NUMBER = 480.0
"""What fp32 makes of the one code that is not a number, all ones; E4M3 itself ends at 448."""
_SIGN_AND_CODE = 0x87F00000 - (1 << 32)
_POWERS = (torch.uint8, torch.float8_e8m0fnu)
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, *_POWERS)


def scale_grid(shape: tuple[int, int], tile: Tile) -> tuple[int, int]:
    """Shape of the scales of a matrix (rows, columns) cut into tiles."""
    return ceil_div(shape[0], tile[0]), ceil_div(shape[1], tile[1])


def dequantise_float8(codes: Tensor, scales: Tensor, *, tile: Tile, out: Tensor) -> None:
    """Write the values of a matrix of E4M3 codes.

    Args:
        codes: Shape (rows, columns), float8_e4m3fn.
        scales: As many as `scale_grid` has; fp32 or a type that it holds exactly, or powers of two in uint8 or E8M0.
        tile: Rows and columns that share a scale.
        out: Shape (rows, columns), any floating-point type and strides.
    """
    grid = power_scales(scales) if scales.dtype in _POWERS else scales.float()
    grid = grid.view(scale_grid((out.shape[0], out.shape[1]), tile))
    # Of one row each: a piece may begin and end inside a tile.
    tile_of_row = torch.arange(out.shape[0], device=out.device) // tile[0]

    def fill(rows: slice, into: Tensor) -> None:
        widen_float8(codes[rows], into=into)
        scale_columns(into, grid[tile_of_row[rows]], tile[1])

    unpack_rows(out, fill)


def widen_float8(codes: Tensor, *, into: Tensor) -> None:
    """Convert E4M3 to fp32, exactly.

    Args:
        codes: Any shape, float8_e4m3fn.
        into: The same shape, fp32, contiguous.
    """
    if into.device.type != "cpu" or _flushes_subnormals():
        into.copy_(codes)
        return
    # Torch converts one element at a time on a processor. Instead: seven bits to the top of the fraction and the bottom
    # of the exponent, the sign to its place, then the bias. Subnormal codes are subnormal fp32 for the moment.
    bits = into.view(torch.int32)
    bits.copy_(codes.view(torch.int8))
    bits.bitwise_left_shift_(20).bitwise_and_(_SIGN_AND_CODE)
    into.mul_(_TO_FP32_EXPONENT)
    low, high = torch.aminmax(into)
    if float(high) == _NO_NUMBER or float(low) == -_NO_NUMBER:
        into.masked_fill_(into.abs() == _NO_NUMBER, float("nan"))


def _flushes_subnormals() -> bool:
    """Whether torch.set_flush_denormal is on, which torch does not tell."""
    return not bool(torch.tensor(2.0**-140).mul(1.0) > 0)


_IGNORED = frozenset(
    """
    quant_method activation_scheme modules_to_not_convert ignored_layers modules_to_convert dequantize
    activation_scale_ub quantization_status global_compression_ratio version input_activations targets
    output_activations ignore kv_cache_scheme
    """.split()  # noqa: SIM905 - a table is easier to read than quoted lines
)
"""Settings that say which modules are quantised, which the files say themselves, or how activations are."""


@dataclass(frozen=True, kw_only=True)
class Float8(Format):
    """E4M3 weights, as DeepSeek, vLLM's and Meta's tools and compressed-tensors store them."""

    reads: ClassVar[tuple[str, ...]] = ("fp8", "mxfp8", "fbgemm_fp8", "compressed-tensors (8-bit float)")
    name: str = "fp8"
    tile: Tile | None = (128, 128)
    """None where each weight has one scale, or one per row."""
    experts_in_fp4: bool = False
    """Whether int8 tensors are MXFP4 codes, two in a byte (DeepSeek-V4)."""

    @classmethod
    def from_config(cls, quantization: Mapping[str, object]) -> Self | None:
        settings = Settings(quantization)
        match settings.method:
            case "fp8" | "mxfp8" as method:
                settings.refuse_unknown(_IGNORED | {"weight_block_size", "fmt", "scale_fmt", "expert_dtype"})
                settings.one_of("fmt", "e4m3", "float8_e4m3fn")
                settings.one_of("scale_fmt", "float", "ue8m0")
                experts = settings.one_of("expert_dtype", "fp8", "fp4")
                usual = [1, GROUP] if method == "mxfp8" else [128, 128]
                tile = _tile(settings, settings.get("weight_block_size", usual))
                return cls(name=method, tile=tile, experts_in_fp4=experts == "fp4")
            case "fbgemm_fp8":
                settings.refuse_unknown(_IGNORED)
                return cls(tile=None)
            case "compressed-tensors" if settings.get("format") in ("float-quantized", "naive-quantized"):
                return cls(tile=_compressed_tile(settings))
            case _:
                return None

    def find(self, tensors: Mapping[str, TensorSpec], read: ReadBytes) -> dict[str, PackedWeight]:
        del read
        found = {}
        for name, spec in tensors.items():
            if spec.dtype == torch.float8_e5m2:
                refuse_weight(name, spec, "expected weights in E4M3, got E5M2, which is for gradients")
            is_fp4 = self.experts_in_fp4 and spec.dtype == torch.int8
            if spec.dtype == torch.float8_e4m3fn or is_fp4:
                found[name] = self._weight(name, spec, _scales_of(name, spec, tensors), is_fp4=is_fp4)
        return found

    def _weight(self, name: str, spec: TensorSpec, scales: TensorSpec, *, is_fp4: bool) -> PackedWeight:
        if len(spec.shape) not in (2, 3):
            refuse_weight(name, spec, f"expected a matrix or a stack of them, got shape {list(spec.shape)}")
        shape = (*spec.shape[:-1], spec.shape[-1] * (2 if is_fp4 else 1))
        rows, columns = shape[-2:]
        stack = shape[:-2]
        tile = (1, GROUP) if is_fp4 else self.tile
        num_scales = math.prod(scales.shape)
        if tile is None or not _fits(scales.shape, (*stack, *scale_grid((rows, columns), tile))):
            # One per matrix or one per row are told by their number alone.
            by_number = {math.prod(stack) * rows: (1, columns), math.prod(stack): (rows, columns)}
            if is_fp4 or num_scales not in by_number:
                expected = [*stack, *scale_grid((rows, columns), tile)] if tile else "one per row or one in all"
                refuse_weight(
                    scales.name,
                    scales,
                    f"expected scales {expected} for a weight {list(shape)}"
                    + (f" in tiles of {tile[0]} x {tile[1]}" if tile else "")
                    + f", got {list(scales.shape)}",
                )
            tile = by_number[num_scales]
        dequantise = _fp4_stack if is_fp4 else partial(_float8_stack, tile=tile)
        made = PackedWeight(name=name, shape=shape, parts=(spec, scales), format=self.name, dequantise=dequantise)
        has_entries = len(shape) == 3 and scales.shape[:1] == shape[:1]
        return along_first(made) if has_entries else made


def _float8_stack(parts: Sequence[Tensor], out: Tensor, *, tile: Tile) -> None:
    codes, scales = parts
    if out.ndim == 2:
        dequantise_float8(codes, scales, tile=tile, out=out)
        return
    for one, own, into in zip(codes, scales.reshape(out.shape[0], -1), out, strict=True):
        dequantise_float8(one, own, tile=tile, out=into)


def _fp4_stack(parts: Sequence[Tensor], out: Tensor) -> None:
    codes, scales = parts
    dequantise_mxfp4(codes.view(torch.uint8), scales, out=out)


def _scales_of(name: str, spec: TensorSpec, tensors: Mapping[str, TensorSpec]) -> TensorSpec:
    """The scales that belong to a weight, by any of the names that tools give them."""
    module, _, last = name.rpartition(".")
    names = [f"{name}_scale_inv", f"{name}_scale"]
    if last == "weight":
        names += [f"{module}.scale", f"{module}.qscale_weight"]
    there = [tensors[other] for other in names if other in tensors]
    if len(there) != 1:
        held = ", ".join(scales.name for scales in there)
        refuse_weight(
            name, spec, f"expected its scales under one of {', '.join(names)}; the files hold {held or 'none'}"
        )
    if there[0].dtype not in _SCALE_DTYPES:
        refuse_weight(there[0].name, there[0], f"expected scales in a floating-point type, got {there[0].dtype}")
    return there[0]


def _fits(shape: Sequence[int], grid: Sequence[int]) -> bool:
    return tuple(shape) == tuple(grid) or (math.prod(grid) == 1 and math.prod(shape) == 1)


def _tile(settings: Settings, value: object) -> Tile | None:
    if value is None:
        return None
    if (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in value)
    ):
        return value[0], value[1]
    raise settings.unsupported("weight_block_size", "expected two positive whole numbers")


def _compressed_tile(settings: Settings) -> Tile | None:
    """The tile of compressed-tensors' scheme for weights, which all groups of modules must share."""
    settings.refuse_unknown(
        _IGNORED | {"format", "config_groups", "sparsity_config", "transform_config", "compression_ratio"}
    )
    for field in ("sparsity_config", "transform_config"):
        if settings.get(field) not in (None, {}):
            raise settings.unsupported(field, "weights would have to be changed once more after their scales")
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise settings.unsupported("config_groups", "expected at least one group of modules")
    tiles = {_weights_tile(settings, group) for group in groups.values()}
    if len(tiles) > 1:
        raise settings.unsupported("config_groups", "its groups of modules store weights in different ways")
    return tiles.pop()


def _weights_tile(settings: Settings, group: object) -> Tile | None:
    scheme = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(scheme, Mapping) or scheme.get("num_bits") != 8 or scheme.get("type") != "float":
        raise settings.unsupported("config_groups", "weights must be 8-bit floats there")
    if scheme.get("dynamic") or not scheme.get("symmetric", True):
        raise settings.unsupported("config_groups", "weights must have stored scales and no zeros there")
    match scheme.get("strategy"):
        case "tensor" | "channel":
            return None
        case "block":
            return _tile(settings, scheme.get("block_structure"))
        case "group":
            return _tile(settings, [1, scheme.get("group_size")])
        case strategy:
            raise settings.unsupported("config_groups", f"strategy {ascii(strategy)[:40]} is not known")
