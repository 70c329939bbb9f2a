"""The order in which blocks will be visited, and where in it the consumer is. Pure: no threads, no memory."""

import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence

NEVER = sys.maxsize
"""The next use of a block that is not expected."""


class VisitOrder:
    """Blocks still to come, and how far away each is.

    A visit that is not the expected one is taken for an excursion, and the order stays where it is. When the visit
    after it is the one that follows it in the order, the consumer has jumped and the order goes on from there: blocks
    left out, or a pass begun again.

    Args:
        num_blocks: Blocks are numbered from 0 to this.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._order: tuple[int, ...] = ()
        self._positions: dict[int, list[int]] = {}
        self._here = 0
        self._after_excursion: int | None = None

    def replace(self, order: Sequence[int]) -> None:
        """Expect these visits, in this order, instead of what was expected until now.

        Raises:
            ValueError: A number is not that of a block; what was expected until now stays.
        """
        for block in order:
            if not 0 <= block < self._num_blocks:
                raise ValueError(f"order: expected block numbers from 0 to {self._num_blocks - 1}, got {block}")
        self._order = tuple(order)
        self._positions = {}
        for position, block in enumerate(self._order):
            self._positions.setdefault(block, []).append(position)
        self._here = 0
        self._after_excursion = None

    def visit(self, block: int) -> bool:
        """Note that a block is being visited now. False if it is not the one expected next."""
        if self._expects(self._here, block):
            self._here += 1
            self._after_excursion = None
            return True
        if self._after_excursion is not None and self._expects(self._after_excursion, block):
            self._here = self._after_excursion + 1
            self._after_excursion = None
        else:
            found = self._find(block)
            self._after_excursion = None if found is None else found + 1
        return False

    def next_use(self, block: int) -> int:
        """Visits until the block is visited: 0 for the very next one, `NEVER` if it is not expected."""
        positions = self._positions.get(block, [])
        nearest = bisect_left(positions, self._here)
        return positions[nearest] - self._here if nearest < len(positions) else NEVER

    def upcoming(self) -> Iterator[int]:
        """Blocks to be visited, nearest first."""
        for position in range(self._here, len(self._order)):
            yield self._order[position]

    def _expects(self, position: int, block: int) -> bool:
        return position < len(self._order) and self._order[position] == block

    def _find(self, block: int) -> int | None:
        """Nearest position of a block from here on, else its first one."""
        positions = self._positions.get(block)
        if positions is None:
            return None
        nearest = bisect_left(positions, self._here)
        return positions[nearest] if nearest < len(positions) else positions[0]
