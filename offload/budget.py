"""How much of each tier a run may use, and what there is; sizes and durations as people write and read them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Self

import torch

_UNIT_BYTES = {
    "": 1,
    "B": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", re.ASCII)

_RAM_MARGIN = 0.1
"""Part of the available RAM that a measured budget leaves to the rest of the process and to the system."""

_CUDA_MARGIN = 0.05
"""Part of the free device memory that a measured budget leaves to the allocator's rounding and to libraries."""


def parse_bytes(size: str | int, *, field: str = "size") -> int:
    """Read a size such as ``"2.4GiB"``, ``"900MiB"``, ``"20 GB"``, ``"0"`` or a plain number of bytes.

    Args:
        size: The size; a number without a unit is bytes. GiB is 2**30, GB is 10**9; case does not matter.
        field: What the size is for; named in the error.

    Returns:
        Whole bytes, rounded down.

    Raises:
        ValueError: `size` is negative, has no known unit or is not a number.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        if size < 0:
            raise ValueError(f"{field}: {size} bytes is negative; give 0 or more")
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    unit_bytes = _UNIT_BYTES.get(match[2].upper()) if match else None
    if match is None or unit_bytes is None:
        raise ValueError(
            f'{field}: expected bytes as an int or text such as "900MiB", "2.4GiB", "20GB" or "0", got {size!r}'
        )
    return int(Fraction(match[1]) * unit_bytes)


def format_bytes(nbytes: int) -> str:
    """Write a number of bytes for people: ``"512 B"``, ``"1.21 GiB"``."""
    if abs(nbytes) < 1024:
        return f"{nbytes} B"
    size = nbytes / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if abs(size) < 1023.995:
            return f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def available_ram_bytes(*, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be allocated before the kernel starts to swap or to kill, page cache counted as free.

    The smallest of what the machine has available and of what every control group (v1 or v2) around this process leaves
    below its limit. Where the system says nothing, as on macOS, half of the installed RAM.

    Args:
        proc: Where procfs is mounted.
        cgroups: Where the control groups are mounted.
    """
    machine_bytes = _field_bytes(proc / "meminfo", "MemAvailable:", unit_bytes=1024)
    if machine_bytes is None:
        machine_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min([machine_bytes, *_headrooms(proc / "self" / "cgroup", cgroups)])


def _headrooms(membership: Path, cgroups: Path) -> list[int]:
    """What each control group that holds this process leaves, from its own group up to the root."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    headrooms: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = [cgroups, cgroups / "unified"]
        elif "memory" in controllers.split(","):
            mounts = [cgroups / "memory"]
        else:
            continue
        for mount in mounts:
            folder = mount / path.lstrip("/")
            # In a container the path may be the host's, and this group be mounted as the root.
            for group in (folder, *folder.parents) if folder.is_dir() else (mount,):
                headrooms.append(_headroom_bytes(group))
                if group == mount:
                    break
    return [headroom for headroom in headrooms if headroom >= 0]


def _headroom_bytes(group: Path) -> int:
    """Bytes below the limit of one group, or -1 if it has none. Inactive page cache is given back on demand."""
    for limit_name, usage_name, cache_field in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit = _number(group / limit_name)
        usage = _number(group / usage_name)
        if limit is not None and usage is not None:
            cache = _field_bytes(group / "memory.stat", cache_field, unit_bytes=1) or 0
            return max(0, limit - max(0, usage - cache))
    return -1


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max": no limit


def _field_bytes(file: Path, field: str, *, unit_bytes: int) -> int | None:
    """The number after `field` in a file of lines such as ``MemAvailable:  123 kB``."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.split()
        if words and words[0] == field:
            return int(words[1]) * unit_bytes
    return None


@dataclass(frozen=True, kw_only=True, init=False)
class Budget:
    """Bytes that a run may use of the compute device and of host RAM, and where it may write on disk.

    Sizes are bytes as an int or text such as ``"900MiB"``, ``"2.4GiB"``, ``"0"``. What is not given is measured when it
    is needed (`measured`).

    Args:
        device: Bounds everything that the compute device holds: the ring, resident blocks and whatever else the caller
            puts there.
        host: Bounds stored bytes cached in RAM, and offloaded state. ``"0"`` caches nothing; staging buffers come on
            top.
        disk: A folder for what must be written. It need not exist yet.

    Raises:
        ValueError: A size is negative or not a size, or `disk` is not a folder.
    """

    device: int | str | None
    """As it was given."""
    host: int | str | None
    """As it was given."""
    disk: Path | None
    """Folder for what must be written, with ``~`` expanded."""

    def __init__(
        self,
        *,
        device: int | str | None = None,
        host: int | str | None = None,
        disk: str | os.PathLike[str] | None = None,
    ) -> None:
        for field, size in (("device", device), ("host", host)):
            if size is not None:
                parse_bytes(size, field=f"Budget.{field}")
        # Frozen: fields can be set only past the class's own __setattr__.
        object.__setattr__(self, "device", device)
        object.__setattr__(self, "host", host)
        object.__setattr__(self, "disk", None if disk is None else _folder(disk))

    @property
    def device_bytes(self) -> int | None:
        """Bytes of device memory, or None where they are to be measured."""
        return None if self.device is None else parse_bytes(self.device)

    @property
    def host_bytes(self) -> int | None:
        """Bytes of host RAM, or None where they are to be measured."""
        return None if self.host is None else parse_bytes(self.host)

    def measured(self, device: torch.device | str) -> Self:
        """Fill in what is left open from the memory that is free now, less a margin.

        On a CPU both sizes come out of the same RAM: what is given for one is not counted again for the other, and with
        neither given all of it is the device's, because a cached block is there no closer to disk than a resident one.

        Args:
            device: Where the model computes.

        Returns:
            A budget with both sizes in bytes and the same folder.

        Raises:
            ValueError: Neither a CPU nor a CUDA device.
        """
        chosen = torch.device(device)
        device_bytes, host_bytes = self.device_bytes, self.host_bytes
        if chosen.type not in ("cpu", "cuda"):
            raise ValueError(f"device: expected a CPU or a CUDA device, got {str(chosen)!r}")
        if device_bytes is None or host_bytes is None:
            if chosen.type == "cuda" and device_bytes is None:
                free_bytes, _ = torch.cuda.mem_get_info(chosen)
                # Torch has taken this from the driver and uses it for nothing.
                idle_bytes = torch.cuda.memory_reserved(chosen) - torch.cuda.memory_allocated(chosen)
                device_bytes = int((free_bytes + idle_bytes) * (1 - _CUDA_MARGIN))
            ram_bytes = int(available_ram_bytes() * (1 - _RAM_MARGIN))
            if chosen.type == "cpu":
                if device_bytes is None:
                    device_bytes = max(0, ram_bytes - (host_bytes or 0))
                ram_bytes = max(0, ram_bytes - device_bytes)
            host_bytes = ram_bytes if host_bytes is None else host_bytes
        return type(self)(device=device_bytes, host=host_bytes, disk=self.disk)


def _folder(disk: str | os.PathLike[str]) -> Path:
    if not os.fspath(disk):
        raise ValueError("Budget.disk: expected a folder, got an empty path")
    folder = Path(disk).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Budget.disk: {folder} is a file; give a folder")
    return folder


def format_seconds(seconds: float) -> str:
    """Write a duration: ``"320 ms"``, ``"12.3 s"``, ``"8.4 min"``, ``"3.1 h"``."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
