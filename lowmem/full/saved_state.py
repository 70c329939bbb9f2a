"""The moments in a checkpoint: beside the saved weights, as files of units or as links to the store's own files."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import torch

from lowmem.adapters.shards import OutputTensor, ShardFile
from lowmem.errors import UnsupportedError
from lowmem.full.disk_tier import DiskTier
from lowmem.full.engine import FullTuning
from lowmem.full.tier import EXP_AVG, EXP_AVG_SQ
from offload import Store

FOLDER = "optimizer_state"
"""Name of the folder in a checkpoint."""
_MOMENTS = (EXP_AVG, EXP_AVG_SQ)


def save_moments(full: FullTuning) -> str:
    """Keep the moments beside the weights that were saved last.

    State on disk is linked where the file system can, else copied; state in memory is written. One parameter at a time
    is in RAM.

    Returns:
        The absolute path of their folder.

    Raises:
        UnsupportedError: The weights were never saved, or have changed since.
    """
    if full.saved is None or full.saved.version != full.version:
        raise UnsupportedError(
            "optimizer.state_dict() of a model whose weights are not saved",
            reason="the moments are too large for a dictionary, and are kept beside the weights of the same step",
            instead="model.save_pretrained(folder) first, as the Trainer does",
        )
    folder = full.saved.folder / FOLDER
    if isinstance(full.tier, DiskTier):
        full.tier.save_to(folder)
        return str(folder.resolve())
    folder.mkdir(parents=True, exist_ok=True)
    for layout in full.tier.layouts:
        named = [(place, field) for place in layout.places for field in _MOMENTS]
        outputs = [
            OutputTensor(name=f"{place.key}.{field}", dtype=torch.float32, shape=tuple(place.shape))
            for place, field in named
        ]
        file = folder / f"{layout.name}.safetensors"
        file.unlink(missing_ok=True)
        with ShardFile(file, outputs) as shard:
            for place, field in named:
                shard.write(full.read(place.key, field))
    return str(folder.resolve())


def load_moments(full: FullTuning, folder: Path, *, keys: Collection[str], stale: Iterable[str]) -> None:
    """Take moments that `save_moments` kept.

    Args:
        full: The engine.
        folder: What `save_moments` answered.
        keys: Parameters that have moments.
        stale: Parameters that have moments now and have none in the checkpoint.

    Raises:
        FileNotFoundError: They are not there.
        UnsupportedError: They were saved with state on disk, and this run keeps it in memory.
    """
    if Store.exists(folder):
        if not isinstance(full.tier, DiskTier):
            raise UnsupportedError(
                f"resuming from {folder} with state in memory",
                reason="it was saved with state on disk, and consists of that run's files",
                instead="a budget with Budget.disk that puts the state on disk, as when it was saved",
            )
        full.adopt(folder)
        return
    files: dict[Path, list[str]] = {}
    for key in keys:
        name = full.tier.layouts[full.params[key].unit].name
        files.setdefault(folder / f"{name}.safetensors", []).append(key)
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{missing[0]}: the moments of {files[missing[0]][0]} are not there; if the checkpoint was moved, set "
            "['lowmem_full']['folder'] in the optimizer's state to where its folder optimizer_state is now"
        )
    for key in stale:
        for field in _MOMENTS:
            full.write(key, torch.zeros(full.params[key].place.shape), field)
    for file, inside in files.items():
        _load_file(full, file, inside)


def _load_file(full: FullTuning, file: Path, keys: Iterable[str]) -> None:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stored:
        for key in keys:
            for field in _MOMENTS:
                full.write(key, stored.get_tensor(f"{key}.{field}"), field)


__all__ = ["FOLDER", "load_moments", "save_moments"]
