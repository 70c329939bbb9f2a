"""The files of a store's objects: made, written, read, used again once nothing refers to them; and copies of them."""

from __future__ import annotations

import contextlib
import errno
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from offload.buffers import StagingBuffer
from offload.errors import OffloadError, ReadError, SourceError
from offload.files.file import File, Pread, Pwrite, reason_of, sync_folder, write_failure
from offload.files.file_io import FileIO, FilePart
from offload.files.folder import Folder
from offload.store.manifest import (
    MANIFEST,
    OBJECTS,
    Manifest,
    StoredObject,
    StoreFolder,
    damage,
    missing_files,
    next_number,
    own_files,
    read_manifest,
)
from offload.trace import Trace
from offload.transfer import Transfer, bytes_of

_NO_PREALLOCATION = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS})


@dataclass(kw_only=True, eq=False)
class ObjectFile:
    """One file, and what is being done with it."""

    name: str
    """Its name in the folder of objects."""
    nbytes: int
    """How long it is."""
    crc32: int = 0
    """Checksum of what was written to it last, once that has ended."""
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

    def __init__(self, folder: StoreFolder, io: StoreIo) -> None:
        self._objects, self._io = folder.objects, io
        self._free = {
            name: ObjectFile(name=name, nbytes=self._objects.status(name).st_size) for name in own_files(self._objects)
        }
        self._next_number = next_number(self._objects)
        self._has_new_names = True
        # Reads do not wait behind writes.
        self._writer = FileIO(num_threads=io.num_writers, request_bytes=io.request_bytes)
        self._reader = FileIO(num_threads=io.num_readers, request_bytes=io.request_bytes)

    def of(self, stored: StoredObject) -> ObjectFile:
        """The file of a committed object; no longer free then."""
        file = self._free.pop(stored.file)
        file.crc32 = stored.crc32
        return file

    def free(self, file: ObjectFile) -> None:
        """Let another version have a file, as soon as nothing uses it."""
        self._free[file.name] = file

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
            transfer = self._writer.write(
                opened,
                data,
                offset_bytes=0,
                name=name,
                sync=True,
                checksum=partial(setattr, file, "crc32"),
                at_end=ended,
            )
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
        parts: list[FilePart] = []
        start = 0
        try:
            for file in files:
                opened = self._opened(file, _open(self._objects, file.name, os.O_RDONLY, nbytes=file.nbytes))
                parts.append(FilePart(opened, offset_bytes=0, start=start, nbytes=file.nbytes, room_bytes=file.nbytes))
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
            self._objects.sync()
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
            del self._free[file.name]
            try:
                fd = self._objects.open_file(file.name, os.O_RDWR)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise write_failure(self._objects.path / file.name, error, nbytes=nbytes) from error
            if os.fstat(fd).st_nlink == 1:
                return self._sized(file, fd, nbytes)
            os.close(fd)
            # Also a checkpoint's: let it keep what is in there.
            self._objects.unlink(file.name)
        name = f"{self._next_number}.bin"
        self._next_number += 1
        self._has_new_names = True
        fd = _open(self._objects, name, os.O_RDWR | os.O_CREAT | os.O_EXCL, nbytes=nbytes)
        return self._sized(ObjectFile(name=name, nbytes=0), fd, nbytes)

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
                self._objects.unlink(file.name)
            raise write_failure(self._objects.path / file.name, error, nbytes=nbytes) from error
        file.nbytes = nbytes
        return file, self._opened(file, fd)

    def _opened(self, file: ObjectFile, fd: int) -> File:
        path = self._objects.path / file.name
        return File(fd, path, direct=self._io.direct, pwrite=self._io.pwrite, pread=self._io.pread)

    def _note(self, lane: str, opened: tuple[File, ...], transfer: Transfer) -> None:
        for file in opened:
            file.close()
        if transfer.failed:
            return
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


def copy_state(manifest: Manifest, source: Folder, target: Path) -> None:
    """Make `target` a store of its own with the state that `manifest` describes; what was committed there goes.

    Interrupted at any instant, `target` has the state that it had before, or the new one.

    Args:
        manifest: The state.
        source: Folder with the files that it names; they must stay as they are meanwhile.
        target: Folder to make or to replace the state of. Files in it that are not a store's are left alone.

    Raises:
        FolderInUse: A run works in `target`.
        TierFull: `target`'s disk is full; its state is as before.
        WriteError: Something could not be written; likewise.
        ReadError: A file of the state could not be read; likewise.
        SourceError: `target` is not this user's alone; or a file of the state is damaged; likewise.
    """
    folder = StoreFolder(target)
    made: list[str] = []
    try:
        before = own_files(folder.objects)
        number = next_number(folder.objects)
        objects: dict[str, StoredObject] = {}
        for name, stored in manifest.objects.items():
            file = f"{number + len(made)}.bin"
            made.append(file)
            _link_or_copy(source, stored, folder.objects, file)
            objects[name] = replace(stored, file=file)
        folder.objects.sync()
        folder.put(replace(manifest, objects=objects))
        # Until its name is on the disk too, a power failure may bring either state back.
        made = []
        folder.folder.sync()
        made = before
        sync_folder(target.parent)
    finally:
        # What did not become the state, or is it no more.
        for file in made:
            with contextlib.suppress(OSError):
                folder.objects.unlink(file)
        folder.release()


def _link_or_copy(source: Folder, stored: StoredObject, target: Folder, name: str) -> None:
    try:
        source.link(stored.file, target, name)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise write_failure(target.path / name, error) from error
        _copy(source, stored, target, name)


def _copy(source: Folder, stored: StoredObject, target: Folder, name: str) -> None:
    made = File(_open(target, name, os.O_RDWR | os.O_CREAT | os.O_EXCL), target.path / name)
    with contextlib.closing(made) as writing:
        crc32 = start = 0
        for piece in _pieces(source, stored.file, pread=os.preadv):
            writing.write(piece, offset_bytes=start)
            start += len(piece)
            crc32 = zlib.crc32(piece, crc32)
        writing.sync()
        if crc32 != stored.crc32:
            problem = "its bytes are not those that were written: the checksum is another one"
            remedy = "the folder is damaged: restore it from a checkpoint"
            raise SourceError(source.path / stored.file, field="contents", problem=problem, remedy=remedy)


def damages(manifest: Manifest, folder: Folder, objects: Folder, *, io: StoreIo) -> Iterator[SourceError | ReadError]:
    """Read all files of a state and say of each what is wrong with it, if anything is.

    Args:
        manifest: The state.
        folder: The store's folder.
        objects: Its folder of objects.
        io: How to read; `num_readers` files at a time.
    """
    missing = {error.field: error for error in missing_files(manifest, folder, objects)}
    yield from missing.values()

    def check(name: str) -> SourceError | ReadError | None:
        stored = manifest.objects[name]
        changed = damage(folder, name, f"the bytes of {objects.path / stored.file} are not those that were written")
        if changed.field in missing:
            return None
        try:
            crc32 = 0
            for piece in _pieces(objects, stored.file, pread=io.pread):
                crc32 = zlib.crc32(piece, crc32)
        except ReadError as error:
            return error
        return None if crc32 == stored.crc32 else changed

    # Nothing is yielded while there is a pool. A collection may run in a thread that is just being started: a generator
    # that was left to it would end its pool there, which takes locks that this thread holds (threading, Python 3.11).
    with ThreadPoolExecutor(io.num_readers, thread_name_prefix="offload-verify") as pool:
        all_found = list(pool.map(check, manifest.objects))
    yield from (found for found in all_found if found is not None)


def verify_store(folder: Path) -> tuple[OffloadError, ...]:
    """Read all of a store's committed state, or of a checkpoint of one, and say what is damaged; nothing is changed.

    Args:
        folder: The store's folder. A run may work in it, and then what that commits meanwhile looks like damage.

    Returns:
        One error for each thing that is wrong, with file and field; none if all is as it was written.
    """
    try:
        with open_state(folder) as (manifest, opened, objects):
            return tuple(damages(manifest, opened, objects, io=StoreIo()))
    except SourceError as error:
        return (error,)


@contextlib.contextmanager
def open_state(path: Path) -> Iterator[tuple[Manifest, Folder, Folder]]:
    """The committed state of a folder that is only read: what it says, the folder, and the folder of its objects.

    Raises:
        SourceError: There is none, or it is damaged.
    """
    with contextlib.ExitStack() as opened:
        try:
            folder = opened.enter_context(Folder.open(path))
            manifest = read_manifest(folder)
            objects = opened.enter_context(folder.inner(OBJECTS))
        except OSError as error:
            problem = f"the store's folder cannot be opened ({reason_of(error)})"
            if error.errno == errno.ENOENT:
                problem = "it does not exist: nothing was committed here"
            remedy = "give another folder"
            raise SourceError(path / MANIFEST, field="file", problem=problem, remedy=remedy) from error
        yield manifest, folder, objects


def _pieces(folder: Folder, name: str, *, pread: Pread) -> Iterator[memoryview]:
    """A file's bytes in order, through one buffer that the next piece overwrites."""
    opened = File(_open(folder, name, os.O_RDONLY), folder.path / name, pread=pread)
    with contextlib.closing(opened) as file, StagingBuffer(_COPY_BYTES) as buffer:
        view = bytes_of(buffer.tensor, name=name)
        size_bytes = file.size_bytes
        for start in range(0, size_bytes, _COPY_BYTES):
            piece = view[: min(_COPY_BYTES, size_bytes - start)]
            file.read(piece, offset_bytes=start)
            yield piece


def _open(folder: Folder, name: str, flags: int, *, nbytes: int = 0) -> int:
    """Open a file of an object.

    Raises:
        ReadError: It cannot be opened for reading.
        TierFull: It cannot be made: there is no room.
        WriteError: It cannot be made.
    """
    try:
        return folder.open_file(name, flags)
    except OSError as error:
        if flags & os.O_CREAT:
            raise write_failure(folder.path / name, error, nbytes=nbytes) from error
        reason = f"opening it: {error.strerror}"
        raise ReadError(folder.path / name, offset_bytes=0, nbytes=nbytes, reason=reason) from error
