"""Whether a file is still the one that was opened and checked.

One file, open for direct and for buffered reading, and the reading of one piece of it.

A file of our own, open for direct and for buffered reading and writing, and the moving of one piece of it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from offload.blocks import PAGE_BYTES, round_up
from offload.budget import format_bytes
from offload.errors import ReadError, SourceChanged, TierFull, WriteError


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


Pread = Callable[[int, list[memoryview], int], int]
"""Reads at an offset into buffers, as ``os.preadv(fd, buffers, offset)`` does; tests inject faults through it."""


# Linux only: elsewhere, and on file systems that refuse the flag, reads go through the page cache.
O_DIRECT: int = getattr(os, "O_DIRECT", 0)


DIRECT_REFUSED = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP})


class OpenedFile:
    """A file that stays open, read in pieces from any number of threads.

    Args:
        path: The file.
        stamp: What it was when it was checked, or None to take what it is now.
        direct: Bypass the page cache where the file system allows it.
        pread: Does the reading.

    Raises:
        SourceChanged: It is not there any more, or is not the file that `stamp` describes.
        ReadError: It cannot be opened.
    """

    def __init__(self, path: Path, *, stamp: FileStamp | None, direct: bool, pread: Pread) -> None:
        self.path = path
        self._pread = pread
        self._direct_fd: int | None = None
        try:
            self._buffered_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise SourceChanged(path, problem=f"it is no longer there ({error.strerror})") from error
        except OSError as error:
            raise ReadError(path, offset_bytes=0, nbytes=0, reason=f"opening it: {error.strerror}") from error
        self._stamp = stamp or stamp_of(self._buffered_fd)
        if direct and O_DIRECT:
            try:
                self._direct_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | O_DIRECT)
            except OSError:
                # Refused, or gone: which of the two, the check below finds out.
                self._direct_fd = None
        self._direct = self._direct_fd is not None
        self._is_cached = False
        try:
            self.check_unchanged()
            # The path may have been replaced between the two opens.
            if self._direct_fd is not None:
                check_stamp(path, fd=self._direct_fd, stamp=self._stamp)
        except SourceChanged:
            self.close()
            raise

    @property
    def direct(self) -> bool:
        """Whether reads bypass the page cache; turns False when the file system refuses the first one."""
        return self._direct

    def read(self, into: memoryview, *, offset_bytes: int, nbytes: int, direct: bool) -> None:
        """Read `nbytes` at `offset_bytes` to the start of `into`.

        Args:
            into: Room for at least `nbytes`; a direct read may fill it to its end.
            offset_bytes: First byte to read.
            nbytes: Bytes that must be there.
            direct: Bypass the page cache if the file can; `into`'s address and length and `offset_bytes` must then be
                multiples of the page.

        Raises:
            ReadError: The operating system could not read.
            SourceChanged: The file ends before the last of those bytes.
        """
        done = 0
        while done < nbytes:
            # A direct read cannot go on from inside a page, where a short one may have ended: the other descriptor can.
            direct = direct and self._direct and done % PAGE_BYTES == 0
            fd = self._direct_fd if direct and self._direct_fd is not None else self._buffered_fd
            room = into[done:] if direct else into[done:nbytes]
            try:
                num_read = self._pread(fd, [room], offset_bytes + done)
            except InterruptedError:
                continue
            except OSError as error:
                if direct and error.errno in DIRECT_REFUSED:
                    self._direct = False
                    continue
                reason = f"{error.strerror} ({errno.errorcode.get(error.errno or 0, error.errno)})"
                raise ReadError(
                    self.path, offset_bytes=offset_bytes + done, nbytes=nbytes - done, reason=reason
                ) from error
            if num_read == 0:
                self._raise_early_end(offset_bytes + done, nbytes=nbytes - done)
            self._is_cached = self._is_cached or not direct
            done += num_read
        if not direct:
            self.drop_cached(offset_bytes, nbytes=nbytes)

    def drop_cached(self, offset_bytes: int, *, nbytes: int) -> None:
        """Drop a range from the page cache, if reads have gone through it.

        A process whose page cache counts against its memory limit must not fill it with bytes that it reads once. The
        system keeps pages that it cached in one piece with pages outside the range, so that a range that was read in
        several pieces wants to be dropped again as a whole.
        """
        if self._is_cached and hasattr(os, "posix_fadvise"):
            length = round_up(offset_bytes + nbytes, PAGE_BYTES) - offset_bytes
            os.posix_fadvise(self._buffered_fd, offset_bytes, length, os.POSIX_FADV_DONTNEED)

    def check_unchanged(self) -> None:
        """Check that it is still the file that was opened: two system calls, no reading.

        Raises:
            SourceChanged: It was shortened, extended, rewritten in place, replaced or removed.
        """
        check_stamp(self.path, fd=self._buffered_fd, stamp=self._stamp)

    def close(self) -> None:
        """Close its descriptors; no read may be running."""
        os.close(self._buffered_fd)
        if self._direct_fd is not None:
            os.close(self._direct_fd)

    def _raise_early_end(self, offset_bytes: int, *, nbytes: int) -> None:
        size_bytes = stamp_of(self._buffered_fd).size_bytes
        if size_bytes < offset_bytes + nbytes:
            problem = f"expected at least {offset_bytes + nbytes} bytes, got {size_bytes}: it was shortened"
            raise SourceChanged(self.path, problem=problem)
        reason = f"the system reported the end of the file, which has {size_bytes} bytes"
        raise ReadError(self.path, offset_bytes=offset_bytes, nbytes=nbytes, reason=reason)


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
