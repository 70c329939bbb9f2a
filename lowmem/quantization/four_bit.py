"""NF4 and FP4 as bitsandbytes stores them: two weights to a byte, an absmax for each block of the flattened matrix.

Of a weight `p` of shape (N, K), n = N * K:

    p                                  U8 (n/2, 1)            codes, row-major; with another `quant_storage` the same
                                                              bytes under another type
    p.absmax                           F32 (ceil(n/block))    or U8, where the absmaxes are quantised again ("nested")
    p.quant_map                        F32 (16)               the code's values
    p.nested_absmax, .nested_quant_map F32 (ceil(blocks/256)), F32 (256)      only where nested
    p.quant_state.bitsandbytes__nf4    U8                     JSON: type, block sizes, shape, offset

A value is `quant_map[code] * absmax`, nested `absmax = nested_quant_map[code] * nested_absmax + offset`: 4.127 bits a
weight with blocks of 64, 4.5 where not nested.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.internals.bitsandbytes import Code
from lowmem.quantization.format import Format, PackedWeight, ReadBytes, part_of, piece_of, refuse_weight
from lowmem.quantization.kernels import CODES, bytes_of_table, nibbles
from offload import JsonObject, TensorSpec, parse_json_object

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What bitsandbytes takes."""

STATE = ".quant_state.bitsandbytes__"
"""What the name of a weight's JSON has before the type."""
_STORAGES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)
_LEFT = (".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map")
_AGAIN = "download the checkpoint again"


@dataclass(frozen=True, kw_only=True)
class NibbleState:
    """What a weight's JSON says."""

    code: Code
    """Its table."""
    block_size: int
    """Weights that share an absmax."""
    shape: tuple[int, ...]
    """Shape of the weight."""
    nested_block_size: int | None = None
    """Absmaxes that share one of their own; None where they are float32."""
    nested_offset: float = 0.0
    """Added to each absmax after that."""

    @property
    def num_blocks(self) -> int:
        """Absmaxes."""
        return -(-math.prod(self.shape) // self.block_size)


@dataclass(frozen=True, kw_only=True)
class FourBit(Format):
    """bitsandbytes in 4 bits."""

    reads: ClassVar[tuple[str, ...]] = ("bitsandbytes nf4", "bitsandbytes fp4")
    name: str = "nf4"

    @classmethod
    def from_config(cls, quantization: Mapping[str, object]) -> Self | None:
        """Recognise `{"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4", ...}`.

        How the weights are stored is read from the weights; of the configuration only the type is believed.

        Raises:
            UnsupportedError: A type of code that is not known.
        """
        method = quantization.get("quant_method", "bitsandbytes")
        if method != "bitsandbytes" or not quantization.get("load_in_4bit", quantization.get("_load_in_4bit")):
            return None
        code = quantization.get("bnb_4bit_quant_type", "fp4")
        if not isinstance(code, str) or code not in CODES:
            raise UnsupportedError(
                f"bnb_4bit_quant_type={code!r:.60}", reason="bitsandbytes does not have it", instead="'nf4' or 'fp4'"
            )
        return cls(name=str(code))

    def find(self, tensors: Mapping[str, TensorSpec], read: ReadBytes) -> dict[str, PackedWeight]:
        """The weights that have a `quant_state`; see `Format.find`."""
        found = {}
        for key, spec in tensors.items():
            name, state, code = key.partition(STATE)
            if state:
                found[name] = _weight(name, code, spec, tensors=tensors, read=read)
        for key, spec in tensors.items():
            owner = next((key.removesuffix(end) for end in _LEFT if key.endswith(end)), None)
            if owner is not None and owner in tensors and owner not in found:
                refuse_weight(owner, spec, f"expected {owner}{STATE}{self.name} beside {key}, which no file holds")
        return found


def _weight(
    name: str, code: str, described: TensorSpec, *, tensors: Mapping[str, TensorSpec], read: ReadBytes
) -> PackedWeight:
    state = read_state(parse_json_object(described.file, read(described), field=described.name, remedy=_AGAIN), code)
    packed = part_of(tensors, name, weight=described, dtypes=_STORAGES)
    num_bytes = -(-math.prod(state.shape) // 2)
    # A storage type of several bytes needs a whole number of them.
    if packed.nbytes != num_bytes + -num_bytes % packed.dtype.itemsize:
        refuse_weight(name, packed, f"expected {num_bytes} bytes for shape {list(state.shape)}, got {packed.nbytes}")
    nested = state.nested_block_size is not None
    absmax = part_of(
        tensors,
        f"{name}.absmax",
        weight=packed,
        dtypes=(torch.uint8,) if nested else (torch.float32,),
        num_elements=state.num_blocks,
    )
    table = part_of(tensors, f"{name}.quant_map", weight=packed, dtypes=(torch.float32,), shape=(16,))
    _check_table(table, read(table), state.code)
    parts = [packed, absmax, table]
    if state.nested_block_size is not None:
        num_nested = -(-state.num_blocks // state.nested_block_size)
        for suffix, num_elements in ((".nested_absmax", num_nested), (".nested_quant_map", 256)):
            parts.append(
                part_of(tensors, name + suffix, weight=packed, dtypes=(torch.float32,), num_elements=num_elements)
            )
    made = PackedWeight(
        name=name,
        shape=state.shape,
        parts=tuple(parts),
        read_once=(described,),
        format=state.code,
        dequantise=partial(dequantise, state),
    )
    return with_entries(made, state)


def with_entries(weight: PackedWeight, state: NibbleState) -> PackedWeight:
    """A weight, with a way to unpack its entries one by one where no block of codes or absmaxes belongs to two."""
    packed, size = weight.parts[0], math.prod(state.shape[1:])
    if len(state.shape) != 3 or packed.nbytes * 2 != math.prod(state.shape):
        return weight
    if size % state.block_size or size % (2 * packed.dtype.itemsize):
        return weight
    if state.nested_block_size is not None and size // state.block_size % state.nested_block_size:
        return weight
    return replace(weight, entry=partial(_entry, weight, state))


def _entry(stack: PackedWeight, state: NibbleState, index: int) -> PackedWeight:
    own, num = replace(state, shape=state.shape[1:]), state.shape[0]
    packed, absmax, table, *nested = stack.parts
    parts = [
        piece_of(packed, index, num=num, shape=(math.prod(packed.shape) // num,)),
        piece_of(absmax, index, num=num, shape=(own.num_blocks,)),
        table,
    ]
    if nested:
        parts += [piece_of(nested[0], index, num=num, shape=(math.prod(nested[0].shape) // num,)), nested[1]]
    return replace(
        stack,
        name=f"{stack.name}[{index}]",
        shape=own.shape,
        parts=tuple(parts),
        dequantise=partial(dequantise, own),
        entry=None,
    )


def read_state(members: JsonObject, code: str) -> NibbleState:
    """Check what a weight's JSON says.

    Args:
        members: The JSON.
        code: The type that the tensor's name gives.

    Raises:
        SourceError: A member is missing or cannot be true.
    """
    if members.text("quant_type") != code or code not in CODES:
        members.refuse("quant_type", f"expected {' or '.join(CODES)} as the tensor is called, got {code[:60]!a}")
    block_size, shape = members.natural("blocksize"), members.naturals("shape")
    if block_size not in BLOCK_SIZES:
        members.refuse("blocksize", f"expected one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}")
    if not shape or math.prod(shape) < 1:
        members.refuse("shape", f"expected sizes of at least 1, got {list(shape)}")
    state = NibbleState(code=code, block_size=block_size, shape=shape)
    if "nested_blocksize" not in members.members:
        return state
    nested, offset = members.natural("nested_blocksize"), members.members.get("nested_offset")
    if nested < 1:
        members.refuse("nested_blocksize", f"expected at least 1, got {nested}")
    if members.text("nested_dtype") != "float32":
        members.refuse("nested_dtype", f"expected float32, got {members.text('nested_dtype')[:60]}")
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not math.isfinite(offset):
        members.refuse("nested_offset", f"expected a number, got {offset!a:.60}")
    return replace(state, nested_block_size=nested, nested_offset=float(offset))


def _check_table(spec: TensorSpec, raw: bytes, code: Code) -> None:
    """Refuse a table that is not the code's: bitsandbytes' kernels do not look at it."""
    stored = torch.frombuffer(bytearray(raw), dtype=torch.float32)
    if not torch.allclose(stored, torch.tensor(CODES[code]), rtol=0, atol=1e-6):
        refuse_weight(spec.name, spec, f"expected the values of {code}, got {[round(x, 4) for x in stored.tolist()]}")


def dequantise(state: NibbleState, parts: Sequence[Tensor], out: Tensor) -> None:
    """Write a weight's values; see `format.Dequantise`."""
    packed, absmax, table, *nested = parts
    if state.nested_block_size is not None:
        codes, absmax = absmax, torch.empty(absmax.shape, dtype=torch.float32, device=absmax.device)
        nested_absmax, nested_table = nested
        bytes_of_table(codes, nested_absmax, nested_table, absmax, block_size=state.nested_block_size)
        absmax += state.nested_offset
    flat = packed.contiguous().view(torch.uint8).view(-1)
    nibbles(flat, absmax, table, out, code=state.code, block_size=state.block_size)
