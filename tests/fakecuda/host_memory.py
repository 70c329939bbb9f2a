"""The library's own reads into and writes out of host memory, which torch does not see, told to the simulator."""

from __future__ import annotations

from functools import wraps
from typing import Any

from tests.fakecuda import simulated_gpu


def watch_host_memory() -> None:
    """Note every read of blocks from disk, and every read and write of scratch space, as an access of the host."""
    from offload.files.file_io import FileReader
    from offload.files.scratch import Scratch

    read = FileReader.read

    @wraps(read)
    def noted_read(self: FileReader, layout: Any, into: Any) -> Any:
        simulated_gpu.told_of(into.numel(), into.data_ptr(), writes=True, who="FileReader.read")
        return read(self, layout, into)

    FileReader.read = noted_read  # type: ignore[method-assign]
    for name, writes in (("read", True), ("write", False)):
        setattr(Scratch, name, _noted(getattr(Scratch, name), writes=writes, who=f"Scratch.{name}"))


def _noted(moves: Any, *, writes: bool, who: str) -> Any:
    @wraps(moves)
    def noted(self: Any, slot: Any, memory: Any, **options: Any) -> Any:
        simulated_gpu.told_of(memory.numel(), memory.data_ptr(), writes=writes, who=who)
        return moves(self, slot, memory, **options)

    return noted
