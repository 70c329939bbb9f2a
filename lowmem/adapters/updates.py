"""What a merge does to the rows of one parameter, a tile at a time, in fp32 (fp64 for fp64 weights)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import final

import torch
from torch import Tensor


class Update(ABC):
    """Changes rows of a parameter, which is seen as a matrix: all dimensions but the last are its rows.

    A parameter of one dimension is a column.
    """

    @abstractmethod
    def apply(self, tile: Tensor, start: int) -> Tensor:
        """Change some rows.

        Args:
            tile: Consecutive rows of the parameter, shape (n, columns); may be changed in place.
            start: Number of the first of them.

        Returns:
            Their new values, same shape and dtype.
        """

    def measure(self, tiles: Iterable[tuple[int, Tensor]]) -> None:  # noqa: B027 (most updates need no second pass)
        """Look at all rows before the first `apply`, where `sees_all_rows`: pairs of first row and tile."""

    @property
    def sees_all_rows(self) -> bool:
        """Whether `measure` must be called first."""
        return False

    def same_as(self, other: Update) -> bool:
        """Whether the other update makes the same values out of the same parameter: it is of the same numbers."""
        return type(self) is type(other) and all(_equal(one, vars(other)[name]) for name, one in vars(self).items())


def _equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and one == other


@final
class Replacement(Update):
    """Puts other values in the place of all rows: a module that was trained whole, a bias."""

    def __init__(self, values: Tensor) -> None:
        self._values = as_matrix(values)

    def apply(self, tile: Tensor, start: int) -> Tensor:
        # Into the tile's memory: what comes next may work in place.
        return tile.copy_(self._values[start : start + tile.shape[0]])


@final
class RowReplacement(Update):
    """Puts other values in the place of some rows: trained tokens.

    Args:
        rows: Their numbers, shape (n,).
        values: Their values, shape (n, columns).
    """

    def __init__(self, rows: Tensor, values: Tensor) -> None:
        self._rows, self._values = rows, values

    def apply(self, tile: Tensor, start: int) -> Tensor:
        inside = (self._rows >= start) & (self._rows < start + tile.shape[0])
        return tile.index_copy(0, self._rows[inside] - start, self._values[inside].to(tile.dtype))


@final
class LowRank(Update):
    """Adds s L R to each of E stacked matrices, and scales rows or columns to DoRA's magnitude.

    Args:
        left: L, shape (E, rows, r).
        right: R, shape (E, r, columns).
        scaling: s.
        row_magnitude: Wanted norm of each row, shape (rows,); E is 1.
        column_magnitude: Wanted norm of each column, shape (columns,); E is 1.
    """

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        *,
        scaling: float,
        row_magnitude: Tensor | None = None,
        column_magnitude: Tensor | None = None,
    ) -> None:
        self._left, self._right, self._scaling = left, right, scaling
        self._row_magnitude, self._column_magnitude = row_magnitude, column_magnitude
        self._column_norms: Tensor | None = None

    @property
    def factors(self) -> tuple[Tensor, Tensor, float]:
        """L (E, rows, r), R (E, r, columns) and s."""
        return self._left, self._right, self._scaling

    @property
    def sees_all_rows(self) -> bool:
        """Norms of columns need every row."""
        return self._column_magnitude is not None

    def measure(self, tiles: Iterable[tuple[int, Tensor]]) -> None:
        """Sum up the norms of the columns."""
        squares = torch.zeros(self._right.shape[-1], dtype=torch.float64)
        for start, tile in tiles:
            squares += self._add(tile, start).double().square_().sum(dim=0)
        self._column_norms = squares.sqrt()

    def apply(self, tile: Tensor, start: int) -> Tensor:
        new = self._add(tile, start)
        if self._row_magnitude is not None:
            magnitude = self._row_magnitude[start : start + tile.shape[0]].to(tile.dtype)
            new.mul_((magnitude / torch.linalg.norm(new, dim=1)).unsqueeze(1))
        if self._column_magnitude is not None:
            assert self._column_norms is not None, "measure() comes before apply()"
            new.mul_(self._column_magnitude.to(tile.dtype) / self._column_norms.to(tile.dtype))
        return new

    def _add(self, tile: Tensor, start: int) -> Tensor:
        # The product first and then its scaling, added to the weight: PEFT's order, so PEFT's bits.
        for matrix, rows, part in self._parts(start, tile.shape[0]):
            left = self._left[matrix, rows].to(tile.dtype)
            delta = (left @ self._right[matrix].to(tile.dtype)).mul_(self._scaling)
            tile[part] += delta
        return tile

    def _parts(self, start: int, num_rows: int) -> Iterator[tuple[int, slice, slice]]:
        """Cut consecutive rows of the stack at the borders of its matrices."""
        height, done = self._left.shape[1], 0
        while done < num_rows:
            matrix, first = divmod(start + done, height)
            count = min(height - first, num_rows - done)
            yield matrix, slice(first, first + count), slice(done, done + count)
            done += count


def as_matrix(values: Tensor) -> Tensor:
    """A parameter as a matrix: all dimensions but the last are rows, one dimension is a column."""
    return values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values.reshape(-1, 1)


def apply_all(updates: Iterable[Update], tile: Tensor, start: int) -> Tensor:
    """Apply updates one after the other."""
    for update in updates:
        tile = update.apply(tile, start)
    return tile
