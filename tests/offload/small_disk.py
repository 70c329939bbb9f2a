"""A real file system of a few MiB, to fill."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, *, nbytes: int = 8 << 20, kind: str = "ext4") -> Iterator[Path]:
    """Mount a file system on `folder`; skips the test where that is not allowed.

    Args:
        folder: Where; made, and empty afterwards.
        nbytes: Its size, what it needs for itself included.
        kind: "ext4" in a file beside the folder, or "tmpfs".
    """
    folder.mkdir()
    image = folder.with_suffix(".img")
    if kind == "tmpfs":
        commands = [["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]]
    else:
        with open(image, "wb") as opened:
            opened.truncate(nbytes)
        make = ["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-m", "0", str(image)]
        commands = [make, ["mount", "-o", "loop", str(image), str(folder)]]
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except OSError as error:
            pytest.skip(f"no {command[0]} here: {error}")
        if done.returncode:
            pytest.skip(f"{command[0]} is refused here (root, loop devices?): {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=60)
        image.unlink(missing_ok=True)


def fill(folder: Path, *, leave_bytes: int = 0) -> Path:
    """Fill a disk but for some bytes; returns the file that takes the room."""
    filler = folder / "somebody-else"
    fd = os.open(filler, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        free_bytes = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize - leave_bytes
        os.posix_fallocate(fd, 0, max(free_bytes, 1))
    finally:
        os.close(fd)
    return filler
