"""Whether a file is still the one that was opened and checked."""

import os
from dataclasses import dataclass
from pathlib import Path

from offload.errors import SourceChanged


@dataclass(frozen=True, kw_only=True, slots=True)
class FileStamp:
    """What identifies a file's contents without reading them."""

    size_bytes: int
    """Length of the file."""
    mtime_ns: int
    """Time of the last write to it."""
    inode: int
    """Number of the file on its device: another one once the path has been replaced."""
    device: int
    """Number of the device."""


def stamp_of(fd: int) -> FileStamp:
    """Stamp of an open file."""
    return _stamp_from(os.fstat(fd))


def check_stamp(file: Path, *, fd: int, stamp: FileStamp) -> None:
    """Compare an open file, and the path it was opened by, with its stamp: two system calls, no reading.

    Raises:
        SourceChanged: The file was shortened, extended or rewritten in place, or `file` names another one or none now.
    """
    try:
        opened = stamp_of(fd)
    except OSError as error:
        raise SourceChanged(file, problem=f"its state cannot be read ({error.strerror})") from error
    if opened.size_bytes != stamp.size_bytes:
        raise SourceChanged(file, problem=f"expected {stamp.size_bytes} bytes, got {opened.size_bytes}")
    if opened.mtime_ns != stamp.mtime_ns:
        raise SourceChanged(
            file, problem=f"it was written to (expected mtime {stamp.mtime_ns} ns, got {opened.mtime_ns} ns)"
        )
    try:
        named = _stamp_from(os.stat(file))
    except OSError as error:
        raise SourceChanged(file, problem=f"it is no longer there ({error.strerror})") from error
    if (named.inode, named.device) != (stamp.inode, stamp.device):
        raise SourceChanged(
            file, problem=f"the path was replaced (expected inode {stamp.inode}, got inode {named.inode})"
        )


def _stamp_from(status: os.stat_result) -> FileStamp:
    return FileStamp(size_bytes=status.st_size, mtime_ns=status.st_mtime_ns, inode=status.st_ino, device=status.st_dev)
