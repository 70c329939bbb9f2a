"""Packing a checkpoint, block by block, so that it can be killed at any instant and go on.

The work lies in a folder beside the output, with a manifest of the files that are whole; it gets the output's name when
all of it is on the disk. Whoever works there holds its lock: a second process waits, and finds the output made.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lowmem.errors import UnsupportedError
from lowmem.models.absent import read_now
from lowmem.models.checkpoint import Opened, stays_inside
from lowmem.packing.selection import OutputUnit, PackedEntry, PackSelection, select
from lowmem.quantization.manifest import MANIFEST, PackManifest, checksum, damaged, read_manifest
from lowmem.quantization.packing import Packer
from offload import (
    NO_ROOM,
    PAGE_BYTES,
    BlockSpec,
    FileIO,
    Folder,
    SafetensorsSource,
    ShardFile,
    SourceError,
    TierFull,
    format_bytes,
    sync_folder,
    write_index,
)

_COPIED_SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt", ".tiktoken"})
_CODE_SUFFIX = ".py"
_CODE_FIELD = "auto_map"
_INDEX_SUFFIX = ".index.json"
_QUIET_S = 1.0


def bake(
    opened: Opened, packer: Packer, *, output: Path, device: torch.device, trust_remote_code: bool = False
) -> Path:
    """Write a packed folder, or return it where it is there already.

    Args:
        opened: The checkpoint; only read.
        packer: Writes the format.
        output: The folder to make; must not exist, be empty, or be what would be made.
        device: Where values are quantised.
        trust_remote_code: Copy the checkpoint's model code too.

    Returns:
        `output`.

    Raises:
        UnsupportedError: The checkpoint is quantised already, or cannot be packed.
        FileExistsError: Something else lies there.
        offload.TierFull: The disk has no room. What is done stays, and the next call goes on.
        offload.SourceError: The checkpoint is damaged.
    """
    chosen = select(opened, packer)
    manifest = PackManifest(
        source=str(opened.built.model.config.name_or_path),
        fingerprint=opened.source.fingerprint(),
        settings=dict(packer.settings),
    )
    output = output.absolute()
    if is_baked(output, manifest):
        return output
    _refuse_output(output, opened.folder)
    with _working(output) as work:
        if is_baked(output, manifest):
            return output
        _refuse_output(output, opened.folder)
        try:
            done = _go_on(work, manifest, chosen)
            _check_room(output, chosen, done)
            done = _write_units(work, opened, packer, chosen, done, device=device)
            for file in opened.source.files:
                opened.source.check_unchanged(file)
            _finish(work, opened, packer, chosen, trust_remote_code=trust_remote_code)
            _in_order(done, chosen).write(work)
            for file in work.iterdir():
                _sync(file)
            sync_folder(work)
            with suppress(FileNotFoundError):
                output.rmdir()
            work.rename(output)
            sync_folder(output.parent)
        except (OSError, TierFull) as error:
            if isinstance(error, TierFull) or error.errno in NO_ROOM:
                raise TierFull(
                    f"disk: writing {work} failed ({error}); free some space, and the next call goes on"
                ) from error
            raise
    return output


def is_baked(folder: Path, manifest: PackManifest) -> bool:
    """Whether a folder is whole and was made of the same files in the same way.

    Raises:
        SourceError: Its manifest is damaged.
    """
    found = read_manifest(folder) if folder.is_dir() else None
    return found is not None and found.is_of(manifest.fingerprint, manifest.settings)


def _refuse_output(output: Path, base: Path) -> None:
    if output.is_symlink() or output.is_mount():
        what = "a link" if output.is_symlink() else "where a file system is mounted"
        raise FileExistsError(f"output: {output} is {what}, whose place no folder can take; give another one")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"output: {output} exists, and is not this model packed in this way; give another folder, or remove it"
        )
    if output.resolve().is_relative_to(base.resolve()):
        raise ValueError(f"output: {output} is inside the model's folder {base}; give a folder outside of it")


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
        tqdm.write(f"lowmem: another process is packing into {work}; waiting for it", file=sys.stderr)
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


def _check_room(output: Path, chosen: PackSelection, done: PackManifest) -> None:
    needed = sum(unit.nbytes for unit in chosen.units if unit.file not in done.files)
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise TierFull(
            f"disk: {output} needs {format_bytes(needed)} more, {format_bytes(free)} are free on {output.parent}; "
            "free some space, or give a folder on another disk"
        )


def _write_units(
    work: Path, opened: Opened, packer: Packer, chosen: PackSelection, done: PackManifest, *, device: torch.device
) -> PackManifest:
    left = [unit for unit in chosen.units if unit.file not in done.files]
    with (
        FileIO(stamps=opened.source.stamps) as reader,
        tqdm(
            total=chosen.nbytes,
            initial=sum(done.files.values()),
            desc="packing",
            unit="B",
            unit_scale=True,
            leave=False,
            delay=_QUIET_S,
        ) as bar,
    ):
        for unit in left:
            writer = _UnitWriter(unit, packer, reader=reader, device=device)
            unfinished = work / f"{unit.file}.unfinished"
            with ShardFile(unfinished, unit.outputs, align_bytes=PAGE_BYTES) as shard:
                for output_name, values in writer.values():
                    shard.write(values)
                    bar.update(values.nbytes)
                    writer.sums[output_name] = checksum(values)
            unfinished.rename(work / unit.file)
            sync_folder(work)
            done = replace(done, files={**done.files, unit.file: unit.nbytes}, tensors={**done.tensors, **writer.sums})
            # Only now may the next run believe the file.
            done.write(work)
    return done


class _UnitWriter:
    """Makes the tensors of one file in the order in which they lie there."""

    def __init__(self, unit: OutputUnit, packer: Packer, *, reader: FileIO, device: torch.device) -> None:
        self._unit, self._packer, self._reader, self._device = unit, packer, reader, device
        self._entries: dict[str, PackedEntry] = {
            output.name: entry for entry in unit.packed for output in packer.outputs(entry.name, entry.shape)
        }
        self._copied = {spec.name: spec for spec in unit.copied}
        self._converted = {target: recipe for recipe, target in unit.converted}
        self._made: dict[str, Tensor] = {}
        self._recipe: tuple[int, dict[str, Tensor]] | None = None
        self.sums: dict[str, str] = {}
        """Checksums of what was written."""

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values, on the CPU. A weight's small parts wait until their place comes."""
        for output in self._unit.outputs:
            if output.name in self._copied:
                spec = self._copied[output.name]
                yield output.name, self._read((spec,), spec.name)[spec.name]
                continue
            if output.name in self._converted:
                yield output.name, self._run(self._converted[output.name].targets[0])[output.name].contiguous()
                continue
            if output.name not in self._made:
                entry = self._entries[output.name]
                self._made |= self._pack(entry)
            yield output.name, self._made.pop(output.name).contiguous()

    def _pack(self, entry: PackedEntry) -> dict[str, Tensor]:
        values = self._run(entry.target)[entry.target]
        if entry.is_transposed:
            values = values.t().contiguous()
        pieces = values if values.dim() == 3 else (values,)
        return self._packer.pack(entry.name, (piece.to(self._device) for piece in pieces), entry.shape)

    def _run(self, target: str) -> Mapping[str, Tensor]:
        """Parameters of the recipe that makes one, in the stored dtype; the last recipe's are kept."""
        recipes = (*(entry.recipe for entry in self._unit.packed), *self._converted.values())
        recipe = next(recipe for recipe in recipes if target in recipe.targets)
        if self._recipe is None or self._recipe[0] != id(recipe):
            self._recipe = None
            self._recipe = id(recipe), recipe.run(self._read(recipe.sources, target))
        return self._recipe[1]

    def _read(self, specs: tuple[object, ...], name: str) -> dict[str, Tensor]:
        return read_now(BlockSpec(name=name, tensors=specs), reader=self._reader, device=torch.device("cpu"))  # type: ignore[arg-type]


def _finish(work: Path, opened: Opened, packer: Packer, chosen: PackSelection, *, trust_remote_code: bool) -> None:
    """Write what is beside the weights: index, configuration, tokenizer."""
    write_index(work, {unit.file: unit.outputs for unit in chosen.units})
    suffixes = _COPIED_SUFFIXES | ({_CODE_SUFFIX} if trust_remote_code else set())
    for file in sorted(opened.folder.iterdir()):
        is_wanted = file.suffix in suffixes or file.name.upper().startswith(("LICENSE", "NOTICE"))
        if not is_wanted or not file.is_file() or file.name.endswith(_INDEX_SUFFIX) or file.name == MANIFEST:
            continue
        if not stays_inside(file, opened.folder):
            raise UnsupportedError(
                f"{file} -> {file.resolve()}",
                reason="the link leads out of its folder, and the output would have a copy of what it leads to",
                instead="a copy of that file in the folder if it belongs to the model, or no link",
            )
        _copy(file, work / file.name, has_code=trust_remote_code)
    config = json.loads((work / "config.json").read_text())
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    config["quantization_config"] = packer.config(compute_dtype=str(stored), skipped=list(chosen.skipped))
    (work / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _copy(file: Path, copy: Path, *, has_code: bool) -> None:
    """Copy a file; a configuration loses its references to code that is not copied."""
    if not has_code and file.suffix == ".json":
        with suppress(ValueError, RecursionError):
            values = json.loads(file.read_bytes())
            if isinstance(values, dict) and _CODE_FIELD in values:
                values = {name: value for name, value in values.items() if name != _CODE_FIELD}
                copy.write_text(json.dumps(values, indent=2) + "\n")
                return
    shutil.copyfile(file, copy)


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
