"""The library's own reads into and writes out of host memory, which torch does not see, told to the simulator."""

from __future__ import annotations

from functools import wraps
from typing import Any

from tests.fakecuda import simulated_gpu


def watch_host_memory() -> None:
    """Note reads of blocks from disk, reads and writes of scratch space, and what full tuning does, as the host's."""
    from lowmem.full.gpu_tier import GpuMemoryTier, _Halves
    from lowmem.full.tier import Contribution

    add_to = Contribution.add_to

    def noted_adding(self: Contribution, kept: Any) -> None:
        if self.value.device.type == "cpu":
            simulated_gpu.told_of(self.value.nbytes, self.value.data_ptr(), writes=False, who="Contribution.add_to")
        add_to(self, kept)

    fill = _Halves.fill

    def noted_filling(self: _Halves, into: Any, master: Any) -> None:
        simulated_gpu.told_of(master.nbytes, master.data_ptr(), writes=False, who="reading a master")
        fill(self, into, master)

    _Halves.fill = noted_filling  # type: ignore[method-assign]
    Contribution.add_to = noted_adding  # type: ignore[method-assign]
    GpuMemoryTier._lift = _noted(GpuMemoryTier._lift, writes=True, who="GpuMemoryTier._lift")  # type: ignore[method-assign]
    watch_reads_and_writes()


def watch_reads_and_writes() -> None:
    """What of that the package `offload` does."""
    from offload import FileIO, Scratch, SharedReader

    FileIO.read = _noted(FileIO.read, writes=True, who="FileIO.read")  # type: ignore[method-assign]
    # Out of memory of all ranks of a machine, into a buffer of this one.
    SharedReader.read = _noted(SharedReader.read, writes=True, who="SharedReader.read")  # type: ignore[method-assign]
    for name, writes in (("read", True), ("write", False)):
        setattr(Scratch, name, _noted(getattr(Scratch, name), writes=writes, who=f"Scratch.{name}"))


def _noted(moves: Any, *, writes: bool, who: str) -> Any:
    @wraps(moves)
    def noted(self: Any, what: Any, memory: Any, **options: Any) -> Any:
        simulated_gpu.told_of(memory.numel(), memory.data_ptr(), writes=writes, who=who)
        return moves(self, what, memory, **options)

    return noted
