"""A fixed set of equal buffers that blocks pass through, and which of them the next block may take."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.device import Copy
from offload.visits import NEVER


@dataclass(eq=False, kw_only=True)
class Slot:
    """Memory that holds one block's stored bytes or is being filled with them. The fetcher's lock guards its fields."""

    tensor: Tensor
    """The memory, uint8."""
    block: int | None = None
    """Whose bytes these are, or will be."""
    ready: bool = False
    """Whether the bytes are there or, where `copy` is set, will be when that is done."""
    holds: int = 0
    """Visits, or copies out of it, that are using it. It is not overwritten before they end."""
    last_use: int = 0
    """Number of the visit that used it last."""
    mark: torch.cuda.Event | None = None
    """The point on the compute stream after which it may be overwritten, where the device has one."""
    copy: Copy | None = None
    """The copy that fills it, where the device has memory of its own: compute has to wait for it."""

    @property
    def busy(self) -> bool:
        """Whether somebody is reading or writing it, so that it cannot be given to another block."""
        return self.holds > 0 or (self.block is not None and not self.ready)

    def clear(self) -> None:
        """Forget whose bytes these are."""
        self.block = None
        self.ready = False
        self.copy = None


class Ring:
    """Slots of one size and their eviction.

    Args:
        slots: The slots, all free.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._slots = tuple(slots)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def find(self, block: int) -> Slot | None:
        """The slot that holds a block or is being filled with it."""
        return next((slot for slot in self._slots if slot.block == block), None)

    def take(self, block: int, *, next_use: Callable[[int], int], leave: int = 0) -> Slot | None:
        """Give a slot to a block: a free one, else that of the block whose next use is farthest.

        Belady's rule (A study of replacement algorithms for a virtual-storage computer, 1966), with which the fewest
        blocks are fetched when the order is known. Among blocks that are not expected at all the one used longest ago
        goes.

        Args:
            block: Who wants it.
            next_use: Visits until a block is used.
            leave: Slots that must remain to be had, for blocks that are needed sooner and cannot take theirs yet.

        Returns:
            The slot, now the block's and not ready, or None: the others are busy or hold blocks that are needed sooner.
        """
        wanted = next_use(block)
        uses = [
            (NEVER if slot.block is None else next_use(slot.block), slot.block is None, -slot.last_use, slot)
            for slot in self._slots
            if not slot.busy
        ]
        can_be_had = [use for use in uses if use[0] > wanted]
        if len(can_be_had) <= leave:
            return None
        chosen = max(can_be_had, key=lambda use: use[:3])[3]
        chosen.clear()
        chosen.block = block
        return chosen
