"""Where the runtime gets a block's weights from: frozen ones from a checkpoint, or masters that change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from offload import Counters


class BlockSource(Protocol):
    """Brings blocks to the compute device: `offload.Scheduler`, or the master weights of full tuning."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""

    @property
    def counters(self) -> Counters:
        """What it has done so far."""

    def memory(self) -> dict[str, int]:
        """Bytes allocated now, by role."""

    def expect(self, order: Iterable[int]) -> None:
        """Fetch ahead for these visits, the nearest first."""

    def resident(self, block: int) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Have a block's tensors on the compute device for the time of a ``with``."""

    def reset(self) -> None:
        """End all visits."""

    def close(self) -> None:
        """Stop the transfers and free all buffers. May be called twice."""


class BlockUnpacker(Protocol):
    """Makes a block's parameters from what its source brought."""

    @property
    def workspace_bytes(self) -> int:
        """Bytes of its workspace."""

    def unpack(self, index: int, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters by model name; valid while `stored` is and until another block is unpacked."""

    def forget(self) -> None:
        """Take the workspace's contents for stale."""

    def close(self) -> None:
        """Release the workspace."""


__all__ = ["BlockSource", "BlockUnpacker"]
