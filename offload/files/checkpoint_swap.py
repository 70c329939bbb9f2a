"""A checkpoint that is written beside an older one, and takes its place when all of it is on the disk."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from offload.files.file import read_small_file, sync_folder, write_failure
from offload.files.safetensors import INDEX_NAME, SINGLE_NAME
from offload.files.strict_json import MAX_JSON_BYTES

_BESIDE = ".saving-"


@contextmanager
def unfinished_folder(parent: Path, *, prefix: str) -> Iterator[Path]:
    """A new folder for what is not whole yet, for this user alone; gone when the ``with`` ends, unless it was renamed.

    Its name cannot be guessed. It is locked as long as somebody works in it: what killed runs have left, whose names
    begin in the same way, is removed first.

    Raises:
        OSError: It cannot be made.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    for left in parent.glob(f"{glob.escape(prefix)}*"):
        with suppress(OSError):
            fd = os.open(left, flags)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(fd).st_uid == os.geteuid():
                    shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(fd)
    made = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    lock = os.open(made, flags)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(lock)


@contextmanager
def replacing_checkpoint(folder: Path) -> Iterator[Path]:
    """Write a checkpoint that replaces the one in a folder when the ``with`` ends, and not before.

    Interrupted at any instant, the folder holds the older checkpoint or the new one, whole. What goes are the weights
    that the older index lists and files of the same name; whatever else is in the folder stays. Shards are named anew
    where files of their names are there. After an error the folder is as it was.

    Args:
        folder: The folder, made if need be.

    Yields:
        An empty folder for the new checkpoint's files: one of weights, or shards and their index, and others. Where it
        gets others alone, such as an adapter's, each takes the place of the file of its name, in folders too, and
        weights stay.

    Raises:
        TierFull: The disk has no room.
        WriteError: The folder cannot be written.
    """
    with ExitStack() as stack:
        with _reporting(folder):
            folder.mkdir(parents=True, exist_ok=True)
            beside = stack.enter_context(unfinished_folder(folder, prefix=_BESIDE))
        yield beside
        with _reporting(folder):
            _put_in_place(beside, folder)


def listed_weights(folder: Path) -> set[str]:
    """Names of the weight files of the checkpoint in a folder: those that the index lists, and a single file."""
    names = {SINGLE_NAME} if (folder / SINGLE_NAME).exists() else set()
    with suppress(OSError, ValueError):
        index = json.loads(read_small_file(folder / INDEX_NAME, max_bytes=MAX_JSON_BYTES))
        weights = index.get("weight_map") if isinstance(index, dict) else None
        if isinstance(weights, dict):
            names.update(name for name in weights.values() if isinstance(name, str) and _is_plain(name))
    return names


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _put_in_place(beside: Path, folder: Path) -> None:
    index = beside / INDEX_NAME
    is_whole = index.exists() or (beside / SINGLE_NAME).exists()
    older = listed_weights(folder) if is_whole else set()
    names = {SINGLE_NAME: SINGLE_NAME}
    if index.exists():
        names = _free_names(folder, sorted(listed_weights(beside)))
        content = json.loads(index.read_bytes())
        content["weight_map"] = {tensor: names[file] for tensor, file in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2) + "\n")
    sync_files(beside)
    if index.exists():
        for name, free in names.items():
            (beside / name).rename(folder / free)
        sync_folder(folder)
        # From here on the index speaks of the new weights, unless a single file comes before it.
        index.replace(folder / INDEX_NAME)
        sync_folder(folder)
        (folder / SINGLE_NAME).unlink(missing_ok=True)
    elif is_whole:
        (beside / SINGLE_NAME).replace(folder / SINGLE_NAME)
        sync_folder(folder)
        (folder / INDEX_NAME).unlink(missing_ok=True)
    _move_into(beside, folder)
    for name in older - set(names.values()):
        (folder / name).unlink(missing_ok=True)
    sync_folder(folder)


def _move_into(source: Path, folder: Path) -> None:
    """Put files in the places of those of their names, in folders too: weights first, what describes them last."""
    for entry in sorted(source.iterdir(), key=lambda entry: (entry.suffix == ".json", entry.name)):
        if entry.is_dir():
            (folder / entry.name).mkdir(exist_ok=True)
            _move_into(entry, folder / entry.name)
        else:
            entry.replace(folder / entry.name)
    sync_folder(folder)


def _free_names(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """The same names where none of them is taken, else with a number that is free for all of them."""
    found = {name: name for name in names}
    number = 1
    while any(os.path.lexists(folder / name) for name in found.values()):
        number += 1
        found = {name: f"{Path(name).stem}-v{number}{Path(name).suffix}" for name in names}
    return found


def sync_files(folder: Path) -> None:
    """Bring what is in a folder's files, nested ones too, to the disk; `sync_folder` does it with their names.

    Raises:
        OSError: The disk failed, or has no room.
    """
    for file in folder.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


@contextmanager
def _reporting(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_failure(Path(error.filename or folder), error) from error
