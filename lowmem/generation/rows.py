"""Which rows of a generated batch a block is computing now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class ActiveRows:
    """Tells modules inside a block which rows of the batch their input's rows are.

    Finished sequences are left out and a prompt may pass in parts, so row 0 of what a module gets need not be row 0 of
    the batch. Modules that treat rows differently (one adapter per row) look here.
    """

    def __init__(self) -> None:
        self.index: Tensor | None = None
        """Numbers of the rows in the batch, shape (rows,), int64; None for all of them in order."""

    @contextmanager
    def set(self, index: Tensor | None) -> Iterator[None]:
        """Announce rows for the time of a `with`."""
        before, self.index = self.index, index
        try:
            yield
        finally:
            self.index = before


__all__ = ["ActiveRows"]
