"""The manifest of a store, which names the file of each object's version; and the lock of a store's folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

from offload.blocks import PAGE_BYTES, ObjectLayout, PlacedTensor, round_up
from offload.errors import FolderInUse, SourceError, WriteError
from offload.files.file import read_all, reason_of, write_failure
from offload.files.folder import Folder
from offload.files.safetensors import DTYPES
from offload.files.strict_json import MAX_JSON_BYTES, JsonObject, parse_json_object, short

MANIFEST = "store.json"
OBJECTS = "objects"
_LOCK = "store.lock"
_MAX_LOCK_BYTES = 512
_FORMAT = "offload-store"
_VERSION = 2
_FILE_NAME = re.compile(r"[0-9]{1,18}\.bin", re.ASCII)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
_DAMAGED = "the folder is damaged: restore it from a checkpoint"


class StoreFolder:
    """A store's folder, held open and held alone until it is released or the process ends, however it ends.

    Args:
        path: The folder; made if it is not there.
        holder: What holds it, in a few words for whoever wants it meanwhile.

    Raises:
        SourceError: It is not this user's alone; or it never was a store's, and has files that a store would take for
            its own.
        FolderInUse: Somebody holds it.
        WriteError: It cannot be made, or not be locked.
    """

    def __init__(self, path: Path, *, holder: str = "") -> None:
        self._lock_fd, self._holder = -1, holder
        self._opened: list[Folder] = []
        try:
            self._take(path)
        except BaseException:
            self.release()
            raise
        # A fork shares the lock. The workers of a data loader must not hold it longer than the run itself.
        os.register_at_fork(after_in_child=partial(_release_in_child, weakref.ref(self)))

    def _take(self, path: Path) -> None:
        try:
            self.path, self.folder = path, self._keep(Folder.own(path))
            self.objects = self._keep(self.folder.own_inner(OBJECTS))
        except OSError as error:
            raise write_failure(path, error) from error
        try:
            self._refuse_strangers()
            self._lock(path / _LOCK)
            self.folder.remove_unfinished(MANIFEST)
        except BlockingIOError as error:
            found = os.pread(self._lock_fd, _MAX_LOCK_BYTES, 0).decode(errors="replace")
            pid, _, holder = found.partition("\n")
            holder = "".join(filter(str.isprintable, holder))
            is_own = _has_open(os.fstat(self._lock_fd), beside=self._lock_fd)
            number = int(pid) if pid.isascii() and pid.isdigit() else None
            raise FolderInUse(path, pid=number, holder=holder, is_own=is_own) from error
        except OSError as error:
            reason = f"locking it: {reason_of(error)}"
            raise WriteError(path / _LOCK, offset_bytes=0, nbytes=0, reason=reason) from error

    def put(self, manifest: Manifest) -> None:
        """Replace the manifest, so that after a crash or a power failure it is the old one or the new one.

        The files that it names must be on the disk already. It survives a power failure after `sync`.

        Raises:
            TierFull: The disk is full; the old manifest is in force.
            WriteError: The disk failed; likewise.
        """
        raw = json.dumps(_to_json(manifest), separators=(",", ":")).encode()
        try:
            self.folder.put(MANIFEST, raw)
        except OSError as error:
            raise write_failure(self.path / MANIFEST, error, nbytes=len(raw)) from error

    def release(self) -> None:
        """Let others have the folder. Twice is fine."""
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)
        for folder in self._opened:
            folder.close()

    def _keep(self, folder: Folder) -> Folder:
        self._opened.append(folder)
        return folder

    def _refuse_strangers(self) -> None:
        if {_LOCK, MANIFEST}.isdisjoint(self.folder.names()) and (strangers := own_files(self.objects)):
            problem = "it is named like a file of a store, and there was no store here"
            file = self.objects.path / strangers[0]
            raise SourceError(file, field="name", problem=problem, remedy="give another folder")

    def _lock(self, file: Path) -> None:
        self._lock_fd = self.folder.open_file(file.name, os.O_RDWR | os.O_CREAT)
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, f"{os.getpid()}\n{self._holder}".encode()[:_MAX_LOCK_BYTES], 0)

    def __del__(self) -> None:
        self.release()


def _has_open(file: os.stat_result, *, beside: int) -> bool:
    """Whether this process has a file open under another descriptor than `beside`.

    Numbers of processes do not tell: in two containers that share a folder, both may be number 1.
    """
    for name in os.listdir("/proc/self/fd"):
        # The descriptor that lists them is closed by now, as may be those of other threads.
        with suppress(OSError):
            if int(name) != beside and os.path.samestat(os.fstat(int(name)), file):
                return True
    return False


def _release_in_child(folder: weakref.ref[StoreFolder]) -> None:
    held = folder()
    if held is not None:
        held.release()


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """One version of one object."""

    file: str
    """Name of its file in the store's folder of objects."""
    layout: ObjectLayout
    """Its tensors in that file, which is exactly as long as the layout."""
    crc32: int
    """Checksum of the file."""


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


def own_files(objects: Folder) -> list[str]:
    """Names of the files of objects, also of those that no manifest names, in the order of their numbers."""
    return sorted(filter(is_object_file, objects.files()), key=lambda name: int(name.removesuffix(".bin")))


def next_number(objects: Folder) -> int:
    """A number such that no file of an object has it, or a higher one, whatever else may have such a name."""
    names = filter(is_object_file, objects.names())
    return 1 + max((int(name.removesuffix(".bin")) for name in names), default=0)


def read_manifest(folder: Folder) -> Manifest:
    """Read and check a folder's manifest; that its files are there, `check_file` finds out.

    Raises:
        SourceError: There is none, it is damaged, or something that it says cannot be true; names file and field.
    """
    file = folder.path / MANIFEST
    try:
        raw = read_all(folder.open_file(MANIFEST), MAX_JSON_BYTES)
    except OSError as error:
        problem, remedy = f"it cannot be read ({reason_of(error)})", "check what it is, permissions and the disk"
        if error.errno == errno.ENOENT:
            problem, remedy = "it does not exist: nothing was committed here", "give another folder"
        raise SourceError(file, field="file", problem=problem, remedy=remedy) from error
    return _manifest_from(parse_json_object(file, raw, field="file", remedy=_DAMAGED))


def missing_files(manifest: Manifest, folder: Folder, objects: Folder) -> Iterator[SourceError]:
    """What is wrong with the files that a manifest names, as far as it shows without reading them."""
    for name, stored in manifest.objects.items():
        file = objects.path / stored.file
        try:
            status = objects.status(stored.file)
        except OSError as error:
            problem = f"{file} is not there ({error.strerror})"
        else:
            if not stat.S_ISREG(status.st_mode):
                problem = f"{file} is not a regular file"
            elif status.st_size != stored.layout.nbytes:
                problem = f"expected {file} to have {stored.layout.nbytes} bytes, it has {status.st_size}"
            else:
                continue
        yield damage(folder, name, problem)


def damage(folder: Folder, name: str, problem: str) -> SourceError:
    """Says that the file of an object is not what the manifest says."""
    name = name if name.isprintable() else short(name)
    return SourceError(folder.path / MANIFEST, field=f"objects.{name}.file", problem=problem, remedy=_DAMAGED)


def _to_json(manifest: Manifest) -> dict[str, object]:
    objects = {
        name: {
            "file": stored.file,
            "nbytes": stored.layout.nbytes,
            "crc32": stored.crc32,
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
    members: dict[str, object] = {
        "format": _FORMAT,
        "version": _VERSION,
        "fingerprint": manifest.fingerprint,
        "step": manifest.step,
        "extra": dict(manifest.extra),
        "objects": objects,
    }
    # What a reader gets, so that both count the same: JSON has no integer keys and no tuples.
    members = json.loads(json.dumps(members))
    return members | {"sha256": _digest(members)}


def _digest(members: Mapping[str, object]) -> str:
    """Checksum of everything that a manifest says."""
    said = {key: value for key, value in members.items() if key != "sha256"}
    return sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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
    manifest = Manifest(
        fingerprint=root.text("fingerprint"),
        step=root.natural("step"),
        extra=root.inner("extra").members,
        objects=objects,
    )
    # Last: what cannot be true has been named by then, what could be true and was not written is found out here.
    if root.text("sha256") != _digest(root.members):
        root.refuse("sha256", "the manifest is not what was written: its checksum is another one")
    return manifest


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
    return StoredObject(file=file, layout=layout, crc32=entry.natural("crc32"))


def _tensor_from(entry: JsonObject, name: str) -> PlacedTensor:
    dtype = entry.members.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        entry.refuse("dtype", f"expected the name of a type such as float32, got {short(dtype)}")
    offset_bytes = entry.natural("offset_bytes")
    if offset_bytes % PAGE_BYTES:
        entry.refuse("offset_bytes", f"expected a multiple of {PAGE_BYTES}, got {offset_bytes}")
    return PlacedTensor(name=name, dtype=_DTYPES[dtype], shape=entry.naturals("shape"), offset_bytes=offset_bytes)
