"""The manifest of a store, which names the file of each object's version; and the lock of a store's folder."""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from offload.blocks import PAGE_BYTES, ObjectLayout, PlacedTensor, round_up
from offload.errors import FolderInUse, SourceError, WriteError
from offload.files.file import write_failure
from offload.files.safetensors_read import DTYPES
from offload.files.strict_json import MAX_JSON_BYTES, JsonObject, parse_json_object, short

MANIFEST = "store.json"
OBJECTS = "objects"
_LOCK = "store.lock"
_UNFINISHED = MANIFEST + ".tmp"
_FORMAT = "offload-store"
_VERSION = 1
_FILE_NAME = re.compile(r"[0-9]{1,18}\.bin", re.ASCII)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
_DAMAGED = "the folder is damaged: restore it from a checkpoint"


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


def _release_in_child(lock: weakref.ref[FolderLock]) -> None:
    held = lock()
    if held is not None:
        held.release()


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """One version of one object."""

    file: str
    """Name of its file in the store's folder of objects."""
    layout: ObjectLayout
    """Its tensors in that file, which is exactly as long as the layout."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One committed state."""

    fingerprint: str
    """What the state belongs to, in the words of whoever made the store."""
    step: int
    """Number of the step that it is the result of."""
    extra: Mapping[str, object]
    """What else belongs to the state: anything JSON can say."""
    objects: Mapping[str, StoredObject]
    """Every object by name."""


def is_object_file(name: str) -> bool:
    """Whether a file's name is one that a store gives to the files of its objects."""
    return _FILE_NAME.fullmatch(name) is not None


def own_files(folder: Path) -> list[Path]:
    """The files of objects in a store's folder, also those that no manifest names, in the order of their numbers."""
    try:
        entries = list(os.scandir(folder / OBJECTS))
    except FileNotFoundError:
        return []
    names = [entry.name for entry in entries if is_object_file(entry.name) and entry.is_file(follow_symlinks=False)]
    return [folder / OBJECTS / name for name in sorted(names, key=lambda name: int(name.removesuffix(".bin")))]


def next_number(folder: Path) -> int:
    """A number such that no file of an object has it, or a higher one, whatever else may have such a name."""
    names = [entry.name for entry in os.scandir(folder / OBJECTS)]
    return 1 + max((int(name.removesuffix(".bin")) for name in names if is_object_file(name)), default=0)


def put_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace a folder's manifest, so that after a crash or a power failure it is the old one or the new one.

    The files that it names must be on the disk already. It survives a power failure after `sync_folder(folder)`.

    Raises:
        TierFull: The disk is full; the old manifest is in force.
        WriteError: The disk failed; likewise.
    """
    raw = json.dumps(_to_json(manifest), separators=(",", ":")).encode()
    unfinished = folder / _UNFINISHED
    try:
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            done = 0
            while done < len(raw):
                done += os.write(fd, raw[done:])
            os.fsync(fd)
        finally:
            os.close(fd)
        unfinished.replace(folder / MANIFEST)
    except OSError as error:
        raise write_failure(unfinished, error, offset_bytes=0, nbytes=len(raw)) from error


def read_manifest(folder: Path) -> Manifest:
    """Read and check a folder's manifest, and that the files that it names are there and as long as they have to be.

    Raises:
        SourceError: There is none, it is damaged, or something that it says cannot be true; names file and field.
    """
    file = folder / MANIFEST
    try:
        size_bytes = file.stat().st_size
        raw = file.read_bytes() if size_bytes <= MAX_JSON_BYTES else b""
    except FileNotFoundError as error:
        raise SourceError(
            file, field="file", problem="it does not exist: nothing was committed here", remedy="give another folder"
        ) from error
    except OSError as error:
        raise SourceError(
            file, field="file", problem=f"it cannot be read ({error.strerror})", remedy="check permissions and the disk"
        ) from error
    if size_bytes > MAX_JSON_BYTES:
        problem = f"expected at most {MAX_JSON_BYTES} bytes, got {size_bytes}"
        raise SourceError(file, field="file", problem=problem, remedy=_DAMAGED)
    manifest = _manifest_from(parse_json_object(file, raw, field="file", remedy=_DAMAGED))
    for name, stored in manifest.objects.items():
        _check_file(file, folder / OBJECTS / stored.file, name=name, nbytes=stored.layout.nbytes)
    return manifest


def _check_file(manifest: Path, file: Path, *, name: str, nbytes: int) -> None:
    try:
        status = os.lstat(file)
    except OSError as error:
        problem = f"{file} is not there ({error.strerror})"
    else:
        if stat.S_ISREG(status.st_mode) and status.st_size == nbytes:
            return
        problem = f"{file} is not a regular file"
        if stat.S_ISREG(status.st_mode):
            problem = f"expected {file} to have {nbytes} bytes, it has {status.st_size}"
    raise SourceError(manifest, field=f"objects.{name}.file", problem=problem, remedy=_DAMAGED)


def _to_json(manifest: Manifest) -> dict[str, object]:
    objects = {
        name: {
            "file": stored.file,
            "nbytes": stored.layout.nbytes,
            "tensors": {
                placed.name: {
                    "dtype": str(placed.dtype).removeprefix("torch."),
                    "shape": list(placed.shape),
                    "offset_bytes": placed.offset_bytes,
                }
                for placed in stored.layout.tensors
            },
        }
        for name, stored in manifest.objects.items()
    }
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "fingerprint": manifest.fingerprint,
        "step": manifest.step,
        "extra": dict(manifest.extra),
        "objects": objects,
    }


def _manifest_from(root: JsonObject) -> Manifest:
    if root.members.get("format") != _FORMAT:
        root.refuse("format", f'expected "{_FORMAT}", got {short(root.members.get("format"))}')
    if root.members.get("version") != _VERSION:
        version = short(root.members.get("version"))
        root.refuse("version", f"expected {_VERSION}, got {version}: another version of this library")
    entries = root.inner("objects")
    objects = {name: _object_from(entries.inner(name)) for name in entries}
    holders: dict[str, str] = {}
    for name, stored in objects.items():
        if holders.setdefault(stored.file, name) != name:
            root.refuse("objects", f"{stored.file} is the file of several objects")
    return Manifest(
        fingerprint=root.text("fingerprint"),
        step=root.natural("step"),
        extra=root.inner("extra").members,
        objects=objects,
    )


def _object_from(entry: JsonObject) -> StoredObject:
    file = entry.members.get("file")
    if not isinstance(file, str) or not is_object_file(file):
        entry.refuse("file", f"expected a name such as 12.bin, got {short(file)}")
    tensors = entry.inner("tensors")
    placed: list[PlacedTensor] = []
    end_bytes = 0
    for name in tensors:
        tensor = _tensor_from(tensors.inner(name), name)
        if tensor.offset_bytes < end_bytes:
            problem = f"expected {end_bytes} or more, got {tensor.offset_bytes}: tensors overlap"
            tensors.refuse(f"{name}.offset_bytes", problem)
        end_bytes = round_up(tensor.offset_bytes + tensor.nbytes, PAGE_BYTES)
        placed.append(tensor)
    layout = ObjectLayout(tensors=tuple(placed))
    if entry.natural("nbytes") != layout.nbytes:
        entry.refuse("nbytes", f"its tensors take {layout.nbytes} bytes, got {entry.natural('nbytes')}")
    return StoredObject(file=file, layout=layout)


def _tensor_from(entry: JsonObject, name: str) -> PlacedTensor:
    dtype = entry.members.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        entry.refuse("dtype", f"expected the name of a type such as float32, got {short(dtype)}")
    offset_bytes = entry.natural("offset_bytes")
    if offset_bytes % PAGE_BYTES:
        entry.refuse("offset_bytes", f"expected a multiple of {PAGE_BYTES}, got {offset_bytes}")
    return PlacedTensor(name=name, dtype=_DTYPES[dtype], shape=entry.naturals("shape"), offset_bytes=offset_bytes)
