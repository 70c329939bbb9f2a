"""What the kernel says of this process: bytes that storage brought it, and whose the pages are that it maps."""

from __future__ import annotations

import mmap
import os
from pathlib import Path


def storage_bytes() -> int:
    """Bytes that storage has brought this process, all threads; what the page cache had is not among them."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def why_uncounted(folder: Path) -> str:
    """Why reads of this folder's files are not counted, if so: the file system has no O_DIRECT, or no storage."""
    file = folder / "counted"
    file.write_bytes(os.urandom(1 << 16))
    fd = os.open(file, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    try:
        before, fd = storage_bytes(), os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        return f"reads of {folder} cannot be counted: {error}"
    with mmap.mmap(-1, 1 << 16) as memory:
        num_read = os.preadv(fd, [memory], 0)
    os.close(fd)
    file.unlink()
    counted = storage_bytes() - before
    return "" if counted >= num_read else f"the kernel counts {counted} bytes of {num_read} that were read in {folder}"


def mapped_bytes(name: str) -> dict[str, int]:
    """Memory of the mappings whose file's name has some text in it.

    Returns:
        "rss": bytes of their pages; "pss": the same, of which each page is divided by how often it is mapped, so that
        the sum over all processes counts it once; "num": mappings.
    """
    found = {"rss": 0, "pss": 0, "num": 0}
    is_meant = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):  # addresses, and what is mapped
            is_meant = name in line
            found["num"] += is_meant
        elif is_meant and first in ("Rss:", "Pss:"):
            found[first[:-1].lower()] += int(line.split()[1]) * 1024
    return found


def private_bytes() -> int:
    """Memory of this process that no file and no other process has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def page_bytes_of_shared_memory() -> int:
    """Of a piece of it: a huge page where the system gives such to all."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    is_huge = setting.exists() and any(
        f"[{word}]" in setting.read_text() for word in ("always", "within_size", "force")
    )
    return 2 << 20 if is_huge else os.sysconf("SC_PAGE_SIZE")


def can_swap() -> bool:
    """Whether memory may be away without having been freed, so that counts of what is there are too small."""
    return len(Path("/proc/swaps").read_text().splitlines()) > 1
