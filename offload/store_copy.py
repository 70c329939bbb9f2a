"""A committed state in another folder: by hard links where the file system has them, else copied in bounded memory."""

import contextlib
import errno
import os
from dataclasses import replace
from pathlib import Path

from offload.buffers import StagingBuffer
from offload.errors import ReadError
from offload.folder_lock import FolderLock
from offload.manifest import OBJECTS, Manifest, StoredObject, next_number, own_files, put_manifest, sync_folder
from offload.own_file import OwnFile, write_failure
from offload.transfer import bytes_of

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


__all__ = ["copy_state"]
