"""A folder of ours belongs to one run at a time."""

import fcntl
import os
import weakref
from functools import partial
from pathlib import Path

from offload.errors import FolderInUse, SourceError, WriteError
from offload.manifest import MANIFEST, own_files

_LOCK = "store.lock"


class FolderLock:
    """Holds a folder until it is released or the process ends, however it ends.

    Args:
        folder: The folder; must exist.

    Raises:
        SourceError: It never was a store's, and has files that a store would take for its own.
        FolderInUse: Somebody holds it.
        WriteError: It cannot be locked.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / _LOCK
        if not file.exists() and not (folder / MANIFEST).exists() and (strangers := own_files(folder)):
            problem = "it is named like a file of a store, and there was no store here"
            raise SourceError(strangers[0], field="name", problem=problem, remedy="give another folder")
        try:
            self._fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise WriteError(file, offset_bytes=0, nbytes=0, reason=f"opening it: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError as error:
            holder = os.pread(self._fd, 32, 0).strip()
            self.release()
            raise FolderInUse(folder, pid=int(holder) if holder.isdigit() else None) from error
        except OSError as error:
            self.release()
            raise WriteError(file, offset_bytes=0, nbytes=0, reason=f"locking it: {error.strerror}") from error
        # A fork shares the lock. The workers of a data loader must not hold it longer than the run itself.
        os.register_at_fork(after_in_child=partial(_release_in_child, weakref.ref(self)))

    def release(self) -> None:
        """Let others have the folder. Twice is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.release()


def _release_in_child(lock: "weakref.ref[FolderLock]") -> None:
    held = lock()
    if held is not None:
        held.release()


__all__ = ["FolderLock"]
