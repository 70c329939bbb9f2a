"""The library's own reads into and writes out of host memory, which torch does not see, told to the simulator."""

from __future__ import annotations

from functools import wraps
from typing import Any

from tests.fakecuda import simulated_gpu


def watch_host_memory() -> None:
    """Note every read of blocks from disk, and every read and write of scratch space, as an access of the host."""
    from offload import FileIO, Scratch

    FileIO.read = _noted(FileIO.read, writes=True, who="FileIO.read")  # type: ignore[method-assign]
    for name, writes in (("read", True), ("write", False)):
        setattr(Scratch, name, _noted(getattr(Scratch, name), writes=writes, who=f"Scratch.{name}"))


def _noted(moves: Any, *, writes: bool, who: str) -> Any:
    @wraps(moves)
    def noted(self: Any, what: Any, memory: Any, **options: Any) -> Any:
        simulated_gpu.told_of(memory.numel(), memory.data_ptr(), writes=writes, who=who)
        return moves(self, what, memory, **options)

    return noted
