"""How much of each tier a run may use, and what there is; sizes and durations as people write and read them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
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


# The kernel rounds "no limit" of version 1 down to a page multiple of 2^63; no machine has a real limit this large.
_UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True, kw_only=True)
class ControlGroup:
    """A memory control group that this process is in: a limit holds for all groups below it."""

    path: Path
    """Its folder."""
    limit_bytes: int | None
    """Bytes at which the kernel reclaims, then kills; None if it has no limit."""
    usage_bytes: int
    """Charged now, page cache included."""
    reclaimable_bytes: int
    """The part of it that is given back on demand: inactive page cache."""

    @property
    def headroom_bytes(self) -> int | None:
        """Bytes below its limit; None if it has none."""
        used = max(0, self.usage_bytes - self.reclaimable_bytes)
        return None if self.limit_bytes is None else max(0, self.limit_bytes - used)


def control_groups(proc: Path = Path("/proc")) -> tuple[ControlGroup, ...]:
    """The memory control groups of version 1 and 2 around this process, from its own up to the root.

    Args:
        proc: Where procfs is mounted.

    Returns:
        None of them where there are no control groups, as on macOS.
    """
    try:
        memberships = [line.split(":", 2) for line in (proc / "self" / "cgroup").read_text().splitlines()]
        mounts = (proc / "self" / "mountinfo").read_text().splitlines()
    except OSError:
        return ()
    names = {1: "", 2: ""}
    for _, controllers, name in memberships:
        if not controllers or "memory" in controllers.split(","):
            names[1 if controllers else 2] = name
    groups: list[ControlGroup | None] = []
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        root, mount_point = before.split()[3:5]
        kind, _, options = after.split(" ", 2)
        version = 2 if kind == "cgroup2" else 1 if kind == "cgroup" and "memory" in options.split(",") else 0
        if names.get(version):
            own, top = PurePosixPath(names.pop(version)), Path(mount_point)
            # In a container the name may be the host's, of which the mount shows only what is below `root`, or nothing.
            folder = top / (own.relative_to(root) if own.is_relative_to(root) else own.relative_to("/"))
            folders = [folder, *folder.parents] if folder.is_dir() else [top]
            groups += [_read_group(path, version=version) for path in folders if path.is_relative_to(top)]
    return tuple(group for group in groups if group is not None)


def _read_group(folder: Path, *, version: int) -> ControlGroup | None:
    """Read one group's files; None for the root of version 2, which has none."""
    usage, limit, cache = (
        ("memory.current", "memory.max", "inactive_file")
        if version == 2
        else ("memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file")
    )
    usage_bytes, limit_bytes = _number(folder / usage), _number(folder / limit)
    if usage_bytes is None:
        return None
    return ControlGroup(
        path=folder,
        limit_bytes=None if limit_bytes is None or limit_bytes >= _UNLIMITED_BYTES else limit_bytes,
        usage_bytes=usage_bytes,
        reclaimable_bytes=_field_bytes(folder / "memory.stat", cache, unit_bytes=1) or 0,
    )


def available_ram_bytes(*, proc: Path = Path("/proc")) -> int:
    """Bytes that can be allocated before the kernel starts to swap or to kill, page cache counted as free.

    The smallest of what the machine has available and of what every control group around this process leaves below its
    limit. Where the system says nothing, as on macOS, half of the installed RAM.

    Args:
        proc: Where procfs is mounted.
    """
    machine_bytes = _field_bytes(proc / "meminfo", "MemAvailable:", unit_bytes=1024)
    if machine_bytes is None:
        machine_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    headrooms = (group.headroom_bytes for group in control_groups(proc))
    return min([machine_bytes, *(headroom for headroom in headrooms if headroom is not None)])


def installed_ram_bytes(*, proc: Path = Path("/proc")) -> int:
    """Bytes of RAM that this process can have at most, whoever has them now.

    The machine's, or the smallest limit of the control groups around this process.

    Args:
        proc: Where procfs is mounted.
    """
    machine_bytes = _field_bytes(proc / "meminfo", "MemTotal:", unit_bytes=1024)
    if machine_bytes is None:
        machine_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = (group.limit_bytes for group in control_groups(proc))
    return min([machine_bytes, *(limit for limit in limits if limit is not None)])


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


_FEWEST_BYTES = 1024
"""Less is a number whose unit was left out."""


@dataclass(frozen=True, kw_only=True, init=False)
class Budget:
    """Bytes that a run may use of the compute device and of host RAM, and where it may write on disk.

    Sizes are bytes as an int or text such as ``"900MiB"``, ``"2.4GiB"``, ``"0"``. What is not given is measured when it
    is needed (`measured`).

    Args:
        device: Bounds everything that the compute device holds: the ring, resident blocks and whatever else the caller
            puts there.
        host: Bounds stored bytes cached in RAM, offloaded state, and the buffers that transfers to a GPU pass
            through. ``"0"`` keeps nothing but these.
        disk: A folder for what must be written. It need not exist yet.

    Raises:
        ValueError: A size is negative, not a size or of a few bytes, or `disk` is not a folder.
        TypeError: Something else is given; says under which name it belongs here.
    """

    device: int | str | None
    """As it was given."""
    host: int | str | None
    """As it was given."""
    disk: Path | None
    """Folder for what must be written, with ``~`` expanded."""

    def __init__(
        self,
        *given: object,
        device: int | str | None = None,
        host: int | str | None = None,
        disk: str | os.PathLike[str] | None = None,
        **others: object,
    ) -> None:
        if given or others:
            raise TypeError(_what_to_write(*given, **others))
        for field, size in (("device", device), ("host", host)):
            if size is not None and 0 < (nbytes := parse_bytes(size, field=f"Budget.{field}")) < _FEWEST_BYTES:
                raise ValueError(
                    f"Budget.{field}: {size!r} is {nbytes} bytes, in which nothing runs; give the unit, "
                    f'"{nbytes}GiB" for instance, or "0"'
                )
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

    def measured(self, device: torch.device | str, *, num_processes: int = 1) -> Self:
        """Fill in what is left open from the memory that is free now, less a margin.

        On a CPU both sizes come out of the same RAM: what is given for one is not counted again for the other, and with
        neither given all of it is the device's, because a cached block is there no closer to disk than a resident one.

        Args:
            device: Where the model computes.
            num_processes: Processes like this one on this machine, each of which gets as much of the RAM.

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
            ram_bytes = int(available_ram_bytes() * (1 - _RAM_MARGIN)) // num_processes
            if chosen.type == "cpu":
                if device_bytes is None:
                    device_bytes = max(0, ram_bytes - (host_bytes or 0))
                ram_bytes = max(0, ram_bytes - device_bytes)
            host_bytes = ram_bytes if host_bytes is None else host_bytes
        return type(self)(device=device_bytes, host=host_bytes, disk=self.disk)


_OTHER_WORDS = {
    **dict.fromkeys(("gpu", "vram", "cuda", "device_memory", "max_memory", "memory"), "device"),
    **dict.fromkeys(("ram", "cpu", "host_memory", "cpu_memory"), "host"),
    **dict.fromkeys(("disk_folder", "folder", "offload_folder", "nvme", "path"), "disk"),
}
"""What the fields are called elsewhere."""


def _what_to_write(*given: object, **others: object) -> str:
    """What is wrong with arguments that a budget does not have, in a sentence."""
    if given:
        return f"Budget({given[0]!r}): say of what: Budget(device={given[0]!r}), or host= for RAM, disk= for a folder"
    name, value = next(iter(others.items()))
    fields = "device=, host= (RAM) and disk= (a folder)"
    near = _OTHER_WORDS.get(name.lower())
    return f"Budget({name}={value!r}): " + (f"write {near}={value!r}" if near else f"it has {fields}, each optional")


def _folder(disk: str | os.PathLike[str]) -> Path:
    if not isinstance(disk, str | os.PathLike):
        raise TypeError(f"Budget.disk: expected a folder, got {disk!r}")
    if not os.fspath(disk):
        raise ValueError("Budget.disk: expected a folder, got an empty path")
    folder = Path(disk).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Budget.disk: {folder} is a file; give a folder")
    return folder


def format_number(number: float) -> str:
    """Write a number to three digits, never with an exponent: ``"0.125"``, ``"98.7"``, ``"31,100"``."""
    rounded = float(f"{number:.3g}")
    if abs(rounded) >= 100:
        return f"{rounded:,.0f}"
    return f"{rounded:.9f}".rstrip("0").rstrip(".")


def format_seconds(seconds: float) -> str:
    """Write a duration: ``"320 ms"``, ``"12.3 s"``, ``"8.4 min"``, ``"3.1 h"``, ``"5.2 days"``."""
    if seconds < 1:
        return f"{format_number(seconds * 1000)} ms"
    for unit, unit_s, fewest in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < fewest * unit_s:
            return f"{format_number(seconds / unit_s)} {unit}"
    return f"{format_number(seconds / 86400)} days"
