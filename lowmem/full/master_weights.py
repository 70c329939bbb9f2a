"""What the runtime visits blocks through when their weights are masters that change: scheduler and unpacker in one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from lowmem.full.engine import FullTuning
from offload import Counters


class MasterWeights:
    """Lends blocks their newest weights, under the names that `Scheduler` and `Unpacker` have for it."""

    workspace_bytes = 0
    """Nothing is unpacked: masters are in the compute dtype."""

    def __init__(self, full: FullTuning) -> None:
        """Visit through an engine.

        Args:
            full: Owns the weights; closed with this.
        """
        self._full = full
        self.scheduler = self.unpacker = self

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return self._full.num_blocks

    @property
    def counters(self) -> Counters:
        """What the tier has read so far."""
        return self._full.tier.counters

    def memory(self) -> dict[str, int]:
        """Bytes of memory taken, by role."""
        return self._full.tier.memory()

    def expect(self, order: Iterable[int]) -> None:
        """Have blocks ready for visits in this order."""
        self._full.tier.expect(tuple(order))

    @contextmanager
    def resident(self, block: int) -> Iterator[Mapping[str, Tensor]]:
        """A block's parameters by model name for the time of a visit."""
        with self._full.lend(block) as values:
            yield values

    def unpack(self, index: int, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters, as `resident` gave them."""
        return dict(stored)

    def forget(self) -> None:
        """Do nothing: there is no workspace."""

    def reset(self) -> None:
        """End all visits."""
        self._full.tier.reset()

    def close(self) -> None:
        """Complete the updates under way and give all memory back. May be called twice."""
        self._full.tier.close()


__all__ = ["MasterWeights"]
