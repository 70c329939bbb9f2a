"""Values of what a merge writes: rows of the base with the adapter's updates on them, a tile at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowmem.adapters.merge_plan import MergedTensor, MergePlan, num_rows
from lowmem.adapters.updates import Update, apply_all
from lowmem.quantization.values import ValueReader

# Values computed at a time, in bytes of fp32. Small enough that the allocator gives the same memory again: tiles of
# 8 MiB let the heap grow by 55 to 115 MiB from run to run, these by 15 to 30 (tests/lowmem/test_merge.py, full disk).
_TILE_BYTES = 2 << 20


# But no fewer rows: MKL sums a product of 9 rows on two threads in another order than PEFT's of all rows, one of 18 in
# the same (fp32 matrices of 28672 columns).
_TILE_ROWS = 32


class Counts(Protocol):
    """Counts what a merge changes."""

    counts_exact: bool
    """Whether values that are handed on as they were computed are of interest too."""

    def add(self, old: Tensor, new: Tensor, stored: Tensor) -> None:
        """Take values before, after, and after as they are handed on; may work in the memory of the first two."""


@dataclass(kw_only=True)
class Rounding:
    """How much of the changes is lost because the weights are stored in fewer bits than they are computed in."""

    wanted: float = 0.0
    """Sum of squares of the changes."""
    kept: float = 0.0
    """Scalar product of the changes and what is stored of them."""
    num_changed: int = 0
    """Values that change."""
    num_unmoved: int = 0
    """Those of them that are stored as before."""
    dtype: torch.dtype | None = None
    """What was rounded to."""
    counts_exact: bool = False
    """See `Counts`."""

    def add(self, old: Tensor, new: Tensor, stored: Tensor) -> None:
        """Count values: before, after, and after as they are stored. Works in the memory of the first two."""
        old_stored = old.to(stored.dtype)
        change = new.sub_(old).reshape(-1)
        moved = old.copy_(stored).sub_(old_stored).reshape(-1)
        self.wanted += float(change @ change)
        self.kept += float(change @ moved)
        self.num_changed += int(change.count_nonzero())
        self.num_unmoved += int((change != 0).logical_and_(moved == 0).sum())
        self.dtype = stored.dtype

    @property
    def lost(self) -> float:
        """Part of the change that is lost, from 0 to 1."""
        return min(1.0, max(0.0, 1 - self.kept / self.wanted)) if self.wanted else 0.0

    def told(self) -> str:
        """The loss in a sentence."""
        unmoved = self.num_unmoved / max(1, self.num_changed)
        return (
            f"rounding to {str(self.dtype).removeprefix('torch.')} lost {self.lost:.0%} of what the adapter changes "
            f"({unmoved:.0%} of the changed values are stored as before); "
            'dtype="float32" (--dtype float32) keeps all of it'
        )


class MergedValues:
    """Values of the tensors that a merge writes, a tile at a time."""

    def __init__(self, plan: MergePlan, rounding: Counts) -> None:
        """Open nothing yet.

        Args:
            plan: What changes how.
            rounding: Counts what changes.
        """
        self._reader = ValueReader(plan.packed)
        self._sources, self._rounding = plan.sources, rounding

    def values(self, tensor: MergedTensor) -> Iterator[Tensor]:
        """A tensor's values in its stored dtype, part by part; each is valid until the next."""
        spec, dtype = tensor.source, tensor.output.dtype
        if tensor.whole_layer is not None:
            layer, attribute = tensor.whole_layer
            merged = layer.merged(attribute, self._whole)
            yield self._rounded(merged, dtype, old=self._whole(f"{layer.prefix}.{attribute}"))
        elif not tensor.segments:
            step = _TILE_BYTES - _TILE_BYTES % spec.dtype.itemsize
            for start in range(0, spec.nbytes, step):
                yield self._reader.read(spec, start, nbytes=min(step, spec.nbytes - start)).to(dtype)
        else:
            for segment in tensor.segments:
                shift = segment.target_start - segment.start
                stop = segment.start + segment.num_rows
                for number, update in enumerate(segment.updates):
                    if update.sees_all_rows:
                        update.measure(self._updated(tensor, segment.updates[:number]))
                for start, tile in self._tiles(tensor, segment.start, stop):
                    old = tile.clone() if segment.updates and self._counts(tile.dtype, dtype) else None
                    yield self._rounded(apply_all(segment.updates, tile, start + shift), dtype, old=old)

    def _rounded(self, new: Tensor, dtype: torch.dtype, *, old: Tensor | None) -> Tensor:
        stored = new.to(dtype)
        if old is not None and self._counts(new.dtype, dtype):
            # Works in the memory of what it is given.
            self._rounding.add(old, new.clone() if stored is new else new, stored)
        return stored

    def _counts(self, computed: torch.dtype, stored: torch.dtype) -> bool:
        return stored.itemsize < computed.itemsize or self._rounding.counts_exact

    def _updated(self, tensor: MergedTensor, updates: Iterable[Update]) -> Iterator[tuple[int, Tensor]]:
        for start, tile in self._tiles(tensor, 0, num_rows(tensor.output.shape)):
            yield start, apply_all(updates, tile, start)

    def _tiles(self, tensor: MergedTensor, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Rows of a tensor before the merge, in the dtype to compute in, in new memory; zeros for one of a new size."""
        spec, shape = tensor.source, tensor.output.shape
        width = torch.Size(shape).numel() // max(1, num_rows(shape))
        compute = _compute_dtype(spec.dtype)
        step = max(_TILE_ROWS, _TILE_BYTES // max(1, width * compute.itemsize))
        row_bytes = width * spec.dtype.itemsize
        for first in range(start, stop, step):
            count = min(step, stop - first)
            if shape != spec.shape:
                yield first, torch.zeros(count, width, dtype=compute)
                continue
            tile = self._reader.read(spec, first * row_bytes, nbytes=count * row_bytes)
            yield first, tile.to(compute, copy=True).view(count, -1)

    def _whole(self, name: str) -> Tensor:
        spec = self._sources[name]
        values = self._reader.read(spec, 0, nbytes=spec.nbytes)
        return values.to(_compute_dtype(spec.dtype), copy=True).view(spec.shape)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


def _compute_dtype(stored: torch.dtype) -> torch.dtype:
    return torch.float64 if stored == torch.float64 else torch.float32
