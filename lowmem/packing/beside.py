"""A checkpoint that is made of another one: where it may lie, and what goes there beside the weights.

That is configuration, tokenizer, licence and code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lowmem.errors import UnsupportedError
from lowmem.models.checkpoint import stays_inside
from lowmem.quantization.manifest import MANIFEST
from offload import NO_ROOM, TierFull, format_bytes

_COPIED_SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt", ".tiktoken"})
_CODE_SUFFIX = ".py"
_INDEX_SUFFIX = ".index.json"
_CONFIG = "config.json"
# What speaks of the weights as they were, or of an adapter that is no longer one.
_LEFT_BEHIND = frozenset({MANIFEST, "adapter_config.json"})

# What names code of the repository in the configurations of models, tokenizers and pipelines.
_CODE_FIELDS = ("auto_map", "custom_pipelines")

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def refuse_output(output: Path, base: Path, *, holds: str = "is not an empty folder") -> None:
    """Refuse a folder to write that is not empty, or that no folder can take the place of.

    Args:
        output: The folder.
        base: The model that it is made of.
        holds: What is wrong with one that is there, in words.

    Raises:
        FileExistsError: As it says.
        ValueError: It is inside of the base model's.
    """
    if output.is_symlink() or output.is_mount():
        what = "a link" if output.is_symlink() else "where a file system is mounted"
        raise FileExistsError(f"output: {output} is {what}, whose place no folder can take; give another one")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"output: {output} exists and {holds}; give another one, or remove it")
    if output.resolve().is_relative_to(base.resolve()):
        raise ValueError(f"output: {output} is inside the model's folder {base}; give a folder outside of it")


def require_room(output: Path, nbytes: int, *, instead: str) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        TierFull: As it says.
    """
    parent = next(folder for folder in output.parents if folder.is_dir())
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < nbytes:
        raise TierFull(
            f"disk: {output} needs {format_bytes(nbytes)}, {format_bytes(free_bytes)} are free on {parent}; "
            f"free some space, {instead}"
        )


def files_beside(folder: Path, *, has_code: bool, adapter: Path | None = None) -> dict[str, Path]:
    """Files to copy, by their name in the output.

    Args:
        folder: The checkpoint's.
        has_code: Whether its code is trusted, and copied.
        adapter: Folder of an adapter, whose tokenizer, if it has one, takes the place of the checkpoint's.

    Raises:
        UnsupportedError: One is a link to a file elsewhere, which nobody meant to give away with the model.
    """
    suffixes = _COPIED_SUFFIXES | ({_CODE_SUFFIX} if has_code else set())
    found = {
        file.name: _inside(file, folder)
        for file in sorted(folder.iterdir())
        if (file.suffix in suffixes or file.name.upper().startswith(("LICENSE", "NOTICE")))
        and file.is_file()
        and not file.name.endswith(_INDEX_SUFFIX)
        and file.name not in _LEFT_BEHIND
    }
    if adapter is not None and (adapter / "tokenizer_config.json").is_file():
        found |= {name: _inside(adapter / name, adapter) for name in _TOKENIZER_FILES if (adapter / name).is_file()}
    return found


def copy_files(files: Mapping[str, Path], folder: Path, *, has_code: bool) -> None:
    """Copy files into a folder; configurations lose their references to code that is not copied.

    Args:
        files: What `files_beside` found.
        folder: Where to.
        has_code: Whether the code is copied too.
    """
    for name, file in files.items():
        content = _without_code(file) if name.endswith(".json") and not has_code else None
        if content is None:
            shutil.copyfile(file, folder / name)
        else:
            (folder / name).write_text(content)


def change_config(folder: Path, changes: Mapping[str, object]) -> None:
    """Give fields of a folder's config.json new values, where they stand; None leaves a field out."""
    if not changes:
        return
    file = folder / _CONFIG
    config = json.loads(file.read_text())
    if "dtype" in changes:
        config.pop("torch_dtype", None)
    for name, value in changes.items():
        parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
        if value is None:
            for part in parts:
                part.pop(name, None)
            continue
        for holder in [part for part in parts if name in part] or [config]:
            holder[name] = value
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@contextmanager
def telling_full_disk(folder: Path, outcome: str) -> Iterator[None]:
    """Say, of a disk that had no room while a folder was written, what came of it.

    Raises:
        TierFull: The disk had no room.
    """
    try:
        yield
    except (OSError, TierFull) as error:
        if isinstance(error, TierFull) or error.errno in NO_ROOM:
            raise TierFull(f"disk: writing {folder} failed ({error}); {outcome}") from error
        raise


def _inside(file: Path, folder: Path) -> Path:
    real = file.resolve()
    if not stays_inside(file, folder):
        raise UnsupportedError(
            f"{file} -> {real}",
            reason="the link leads out of its folder, and the output would have a copy of what it leads to",
            instead="a copy of that file in the folder if it belongs to the model, or no link",
        )
    return real


def _without_code(file: Path) -> str | None:
    """A configuration without its references to code that is not copied; None if it has none."""
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not any(name in values for name in _CODE_FIELDS):
        return None
    return json.dumps({name: value for name, value in values.items() if name not in _CODE_FIELDS}, indent=2) + "\n"
