"""A folder of ours belongs to one run at a time.

The manifest of a store: which file holds which version of which object. Replaced in one step, checked when read.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from offload.blocks import PAGE_BYTES, ObjectLayout, PlacedTensor, round_up
from offload.errors import FolderInUse, SourceError, WriteError
from offload.files.file import write_failure

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


def _release_in_child(lock: weakref.ref[FolderLock]) -> None:
    held = lock()
    if held is not None:
        held.release()


MANIFEST = "store.json"


OBJECTS = "objects"


_FORMAT = "offload-store"


_VERSION = 1


_UNFINISHED = MANIFEST + ".tmp"


_FILE_NAME = re.compile(r"[0-9]{1,18}\.bin", re.ASCII)


_MAX_JSON_BYTES = 100_000_000


_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint64,
        torch.uint32,
        torch.uint16,
        torch.uint8,
        torch.bool,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e8m0fnu,
    )
}


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


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk: names of new files, and which file a name stands for.

    Raises:
        WriteError: The disk failed.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise WriteError(folder, offset_bytes=0, nbytes=0, reason=f"its entries: {error.strerror}") from error


def read_manifest(folder: Path) -> Manifest:
    """Read and check a folder's manifest, and that the files that it names are there and as long as they have to be.

    Raises:
        SourceError: There is none, it is damaged, or something that it says cannot be true; names file and field.
    """
    file = folder / MANIFEST
    reader = _ManifestReader(file)
    try:
        if file.stat().st_size > _MAX_JSON_BYTES:
            reader.refuse("file", f"expected at most {_MAX_JSON_BYTES} bytes, got {file.stat().st_size}")
        raw = file.read_bytes()
    except FileNotFoundError as error:
        raise SourceError(
            file, field="file", problem="it does not exist: nothing was committed here", remedy="give another folder"
        ) from error
    except OSError as error:
        raise SourceError(
            file, field="file", problem=f"it cannot be read ({error.strerror})", remedy="check permissions and the disk"
        ) from error
    manifest = reader.manifest(raw)
    for name, stored in manifest.objects.items():
        _check_file(reader, folder / OBJECTS / stored.file, name=name, nbytes=stored.layout.nbytes)
    return manifest


def _check_file(reader: _ManifestReader, file: Path, *, name: str, nbytes: int) -> None:
    try:
        status = os.lstat(file)
    except OSError as error:
        reader.refuse(f"objects.{name}.file", f"{file} is not there ({error.strerror})")
    if not stat.S_ISREG(status.st_mode):
        reader.refuse(f"objects.{name}.file", f"{file} is not a regular file")
    if status.st_size != nbytes:
        reader.refuse(f"objects.{name}.file", f"expected {file} to have {nbytes} bytes, it has {status.st_size}")


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


class _ManifestReader:
    """Believes nothing in a manifest before it has looked at it."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def refuse(self, field: str, problem: str, *, cause: BaseException | None = None) -> NoReturn:
        raise SourceError(
            self._file, field=field, problem=problem, remedy="the folder is damaged: restore it from a checkpoint"
        ) from cause

    def manifest(self, raw: bytes) -> Manifest:
        entries = self._parse(raw)
        if entries.get("format") != _FORMAT:
            self.refuse("format", f'expected "{_FORMAT}", got {_short(entries.get("format"))}')
        if entries.get("version") != _VERSION:
            problem = f"expected {_VERSION}, got {_short(entries.get('version'))}: another version of this library"
            self.refuse("version", problem)
        fingerprint = entries.get("fingerprint")
        if not isinstance(fingerprint, str):
            self.refuse("fingerprint", f"expected text, got {_short(fingerprint)}")
        objects = {
            name: self._object(name, entry) for name, entry in self._entries(entries.get("objects"), "objects").items()
        }
        shared = self._twice(stored.file for stored in objects.values())
        if shared is not None:
            self.refuse("objects", f"{shared} is the file of several objects")
        return Manifest(
            fingerprint=fingerprint,
            step=self._count(entries.get("step"), "step"),
            extra=self._entries(entries.get("extra"), "extra"),
            objects=objects,
        )

    def _object(self, name: str, entry: object) -> StoredObject:
        field = f"objects.{name}"
        entries = self._entries(entry, field)
        file = entries.get("file")
        if not isinstance(file, str) or not is_object_file(file):
            self.refuse(f"{field}.file", f"expected a name such as 12.bin, got {_short(file)}")
        tensors = [
            self._tensor(f"{field}.tensors.{key}", key, value)
            for key, value in self._entries(entries.get("tensors"), f"{field}.tensors").items()
        ]
        end_bytes = 0
        for placed in tensors:
            if placed.offset_bytes < end_bytes:
                problem = f"expected {end_bytes} or more, got {placed.offset_bytes}: tensors overlap"
                self.refuse(f"{field}.tensors.{placed.name}.offset_bytes", problem)
            end_bytes = round_up(placed.offset_bytes + placed.nbytes, PAGE_BYTES)
        layout = ObjectLayout(tensors=tuple(tensors))
        nbytes = self._count(entries.get("nbytes"), f"{field}.nbytes")
        if nbytes != layout.nbytes:
            self.refuse(f"{field}.nbytes", f"its tensors take {layout.nbytes} bytes, got {nbytes}")
        return StoredObject(file=file, layout=layout)

    def _tensor(self, field: str, name: str, entry: object) -> PlacedTensor:
        entries = self._entries(entry, field)
        dtype, shape = entries.get("dtype"), entries.get("shape")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            self.refuse(f"{field}.dtype", f"expected the name of a type such as float32, got {_short(dtype)}")
        if not isinstance(shape, list):
            self.refuse(f"{field}.shape", f"expected a list of sizes, got {_short(shape)}")
        offset_bytes = self._count(entries.get("offset_bytes"), f"{field}.offset_bytes")
        if offset_bytes % PAGE_BYTES:
            self.refuse(f"{field}.offset_bytes", f"expected a multiple of {PAGE_BYTES}, got {offset_bytes}")
        sizes = tuple(self._count(size, f"{field}.shape") for size in shape)
        return PlacedTensor(name=name, dtype=_DTYPES[dtype], shape=sizes, offset_bytes=offset_bytes)

    def _parse(self, raw: bytes) -> dict[str, object]:
        def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
            twice = self._twice(key for key, _ in pairs)
            if twice is not None:
                self.refuse("file", f"key {_short(twice)} occurs twice")
            return dict(pairs)

        try:
            return self._entries(json.loads(raw, object_pairs_hook=unique), "file")
        except SourceError:
            raise
        except (ValueError, RecursionError) as error:
            self.refuse("file", f"not valid JSON ({error})", cause=error)

    def _entries(self, value: object, field: str) -> dict[str, object]:
        if not isinstance(value, dict):
            self.refuse(field, f"expected an object, got {_short(value)}")
        return value

    def _count(self, value: object, field: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            self.refuse(field, f"expected a whole number, 0 or more, got {_short(value)}")
        return value

    def _twice(self, keys: Iterable[str]) -> str | None:
        counts = Counter(keys).most_common(1)
        return counts[0][0] if counts and counts[0][1] > 1 else None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


__all__ = [
    "MANIFEST",
    "OBJECTS",
    "FolderLock",
    "Manifest",
    "StoredObject",
    "is_object_file",
    "next_number",
    "own_files",
    "put_manifest",
    "read_manifest",
    "sync_folder",
]
