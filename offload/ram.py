"""How much RAM this process can still take: the machine's free memory, and what its control groups leave it."""

import os
from pathlib import Path


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
