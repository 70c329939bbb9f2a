"""A store of mutable state on disk: versions of named objects, of which a kill at any instant leaves a whole step."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Tensor

from offload.blocks import ObjectLayout
from offload.errors import Closed, ClosedAfterwards, OffloadError, SourceError, TierFull, WriteError
from offload.files.file import sync_folder
from offload.files.strict_json import is_text
from offload.store.manifest import MANIFEST, Manifest, StoredObject, StoreFolder, missing_files, read_manifest
from offload.store.store_files import ObjectFile, ObjectFiles, StoreIo, copy_state, damages, open_state
from offload.transfer import Transfer


@dataclass(frozen=True, kw_only=True)
class _Version:
    """One version of an object, written in this step or committed."""

    layout: ObjectLayout
    file: ObjectFile | None
    """None where no file could be had; `write` says why."""
    write: Transfer | None = None
    """How the step wrote it; None once it is committed."""


class Store(ClosedAfterwards):
    """A folder with named objects, each a set of tensors in a file of its own, in versions.

    Objects are written within a step; `commit` makes the step's versions the state, all at once, and those that it
    replaces free for the next step. Until then, and after a kill at any instant, a disk that is full or one that fails,
    the state is that of the last commit. An object that a step does not write keeps its version. Reads give the newest
    version, in the middle of a step too.

    One run at a time has a folder. What steps write takes twice its size on disk. Methods may be called from several
    threads; transfers run in threads of the store's own. Made by `create` and `open`.
    """

    def __init__(self, folder: StoreFolder, manifest: Manifest, io: StoreIo) -> None:
        """Take over a locked folder; `create` and `open` do that."""
        self._folder, self._manifest, self._io = folder, manifest, io
        self._lock = threading.RLock()
        self._closed = False
        self._files = ObjectFiles(folder, io)
        self._committed = {
            name: _Version(layout=stored.layout, file=self._files.of(stored))
            for name, stored in manifest.objects.items()
        }
        self._step: dict[str, _Version | None] | None = None
        self._broken: OffloadError | None = None

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether a folder has a committed state."""
        return os.path.lexists(folder / MANIFEST)

    @staticmethod
    def restore(source: Path, target: Path) -> None:
        """Make `target` a store with the state of `source`, by hard links where that is possible; then `open` it.

        `source` keeps its state; all of it is read first, and has to be what was written. Interrupted at any instant,
        `target` has its old state or the new one.

        Raises:
            SourceError: `source` has no state, or is damaged.
            FolderInUse: A run works in `target`.
            TierFull: There is no room; `target` is as before.
            WriteError: Something cannot be written; likewise.
        """
        with open_state(source) as (manifest, opened, objects):
            _raise_first(damages(manifest, opened, objects, io=StoreIo()))
            copy_state(manifest, objects, target)

    @classmethod
    def create(cls, folder: Path, *, fingerprint: str, io: StoreIo | None = None, holder: str = "") -> Self:
        """Begin in a folder that has no state yet, made if it is not there. Other files in it are left alone.

        Args:
            folder: The folder.
            fingerprint: What the state will belong to: of a model, its data, its options.
            io: How to read and write.
            holder: What works there from now on, in a few words for whoever finds the folder in use.

        Raises:
            FolderInUse: Another run works there.
            SourceError: There is a state already.
            WriteError: The folder cannot be made or written.
        """
        with ExitStack() as undo:
            owned = StoreFolder(folder, holder=holder)
            undo.callback(owned.release)
            sync_folder(folder.parent)
            if cls.exists(folder):
                problem = "there is a committed state already"
                remedy = "open it to go on with it, or give another folder"
                raise SourceError(folder / MANIFEST, field="file", problem=problem, remedy=remedy)
            manifest = Manifest(fingerprint=fingerprint, step=0, extra={}, objects={})
            store = cls(owned, manifest, io or StoreIo())
            undo.pop_all()
            return store

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        fingerprint: str | None = None,
        io: StoreIo | None = None,
        verify: bool = True,
        holder: str = "",
    ) -> Self:
        """Go on with the state that was committed last.

        Args:
            folder: The folder.
            fingerprint: What the state has to belong to; None takes any.
            io: How to read and write.
            verify: Read all of the state first; without that, call `verify` before anything is believed.
            holder: As for `create`.

        Raises:
            FolderInUse: Another run works there.
            SourceError: There is no state, it belongs to something else, or it is damaged; names file and field.
            ReadError: The disk failed.
        """
        if not cls.exists(folder):
            with open_state(folder):
                pass
        with ExitStack() as undo:
            owned = StoreFolder(folder, holder=holder)
            undo.callback(owned.release)
            manifest = read_manifest(owned.folder)
            if fingerprint not in (None, manifest.fingerprint):
                problem = f"expected {fingerprint}, got {manifest.fingerprint}: the state of another run"
                remedy = "give this run another folder, or start it with the options of the other one"
                raise SourceError(folder / MANIFEST, field="fingerprint", problem=problem, remedy=remedy)
            io = io or StoreIo()
            check = damages(manifest, owned.folder, owned.objects, io=io) if verify else None
            _raise_first(check or missing_files(manifest, owned.folder, owned.objects))
            store = cls(owned, manifest, io)
            undo.pop_all()
            return store

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self._folder.path

    @property
    def step(self) -> int:
        """Number that the last commit gave; 0 before the first."""
        return self._manifest.step

    @property
    def extra(self) -> Mapping[str, object]:
        """What else the last commit said."""
        return self._manifest.extra

    @property
    def fingerprint(self) -> str:
        """What the state belongs to."""
        return self._manifest.fingerprint

    @property
    def disk_bytes(self) -> int:
        """Disk space that all versions take now, those included that wait to be written again."""
        with self._lock:
            versions = (*self._committed.values(), *(self._step or {}).values())
            return self._files.disk_bytes([version.file for version in versions if version and version.file])

    def names(self) -> tuple[str, ...]:
        """Objects that there are now, those of the step that is under way included."""
        with self._lock:
            newest = self._committed | (self._step or {})
            return tuple(name for name, version in newest.items() if version is not None)

    def layout(self, name: str) -> ObjectLayout:
        """How an object's newest version is laid out, in its file and in a buffer for `load`.

        Raises:
            KeyError: There is no such object.
        """
        with self._lock:
            return self._newest(name).layout

    def begin_step(self) -> None:
        """Begin a step: only within one is anything written.

        Raises:
            RuntimeError: One is under way.
        """
        with self._lock:
            self._check_usable()
            if self._step is not None:
                raise RuntimeError("a step is under way; commit or abort it first")
            self._step = {}

    def write(self, name: str, layout: ObjectLayout, data: Tensor) -> Transfer:
        """Start writing a new version of an object, or its first.

        Returns at once. Leave `data` alone until `wait()` returns or raises; the caller keeps ownership of it. When the
        transfer has ended, the bytes are on the disk. A second write of an object in a step replaces the first.

        Args:
            name: Name of the object, any text.
            layout: Its tensors.
            data: Tensor of shape (layout.nbytes,), uint8, in host memory; page-aligned, or the write is not direct.

        Returns:
            The write. `wait()` raises `TierFull` where the disk is full and `WriteError` where it fails; so does
            `commit` then, until the object has been written successfully or the step is aborted.

        Raises:
            RuntimeError: No step is under way.
            ValueError: `data` has the wrong type, place or size.
            Closed: The store was closed.
        """
        if not is_text(name):
            raise ValueError(f"{name!a}: expected text, got half of a surrogate pair")
        if data.numel() != layout.nbytes:
            raise ValueError(f"{name}: expected {layout.nbytes} bytes, got {data.numel()}")
        with self._lock:
            step = self._in_step()
            self._retire(step.pop(name, None))
            file: ObjectFile | None = None
            try:
                file, transfer = self._files.write(name, data)
            except (TierFull, WriteError) as error:
                transfer = Transfer(name, nbytes=0, num_pieces=0, memory=data)
                transfer.finish_piece(error, num_pieces=0)
            step[name] = _Version(layout=layout, file=file, write=transfer)
            return transfer

    def remove(self, name: str) -> None:
        """Have no such object any more once the step is committed.

        Raises:
            RuntimeError: No step is under way.
            KeyError: There is no such object.
        """
        with self._lock:
            step = self._in_step()
            self._newest(name)
            self._retire(step.pop(name, None))
            if name in self._committed:
                step[name] = None

    def load(self, names: str | Sequence[str], into: Tensor) -> Transfer:
        """Start reading the newest versions of an object, or of several one after another, laid out as `layout` says.

        Returns at once, unless one of them is being written: the call waits for that. Leave `into` alone until `wait()`
        returns or raises.

        Args:
            names: What to read.
            into: Contiguous uint8 tensor of shape (n,), n >= the sum of `layout(name).nbytes`, in host memory;
                page-aligned, else the reads are not direct.

        Returns:
            The read; `wait()` raises `ReadError` where the disk fails.

        Raises:
            KeyError: There is no such object.
            ValueError: `into` has the wrong type, place or size.
            OffloadError: A version could not be written.
            Closed: The store was closed.
        """
        names = (names,) if isinstance(names, str) else names
        while True:
            with self._lock:
                self._check_usable()
                versions = [self._newest(name) for name in names]
                nbytes = sum(version.layout.nbytes for version in versions)
                if into.numel() < nbytes:
                    raise ValueError(f"{names[0]}: expected a buffer of {nbytes} bytes, got {into.numel()}")
                writes = [version.write for version in versions if version.write is not None]
                files = [version.file for version in versions if version.file is not None]
                if all(write.done() and not write.failed for write in writes):
                    return self._files.read(names[0], files, into)
            for write in writes:
                write.wait()

    def commit(self, *, step: int, extra: Mapping[str, object]) -> None:
        """Make what this step wrote the state, for good: it survives a kill and a power failure once this returns.

        Waits for its writes. If it fails, the state is as before and the step is still under way: write what failed
        again and commit, or abort.

        Args:
            step: Number to remember.
            extra: What else belongs to the state; anything that JSON can say.

        Raises:
            RuntimeError: No step is under way.
            TierFull: The disk was too small.
            WriteError: The disk failed.
            TypeError: `extra` is not JSON.
            ValueError: `step` is negative.
        """
        if step < 0:
            raise ValueError(f"step must be 0 or more, got {step}")
        with self._lock:
            written = dict(self._in_step())
        # Without the lock: others may read meanwhile.
        for version in written.values():
            if version is not None and version.write is not None:
                version.write.wait()
        with self._lock:
            if self._step != written:
                raise RuntimeError("the step was changed by another thread while it was committed")
            # A version without a file has failed above.
            versions = {
                name: _Version(layout=version.layout, file=version.file)
                for name, version in (self._committed | written).items()
                if version is not None
            }
            objects = {
                name: StoredObject(file=version.file.name, layout=version.layout, crc32=version.file.crc32)
                for name, version in versions.items()
                if version.file is not None
            }
            manifest = Manifest(fingerprint=self.fingerprint, step=step, extra=dict(extra), objects=objects)
            # Data first, then the names of its files, then the manifest that refers to them.
            self._files.sync_names()
            self._folder.put(manifest)
            try:
                self._folder.folder.sync()
            except OffloadError as error:
                # Which of the two is in force after a power failure, nobody knows: neither may be written over.
                self._broken = error
                raise
            replaced = [self._committed.get(name) for name in written]
            self._manifest, self._committed, self._step = manifest, versions, None
            for version in replaced:
                self._retire(version)

    def abort_step(self) -> None:
        """Forget what this step wrote; waits for its writes to end. Nothing happens if no step is under way."""
        with self._lock:
            for version in (self._step or {}).values():
                if version is not None and version.write is not None:
                    version.write.outcome()
                self._retire(version)
            self._step = None

    def verify(self) -> None:
        """Read all of the committed state, and compare it with the checksums that were taken as it was written.

        Raises:
            SourceError: Nothing was committed yet, or something is damaged; names the object and its file.
            ReadError: The disk failed.
            Closed: The store was closed.
        """
        with self._lock:
            self._check_usable()
            if not self.exists(self.folder):
                read_manifest(self._folder.folder)
            _raise_first(damages(self._manifest, self._folder.folder, self._folder.objects, io=self._io))

    def save_to(self, folder: Path) -> None:
        """Make a folder a store of its own with the last committed state: a checkpoint, for `restore` or `open`.

        By hard links where the file system has them: at once, and this store writes new files from then on. Else copied
        in bounded memory. What was committed in `folder` before goes when this is there.

        Raises:
            ValueError: `folder` is this store's own, or nothing was committed yet.
            FolderInUse: A run works in `folder`.
            TierFull: There is no room; `folder` is as before.
            WriteError: Something cannot be written; likewise.
        """
        with self._lock:
            self._check_usable()
            if folder.resolve() == self.folder.resolve():
                raise ValueError(f"{folder} is the store itself; give another folder")
            if not self.exists(self.folder):
                raise ValueError(f"{self.folder}: nothing was committed yet; commit a step first")
            copy_state(self._manifest, self._folder.objects, folder)

    def close(self) -> None:
        """Stop the transfers, let other runs have the folder. A step that is under way is lost. Twice is fine."""
        self._closed = True
        self._files.close()
        self._folder.release()

    def _retire(self, version: _Version | None) -> None:
        if version is not None and version.file is not None:
            self._files.free(version.file)

    def _newest(self, name: str) -> _Version:
        version = (self._step or {}).get(name, self._committed.get(name))
        if version is None:
            raise KeyError(f"{self.folder} has no object {name!r}")
        return version

    def _in_step(self) -> dict[str, _Version | None]:
        self._check_usable()
        if self._step is None:
            raise RuntimeError("no step is under way; call begin_step first")
        return self._step

    def _check_usable(self) -> None:
        if self._closed:
            raise Closed(f"{self.folder}: the store was closed; open it again")
        if self._broken is not None:
            raise Closed(f"{self.folder}: the last commit may have failed ({self._broken}); open the store again")


def _raise_first(found: Iterable[OffloadError]) -> None:
    for error in found:
        raise error
