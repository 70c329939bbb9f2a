"""Memory as the operating system and the CUDA allocator account for it: now, peaks, and limits.

A reading takes about 0.1 ms and changes nothing. The peak is the kernel's own high-water mark (`VmHWM`): exact, kept
over the whole life of the process, one mark for everybody who asks. Setting it back is a separate, explicit call.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

PROC_SELF = Path("/proc/self")


# The kernel rounds "no limit" of cgroup v1 down to a page multiple of 2^63; no machine has a real limit this large.
UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True, kw_only=True)
class ProcessMemory:
    """This process's memory by the kernel's accounting. `None`: this system does not say."""

    rss_bytes: int | None
    """Resident now: anonymous, file-backed and shared pages together."""
    anonymous_bytes: int | None
    """The part of `rss_bytes` that cannot be dropped and read again: what counts against a limit for good."""
    peak_bytes: int
    """Largest `rss_bytes` since the process started, or since `reset_process_peak()`."""


@dataclass(frozen=True, kw_only=True)
class CgroupMemory:
    """The control group whose memory limit this process meets first."""

    path: Path
    """Folder of the group under /sys/fs/cgroup."""
    limit_bytes: int | None
    """Bytes at which the kernel reclaims, then kills; `None` if no group on the way to the root has a limit."""
    usage_bytes: int
    """Charged now, page cache included."""
    peak_bytes: int | None
    """Largest `usage_bytes` since the group was made or reset; `None` where the kernel does not record it."""


@dataclass(frozen=True, kw_only=True)
class CudaMemory:
    """What torch's CUDA allocator holds on one device."""

    allocated_bytes: int
    """In tensors now."""
    peak_allocated_bytes: int
    """Largest `allocated_bytes` since the start or `torch.cuda.reset_peak_memory_stats`."""
    reserved_bytes: int
    """Taken from the driver now: tensors, cached blocks and fragmentation."""
    peak_reserved_bytes: int
    """Largest `reserved_bytes` since the start or the reset: what the device had to have."""


def process_memory(proc: Path = PROC_SELF) -> ProcessMemory:
    """Read this process's resident memory and its peak.

    Args:
        proc: The process's folder under /proc.
    """
    try:
        status = (proc / "status").read_text()
    except OSError:  # not Linux: getrusage knows the peak only, in bytes on macOS and in KiB elsewhere
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return ProcessMemory(rss_bytes=None, anonymous_bytes=None, peak_bytes=peak)
    sizes = {key: int(value.split()[0]) * 1024 for key, value in _fields(status) if value.endswith("kB")}
    return ProcessMemory(
        rss_bytes=sizes["VmRSS"],
        anonymous_bytes=sizes.get("RssAnon"),
        # The kernel updates the mark lazily, when memory is given back: the current size may already be above it.
        peak_bytes=max(sizes["VmHWM"], sizes["VmRSS"]),
    )


def _fields(status: str) -> list[tuple[str, str]]:
    """Split lines "VmRSS:   1234 kB" of /proc/self/status into (name, value)."""
    pairs = (line.partition(":") for line in status.splitlines())
    return [(key, value.strip()) for key, _, value in pairs]


def reset_process_peak(proc: Path = PROC_SELF) -> bool:
    """Set the kernel's high-water mark of this process down to its present size.

    The mark is shared: afterwards `ru_maxrss`, `/usr/bin/time` and a parent's `getrusage` miss every earlier peak. A
    library must not do that behind a program's back; a benchmark that measures one phase may.

    Returns:
        Whether the kernel did it; it needs write access to /proc/self/clear_refs.
    """
    try:
        (proc / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def cgroup_memory(proc: Path = PROC_SELF) -> CgroupMemory | None:
    """Find the memory control group (v1 or v2) that limits this process, with its usage.

    A limit holds for all groups below it, so the smallest one between the process's group and the root counts.

    Args:
        proc: The process's folder under /proc, of which `cgroup` and `mountinfo` are read.

    Returns:
        `None` where there is no memory control group, as on macOS.
    """
    for is_v2 in (False, True):  # where both are mounted (hybrid), memory is v1's if v1 has a memory hierarchy
        folder, root = _find_group(proc, is_v2=is_v2)
        if folder is None:
            continue
        chain = [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]
        groups = [group for group in (_read_group(path, is_v2=is_v2) for path in chain) if group is not None]
        if groups:
            return min(groups, key=lambda group: UNLIMITED_BYTES if group.limit_bytes is None else group.limit_bytes)
    return None


def _find_group(proc: Path, *, is_v2: bool) -> tuple[Path | None, Path]:
    """Return the process's group in the mounted hierarchy, and the folder at which that hierarchy is mounted."""
    try:
        memberships = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = (proc / "mountinfo").read_text().splitlines()
    except OSError:
        return None, Path()
    names = [path for _, controllers, path in memberships if (not controllers) == is_v2]
    if not is_v2:
        names = [path for _, controllers, path in memberships if "memory" in controllers.split(",")]
    for mount in mounts if names else ():
        before, _, after = mount.partition(" - ")
        root, mount_point = before.split()[3:5]
        kind, _, options = after.split(" ", 2)
        if (kind == "cgroup2") if is_v2 else (kind == "cgroup" and "memory" in options.split(",")):
            name = PurePosixPath(names[0])
            # In a container the name may be the host's, of which the mount shows only the part below `root`.
            below = name.relative_to(root) if name.is_relative_to(root) else name.relative_to("/")
            folder = Path(mount_point) / below
            return folder if folder.is_dir() else Path(mount_point), Path(mount_point)
    return None, Path()


def _read_group(folder: Path, *, is_v2: bool) -> CgroupMemory | None:
    """Read one group's files, or return `None` for the root of v2, which has none."""
    usage, limit, peak = (
        ("memory.current", "memory.max", "memory.peak")
        if is_v2
        else ("memory.usage_in_bytes", "memory.limit_in_bytes", "memory.max_usage_in_bytes")
    )
    usage_bytes = _read_bytes(folder / usage)
    if usage_bytes is None:
        return None
    limit_bytes = _read_bytes(folder / limit)
    return CgroupMemory(
        path=folder,
        limit_bytes=None if limit_bytes is None or limit_bytes >= UNLIMITED_BYTES else limit_bytes,
        usage_bytes=usage_bytes,
        peak_bytes=_read_bytes(folder / peak),
    )


def _read_bytes(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return None if text == "max" else int(text)


def cuda_memory(device: torch.device) -> CudaMemory:
    """Read the CUDA allocator's counters of one device; no synchronisation, no context is made.

    Args:
        device: A CUDA device that this process already uses.
    """
    return CudaMemory(
        allocated_bytes=torch.cuda.memory_allocated(device),
        peak_allocated_bytes=torch.cuda.max_memory_allocated(device),
        reserved_bytes=torch.cuda.memory_reserved(device),
        peak_reserved_bytes=torch.cuda.max_memory_reserved(device),
    )
