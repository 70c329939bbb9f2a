"""`Accelerator.save_model` of a streamed model, in bounded RAM: as shipped it makes every weight contiguous at once.

It asks a model for its state dict and does the rest itself, so there is nothing of the model's to hook. The method is
replaced once, and hands all other models to the one that was there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lowmem.errors import UnsupportedError
from lowmem.internals.stand_in import StandIn, keeping_last_read

if TYPE_CHECKING:
    from accelerate import Accelerator

_PARAMETERS = ("self", "model", "save_directory", "max_shard_size", "safe_serialization")


_SHARD = "2GB"
"""A shard is in RAM while it is written."""


def install_bounded_saving() -> None:
    """Replace the method, unless it is already.

    Raises:
        UnsupportedError: This accelerate has another `save_model`.
    """
    from accelerate import Accelerator

    shipped = Accelerator.save_model
    if hasattr(shipped, "lowmem"):
        return
    if tuple(signature(shipped).parameters) != _PARAMETERS:
        raise UnsupportedError(
            f"accelerate {version('accelerate')}",
            reason=f"Accelerator.save_model has other parameters than {', '.join(_PARAMETERS[1:])}",
            instead="a version of accelerate that README names as tested",
        )
    Accelerator.save_model = _bounded(shipped)


def _bounded(shipped: Callable[..., None]) -> Callable[..., None]:
    default = signature(shipped).parameters["max_shard_size"].default

    @wraps(shipped)
    def save_model(
        self: Accelerator,
        model: nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: int | str = default,
        safe_serialization: bool = True,
    ) -> None:
        plain: Any = self.unwrap_model(model)
        if not any(isinstance(param, StandIn) for param in plain.parameters()):
            shipped(self, model, save_directory, max_shard_size, safe_serialization)
            return
        if not safe_serialization:
            raise UnsupportedError(
                "Accelerator.save_model(safe_serialization=False)",
                reason="a pickle is written from RAM in one piece",
                instead="safe_serialization=True",
            )
        if self.is_main_process:
            save_in_shards(
                plain.state_dict(), Path(save_directory), size=_SHARD if max_shard_size == default else max_shard_size
            )

    save_model.lowmem = True  # type: ignore[attr-defined]
    return save_model


def save_in_shards(state: dict[str, Tensor], folder: Path, *, size: int | str) -> None:
    """Write a state dict as `model*.safetensors`, as accelerate does, with one shard in RAM at a time.

    Args:
        state: Tensors and stand-ins by name; of several names of one tensor the first is written.
        folder: Made if need be; shards of an earlier save that are not written again are removed.
        size: Largest file.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    known: set[int] = set()
    once = {}
    for name, tensor in state.items():
        place = tensor.untyped_storage().data_ptr()
        if place not in known or not place:
            once[name] = tensor
        known.add(place)
    split = split_torch_state_dict_into_shards(once, filename_pattern="model{suffix}.safetensors", max_shard_size=size)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model-?????-of-?????.safetensors"):
        if old.name not in split.filename_to_tensors:
            old.unlink()
    for file, names in split.filename_to_tensors.items():
        with keeping_last_read():
            save_file({name: once[name].contiguous() for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
