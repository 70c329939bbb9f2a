"""A folder held open: names are looked up in it and nowhere else, no link in it is followed, files appear whole."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Self

from offload.errors import ClosedAfterwards, SourceError, WriteError
from offload.files.file import open_regular, reason_of

_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]{32}\.tmp", re.DOTALL)
_PRIVATE = 0o600


class Folder(ClosedAfterwards):
    """A folder, and the files in it by name, whatever becomes of the path that it was opened by.

    Whoever may write to a folder can plant a link there that leads to a file of somebody else's. Links are refused
    here, and names of unfinished files cannot be guessed. What is not a regular file (a pipe, a device) is refused at
    once.

    Args:
        path: Where it is, for errors.
        fd: The folder, open; closed with this object.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self._fd = path, fd

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a folder of anybody's, to read from it or to put files there.

        Raises:
            OSError: It is not there, is no folder, or may not be read.
        """
        return cls(path, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))

    @classmethod
    def own(cls, path: Path) -> Self:
        """Open a folder that nobody else may change; it is made if it is not there, for this user alone.

        The way to it may lead through links, it may not be one itself.

        Raises:
            SourceError: It is a link, belongs to somebody else, or everybody may write to it.
            OSError: It cannot be made or opened.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        return cls._owned(path, str(path), None)

    def own_inner(self, name: str) -> Self:
        """As `own`, a folder in this one."""
        return self._owned(self.path / name, name, self._fd)

    def inner(self, name: str) -> Self:
        """Open a folder in this one.

        Raises:
            OSError: It is not there, is no folder, is a link, or may not be read.
        """
        return type(self)(self.path / name, _open_folder(name, self._fd))

    @classmethod
    def _owned(cls, path: Path, name: str, within: int | None) -> Self:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=within)
        remedy = "give a folder of your own that others cannot write to, or one that is not there yet"
        try:
            fd = _open_folder(name, within)
        except NotADirectoryError as error:
            raise SourceError(path, field="folder", problem=str(error.strerror), remedy=remedy) from error
        status = os.fstat(fd)
        problem = ""
        if status.st_uid != os.geteuid():
            problem = f"it belongs to user {status.st_uid}, and this process runs as user {os.geteuid()}"
        elif status.st_mode & stat.S_IWOTH:
            problem = f"everybody may write to it (mode {stat.S_IMODE(status.st_mode):o})"
        if problem:
            os.close(fd)
            raise SourceError(path, field="folder", problem=problem, remedy=remedy)
        return cls(path, fd)

    def open_file(self, name: str, flags: int = os.O_RDONLY) -> int:
        """Open a regular file; one that is made is for this user alone.

        Raises:
            OSError: It cannot be opened, or is a link or of another kind.
        """
        return open_regular(Path(name), flags | os.O_NOFOLLOW, mode=_PRIVATE, dir_fd=self._fd)

    def status(self, name: str) -> os.stat_result:
        """What the system says about a name; of a link, about the link.

        Raises:
            OSError: There is nothing of that name.
        """
        return os.stat(name, dir_fd=self._fd, follow_symlinks=False)

    def files(self) -> list[str]:
        """Names of the regular files in it."""
        with os.scandir(self._fd) as entries:
            return [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]

    def names(self) -> list[str]:
        """All names in it."""
        return os.listdir(self._fd)

    def link(self, name: str, target: Folder, target_name: str) -> None:
        """Give a file a further name in another folder.

        Raises:
            OSError: The system refuses.
        """
        os.link(name, target_name, src_dir_fd=self._fd, dst_dir_fd=target._fd, follow_symlinks=False)

    def unlink(self, name: str) -> None:
        """Remove a file's name; nothing happens if it is not there.

        Raises:
            OSError: The system refuses.
        """
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)

    def put(self, name: str, raw: bytes, *, mode: int = _PRIVATE) -> None:
        """Make a file, or replace it, so that after a crash or a power failure it is the old one or the new one whole.

        It survives a power failure after `sync`.

        Raises:
            OSError: It cannot be written; what was there before is in force.
        """
        unfinished = f".{name}.{secrets.token_hex(16)}.tmp"
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=self._fd)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except BaseException:
            self.unlink(unfinished)
            raise

    def remove_unfinished(self, name: str) -> None:
        """Remove what a crash in `put` has left; nobody else may be putting that file."""
        for found in self.files():
            match = _UNFINISHED.fullmatch(found)
            if match is not None and match[1] == name:
                self.unlink(found)

    def sync(self) -> None:
        """Bring its entries to the disk: names of new files, and which file a name stands for.

        Raises:
            WriteError: The disk failed.
        """
        try:
            os.fsync(self._fd)
        except OSError as error:
            reason = f"its entries: {reason_of(error)}"
            raise WriteError(self.path, offset_bytes=0, nbytes=0, reason=reason) from error

    def close(self) -> None:
        """Close it. Twice is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _open_folder(name: str, within: int | None) -> int:
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=within)
    except OSError as error:
        # What Linux says of a link with these two flags.
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            problem = "expected a folder, got a link or another kind of file"
            raise NotADirectoryError(errno.ENOTDIR, problem, name) from error
        raise
