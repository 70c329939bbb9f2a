"""What a format of packed weights says of itself: which stored tensors make a weight, and how its values come out.

A format is one file in this folder and one entry of `registry.FORMATS`. It reads headers and, where it has to, some
bytes that describe a weight; the weights themselves are brought by whoever brings stored tensors (scheduler, reader),
packed as they are, and `PackedWeight.dequantise` writes their values where the block is computed from.

    found = FourBit.from_config({"quant_method": "bitsandbytes", "load_in_4bit": True}).find(tensors, read)
    weight = found["model.layers.0.mlp.up_proj.weight"]
    weight.shape                                    # (5632, 2048): what the model has
    sum(part.nbytes for part in weight.parts)       # 5.9 MB: what is read
    weight.dequantise([stored[part.name] for part in weight.parts], out)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NoReturn, Protocol, Self

import torch
from torch import Tensor

from offload import SourceError, TensorSpec

Dequantise = Callable[[Sequence[Tensor], Tensor], None]
"""Writes values: from the stored tensors, in the order of `PackedWeight.parts`, each of its stored dtype and shape and
all on one device, to a contiguous tensor there of the weight's shape in float32, bfloat16 or float16. The values are
computed in float32 and rounded once. Keeps neither; runs on the device's current stream."""

ReadBytes = Callable[[TensorSpec], bytes]
"""Reads a small stored tensor now: what describes a weight, never a weight."""


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """One weight that is stored as several tensors."""

    name: str
    """Name that the weight has, or would have, in a checkpoint that is not quantised."""
    shape: tuple[int, ...]
    """Its shape there."""
    parts: tuple[TensorSpec, ...]
    """The stored tensors that its values are made of, read at each visit."""
    read_once: tuple[TensorSpec, ...] = ()
    """Stored tensors that only describe it, read when the checkpoint is opened."""
    format: str
    """Name of its format, for plans and messages: "nf4"."""
    dequantise: Dequantise = field(compare=False, repr=False)
    """Writes its values."""
    entry: Callable[[int], PackedWeight] | None = field(default=None, compare=False, repr=False)
    """Of a stack whose entries can be unpacked one by one: one of them. Its parts are pieces of these, or these."""

    @property
    def num_params(self) -> int:
        """Weights in it."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes that a visit reads."""
        return sum(part.nbytes for part in self.parts)

    def make(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Its values as a new tensor, on the device of the stored ones.

        Args:
            stored: Stored tensors by name; its parts are among them.
            dtype: float32, bfloat16, float16, or float64 (of the float32 values).
        """
        parts = self.take(stored)
        made = torch.empty(self.shape, dtype=values_dtype(dtype), device=parts[0].device)
        self.dequantise(parts, made)
        return made.to(dtype)

    def transposed(self) -> PackedWeight:
        """The weight of a layer that keeps it as (in, out): packed, it lies as that of a linear layer does."""

        def dequantise(parts: Sequence[Tensor], out: Tensor) -> None:
            made = torch.empty(self.shape, dtype=out.dtype, device=out.device)
            self.dequantise(parts, made)
            out.copy_(made.mT)

        return replace(self, shape=(*self.shape[:-2], *self.shape[:-3:-1]), dequantise=dequantise)

    def take(self, stored: Mapping[str, Tensor]) -> list[Tensor]:
        """Its parts, in order."""
        return [stored[part.name] for part in self.parts]

    def refuse(self, problem: str) -> NoReturn:
        """Raise `SourceError` about it."""
        refuse_weight(self.name, self.parts[0], problem)


class Format(Protocol):
    """A way to store weights, with the settings that a checkpoint's configuration gives it."""

    reads: ClassVar[tuple[str, ...]]
    """What it can read, for messages: "bitsandbytes nf4"."""

    @property
    def name(self) -> str:
        """For plans and messages: "nf4"."""

    @classmethod
    def from_config(cls, quantization: Mapping[str, object]) -> Self | None:
        """The format that the `quantization_config` of a config.json speaks of; None if it is another one.

        Raises:
            UnsupportedError: It is this one, with an option that cannot be honoured; names it.
        """

    def find(self, tensors: Mapping[str, TensorSpec], read: ReadBytes) -> dict[str, PackedWeight]:
        """The packed weights among a checkpoint's tensors, by `PackedWeight.name`.

        Args:
            tensors: All stored tensors by name. What is in no weight's `parts` or `read_once` is stored plainly.
            read: Reads a small one now.

        Raises:
            SourceError: A part is missing, or is not of the size or type that belongs to the weight.
            UnsupportedError: A weight is stored in a way that is not known; names it.
        """


def piece_of(spec: TensorSpec, index: int, *, num: int, shape: tuple[int, ...]) -> TensorSpec:
    """One of some equal pieces of a stored tensor, one after another in the file.

    Args:
        spec: The tensor.
        index: Which piece.
        num: How many there are.
        shape: The shape of a piece.
    """
    nbytes = spec.nbytes // num
    return replace(
        spec, name=f"{spec.name}[{index}]", shape=shape, offset_bytes=spec.offset_bytes + index * nbytes, nbytes=nbytes
    )


def along_first(weight: PackedWeight) -> PackedWeight:
    """A stack, whose entries are those of its parts along their first dimension, unpacked by the same function."""

    def entry(index: int) -> PackedWeight:
        parts = tuple(piece_of(spec, index, num=spec.shape[0], shape=spec.shape[1:]) for spec in weight.parts)
        return replace(weight, name=f"{weight.name}[{index}]", shape=weight.shape[1:], parts=parts, entry=None)

    return replace(weight, entry=entry)


def values_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values are written in on the way to `dtype`."""
    return torch.float32 if dtype == torch.float64 else dtype


def part_of(
    tensors: Mapping[str, TensorSpec],
    name: str,
    *,
    weight: TensorSpec,
    dtypes: Iterable[torch.dtype],
    shape: tuple[int, ...] | None = None,
    num_elements: int | None = None,
) -> TensorSpec:
    """A stored tensor that belongs to a weight, checked.

    Args:
        tensors: All stored tensors by name.
        name: Its name.
        weight: The tensor that it belongs to, for errors.
        dtypes: Types that it may have.
        shape: The shape that it must have; None for any.
        num_elements: How many elements it must have; None for any number.

    Raises:
        SourceError: It is missing or another one.
    """
    spec = tensors.get(name)
    if spec is None:
        refuse_weight(weight.name, weight, f"expected {name} beside it, which no file holds")
    allowed = tuple(dtypes)
    if spec.dtype not in allowed:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        refuse_weight(name, spec, f"expected {expected}, got {str(spec.dtype).removeprefix('torch.')}")
    if shape is not None and tuple(spec.shape) != tuple(shape):
        refuse_weight(name, spec, f"expected shape {list(shape)}, got {list(spec.shape)}")
    if num_elements is not None and math.prod(spec.shape) != num_elements:
        refuse_weight(name, spec, f"expected {num_elements} elements, got shape {list(spec.shape)}")
    return spec


def refuse_weight(name: str, spec: TensorSpec, problem: str) -> NoReturn:
    """Say what is wrong with a packed weight.

    Args:
        name: The tensor in question.
        spec: A stored tensor of the same file.
        problem: Expected against got.

    Raises:
        SourceError: Always.
    """
    raise SourceError(
        spec.file,
        field=f"tensor {name}",
        problem=problem,
        remedy="download the checkpoint again, or use the config.json that belongs to these weights",
    )
