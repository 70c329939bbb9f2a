"""The process's own memory as the kernel counts it."""

import ctypes
import gc
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

_RESET_PEAK = "5"


class PeakMeter:
    """How much the resident set grows inside the `with`, over what it was before; Linux only.

    Memory that was freed before goes back to the system first: otherwise what is measured would hide in it.
    """

    def __init__(self) -> None:
        self.idle_bytes = 0
        self.growth_bytes = 0

    def __enter__(self) -> Self:
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        self.idle_bytes = _status_bytes("VmRSS")
        return self

    def lap(self) -> int:
        """How much it grew at most since it was entered, or since the lap before; the growth of all laps is kept."""
        grown_bytes = _status_bytes("VmHWM") - self.idle_bytes
        self.growth_bytes = max(self.growth_bytes, grown_bytes)
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        return grown_bytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.growth_bytes = max(self.growth_bytes, _status_bytes("VmHWM") - self.idle_bytes)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {field}")
