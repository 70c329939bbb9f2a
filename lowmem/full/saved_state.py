"""The moments in a checkpoint: files beside the saved weights, one unit at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lowmem.errors import UnsupportedError
from lowmem.full.engine import FullTuning
from lowmem.full.tier import EXP_AVG, EXP_AVG_SQ

FOLDER = "optimizer_state"
"""Name of the folder in a checkpoint."""


def save_moments(full: FullTuning) -> str:
    """Write the moments beside the weights that were saved last. One parameter at a time is copied.

    Returns:
        The absolute path of their folder.

    Raises:
        UnsupportedError: The weights were never saved, or have changed since.
    """
    from safetensors.torch import save_file

    if full.saved is None or full.saved.version != full.version:
        raise UnsupportedError(
            "optimizer.state_dict() of a model whose weights are not saved",
            reason="the moments are too large for a dictionary, and are written beside the weights of the same step",
            instead="model.save_pretrained(folder) first, as the Trainer does",
        )
    folder = full.saved.folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for layout in full.tier.layouts:
        tensors = {
            f"{place.key}.{field}": full.read(place.key, field)
            for place in layout.places
            for field in (EXP_AVG, EXP_AVG_SQ)
        }
        save_file(tensors, folder / f"{layout.name}.safetensors")
    return str(folder.resolve())


def load_moments(full: FullTuning, folder: str, *, keys: Iterable[str]) -> None:
    """Read moments that `save_moments` wrote.

    Args:
        full: The engine.
        folder: What `save_moments` answered.
        keys: Parameters that have moments.

    Raises:
        FileNotFoundError: A file is missing.
    """
    from safetensors import safe_open

    files: dict[Path, list[str]] = {}
    for key in keys:
        name = full.tier.layouts[full.params[key].unit].name
        files.setdefault(Path(folder) / f"{name}.safetensors", []).append(key)
    for file, inside in files.items():
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: the moments of {inside[0]} are not there; if the checkpoint was moved, set 'folder' in the "
                "optimizer's state to where its folder optimizer_state is now"
            )
        with safe_open(file, framework="pt") as stored:
            for key in inside:
                for field in (EXP_AVG, EXP_AVG_SQ):
                    full.write(key, stored.get_tensor(f"{key}.{field}"), field)


__all__ = ["FOLDER", "load_moments", "save_moments"]
