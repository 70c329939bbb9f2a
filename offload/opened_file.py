"""One file, open for direct and for buffered reading, and the reading of one piece of it."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

from offload.errors import ReadError, SourceChanged
from offload.layout import PAGE_BYTES, round_up
from offload.stamp import FileStamp, check_stamp, stamp_of

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
