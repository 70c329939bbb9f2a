"""A file of our own, open for direct and for buffered reading and writing, and the moving of one piece of it."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from offload.errors import ReadError, TierFull, WriteError
from offload.layout import PAGE_BYTES
from offload.opened_file import DIRECT_REFUSED, O_DIRECT, Pread
from offload.units import format_bytes

Pwrite = Callable[[int, list[memoryview], int], int]
"""Writes buffers at an offset, as ``os.pwritev(fd, buffers, offset)`` does; tests inject faults through it."""

# The user's quota and the process's file size limit run out like the disk does.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class OwnFile:
    """A file that nobody else writes, moved in pieces from any number of threads.

    Args:
        fd: Open without O_DIRECT, for what is to be done; closed with this object. The file may have no name any more.
        name: What errors call it.
        direct: Bypass the page cache where the file system allows it.
        pwrite: Does the writing.
        pread: Does the reading.
    """

    def __init__(
        self, fd: int, *, name: Path, direct: bool = True, pwrite: Pwrite = os.pwritev, pread: Pread = os.preadv
    ) -> None:
        self.name = name
        self._pwrite, self._pread = pwrite, pread
        self._buffered_fd = fd
        self._direct_fd = _reopen_direct(fd) if direct else None
        self._direct = self._direct_fd is not None

    @property
    def direct(self) -> bool:
        """Whether the page cache is bypassed; turns False when the file system refuses the first request."""
        return self._direct

    @property
    def size_bytes(self) -> int:
        """Length of the file."""
        return os.fstat(self._buffered_fd).st_size

    def write(self, data: memoryview, *, offset_bytes: int) -> None:
        """Write all of `data` at `offset_bytes`; directly where its address, length and `offset_bytes` are whole pages.

        Raises:
            TierFull: The file system, a quota or a limit has no room for it.
            WriteError: The operating system could not write.
        """
        done = 0
        while done < len(data):
            # A direct write cannot go on from inside a page, where a short one may have ended.
            direct = self._direct and _in_whole_pages(data, done, offset_bytes)
            fd = self._direct_fd if direct and self._direct_fd is not None else self._buffered_fd
            try:
                num_written = self._pwrite(fd, [data[done:]], offset_bytes + done)
            except InterruptedError:
                continue
            except OSError as error:
                if direct and error.errno in DIRECT_REFUSED:
                    self._direct = False
                    continue
                raise write_failure(
                    self.name, error, offset_bytes=offset_bytes + done, nbytes=len(data) - done
                ) from error
            if num_written == 0:
                reason = "the system wrote nothing and gave no reason"
                raise WriteError(self.name, offset_bytes=offset_bytes + done, nbytes=len(data) - done, reason=reason)
            done += num_written
        if not self._direct and hasattr(os, "posix_fadvise"):
            # Starts writing back, and drops what is clean: a cgroup's page cache must not fill with it.
            os.posix_fadvise(self._buffered_fd, offset_bytes, len(data), os.POSIX_FADV_DONTNEED)

    def read(self, into: memoryview, *, offset_bytes: int) -> None:
        """Fill `into` from `offset_bytes`.

        Raises:
            ReadError: The operating system could not read, or the file ends before.
        """
        done = 0
        while done < len(into):
            direct = self._direct and _in_whole_pages(into, done, offset_bytes)
            fd = self._direct_fd if direct and self._direct_fd is not None else self._buffered_fd
            try:
                num_read = self._pread(fd, [into[done:]], offset_bytes + done)
            except InterruptedError:
                continue
            except OSError as error:
                if direct and error.errno in DIRECT_REFUSED:
                    self._direct = False
                    continue
                raise self._read_failed(_reason(error), offset_bytes + done, nbytes=len(into) - done) from error
            if num_read == 0:
                reason = f"the file ends there, it has {self.size_bytes} bytes"
                raise self._read_failed(reason, offset_bytes + done, nbytes=len(into) - done)
            done += num_read
        if not self._direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._buffered_fd, offset_bytes, len(into), os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Wait until everything that was written is on the disk.

        Raises:
            TierFull: The file system has no room for it after all.
            WriteError: The disk could not take it.
        """
        try:
            # macOS has no fdatasync.
            getattr(os, "fdatasync", os.fsync)(self._buffered_fd)
        except OSError as error:
            raise write_failure(self.name, error, offset_bytes=0, nbytes=self.size_bytes) from error

    def resize(self, size_bytes: int) -> None:
        """Cut the file, or lengthen it by a hole.

        Raises:
            TierFull: The file system has no room for it.
            WriteError: The operating system refuses.
        """
        try:
            os.ftruncate(self._buffered_fd, size_bytes)
        except OSError as error:
            raise write_failure(self.name, error, offset_bytes=0, nbytes=size_bytes) from error

    def close(self) -> None:
        """Close its descriptors; no request may be running. Twice is fine."""
        for fd in {self._buffered_fd, -1 if self._direct_fd is None else self._direct_fd} - {-1}:
            os.close(fd)
        self._buffered_fd, self._direct_fd = -1, None

    def _read_failed(self, reason: str, offset_bytes: int, *, nbytes: int) -> ReadError:
        return ReadError(self.name, offset_bytes=offset_bytes, nbytes=nbytes, reason=reason)


def write_failure(file: Path, error: OSError, *, offset_bytes: int, nbytes: int) -> TierFull | WriteError:
    """What the system's refusal to write is called here.

    Args:
        file: What was to be written.
        error: The refusal.
        offset_bytes: Where in the file.
        nbytes: How much.
    """
    if error.errno not in _FULL:
        return WriteError(file, offset_bytes=offset_bytes, nbytes=nbytes, reason=_reason(error))
    try:
        free = format_bytes(shutil.disk_usage(file.parent).free) + " free"
    except OSError:
        free = "free space unknown"
    return TierFull(
        f"{file}: no room for {nbytes} bytes at offset {offset_bytes}: {_reason(error)}, {free}; "
        "free space there, or write to another disk (Budget.disk)"
    )


def _in_whole_pages(data: memoryview, done: int, offset_bytes: int) -> bool:
    return not (done % PAGE_BYTES or len(data) % PAGE_BYTES or offset_bytes % PAGE_BYTES)


def _reopen_direct(fd: int) -> int | None:
    """The same file with O_DIRECT, whether or not it has a name; None where the system cannot."""
    if not O_DIRECT:
        return None
    try:
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        return os.open(f"/proc/self/fd/{fd}", access | os.O_CLOEXEC | O_DIRECT)
    except OSError:
        return None


def _reason(error: OSError) -> str:
    return f"{error.strerror} ({errno.errorcode.get(error.errno or 0, error.errno)})"


__all__ = ["OwnFile", "Pwrite", "write_failure"]
