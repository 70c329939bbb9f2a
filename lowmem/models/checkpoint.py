"""Where a model's files are: a local folder, or a hub id resolved to its folder in the cache."""

from __future__ import annotations

import os
from pathlib import Path

from lowmem.errors import UnsupportedError

# What a streamed model needs of a repository; pickled weights are never fetched.
_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]


def resolve(model: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Find the folder that holds a model's config, tokenizer and weights.

    Args:
        model: A local folder, or a hub id ("Qwen/Qwen3-32B"), whose files are downloaded into the hub cache.
        revision: Branch, tag or commit of the hub repository.

    Returns:
        The folder. Nothing in it is ever written or deleted.

    Raises:
        FileNotFoundError: No such folder, and no such repository can be reached.
        UnsupportedError: The path is a single file.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UnsupportedError(
            f"model={str(model)!r}",
            reason="it is a file",
            instead="the folder that holds config.json and the .safetensors files",
        )
    if folder.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") != 1:
        raise FileNotFoundError(f"{model}: no such folder; give a local folder or a hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=_PATTERNS))
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"{model}: neither a local folder nor a hub repository that can be reached: {error}"
        ) from error


__all__ = ["resolve"]
