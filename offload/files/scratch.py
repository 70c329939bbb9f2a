"""Scratch space on disk: data that is read back within a step, in a file that is gone with the process."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import threading
from bisect import insort
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from offload.blocks import PAGE_BYTES, round_up
from offload.errors import ClosedAfterwards, WriteError
from offload.files.file import File, Pread, Pwrite
from offload.files.file_io import FileIO, FilePart
from offload.trace import Trace
from offload.transfer import Transfer


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class FileSlot:
    """A stretch of a file."""

    offset_bytes: int
    """First byte, on a page."""
    nbytes: int
    """Length in whole pages."""


class SlotAllocator:
    """First fit, neighbours joined: what is given back serves again before the file grows."""

    def __init__(self) -> None:
        self._free: list[FileSlot] = []
        self.end_bytes = 0
        """How long the file has to be; grows to the most that was ever needed at once, and to gaps that did not fit."""

    def take(self, nbytes: int) -> FileSlot:
        """A slot of at least `nbytes`, the first in the file that is free."""
        nbytes = round_up(max(nbytes, 1), PAGE_BYTES)
        for index, gap in enumerate(self._free):
            if gap.nbytes >= nbytes:
                rest = gap.nbytes - nbytes
                self._free[index : index + 1] = (
                    [FileSlot(offset_bytes=gap.offset_bytes + nbytes, nbytes=rest)] if rest else []
                )
                return FileSlot(offset_bytes=gap.offset_bytes, nbytes=nbytes)
        start = self.end_bytes
        if self._free and self._free[-1].offset_bytes + self._free[-1].nbytes == start:
            start = self._free.pop().offset_bytes
        self.end_bytes = start + nbytes
        return FileSlot(offset_bytes=start, nbytes=nbytes)

    def give_back(self, slot: FileSlot) -> None:
        """Free a slot; each slot once."""
        insort(self._free, slot)
        joined: list[FileSlot] = []
        for gap in self._free:
            last = joined[-1] if joined else None
            if last is not None and last.offset_bytes + last.nbytes == gap.offset_bytes:
                joined[-1] = FileSlot(offset_bytes=last.offset_bytes, nbytes=last.nbytes + gap.nbytes)
            else:
                joined.append(gap)
        self._free = joined


_PREFIX = ".offload-scratch-"


class Scratch(ClosedAfterwards):
    """A file without a name in a folder of the user's, in page-aligned slots that one step after another uses.

    The file never has a name where the file system allows that (O_TMPFILE), else for a moment while it is opened: when
    the process ends, however it ends, the system frees its space. Names that a crash in that moment has left are
    removed at the next start. Nothing else in the folder is touched, and the folder stays.

    Requests bypass the page cache where the file system allows it. Methods may be called from any thread.

    Args:
        folder: Where the file lives; made if it is not there.
        request_bytes: Largest request; 1 to 16 MiB are sensible.
        trace: Where transfers are recorded: reads on the lane "disk", writes on the lane "disk write".
        pwrite: Does the writing; called from several threads at once.
        pread: Does the reading; likewise.

    Raises:
        WriteError: The folder or the file cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        *,
        request_bytes: int = 4 << 20,
        trace: Trace | None = None,
        pwrite: Pwrite = os.pwritev,
        pread: Pread = os.preadv,
    ) -> None:
        self._trace = trace
        self._slots = SlotAllocator()
        self._lock = threading.Lock()
        self.written_bytes = 0
        """Bytes written so far, failed writes left out."""
        name = folder / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_stale(folder)
            fd = _open_nameless(name)
        except OSError as error:
            problem = f"{error.strerror}; give a folder that can be written (Budget.disk)"
            raise WriteError(name, offset_bytes=0, nbytes=0, reason=f"making it: {problem}") from error
        self._file = File(fd, name, pwrite=pwrite, pread=pread)
        # The last thread closes the file: no request can be under way then, also when nobody closes this object.
        self._io = FileIO(request_bytes=request_bytes)
        self._io.adopt(self._file)

    @property
    def file_bytes(self) -> int:
        """How long the file is at most: what was needed at once so far."""
        return self._slots.end_bytes

    def take(self, nbytes: int) -> FileSlot:
        """A slot of `nbytes`, rounded up to whole pages; the caller owns it until `give_back`."""
        with self._lock:
            return self._slots.take(nbytes)

    def give_back(self, slot: FileSlot) -> None:
        """Let others have a slot; no transfer of it may be under way."""
        with self._lock:
            self._slots.give_back(slot)

    def write(self, slot: FileSlot, data: Tensor, *, name: str) -> Transfer:
        """Start writing to a slot. Returns at once; leave `data` alone until `wait()` returns or raises.

        Args:
            slot: Where to.
            data: Contiguous uint8 tensor of shape (n,), n <= `slot.nbytes`, in host memory; page-aligned and of whole
                pages, or the write is not direct.
            name: What is written, for errors and traces.

        Returns:
            The write; its `wait()` raises `TierFull` where the disk is full and `WriteError` where it fails.

        Raises:
            Closed: The scratch was closed.
            ValueError: `data` has the wrong type, place or size.
        """
        self._check(slot, data, name=name)
        ended = partial(self._note, "disk write")
        return self._io.write(self._file, data, offset_bytes=slot.offset_bytes, name=name, at_end=ended)

    def read(self, slot: FileSlot, into: Tensor, *, name: str) -> Transfer:
        """Start reading a slot's first bytes; arguments and result as for `write`.

        `wait()` raises `ReadError`, also where those bytes were never written and the file ends before them.
        """
        self._check(slot, into, name=name)
        nbytes = into.numel()
        part = FilePart(self._file, offset_bytes=slot.offset_bytes, start=0, nbytes=nbytes, room_bytes=nbytes)
        return self._io.read_parts([part], into, name=name, at_end=partial(self._note, "disk"))

    def close(self) -> None:
        """Fail what has not been begun, wait for requests in flight, give the space back. May be called twice."""
        self._io.close()

    def _check(self, slot: FileSlot, data: Tensor, *, name: str) -> None:
        if data.numel() > slot.nbytes:
            raise ValueError(f"{name}: expected at most the slot's {slot.nbytes} bytes, got {data.numel()}")

    def _note(self, lane: str, transfer: Transfer) -> None:
        if transfer.failed:
            return
        if lane == "disk write":
            with self._lock:
                self.written_bytes += transfer.nbytes
        if self._trace is not None:
            self._trace.add(lane, transfer.name, transfer.start_ns, transfer.end_ns, nbytes=transfer.nbytes)


def _open_nameless(name: Path) -> int:
    if hasattr(os, "O_TMPFILE"):
        # Refused by file systems that have no such files (overlayfs, NFS, FUSE): the other way serves there.
        with contextlib.suppress(OSError):
            return os.open(name.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    # Another process that starts now may have taken the name for a stale one.
    name.unlink(missing_ok=True)
    return fd


def _remove_stale(folder: Path) -> None:
    """Remove names that a crash between making a file and removing its name has left.

    A name that is in use loses nothing by it: it was to be removed at once.
    """
    for left in folder.glob(f"{_PREFIX}*"):
        # Those of another user's runs are not ours to remove.
        with contextlib.suppress(OSError):
            status = left.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                left.unlink()
