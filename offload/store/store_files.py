"""The files of a store's objects: made, used again once nothing refers to them, never written while something does.

The transfers of a store: versions of objects from buffers to files and back.

A committed state in another folder: by hard links where the file system has them, else copied in bounded memory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from offload.blocks import BlockLayout, round_up
from offload.buffers import StagingBuffer
from offload.errors import ReadError
from offload.files.file import OwnFile, Pread, Pwrite, write_failure
from offload.files.file_io import FileWriter, Part
from offload.store.manifest import (
    OBJECTS,
    FolderLock,
    Manifest,
    StoredObject,
    next_number,
    own_files,
    put_manifest,
    sync_folder,
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


class ObjectIo:
    """Reads and writes object files in threads of its own; each is open for as long as a transfer uses it.

    Args:
        files: The files.
        io: How.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(self, files: ObjectFiles, io: StoreIo) -> None:
        self._files, self._trace = files, io.trace
        self._writer = FileWriter(num_threads=io.num_writers, request_bytes=io.request_bytes)
        self._reader = FileWriter(num_threads=io.num_readers, request_bytes=io.request_bytes)
        # Not the store's: its owner waits for transfers with that one held.
        self._lock = threading.Lock()
        self._written_bytes = self._read_bytes = 0

    @property
    def written_bytes(self) -> int:
        """Bytes written so far."""
        return self._written_bytes

    @property
    def read_bytes(self) -> int:
        """Bytes read so far."""
        return self._read_bytes

    def write(self, name: str, file: ObjectFile, opened: OwnFile, data: Tensor) -> Transfer:
        """Start writing a whole file; it is on the disk when the transfer has ended.

        Args:
            name: Of the object, for errors and traces.
            file: The file.
            opened: The same; closed by this, also on errors.
            data: Its contents: tensor of shape (file.nbytes,), uint8, in host memory.

        Raises:
            Closed: This was closed.
            ValueError: `data` has the wrong type or place.
        """
        ended = partial(self._note, "disk write", (opened,))
        try:
            transfer = self._writer.write(opened, data, offset_bytes=0, name=name, sync=True, at_end=ended)
        except BaseException:
            opened.close()
            raise
        file.transfers.append(transfer)
        return transfer

    def read(self, layout: BlockLayout, into: Tensor, files: Mapping[Path, ObjectFile]) -> Transfer:
        """Start reading a block.

        Args:
            layout: What to read and where to put it.
            into: Tensor of shape (n,), uint8, n >= `layout.buffer_bytes`, in host memory.
            files: For each file that the layout speaks of, the one that stands for it.

        Raises:
            ReadError: A file cannot be opened.
            Closed: This was closed.
            ValueError: `into` has the wrong type or place.
        """
        opened: dict[Path, OwnFile] = {}
        try:
            for path, file in files.items():
                opened[path] = self._files.open(file)
            parts = [
                Part(
                    file=opened[extent.file],
                    offset_bytes=extent.file_offset_bytes,
                    start=extent.buffer_offset_bytes,
                    # Whole pages: that is what the files consist of.
                    nbytes=round_up(extent.nbytes, layout.page_bytes),
                )
                for extent in layout.extents
            ]
            ended = partial(self._note, "disk", tuple(opened.values()))
            transfer = self._reader.read_parts(parts, into, name=layout.name, at_end=ended)
        except BaseException:
            for own in opened.values():
                own.close()
            raise
        for file in files.values():
            file.transfers.append(transfer)
        return transfer

    def close(self) -> None:
        """Fail what has not been begun, wait for requests in flight, stop the threads. May be called twice."""
        self._writer.close()
        self._reader.close()

    def _note(self, lane: str, opened: tuple[OwnFile, ...], transfer: Transfer) -> None:
        for file in opened:
            file.close()
        if transfer.failed:
            return
        with self._lock:
            if lane == "disk":
                self._read_bytes += transfer.nbytes
            else:
                self._written_bytes += transfer.nbytes
        if self._trace is not None:
            self._trace.add(lane, transfer.name, transfer.start_ns, transfer.end_ns, nbytes=transfer.nbytes)


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
        raise write_failure(target, error, offset_bytes=0, nbytes=0) from error
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
            raise write_failure(target, error, offset_bytes=0, nbytes=0) from error
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    reading = _opened(source, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        writing = _opened(target, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            with StagingBuffer(_COPY_BYTES) as buffer:
                view = bytes_of(buffer.tensor, name=str(target))
                size_bytes = reading.size_bytes
                for start in range(0, size_bytes, _COPY_BYTES):
                    piece = view[: min(_COPY_BYTES, size_bytes - start)]
                    reading.read(piece, offset_bytes=start)
                    writing.write(piece, offset_bytes=start)
            writing.sync()
        finally:
            writing.close()
    finally:
        reading.close()


def _opened(path: Path, flags: int) -> OwnFile:
    try:
        return OwnFile(os.open(path, flags | os.O_CLOEXEC, 0o666), name=path)
    except OSError as error:
        if flags & os.O_CREAT:
            raise write_failure(path, error, offset_bytes=0, nbytes=0) from error
        raise ReadError(path, offset_bytes=0, nbytes=0, reason=f"opening it: {error.strerror}") from error


__all__ = ["ObjectFile", "ObjectFiles", "ObjectIo", "StoreIo", "copy_state"]
