"""Packing a checkpoint, block by block, so that it can be killed at any instant and go on.

The work lies in a folder beside the output, with a manifest of the files that are whole; it gets the output's name when
all of it is on the disk. Whoever works there holds its lock: a second process waits, and finds the output made.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import torch

from lowmem.models.build import Skeleton
from lowmem.models.checkpoint import Opened
from lowmem.packing.beside import (
    change_config,
    copy_files,
    files_beside,
    refuse_output,
    require_room,
    telling_full_disk,
)
from lowmem.packing.selection import Included, OutputUnit, PackSelection, select
from lowmem.packing.writing import Contents, StoredContents, UnitWriter
from lowmem.progress_line import say, showing_bytes
from lowmem.quantization.manifest import PackManifest, check_files, check_opened, damaged, read_manifest
from lowmem.quantization.packing import Observe, Packer
from offload import (
    PAGE_BYTES,
    Folder,
    SafetensorsSource,
    ShardFile,
    SourceError,
    TensorSpec,
    sync_files,
    sync_folder,
    write_index,
)

_OTHER = "is not this model packed in this way"
_QUIET_S = 1.0


@dataclass(frozen=True, kw_only=True)
class BakeInput:
    """What a packed folder is made of."""

    name: str
    """The checkpoint, as the user named it."""
    built: Skeleton
    """Its model on meta, matched with its tensors."""
    tensors: Mapping[str, TensorSpec]
    """Its tensors by name; those that the model has no place for are copied."""
    folder: Path
    """Where it lies; only read."""
    fingerprint: str
    """Of all that the output depends on, but for the settings."""
    contents: Callable[[], Contents]
    """Opens its values."""
    check: Callable[[], None]
    """Sees that nothing of it has changed meanwhile."""
    copies: Mapping[str, Path]
    """Files to copy."""
    has_code: bool = False
    """Whether code is among them."""
    config_changes: Mapping[str, object] = field(default_factory=dict)
    """Fields of its config.json that get new values."""
    keeps_packed: bool = False
    """Whether weights that are packed in the same format already are copied as they are; else they are refused."""
    said_dtype: torch.dtype | None = None
    """Dtype that weights are said to have been quantised from; that of their values if None."""
    observe: Observe | None = None
    """Sees what is quantised, and what of it is stored."""

    @classmethod
    def of(cls, opened: Opened, *, trust_remote_code: bool = False) -> Self:
        """A checkpoint as it is."""

        def check() -> None:
            for file in opened.source.files:
                opened.source.check_unchanged(file)

        return cls(
            name=str(opened.built.model.config.name_or_path),
            built=opened.built,
            tensors=opened.source.tensors,
            folder=opened.folder,
            fingerprint=opened.source.fingerprint(),
            contents=StoredContents,
            check=check,
            copies=files_beside(opened.folder, has_code=trust_remote_code),
            has_code=trust_remote_code,
        )

    def select(self, packer: Packer, include: Collection[Included] = ()) -> PackSelection:
        """What of it is packed; see `select`."""
        return select(
            self.built,
            packer,
            tensors=self.tensors,
            include=include,
            keeps_packed=self.keeps_packed,
            said_dtype=self.said_dtype,
        )

    def manifest(self, packer: Packer, include: Collection[Included] = ()) -> PackManifest:
        """What the output's manifest will say, without its files."""
        settings = dict(packer.settings) | ({"include": sorted(include)} if include else {})
        return PackManifest(source=self.name, fingerprint=self.fingerprint, settings=settings)


def bake(
    given: BakeInput, packer: Packer, *, output: Path, device: torch.device, include: Collection[Included] = ()
) -> Path:
    """Write a packed folder, or return it where it is there already.

    Args:
        given: What it is made of.
        packer: Writes the format.
        output: The folder to make; must not exist, be empty, or be what would be made.
        device: Where values are quantised.
        include: What is packed outside the blocks.

    Returns:
        `output`.

    Raises:
        UnsupportedError: The checkpoint is quantised already, or cannot be packed.
        FileExistsError: Something else lies there.
        offload.TierFull: The disk has no room. What is done stays, and the next call goes on.
        offload.SourceError: The checkpoint is damaged.
    """
    chosen, manifest = given.select(packer, include), given.manifest(packer, include)
    output = output.absolute()
    if is_baked(output, manifest):
        return output
    refuse_output(output, given.folder, holds=_OTHER)
    with _working(output) as work:
        if is_baked(output, manifest):
            return output
        refuse_output(output, given.folder, holds=_OTHER)
        done = _go_on(work, manifest, chosen)
        left = sum(unit.nbytes for unit in chosen.units if unit.file not in done.files)
        require_room(output, left, instead="or give a folder on another disk")
        with telling_full_disk(work, "free some space, and the next call goes on"):
            done = _write_units(work, given, packer, chosen, done, device=device)
            given.check()
            _finish(work, given, packer, chosen)
            _in_order(done, chosen).write(work)
            work.chmod(_usual_mode(work, output))
            sync_files(work)
            sync_folder(work)
            with suppress(FileNotFoundError):
                output.rmdir()
            work.rename(output)
            sync_folder(output.parent)
    return output


def is_baked(folder: Path, manifest: PackManifest) -> bool:
    """Whether a folder was made of the same files in the same way; its files are looked at, their contents are not.

    Raises:
        SourceError: It was, and its manifest is damaged since, or a file is missing or another one.
    """
    found = read_manifest(folder) if folder.is_dir() else None
    if found is None or not found.is_of(manifest.fingerprint, manifest.settings):
        return False
    check_files(folder)
    with SafetensorsSource(folder) as source:
        check_opened(folder, found, source)
    return True


def _usual_mode(work: Path, output: Path) -> int:
    """Who may do what in the output: as in a folder that is made now, or in the empty one that was given."""
    # The work is its owner's alone. What the process masks is only told to what it makes.
    made = work / "mode"
    made.mkdir(exist_ok=True)
    mode = stat.S_IMODE((output if output.is_dir() else made).stat().st_mode)
    made.rmdir()
    # A work that everybody may write to is nobody's to go on with.
    return mode & ~stat.S_IWOTH


@contextmanager
def _working(output: Path) -> Iterator[Path]:
    """The folder that the output is made in, locked; kept after an error, so that the next one goes on."""
    work = output.parent / f".{output.name}.packing"
    while True:
        Folder.own(work).close()
        lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _wait_for(lock, work)
            if _is_still(work, lock):
                yield work
                break
        finally:
            # A folder that has the output's name by now, or an empty one that nobody needs.
            with suppress(OSError):
                work.rmdir()
            os.close(lock)


def _wait_for(lock: int, work: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"another process is packing into {work}; waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)


def _is_still(work: Path, lock: int) -> bool:
    try:
        return os.path.samestat(os.stat(work, follow_symlinks=False), os.fstat(lock))
    except FileNotFoundError:
        return False


def _in_order(done: PackManifest, chosen: PackSelection) -> PackManifest:
    """The same manifest whichever file was written last."""
    names = [output.name for unit in chosen.units for output in unit.outputs]
    return replace(
        done,
        files={unit.file: done.files[unit.file] for unit in chosen.units},
        tensors={name: done.tensors[name] for name in names},
    )


def _go_on(work: Path, manifest: PackManifest, chosen: PackSelection) -> PackManifest:
    """What of an earlier, interrupted bake is whole; the rest is removed."""
    found = None
    with suppress(SourceError):
        found = read_manifest(work)
    if found is None or not found.is_of(manifest.fingerprint, manifest.settings):
        _clear(work, keep=set())
        return manifest
    whole: dict[str, int] = {}
    sums: dict[str, str] = {}
    for unit in chosen.units:
        names = [output.name for output in unit.outputs]
        if unit.file in found.files and _is_whole(work / unit.file, unit, found):
            whole[unit.file] = found.files[unit.file]
            sums |= {name: found.tensors[name] for name in names}
    _clear(work, keep=set(whole))
    return replace(manifest, files=whole, tensors=sums)


def _is_whole(file: Path, unit: OutputUnit, found: PackManifest) -> bool:
    try:
        with SafetensorsSource(file) as source:
            names = {output.name for output in unit.outputs}
            if set(source.tensors) != names or not names <= set(found.tensors):
                return False
            part = replace(found, tensors={name: found.tensors[name] for name in names})
            return not any(is_damaged for _, is_damaged in damaged(part, source.tensors))
    except SourceError:
        return False


def _clear(work: Path, *, keep: set[str]) -> None:
    for path in work.iterdir():
        if path.name not in keep and not path.is_dir():
            path.unlink()


def _write_units(
    work: Path, given: BakeInput, packer: Packer, chosen: PackSelection, done: PackManifest, *, device: torch.device
) -> PackManifest:
    left = [unit for unit in chosen.units if unit.file not in done.files]
    showing = showing_bytes("packing", chosen.nbytes, done=sum(done.files.values()), delay_s=_QUIET_S)
    with closing(given.contents()) as contents, showing as moved:
        for unit in left:
            writer = UnitWriter(unit, packer, contents=contents, device=device, observe=given.observe)
            unfinished = work / f"{unit.file}.unfinished"
            with ShardFile(unfinished, unit.outputs, align_bytes=PAGE_BYTES) as shard:
                for part in writer.parts():
                    shard.write(part)
                    moved(part.nbytes)
            unfinished.rename(work / unit.file)
            sync_folder(work)
            done = replace(done, files={**done.files, unit.file: unit.nbytes}, tensors={**done.tensors, **writer.sums})
            # Only now may the next run believe the file.
            done.write(work)
    return done


def _finish(work: Path, given: BakeInput, packer: Packer, chosen: PackSelection) -> None:
    """Write what is beside the weights: index, configuration, tokenizer."""
    write_index(work, {unit.file: unit.outputs for unit in chosen.units})
    copy_files(given.copies, work, has_code=given.has_code)
    change_config(work, given.config_changes)
    config = json.loads((work / "config.json").read_text())
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    config["quantization_config"] = packer.config(compute_dtype=str(stored), skipped=list(chosen.skipped))
    (work / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
