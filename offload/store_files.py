"""The files of a store's objects: made, used again once nothing refers to them, never written while something does."""

import contextlib
import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

from offload.errors import ReadError
from offload.manifest import OBJECTS, next_number, own_files, sync_folder
from offload.opened_file import Pread
from offload.own_file import OwnFile, Pwrite, write_failure
from offload.transfer import Transfer

_NO_PREALLOCATION = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS})


@dataclass(kw_only=True, eq=False)
class ObjectFile:
    """One file, and what is being done with it."""

    path: Path
    """Where it is."""
    nbytes: int
    """How long it is."""
    transfers: list[Transfer] = field(default_factory=list)
    """Reads and writes of it; those that have ended may still be listed."""

    @property
    def in_use(self) -> bool:
        """Whether something reads or writes it."""
        self.transfers = [transfer for transfer in self.transfers if not transfer.done()]
        return bool(self.transfers)


class ObjectFiles:
    """All files of a store's folder.

    A file that no version needs any more is written again in place: its blocks on the disk are there already. That is
    not done to a file with further names (a checkpoint's links), which only loses its name here.

    Args:
        folder: The store's folder.
        direct: Bypass the page cache where the file system allows it.
        pwrite: Does the writing.
        pread: Does the reading.
    """

    def __init__(self, folder: Path, *, direct: bool, pwrite: Pwrite, pread: Pread) -> None:
        self._folder = folder / OBJECTS
        self._direct, self._pwrite, self._pread = direct, pwrite, pread
        files = own_files(folder)
        self._free = {path.name: ObjectFile(path=path, nbytes=path.stat().st_size) for path in files}
        self._next_number = next_number(folder)
        self._has_new_names = True

    def named(self, name: str) -> ObjectFile:
        """A file that a manifest names; no longer free then."""
        return self._free.pop(name)

    def free(self, file: ObjectFile) -> None:
        """Have a file for another version, as soon as nothing uses it."""
        self._free[file.path.name] = file

    def claim(self, nbytes: int) -> tuple[ObjectFile, OwnFile]:
        """A file of exactly `nbytes` for a new version, and the file opened; its contents are anything.

        Raises:
            TierFull: The disk has no room for it.
            WriteError: It cannot be made or opened.
        """
        while (file := self._reusable(nbytes)) is not None:
            del self._free[file.path.name]
            try:
                fd = os.open(file.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise write_failure(file.path, error, offset_bytes=0, nbytes=nbytes) from error
            if os.fstat(fd).st_nlink == 1:
                return self._sized(file, fd, nbytes)
            os.close(fd)
            # Also a checkpoint's: let it keep what is in there.
            file.path.unlink(missing_ok=True)
        path = self._folder / f"{self._next_number}.bin"
        self._next_number += 1
        self._has_new_names = True
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise write_failure(path, error, offset_bytes=0, nbytes=nbytes) from error
        return self._sized(ObjectFile(path=path, nbytes=0), fd, nbytes)

    def open(self, file: ObjectFile) -> OwnFile:
        """A file opened to be read.

        Raises:
            ReadError: It cannot be opened.
        """
        try:
            fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            reason = f"opening it: {error.strerror}"
            raise ReadError(file.path, offset_bytes=0, nbytes=file.nbytes, reason=reason) from error
        return self._owned(file, fd)

    def sync_names(self) -> None:
        """Bring the names of new files to the disk.

        Raises:
            WriteError: The disk failed.
        """
        if self._has_new_names:
            sync_folder(self._folder)
            self._has_new_names = False

    def disk_bytes(self, kept: list[ObjectFile]) -> int:
        """Length of the free files and of those in `kept`."""
        return sum(file.nbytes for file in (*self._free.values(), *kept))

    def _reusable(self, nbytes: int) -> ObjectFile | None:
        idle = [file for file in self._free.values() if not file.in_use]
        return next((file for file in idle if file.nbytes == nbytes), idle[0] if idle else None)

    def _sized(self, file: ObjectFile, fd: int, nbytes: int) -> tuple[ObjectFile, OwnFile]:
        try:
            if file.nbytes != nbytes:
                _resize(fd, nbytes)
        except OSError as error:
            os.close(fd)
            # What is left of it must not take the room that is missing.
            with contextlib.suppress(OSError):
                file.path.unlink()
            raise write_failure(file.path, error, offset_bytes=0, nbytes=nbytes) from error
        file.nbytes = nbytes
        return file, self._owned(file, fd)

    def _owned(self, file: ObjectFile, fd: int) -> OwnFile:
        return OwnFile(fd, name=file.path, direct=self._direct, pwrite=self._pwrite, pread=self._pread)


def _resize(fd: int, nbytes: int) -> None:
    """Give a file its length and its blocks: a disk that is too small is found out before anything is written."""
    os.ftruncate(fd, nbytes)
    if nbytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            if error.errno not in _NO_PREALLOCATION:
                raise


__all__ = ["ObjectFile", "ObjectFiles"]
