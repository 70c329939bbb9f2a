"""Four-bit integers with a scale and a zero for each group of inputs: GPTQ and AWQ, as their tools store them.

A weight is scale x (code - zero). Both pack eight codes into an int32 and store the transpose of torch's weight: GPTQ
along the inputs, AWQ along the outputs and in an order of its own. Products of a half-precision scale and such a
difference are exact in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from lowmem.quantization.format import Dequantise, Format, PackedWeight, ReadBytes, part_of, refuse_weight
from lowmem.quantization.settings import Settings
from lowmem.quantization.unpacking import PairLookup, scale_columns, unpack_rows
from offload import TensorSpec, ceil_div

CODES_PER_WORD = 8
"""Four-bit codes in an int32."""

_ONES = 0x11111111
"""One in each code of a word."""

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs each nibble of AWQ's words holds, the lowest first (its GEMM kernels' order)."""


def dequantise_gptq(
    parts: Sequence[Tensor], out: Tensor, *, group_of_input: Tensor | None, zero_offset: int, group_size: int
) -> None:
    """Write the values of a matrix that GPTQ packed.

    Args:
        parts: Codes, shape (inputs / 8, outputs), int32: nibble j of row r is the code of input 8 r + j. Zeros, shape
            (groups, outputs / 8), int32: nibble j of column c is the zero of output 8 c + j. Scales, shape (groups,
            outputs), float16, bfloat16 or float32.
        out: Shape (outputs, inputs), any floating-point type and strides.
        group_of_input: Shape (inputs,), int32: the group of each input (`g_idx`); None where they lie in order.
        zero_offset: What is added to each stored zero: 1 in the first version of the format, 0 in the second. Added to
            whole words, as GPTQModel does and subtracts when it writes: a stored 15 carries into its neighbour.
        group_size: Inputs of a group, where they lie in order.
    """
    qweight, qzeros, scales = parts
    order = None if group_of_input is None else group_of_input.to(out.device)
    # Bytes of the transposed words are codes in the order of the inputs.
    packed = qweight.t().contiguous().view(torch.uint8)
    zeros = _nibbles(qzeros + zero_offset * _ONES).float().t().contiguous()
    by_output = scales.float().t().contiguous()
    look_up = PairLookup(range(16), device=out.device)

    def fill(rows: slice, into: Tensor) -> None:
        look_up(packed[rows], into=into)
        if order is None:
            scale_columns(into, by_output[rows], group_size, zeros=zeros[rows])
        else:
            into.sub_(zeros[rows].index_select(1, order))
            into.mul_(by_output[rows].index_select(1, order))

    unpack_rows(out, fill)


def dequantise_awq(parts: Sequence[Tensor], out: Tensor, *, group_size: int) -> None:
    """Write the values of a matrix that AWQ packed for its GEMM kernels.

    Args:
        parts: Codes, shape (inputs, outputs / 8), int32. Zeros, shape (groups, outputs / 8), int32. Scales, shape
            (groups, outputs), float16 or bfloat16 or float32.
        out: Shape (outputs, inputs), any floating-point type and strides.
        group_size: Inputs of a group.
    """
    qweight, qzeros, scales = parts
    inverse = torch.argsort(torch.tensor(_AWQ_ORDER, device=out.device))
    zeros = _nibbles(qzeros).view(len(qzeros), -1, CODES_PER_WORD)[..., inverse].flatten(1).float().t().contiguous()
    by_output = scales.float().t().contiguous()
    # A byte holds two outputs of one input; transposed, a row of bytes is two rows of codes.
    num_outputs, num_inputs = out.shape
    packed = qweight.view(torch.uint8).t().contiguous().view(num_outputs // CODES_PER_WORD, -1, num_inputs)
    codes = torch.empty(0, dtype=torch.uint8, device=out.device)

    def fill(rows: slice, into: Tensor) -> None:
        nonlocal codes
        words = packed[rows.start // CODES_PER_WORD : rows.stop // CODES_PER_WORD]
        by_word = into.view(-1, CODES_PER_WORD, num_inputs)
        codes = torch.bitwise_and(words, 15, out=codes.resize_(0))
        for number in range(0, CODES_PER_WORD, 2):
            by_word[:, _AWQ_ORDER[number]].copy_(codes[:, number // 2])
        codes = torch.bitwise_right_shift(words, 4, out=codes.resize_(0))
        for number in range(1, CODES_PER_WORD, 2):
            by_word[:, _AWQ_ORDER[number]].copy_(codes[:, number // 2])
        scale_columns(into, by_output[rows], group_size, zeros=zeros[rows])

    unpack_rows(out, fill, multiple=CODES_PER_WORD)


def _nibbles(words: Tensor) -> Tensor:
    """Codes of words (rows, words), the lowest first: (rows, 8 words), int32."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    return words.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and_(15).flatten(-2)


_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_BESIDE_GPTQ = frozenset(
    """
    quant_method bits group_size desc_act sym format checkpoint_format pack_dtype true_sequential damp_percent
    damp_auto_increment static_groups model_name_or_path model_file_base_name meta quantizer lm_head dataset tokenizer
    act_group_aware backend model_seqlen block_name_to_quantize module_name_preceding_first_block batch_size
    pad_token_id max_input_length cache_block_outputs modules_in_block_to_quantize use_cuda_fp16 use_exllama
    exllama_config disable_exllama adapter mse parallel_packing rotation hyb_act is_marlin_format dynamic
    """.split()  # noqa: SIM905
)
"""Settings that are known; what bears on the stored numbers is read below, the rest says how they were found."""
_BESIDE_AWQ = frozenset(
    """
    quant_method bits group_size zero_point version format backend modules_to_not_convert do_fuse fuse_max_seq_len
    modules_to_fuse exllama_config sym desc_act pack_dtype meta dynamic quantizer
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True, kw_only=True)
class _Words(Format):
    """Weights in words of eight codes, with the zeros and scales of their groups beside them."""

    packs_inputs: ClassVar[bool]
    """Whether a word has eight inputs of one output, else eight outputs of one input."""
    group_size: int
    """Inputs of a group; -1 for all."""

    def find(self, tensors: Mapping[str, TensorSpec], read: ReadBytes) -> dict[str, PackedWeight]:
        found = {}
        for name, qweight in tensors.items():
            module, _, last = name.rpartition(".")
            if last != "qweight":
                continue
            if qweight.dtype != torch.int32 or len(qweight.shape) != 2:
                refuse_weight(
                    name, qweight, f"expected a matrix of int32, got {list(qweight.shape)} of {qweight.dtype}"
                )
            inputs_per_word, outputs_per_word = (CODES_PER_WORD, 1) if self.packs_inputs else (1, CODES_PER_WORD)
            num_inputs, num_outputs = qweight.shape[0] * inputs_per_word, qweight.shape[1] * outputs_per_word
            group_size = max(num_inputs if self.group_size == -1 else self.group_size, 1)
            groups = ceil_div(num_inputs, group_size)
            if num_outputs % CODES_PER_WORD:
                refuse_weight(name, qweight, f"expected a multiple of 8 outputs, got {num_outputs}")
            words = (groups, num_outputs // CODES_PER_WORD)
            qzeros = part_of(tensors, f"{module}.qzeros", weight=qweight, dtypes=[torch.int32], shape=words)
            scales = part_of(tensors, f"{module}.scales", weight=qweight, dtypes=_SCALES, shape=(groups, num_outputs))
            index = tensors.get(f"{module}.g_idx") if self.packs_inputs else None
            order = None
            if index is not None:
                part_of(tensors, index.name, weight=qweight, dtypes=[torch.int32], shape=(num_inputs,))
                order = _group_of_input(index, read(index), groups=groups, group_size=group_size)
            found[f"{module}.weight"] = PackedWeight(
                name=f"{module}.weight",
                shape=(num_outputs, num_inputs),
                parts=(qweight, qzeros, scales),
                read_once=() if index is None else (index,),
                format=self.name,
                dequantise=self._dequantise(order, group_size),
            )
        return found

    def _dequantise(self, order: Tensor | None, group_size: int) -> Dequantise:
        """Writes a weight whose inputs are in groups of this size, in order if that is None."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Gptq(_Words):
    """Weights that GPTQ quantised to four bits, in either version of the format."""

    reads: ClassVar[tuple[str, ...]] = ("gptq (4 bits)",)
    packs_inputs: ClassVar[bool] = True
    name: str = "gptq"
    zero_offset: int
    """As in `dequantise_gptq`."""

    @classmethod
    def from_config(cls, quantization: Mapping[str, object]) -> Self | None:
        """See `Format.from_config`."""
        settings = Settings(quantization)
        if settings.method != "gptq":
            return None
        settings.refuse_unknown(_BESIDE_GPTQ)
        field = "checkpoint_format" if settings.get("checkpoint_format") is not None else "format"
        version = settings.one_of(field, "gptq", "gptq_v2")
        for name in ("is_marlin_format", "rotation", "adapter", "dynamic"):
            if settings.get(name):
                raise settings.unsupported(name, "it changes what the stored numbers mean, or how they lie")
        return cls(group_size=_group_size(settings), zero_offset=1 if version == "gptq" else 0)

    def _dequantise(self, order: Tensor | None, group_size: int) -> Dequantise:
        return partial(dequantise_gptq, group_of_input=order, zero_offset=self.zero_offset, group_size=group_size)


@dataclass(frozen=True, kw_only=True)
class Awq(_Words):
    """Weights that AWQ quantised to four bits, packed for its GEMM kernels."""

    reads: ClassVar[tuple[str, ...]] = ("awq (4 bits, gemm)",)
    packs_inputs: ClassVar[bool] = False
    name: str = "awq"

    @classmethod
    def from_config(cls, quantization: Mapping[str, object]) -> Self | None:
        """See `Format.from_config`."""
        settings = Settings(quantization)
        if settings.method != "awq":
            return None
        settings.refuse_unknown(_BESIDE_AWQ)
        for field in ("version", "format"):
            settings.one_of(field, "gemm")
        if settings.get("zero_point", True) is not True:
            raise settings.unsupported("zero_point", "AWQ's GEMM layout always has zeros")
        if settings.get("backend") == "llm-awq" or settings.get("dynamic"):
            name = "dynamic" if settings.get("dynamic") else "backend"
            raise settings.unsupported(name, "its layout is another one")
        return cls(group_size=_group_size(settings))

    def _dequantise(self, order: Tensor | None, group_size: int) -> Dequantise:
        return partial(dequantise_awq, group_size=group_size)


def _group_size(settings: Settings) -> int:
    if settings.whole("bits") != 4:
        raise settings.unsupported("bits", "only four-bit codes are unpacked")
    if settings.one_of("pack_dtype", "int32") != "int32":
        raise settings.unsupported("pack_dtype", "only words of 32 bits are unpacked")
    size = settings.whole("group_size", 128)
    if size != -1 and size <= 0:
        raise settings.unsupported("group_size", "expected a positive number of inputs, or -1 for all")
    return size


def _group_of_input(index: TensorSpec, raw: bytes, *, groups: int, group_size: int) -> Tensor | None:
    """Groups of the inputs, shape (inputs,), int32; None where they lie in order.

    Raises:
        SourceError: A group is named that is not there.
    """
    order = torch.frombuffer(bytearray(raw), dtype=torch.int32) if raw else torch.empty(0, dtype=torch.int32)
    if order.numel() and not (int(order.min()) >= 0 and int(order.max()) < groups):
        refuse_weight(
            index.name, index, f"expected groups 0 to {groups - 1}, got {int(order.min())} to {int(order.max())}"
        )
    usual = torch.arange(order.numel(), dtype=torch.int32) // group_size
    return None if torch.equal(order, usual) else order
