"""The files of a store's objects: made, written, read, used again once nothing refers to them; and copies of them."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from offload.buffers import StagingBuffer
from offload.errors import ReadError
from offload.files.file import File, Pread, Pwrite, sync_folder, write_failure
from offload.files.file_io import FileIO, Part
from offload.store.manifest import (
    OBJECTS,
    FolderLock,
    Manifest,
    StoredObject,
    next_number,
    own_files,
    put_manifest,
)
from offload.trace import Trace
from offload.transfer import Transfer, bytes_of

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


@dataclass(frozen=True, kw_only=True)
class StoreIo:
    """How a store reads and writes."""

    num_readers: int = 4
    """Read requests in flight."""
    num_writers: int = 2
    """Write requests in flight."""
    request_bytes: int = 4 << 20
    """Largest request, a multiple of 4096; 1 to 16 MiB are sensible."""
    direct: bool = True
    """Bypass the page cache where the file system allows it."""
    trace: Trace | None = None
    """Where transfers are recorded: reads on the lane "disk", writes on the lane "disk write"."""
    pwrite: Pwrite = os.pwritev
    """Does the writing; called from several threads at once."""
    pread: Pread = os.preadv
    """Does the reading; likewise."""


class ObjectFiles:
    """All files of a store's folder, read and written in threads of its own; each is open while a transfer uses it.

    A file that no version needs any more is written again in place: its blocks on the disk are there already. That is
    not done to a file with further names (a checkpoint's links), which only loses its name here.

    Args:
        folder: The store's folder.
        io: How to read and write.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(self, folder: Path, io: StoreIo) -> None:
        self._folder, self._io = folder / OBJECTS, io
        self._free = {path.name: ObjectFile(path=path, nbytes=path.stat().st_size) for path in own_files(folder)}
        self._next_number = next_number(folder)
        self._has_new_names = True
        # Reads do not wait behind writes.
        self._writer = FileIO(num_threads=io.num_writers, request_bytes=io.request_bytes)
        self._reader = FileIO(num_threads=io.num_readers, request_bytes=io.request_bytes)
        # Not the store's: its owner waits for transfers with that one held.
        self._lock = threading.Lock()
        self.written_bytes = 0
        """Bytes written so far."""
        self.read_bytes = 0
        """Bytes read so far."""

    def named(self, name: str) -> ObjectFile:
        """A file that a manifest names; no longer free then."""
        return self._free.pop(name)

    def free(self, file: ObjectFile) -> None:
        """Let another version have a file, as soon as nothing uses it."""
        self._free[file.path.name] = file

    def write(self, name: str, data: Tensor) -> tuple[ObjectFile, Transfer]:
        """Start writing a new file; it is on the disk when the transfer has ended.

        Args:
            name: Of the object, for errors and traces.
            data: Its contents: tensor of shape (n,), uint8, in host memory.

        Raises:
            TierFull: The disk has no room for it.
            WriteError: The file cannot be made or opened.
            Closed: This was closed.
            ValueError: `data` has the wrong type or place.
        """
        file, opened = self._claim(data.numel())
        ended = partial(self._note, "disk write", (opened,))
        try:
            transfer = self._writer.write(opened, data, offset_bytes=0, name=name, sync=True, at_end=ended)
        except BaseException:
            opened.close()
            self.free(file)
            raise
        file.transfers.append(transfer)
        return file, transfer

    def read(self, name: str, files: Sequence[ObjectFile], into: Tensor) -> Transfer:
        """Start reading whole files, one after another.

        Args:
            name: What is read, for errors and traces.
            files: The files.
            into: Tensor of shape (n,), uint8, with room for them, in host memory.

        Raises:
            ReadError: A file cannot be opened.
            Closed: This was closed.
            ValueError: `into` has the wrong type or place.
        """
        parts: list[Part] = []
        start = 0
        try:
            for file in files:
                opened = self._opened(file, _open(file.path, os.O_RDONLY, nbytes=file.nbytes))
                parts.append(Part(opened, offset_bytes=0, start=start, nbytes=file.nbytes, room_bytes=file.nbytes))
                start += file.nbytes
            ended = partial(self._note, "disk", tuple(part.file for part in parts))
            transfer = self._reader.read_parts(parts, into, name=name, at_end=ended)
        except BaseException:
            for part in parts:
                part.file.close()
            raise
        for file in files:
            file.transfers.append(transfer)
        return transfer

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

    def close(self) -> None:
        """Fail what has not been begun, wait for requests in flight, stop the threads. May be called twice."""
        self._writer.close()
        self._reader.close()

    def _claim(self, nbytes: int) -> tuple[ObjectFile, File]:
        """A file of exactly `nbytes` for a new version, and the file opened; its contents are anything."""
        while (file := self._reusable(nbytes)) is not None:
            del self._free[file.path.name]
            try:
                fd = os.open(file.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise write_failure(file.path, error, nbytes=nbytes) from error
            if os.fstat(fd).st_nlink == 1:
                return self._sized(file, fd, nbytes)
            os.close(fd)
            # Also a checkpoint's: let it keep what is in there.
            file.path.unlink(missing_ok=True)
        path = self._folder / f"{self._next_number}.bin"
        self._next_number += 1
        self._has_new_names = True
        fd = _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, nbytes=nbytes)
        return self._sized(ObjectFile(path=path, nbytes=0), fd, nbytes)

    def _reusable(self, nbytes: int) -> ObjectFile | None:
        idle = [file for file in self._free.values() if not file.in_use]
        return next((file for file in idle if file.nbytes == nbytes), idle[0] if idle else None)

    def _sized(self, file: ObjectFile, fd: int, nbytes: int) -> tuple[ObjectFile, File]:
        try:
            if file.nbytes != nbytes:
                _resize(fd, nbytes)
        except OSError as error:
            os.close(fd)
            # What is left of it must not take the room that is missing.
            with contextlib.suppress(OSError):
                file.path.unlink()
            raise write_failure(file.path, error, nbytes=nbytes) from error
        file.nbytes = nbytes
        return file, self._opened(file, fd)

    def _opened(self, file: ObjectFile, fd: int) -> File:
        return File(fd, file.path, direct=self._io.direct, pwrite=self._io.pwrite, pread=self._io.pread)

    def _note(self, lane: str, opened: tuple[File, ...], transfer: Transfer) -> None:
        for file in opened:
            file.close()
        if transfer.failed:
            return
        with self._lock:
            if lane == "disk":
                self.read_bytes += transfer.nbytes
            else:
                self.written_bytes += transfer.nbytes
        if self._io.trace is not None:
            self._io.trace.add(lane, transfer.name, transfer.start_ns, transfer.end_ns, nbytes=transfer.nbytes)


def _resize(fd: int, nbytes: int) -> None:
    """Give a file its length and its blocks: a disk that is too small is found out before anything is written."""
    os.ftruncate(fd, nbytes)
    if nbytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            if error.errno not in _NO_PREALLOCATION:
                raise


_COPY_BYTES = 4 << 20


# Other file systems, file systems without links, and files that have as many as they can.
_NO_LINK = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
)


def copy_state(manifest: Manifest, source: Path, target: Path) -> None:
    """Make `target` a store of its own with the state that `manifest` describes; what was committed there goes.

    Interrupted at any instant, `target` has the state that it had before, or the new one.

    Args:
        manifest: The state.
        source: Folder whose files it names; they must stay as they are meanwhile.
        target: Folder to make or to replace the state of. Files in it that are not a store's are left alone.

    Raises:
        FolderInUse: A run works in `target`.
        TierFull: `target`'s disk is full; its state is as before.
        WriteError: Something could not be written; likewise.
        ReadError: A file of the state could not be read; likewise.
    """
    try:
        (target / OBJECTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(target, error) from error
    lock = FolderLock(target)
    made: list[Path] = []
    try:
        before = own_files(target)
        number = next_number(target)
        objects: dict[str, StoredObject] = {}
        for name, stored in manifest.objects.items():
            file = target / OBJECTS / f"{number + len(made)}.bin"
            made.append(file)
            _link_or_copy(source / OBJECTS / stored.file, file)
            objects[name] = replace(stored, file=file.name)
        sync_folder(target / OBJECTS)
        put_manifest(target, replace(manifest, objects=objects))
        # Until its name is on the disk too, a power failure may bring either state back.
        made = []
        sync_folder(target)
        made = before
        sync_folder(target.parent)
    finally:
        # What did not become the state, or is it no more.
        for path in made:
            with contextlib.suppress(OSError):
                path.unlink()
        lock.release()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise write_failure(target, error) from error
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    with contextlib.ExitStack() as opened:
        reading = File(_open(source, os.O_RDONLY), source)
        opened.callback(reading.close)
        writing = File(_open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL), target)
        opened.callback(writing.close)
        buffer = opened.enter_context(StagingBuffer(_COPY_BYTES))
        view = bytes_of(buffer.tensor, name=str(target))
        size_bytes = reading.size_bytes
        for start in range(0, size_bytes, _COPY_BYTES):
            piece = view[: min(_COPY_BYTES, size_bytes - start)]
            reading.read(piece, offset_bytes=start)
            writing.write(piece, offset_bytes=start)
        writing.sync()


def _open(path: Path, flags: int, *, nbytes: int = 0) -> int:
    """Open a file that is no link.

    Raises:
        ReadError: It cannot be opened for reading.
        TierFull: It cannot be made: there is no room.
        WriteError: It cannot be made.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if flags & os.O_CREAT:
            raise write_failure(path, error, nbytes=nbytes) from error
        raise ReadError(path, offset_bytes=0, nbytes=nbytes, reason=f"opening it: {error.strerror}") from error
