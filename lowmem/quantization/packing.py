"""From values to packed weights in bitsandbytes' layout: what each will take, and the stored tensors themselves.

Codes are bitsandbytes' own (`quantize_4bit`, `int8_vectorwise_quant`), run by run: blocks and rows do not depend on
each other, so that a weight of any size is quantised in bounded memory. Sizes are known before anything is computed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.internals.bitsandbytes import Code, pack_bytes, pack_nibbles, pack_rows
from lowmem.quantization import four_bit, int8
from lowmem.quantization.format import PackedWeight
from lowmem.quantization.kernels import CODES, nibbles, rows
from offload import OutputTensor, TensorSpec

Quantization = Literal["nf4", "fp4", "int8"]
"""What an ordinary checkpoint can be packed to."""

_NESTED_BLOCK_SIZE = 256
"""bitsandbytes' only one."""

_STATE_BYTES = 256
"""Length of a weight's JSON, with spaces behind it: the number in it is known only at the end."""

_RUN_ELEMENTS = 1 << 21
"""Values quantised at a time: bitsandbytes' temporaries on a processor take about 20 bytes for each."""


Observe = Callable[[Tensor, Tensor], None]
"""Sees some values of a weight and what their codes stand for, both flat float32; may overwrite them. Absmaxes that are
quantised again are seen before that."""


class Packer(Protocol):
    """Writes one format."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What distinguishes its output, for the manifest."""

    def config(self, *, compute_dtype: str, skipped: list[str]) -> dict[str, object]:
        """What config.json says as `quantization_config`.

        Args:
            compute_dtype: Dtype that transformers is to compute in, by torch's name.
            skipped: Paths of linear layers that are not packed.
        """

    def outputs(self, name: str, shape: tuple[int, ...]) -> tuple[OutputTensor, ...]:
        """The stored tensors of a weight, the largest first."""

    def pack(
        self,
        name: str,
        values: Iterable[Tensor],
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype | None = None,
        observe: Observe | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Quantise a weight as its values come.

        Args:
            name: Its name.
            values: Its values in order, in pieces of one dtype; each may be overwritten after it was taken.
            shape: Its shape.
            dtype: The dtype that it is said to have been quantised from; that of the values if not given.
            observe: Sees what is quantised.

        Yields:
            Names and values of its stored tensors, on the device of the values: its codes in flat parts, one behind
            the other, then each of the others whole.
        """

    def found(self, name: str, shape: tuple[int, ...], specs: Mapping[str, TensorSpec]) -> PackedWeight:
        """The weight as it will be found in a file that is not written yet."""


@dataclass(frozen=True, kw_only=True)
class NibblePacker(Packer):
    """NF4 or FP4, absmaxes quantised again (QLoRA's double quantisation)."""

    code: Code
    block_size: int = 64

    @property
    def settings(self) -> Mapping[str, object]:
        return {"format": self.code, "block_size": self.block_size, "nested_block_size": _NESTED_BLOCK_SIZE}

    def config(self, *, compute_dtype: str, skipped: list[str]) -> dict[str, object]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.code,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": compute_dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": skipped,
        }

    def outputs(self, name: str, shape: tuple[int, ...]) -> tuple[OutputTensor, ...]:
        num = math.prod(shape)
        num_blocks = -(-num // self.block_size)
        num_nested = -(-num_blocks // _NESTED_BLOCK_SIZE)
        made = (
            ("", torch.uint8, (-(-num // 2), 1)),
            (".absmax", torch.uint8, (num_blocks,)),
            (".nested_quant_map", torch.float32, (256,)),
            (".quant_map", torch.float32, (16,)),
            (".nested_absmax", torch.float32, (num_nested,)),
            (four_bit.STATE + self.code, torch.uint8, (_STATE_BYTES,)),
        )
        return tuple(OutputTensor(name=name + end, dtype=dtype, shape=size) for end, dtype, size in made)

    def pack(
        self,
        name: str,
        values: Iterable[Tensor],
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype | None = None,
        observe: Observe | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        packed, *others = (output.name for output in self.outputs(name, shape))
        scales = _Scales(-(-math.prod(shape) // self.block_size))
        for run in _runs(values, self.block_size):
            codes, absmax = pack_nibbles(run, code=self.code, block_size=self.block_size)
            if observe is not None:
                observe(run.float(), self._values(codes, absmax, run.numel()))
            scales.add(absmax)
            dtype = dtype or run.dtype
            yield packed, codes.view(-1)
        absmax = scales.values
        offset = absmax.mean()
        codes, nested, table = pack_bytes(absmax - offset, block_size=_NESTED_BLOCK_SIZE)
        state = {
            "quant_type": self.code,
            "blocksize": self.block_size,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": list(shape),
            "nested_blocksize": _NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": offset.item(),
        }
        raw = json.dumps(state).encode().ljust(_STATE_BYTES)
        assert len(raw) == _STATE_BYTES
        described = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        yield from zip(others, (codes, table, torch.tensor(CODES[self.code]), nested, described), strict=True)

    def _values(self, codes: Tensor, absmax: Tensor, num: int) -> Tensor:
        made = torch.empty(num, dtype=torch.float32, device=codes.device)
        table = torch.tensor(CODES[self.code], device=codes.device)
        nibbles(codes.view(-1), absmax, table, made, code=self.code, block_size=self.block_size)
        return made

    def found(self, name: str, shape: tuple[int, ...], specs: Mapping[str, TensorSpec]) -> PackedWeight:
        state = four_bit.NibbleState(
            code=self.code, block_size=self.block_size, shape=shape, nested_block_size=_NESTED_BLOCK_SIZE
        )
        made = PackedWeight(
            name=name,
            shape=shape,
            parts=tuple(
                specs[name + end] for end in ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
            ),
            read_once=(specs[name + four_bit.STATE + self.code],),
            format=self.code,
            dequantise=partial(four_bit.dequantise, state),
        )
        return four_bit.with_entries(made, state)


@dataclass(frozen=True, kw_only=True)
class RowPacker(Packer):
    """int8 with a scale for each row."""

    @property
    def settings(self) -> Mapping[str, object]:
        return {"format": "int8"}

    def config(self, *, compute_dtype: str, skipped: list[str]) -> dict[str, object]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": False,
            "load_in_8bit": True,
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": skipped,
        }

    def outputs(self, name: str, shape: tuple[int, ...]) -> tuple[OutputTensor, ...]:
        stem = name.removesuffix(".weight")
        return (
            OutputTensor(name=name, dtype=torch.int8, shape=shape),
            OutputTensor(name=f"{stem}.SCB", dtype=torch.float32, shape=shape[:-1]),
            OutputTensor(name=f"{stem}.weight_format", dtype=torch.uint8, shape=()),
        )

    def pack(
        self,
        name: str,
        values: Iterable[Tensor],
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype | None = None,
        observe: Observe | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        packed, scale, layout = (output.name for output in self.outputs(name, shape))
        scales = _Scales(math.prod(shape[:-1]))
        for run in _runs(values, shape[-1]):
            codes, largest = pack_rows(run.view(-1, shape[-1]))
            if observe is not None:
                made = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
                rows(codes, largest, int8.RECIPROCAL, made)
                observe(run.float(), made.view(-1))
            scales.add(largest)
            yield packed, codes.view(-1)
        yield scale, scales.values
        yield layout, torch.tensor(0, dtype=torch.uint8)

    def found(self, name: str, shape: tuple[int, ...], specs: Mapping[str, TensorSpec]) -> PackedWeight:
        return int8.row_scaled(name, *(specs[output.name] for output in self.outputs(name, shape)))


def packer_for(quantization: object) -> Packer:
    """What writes a format.

    Raises:
        UnsupportedError: There is no such format, or it is only read.
    """
    if not isinstance(quantization, str):
        # A BitsAndBytesConfig, say, whose text has many lines.
        shown = f"quantization= of type {type(quantization).__name__}"
        raise UnsupportedError(shown, reason="a format is given by its name", instead="'nf4', 'fp4' or 'int8'")
    if quantization in CODES:
        return NibblePacker(code=quantization)
    if quantization == "int8":
        return RowPacker()
    raise UnsupportedError(
        f"quantization={quantization!r}", reason="nothing is packed to it", instead="'nf4', 'fp4' or 'int8'"
    )


class _Scales:
    """Scales of one run after the other, in memory that is taken once.

    Small pieces that stay would lie between the temporaries of runs and keep their memory from being used again:
    packing grew by two bytes for each weight (`tests/lowmem/packing/test_memory.py`).
    """

    def __init__(self, num: int) -> None:
        self._num, self._end = num, 0
        self._values: Tensor | None = None

    def add(self, scales: Tensor) -> None:
        if self._values is None:
            self._values = torch.empty(self._num, dtype=torch.float32, device=scales.device)
        self._values[self._end : self._end + scales.numel()].copy_(scales)
        self._end += scales.numel()

    @property
    def values(self) -> Tensor:
        assert self._values is not None
        assert self._end == self._num, f"{self._end} of {self._num} scales"
        return self._values


def _runs(values: Iterable[Tensor], unit: int) -> Iterable[Tensor]:
    """Flat pieces of a whole number of units but for the last, of bounded length."""
    step = max(1, _RUN_ELEMENTS // unit) * unit
    left: Tensor | None = None
    for piece in values:
        flat = piece.reshape(-1)
        if left is not None:
            flat = torch.cat((left, flat))
        num_whole = flat.numel() // unit * unit
        for start in range(0, num_whole, step):
            yield flat[start : min(start + step, num_whole)]
        left = flat[num_whole:].clone() if num_whole < flat.numel() else None
    if left is not None:
        yield left
