"""An open regular file, with and without O_DIRECT: reading, writing, syncing, and whether it is still the same."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from offload.blocks import PAGE_BYTES, round_up
from offload.budget import format_bytes
from offload.errors import ReadError, SourceChanged, TierFull, WriteError

Pread = Callable[[int, list[memoryview], int], int]
"""Reads at an offset into buffers, as ``os.preadv(fd, buffers, offset)`` does; tests inject faults through it."""

Pwrite = Callable[[int, list[memoryview], int], int]
"""Writes buffers at an offset, as ``os.pwritev(fd, buffers, offset)`` does; tests inject faults through it."""

# Linux only: elsewhere, and on file systems that refuse the flag, requests go through the page cache.
O_DIRECT: int = getattr(os, "O_DIRECT", 0)

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
}

_DIRECT_REFUSED = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP})

# The user's quota and the process's file size limit run out like the disk does.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers that mean that nothing more can be written there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileStamp:
    """What identifies a file's contents without reading them."""

    size_bytes: int
    """Length of the file."""
    mtime_ns: int
    """Time of the last write to it; anybody who may write to it can set it back."""
    ctime_ns: int
    """Time of the last write to it or to its metadata; nobody can set it."""
    metadata: tuple[int, ...]
    """Its mode, owner, group and number of names."""
    inode: int
    """Number of the file on its device: another one once the path has been replaced."""
    device: int
    """Number of the device."""

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        """Stamp of a file from what the system says about it."""
        return cls(
            size_bytes=status.st_size,
            mtime_ns=status.st_mtime_ns,
            ctime_ns=status.st_ctime_ns,
            metadata=(status.st_mode, status.st_uid, status.st_gid, status.st_nlink),
            inode=status.st_ino,
            device=status.st_dev,
        )


def open_regular(path: Path, flags: int = os.O_RDONLY, *, mode: int = 0o666, dir_fd: int | None = None) -> int:
    """Open a regular file; anything else (a pipe, a device, a socket, a folder) is refused at once.

    Args:
        path: The file.
        flags: As for `os.open`.
        mode: Who may read and write it, if it is made, less the umask.
        dir_fd: Folder that `path` is relative to.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for its other end for ever.
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, mode, dir_fd=dir_fd)
    except OSError as error:
        if error.errno == errno.ELOOP and flags & os.O_NOFOLLOW:
            raise OSError(errno.ELOOP, "expected a regular file, got a link", str(path)) from error
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "expected a regular file, got a socket or a pipe", str(path)) from error
        raise
    kind = os.fstat(fd).st_mode
    if not stat.S_ISREG(kind):
        os.close(fd)
        raise OSError(errno.EINVAL, f"expected a regular file, got {_KINDS.get(stat.S_IFMT(kind))}", str(path))
    return fd


def read_small_file(path: Path, *, max_bytes: int) -> bytes:
    """Read a whole file that must be a regular one and not too large, whoever wrote it.

    Raises:
        OSError: It cannot be read, is not a regular file, or has more than `max_bytes`.
    """
    return read_all(open_regular(path), max_bytes)


def read_all(fd: int, max_bytes: int) -> bytes:
    """Read a file from its beginning to its end and close it.

    Raises:
        OSError: It cannot be read, or has more than `max_bytes`.
    """
    with os.fdopen(fd, "rb") as file:
        size_bytes = os.fstat(fd).st_size
        raw = file.read(max_bytes + 1) if size_bytes <= max_bytes else b""
    if size_bytes > max_bytes or len(raw) > max_bytes:
        raise OSError(errno.EFBIG, f"expected at most {max_bytes} bytes, got {max(size_bytes, len(raw))}")
    return raw


class File:
    """An open file, moved in pieces from any number of threads.

    Requests bypass the page cache where the file system allows it and memory, length and position are whole pages.
    What goes through the page cache is dropped from it: a process whose page cache counts against its memory limit must
    not fill it with bytes that it moves once.

    Args:
        fd: Open without O_DIRECT, for what is to be done; closed with this object. The file may have no name any more.
        path: Where it is, or what errors call it.
        stamp: What it has to be, where somebody else may change it; None for a file that nobody else writes.
        direct: Bypass the page cache where the file system allows it.
        pread: Does the reading.
        pwrite: Does the writing.
    """

    def __init__(
        self,
        fd: int,
        path: Path,
        *,
        stamp: FileStamp | None = None,
        direct: bool = True,
        pread: Pread = os.preadv,
        pwrite: Pwrite = os.pwritev,
    ) -> None:
        self.path, self.fd = path, fd
        self._stamp, self._pread, self._pwrite = stamp, pread, pwrite
        self._direct_fd = _reopen_direct(fd) if direct else None
        self.direct = self._direct_fd is not None
        """Whether the page cache is bypassed; turns False when the file system refuses the first request."""
        self._is_cached = False

    @property
    def size_bytes(self) -> int:
        """Length of the file."""
        return os.fstat(self.fd).st_size

    def read(self, into: memoryview, *, offset_bytes: int, nbytes: int | None = None) -> None:
        """Read from `offset_bytes` to the start of `into`.

        Args:
            into: Room for at least `nbytes`; a direct read may fill it to its end.
            offset_bytes: First byte to read.
            nbytes: Bytes that must be there; None for all of `into`.

        Raises:
            ReadError: The operating system could not read, or the file ends before the last of those bytes.
            SourceChanged: The same, of a file with a stamp: it was shortened.
        """
        nbytes = len(into) if nbytes is None else nbytes
        aligned = _in_whole_pages(into, offset_bytes)
        done = 0
        while done < nbytes:
            try:
                num_read = self._request(self._pread, into, offset_bytes, done=done, nbytes=nbytes, aligned=aligned)
            except OSError as error:
                raise self._read_error(reason_of(error), offset_bytes + done, nbytes=nbytes - done) from error
            if num_read == 0:
                self._raise_early_end(offset_bytes + done, nbytes=nbytes - done)
            done += num_read or 0
        self.drop_cached(offset_bytes, nbytes=nbytes)

    def write(self, data: memoryview, *, offset_bytes: int) -> None:
        """Write all of `data` at `offset_bytes`.

        Raises:
            TierFull: The file system, a quota or a limit has no room for it.
            WriteError: The operating system could not write.
        """
        aligned, nbytes = _in_whole_pages(data, offset_bytes), len(data)
        done = 0
        while done < nbytes:
            left = {"offset_bytes": offset_bytes + done, "nbytes": nbytes - done}
            try:
                num_written = self._request(self._pwrite, data, offset_bytes, done=done, nbytes=nbytes, aligned=aligned)
            except OSError as error:
                raise write_failure(self.path, error, **left) from error
            if num_written == 0:
                raise WriteError(self.path, reason="the system wrote nothing and gave no reason", **left)
            done += num_written or 0
        # Starts writing back, and drops what is clean already.
        self.drop_cached(offset_bytes, nbytes=nbytes)

    def _request(
        self, move: Pread | Pwrite, memory: memoryview, offset_bytes: int, *, done: int, nbytes: int, aligned: bool
    ) -> int | None:
        """Bytes that one request has moved; None where it is to be made again."""
        # A direct request cannot go on from inside a page, where a short one may have ended: the other descriptor can.
        direct_fd = self._direct_fd if self.direct and aligned and done % PAGE_BYTES == 0 else None
        part = memory[done:] if direct_fd is not None else memory[done:nbytes]
        try:
            num_moved = move(self.fd if direct_fd is None else direct_fd, [part], offset_bytes + done)
        except InterruptedError:
            return None
        except OSError as error:
            if direct_fd is None or error.errno not in _DIRECT_REFUSED:
                raise
            self.direct = False
            return None
        self._is_cached = self._is_cached or direct_fd is None
        return num_moved

    def drop_cached(self, offset_bytes: int, *, nbytes: int) -> None:
        """Drop a range from the page cache, if requests have gone through it.

        The system keeps pages that it cached in one piece with pages outside the range, so that a range that was moved
        in several pieces wants to be dropped again as a whole.
        """
        if self._is_cached and hasattr(os, "posix_fadvise"):
            length = round_up(offset_bytes + nbytes, PAGE_BYTES) - offset_bytes
            os.posix_fadvise(self.fd, offset_bytes, length, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Wait until everything that was written is on the disk.

        Raises:
            TierFull: The file system has no room for it after all.
            WriteError: The disk could not take it.
        """
        try:
            # macOS has no fdatasync.
            getattr(os, "fdatasync", os.fsync)(self.fd)
        except OSError as error:
            raise write_failure(self.path, error, offset_bytes=0, nbytes=self.size_bytes) from error

    def check_unchanged(self) -> None:
        """Compare the open file, and the one that its path names now, with the stamp: two system calls, no reading.

        Raises:
            SourceChanged: It was shortened, extended, rewritten in place, replaced or removed.
        """
        if self._stamp is not None:
            check_stamp(self.path, fd=self.fd, stamp=self._stamp)

    def close(self) -> None:
        """Close its descriptors; no request may be running. Twice is fine."""
        for fd in (self.fd, self._direct_fd):
            if fd is not None and fd >= 0:
                os.close(fd)
        self.fd, self._direct_fd = -1, None

    def _raise_early_end(self, offset_bytes: int, *, nbytes: int) -> None:
        size_bytes = self.size_bytes
        if self._stamp is not None and size_bytes < offset_bytes + nbytes:
            problem = f"expected at least {offset_bytes + nbytes} bytes, got {size_bytes}: it was shortened"
            raise SourceChanged(self.path, problem=problem)
        raise self._read_error(
            f"the system reported the end of the file, which has {size_bytes} bytes", offset_bytes, nbytes=nbytes
        )

    def _read_error(self, reason: str, offset_bytes: int, *, nbytes: int) -> ReadError:
        return ReadError(self.path, offset_bytes=offset_bytes, nbytes=nbytes, reason=reason)


def open_source(path: Path, *, stamp: FileStamp | None = None, direct: bool = True, pread: Pread = os.preadv) -> File:
    """Open a file of somebody else's for reading.

    Args:
        path: The file.
        stamp: What it was when it was checked, or None to take what it is now.
        direct: Bypass the page cache where the file system allows it.
        pread: Does the reading.

    Raises:
        SourceChanged: It is not there any more, or is not the file that `stamp` describes.
        ReadError: It cannot be opened.
    """
    try:
        fd = open_regular(path)
    except FileNotFoundError as error:
        raise SourceChanged(path, problem=f"it is no longer there ({error.strerror})") from error
    except OSError as error:
        raise ReadError(path, offset_bytes=0, nbytes=0, reason=f"opening it: {error.strerror}") from error
    file = File(fd, path, stamp=stamp or FileStamp.of(os.fstat(fd)), direct=direct, pread=pread)
    try:
        file.check_unchanged()
    except SourceChanged:
        file.close()
        raise
    return file


def check_stamp(file: Path, *, fd: int, stamp: FileStamp) -> None:
    """Compare an open file, and the path it was opened by, with its stamp: two system calls, no reading.

    Raises:
        SourceChanged: The file was shortened, extended or rewritten in place, or `file` names another one or none now.
    """
    try:
        opened = FileStamp.of(os.fstat(fd))
    except OSError as error:
        raise SourceChanged(file, problem=f"its state cannot be read ({error.strerror})") from error
    if opened.size_bytes != stamp.size_bytes:
        raise SourceChanged(file, problem=f"expected {stamp.size_bytes} bytes, got {opened.size_bytes}")
    if opened.mtime_ns != stamp.mtime_ns:
        raise SourceChanged(
            file, problem=f"it was written to (expected mtime {stamp.mtime_ns} ns, got {opened.mtime_ns} ns)"
        )
    try:
        named = FileStamp.of(os.stat(file))
    except OSError as error:
        raise SourceChanged(file, problem=f"it is no longer there ({error.strerror})") from error
    if (named.inode, named.device) != (stamp.inode, stamp.device):
        raise SourceChanged(
            file, problem=f"the path was replaced (expected inode {stamp.inode}, got inode {named.inode})"
        )
    # A file that got or lost a link or another mode has a new ctime too: there it cannot tell.
    if opened.ctime_ns != stamp.ctime_ns and opened.metadata == stamp.metadata:
        problem = "it was written to and its time set back"
        raise SourceChanged(file, problem=f"{problem} (expected ctime {stamp.ctime_ns} ns, got {opened.ctime_ns} ns)")


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk: names of new files, and which file a name stands for.

    Raises:
        WriteError: The disk failed.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise WriteError(folder, offset_bytes=0, nbytes=0, reason=f"its entries: {error.strerror}") from error


def write_failure(file: Path, error: OSError, *, offset_bytes: int = 0, nbytes: int = 0) -> TierFull | WriteError:
    """What the system's refusal to write is called here.

    Args:
        file: What was to be written.
        error: The refusal.
        offset_bytes: Where in the file.
        nbytes: How much.
    """
    if error.errno not in NO_ROOM:
        return WriteError(file, offset_bytes=offset_bytes, nbytes=nbytes, reason=reason_of(error))
    try:
        free = format_bytes(shutil.disk_usage(file.parent).free) + " free"
    except OSError:
        free = "free space unknown"
    return TierFull(
        f"{file}: no room for {nbytes} bytes at offset {offset_bytes}: {reason_of(error)}, {free}; "
        "free space there, or write to another disk (Budget.disk)"
    )


def reason_of(error: OSError) -> str:
    """What the system said, with the name of the error number."""
    return f"{error.strerror} ({errno.errorcode.get(error.errno or 0, error.errno)})"


def _in_whole_pages(data: memoryview, offset_bytes: int) -> bool:
    """Whether a request may be direct: position, length and address are multiples of the page."""
    if len(data) == 0 or len(data) % PAGE_BYTES or offset_bytes % PAGE_BYTES or data.readonly:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(data)) % PAGE_BYTES == 0


def _reopen_direct(fd: int) -> int | None:
    """The same file with O_DIRECT, whether or not it has a name; None where the system cannot."""
    if not O_DIRECT:
        return None
    try:
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        return os.open(f"/proc/self/fd/{fd}", access | os.O_CLOEXEC | O_DIRECT)
    except OSError:
        return None
