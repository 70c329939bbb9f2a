"""What one file of a packed folder is written from: tensors in the order in which they lie, a piece at a time.

A weight is quantised as it is read: a stored tensor in pieces, a stack that is stored expert by expert one expert after
the other. Its codes go to the file at once; absmaxes, a hundredth of it, wait until their place comes. Only what a
conversion makes in one go (transposed weights, tensors that are cut) is held whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from hashlib import sha256
from typing import Protocol

import torch
from torch import Tensor

from lowmem.experts.stacks import MatrixRows, taken_apart
from lowmem.models.mapping import Recipe
from lowmem.packing.selection import OutputUnit, PackedEntry
from lowmem.quantization.manifest import raw_bytes
from lowmem.quantization.packing import Observe, Packer
from offload import TensorReader, TensorSpec

_TILE_BYTES = 16 << 20


class Contents(Protocol):
    """Values of the tensors that a packed folder is made of."""

    def tiles(self, spec: TensorSpec) -> Iterator[Tensor]:
        """A tensor's values in order, in flat pieces of its dtype on the CPU; each is valid until the next."""

    def close(self) -> None:
        """Close the files."""


class StoredContents(TensorReader):
    """Tensors as a checkpoint's files hold them."""

    def tiles(self, spec: TensorSpec) -> Iterator[Tensor]:
        """See `Contents`."""
        for start in range(0, spec.nbytes, _TILE_BYTES):
            yield self.read(spec, start, nbytes=min(_TILE_BYTES, spec.nbytes - start))


class UnitWriter:
    """Makes the tensors of one file.

    Args:
        unit: The file.
        packer: Writes the format.
        contents: Values; stays the caller's.
        device: Where values are quantised.
        observe: Sees what is quantised, and what of it is stored.
    """

    def __init__(
        self,
        unit: OutputUnit,
        packer: Packer,
        *,
        contents: Contents,
        device: torch.device,
        observe: Observe | None = None,
    ) -> None:
        self._unit, self._packer, self._contents, self._device = unit, packer, contents, device
        self._observe = observe
        self._entries: dict[str, PackedEntry] = {
            output.name: entry for entry in unit.packed for output in packer.outputs(entry.name, entry.shape)
        }
        self._copied = {spec.name: spec for spec in unit.copied}
        self._converted = {target: recipe for recipe, target in unit.converted}
        self._made: dict[str, Tensor] = {}
        self._held: tuple[int, Mapping[str, Tensor]] | None = None
        self.sums: dict[str, str] = {}
        """Checksums of the tensors that are done, by name."""

    def parts(self) -> Iterator[Tensor]:
        """All values of the file in order, in pieces on the CPU; each is valid until the next."""
        for output in self._unit.outputs:
            digest = sha256()
            for part in self._parts_of(output.name):
                digest.update(raw_bytes(part))
                yield part
            self.sums[output.name] = digest.hexdigest()

    def _parts_of(self, name: str) -> Iterator[Tensor]:
        if name in self._copied:
            yield from self._contents.tiles(self._copied[name])
        elif name in self._converted:
            yield self._run(self._converted[name])[name].contiguous()
        elif name in self._made:
            yield self._made.pop(name)
        else:
            yield from self._pack(self._entries[name], first=name)

    def _pack(self, entry: PackedEntry, *, first: str) -> Iterator[Tensor]:
        """Quantise a weight; the stored tensor that comes first in the file is returned, the others are kept."""
        later: dict[str, list[Tensor]] = defaultdict(list)
        values = (piece.to(self._device) for piece in self._values(entry))
        packed = self._packer.pack(entry.name, values, entry.shape, dtype=entry.dtype, observe=self._observe)
        for name, part in packed:
            if name == first:
                yield part.cpu()
            else:
                later[name].append(part.cpu())
        self._made |= {
            name: parts[0] if len(parts) == 1 else torch.cat([part.view(-1) for part in parts])
            for name, parts in later.items()
        }

    def _values(self, entry: PackedEntry) -> Iterator[Tensor]:
        recipe = entry.recipe
        apart = None if recipe.plain is not None else taken_apart(recipe, entry.shape)
        if recipe.plain is not None and not entry.is_transposed:
            yield from self._contents.tiles(recipe.plain)
        elif apart is not None and all(rows.alone == rows.wholes for expert in apart for rows in expert):
            # Stored tensors are one expert's each.
            yield from self._experts(apart, entry.shape[1:])
        else:
            values = self._run(recipe)[entry.target]
            yield values.mT.contiguous() if entry.is_transposed else values

    def _experts(self, apart: Sequence[Sequence[MatrixRows]], shape: Sequence[int]) -> Iterator[Tensor]:
        # Some of an expert's tensors may be merged with an adapter, and come unrounded.
        dtype = reduce(torch.promote_types, (one.wholes[0].dtype for rows in apart for one in rows))
        matrix = torch.empty(tuple(shape), dtype=dtype)
        for rows in apart:
            for one in rows:
                one.write(self._read(one.wholes), matrix)
            yield matrix

    def _run(self, recipe: Recipe) -> Mapping[str, Tensor]:
        """Parameters of a recipe in the stored dtype; the last recipe's are kept."""
        if self._held is None or self._held[0] != id(recipe):
            self._held = None
            self._held = id(recipe), recipe.run(self._read(recipe.sources))
        return self._held[1]

    def _read(self, specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
        """Whole tensors, in memory of their own."""
        made = {}
        for spec in specs:
            values = made[spec.name] = torch.empty(spec.shape, dtype=spec.dtype)
            end = 0
            for tile in self._contents.tiles(spec):
                values.view(-1)[end : end + tile.numel()].copy_(tile.reshape(-1))
                end += tile.numel()
            assert end == values.numel(), f"{spec.name}: {end} of {values.numel()} values"
        return made
