"""The values of packed weights, read like ordinary tensors in fp32: for what looks at weights outside of visits."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from lowmem.quantization.format import PackedWeight
from offload import TensorReader, TensorSpec


def as_values(tensors: Mapping[str, TensorSpec], packed: Mapping[str, PackedWeight]) -> dict[str, TensorSpec]:
    """The tensors of a checkpoint as they would be if none of them were packed.

    Args:
        tensors: The stored tensors by name.
        packed: The packed weights by the names that they would have.

    Returns:
        By name: what is stored plainly as it is, and for each packed weight one of fp32 with its name and shape, whose
        bytes are in no file; `ValueReader` makes them.
    """
    parts = {spec.name for weight in packed.values() for spec in (*weight.parts, *weight.read_once)}
    values = {
        name: TensorSpec(
            name=name,
            dtype=torch.float32,
            shape=weight.shape,
            file=weight.parts[0].file,
            offset_bytes=0,
            nbytes=prod(weight.shape) * torch.float32.itemsize,
        )
        for name, weight in packed.items()
    }
    return {name: spec for name, spec in tensors.items() if name not in parts} | values


class ValueReader:
    """Reads rows of stored tensors, and of packed weights as if their values were stored in fp32.

    Holds the values of one weight at a time, of a stack one entry where its parts can be taken apart.

    Args:
        packed: The packed weights by the names of what `as_values` returned for them.
    """

    def __init__(self, packed: Mapping[str, PackedWeight]) -> None:
        self._packed = packed
        self._reader = TensorReader()
        self._held: tuple[str, int] | None = None
        self._values = torch.empty(0)

    def read(self, spec: TensorSpec, start_bytes: int, *, nbytes: int) -> Tensor:
        """Read part of a tensor: as `TensorReader.read`.

        Args:
            spec: The tensor, of `as_values`.
            start_bytes: Where the part begins, from the tensor's first byte.
            nbytes: Its length.

        Returns:
            1-D tensor in the stored dtype, or fp32; valid until the next call.
        """
        weight = self._packed.get(spec.name)
        if weight is None:
            return self._reader.read(spec, start_bytes, nbytes=nbytes)
        item = torch.float32.itemsize
        start, stop = start_bytes // item, (start_bytes + nbytes) // item
        num_entries = _num_entries(weight)
        size = weight.num_params // num_entries
        found = []
        for entry in range(start // size, max(start // size, (stop - 1) // size) + 1):
            values = self._entry(weight, entry, num_entries)
            found.append(values[max(start - entry * size, 0) : min(stop - entry * size, size)])
            if start < entry * size + size < stop:
                # The next entry takes its memory.
                found[-1] = found[-1].clone()
        return found[0] if len(found) == 1 else torch.cat(found)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()
        self._values = torch.empty(0)

    def _entry(self, weight: PackedWeight, entry: int, num_entries: int) -> Tensor:
        if self._held == (weight.name, entry):
            return self._values
        self._held = None
        own = weight if weight.entry is None or num_entries == 1 else weight.entry(entry)
        # The reader's memory is the next part's.
        parts = [self._reader.read(spec, 0, nbytes=spec.nbytes).clone().view(spec.shape) for spec in own.parts]
        if self._values.numel() != own.num_params:
            self._values = torch.empty(own.num_params)
        own.dequantise(parts, self._values.view(own.shape))
        self._held = (weight.name, entry)
        return self._values


def _num_entries(weight: PackedWeight) -> int:
    """Entries of a stack that can be unpacked one by one; 1 where it is unpacked whole."""
    return 1 if weight.entry is None else weight.shape[0]
