"""The moments in a checkpoint: beside the saved weights, as files of units or as links to the store's own files.

`save_pretrained` and `load_state_dict` of a fully tuned model: tensor by tensor, in bounded RAM.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.full.disk_tier import DiskTier
from lowmem.full.engine import FullTuning, Saved
from lowmem.full.tier import EXP_AVG, EXP_AVG_SQ
from offload import OutputTensor, ShardFile, Store, parse_bytes, split_into_shards, write_index

if TYPE_CHECKING:
    from torch.nn.modules.module import _IncompatibleKeys
    from transformers import PreTrainedModel


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
        with ShardFile(file, outputs, mode=0o600) as shard:
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


_SHARD = "2GB"
"""Trainer reads a whole shard into RAM when it resumes."""


@dataclass(frozen=True, kw_only=True)
class StoredNames:
    """What parameters are called in the checkpoint that the model was opened from."""

    by_key: Mapping[str, str]
    """Stored names by model name."""

    def keys_of(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under model names, whichever of the two names they come under."""
        by_stored = {name: key for key, name in self.by_key.items()}
        return {by_stored.get(name, name): value for name, value in stored.items()}


class Saving:
    """Stands in for two methods of a model instance."""

    def __init__(self, model: PreTrainedModel, full: FullTuning, names: StoredNames) -> None:
        """Serve a model, weakly: it holds this.

        Args:
            model: The model.
            full: Its engine.
            names: Under which names tensors are written.
        """
        self._model = weakref.ref(model)
        self._full, self._names = full, names

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = _SHARD,
        variant: str | None = None,
        **refused: object,
    ) -> None:
        """Write configuration and master weights as a checkpoint that transformers loads. Completes pending updates.

        Args:
            save_directory: Folder, made if need be; an earlier checkpoint in it is replaced.
            is_main_process: Nothing is written if not.
            state_dict: Only None: the model's own.
            push_to_hub: Only False.
            max_shard_size: Largest file, "2GB" for instance.
            variant: Only None.
            refused: Other options of transformers; refused by name unless they are at their defaults.

        Raises:
            UnsupportedError: An option that is not honoured.
        """
        _refuse({"state_dict": state_dict, "variant": variant, "push_to_hub": push_to_hub or None}, refused)
        if not is_main_process:
            return
        model = self._model()
        assert model is not None, "the model holds this"
        self._full.finish()
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*folder.glob("model*.safetensors"), *folder.glob("model.safetensors.index.json")):
            old.unlink()
        shards = split_into_shards(self._outputs(model), max_shard_bytes=_shard_bytes(max_shard_size))
        keys = {name: key for key, name in self._names.by_key.items()}
        for file, tensors in shards.items():
            with ShardFile(folder / file, tensors) as shard:
                for tensor in tensors:
                    shard.write(self._value(model, keys.get(tensor.name, tensor.name)))
        write_index(folder, shards)
        model.config.dtype = torch.float32
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        self._full.saved = Saved(folder=folder, version=self._full.version)

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """As `torch.nn.Module.load_state_dict`; tensors may also have the names that they have in the checkpoint."""
        if assign:
            raise UnsupportedError(
                "load_state_dict(assign=True)",
                reason="the weights are kept in their tier, not in the tensors that are given",
                instead="assign=False",
            )
        model = self._model()
        assert model is not None, "the model holds this"
        # Between steps nothing may be pending: an update would change what is loaded here.
        self._full.finish()
        loaded: _IncompatibleKeys = torch.nn.Module.load_state_dict(
            model, self._names.keys_of(state_dict), strict=strict
        )
        self._full.version += 1
        return loaded

    def _outputs(self, model: PreTrainedModel) -> list[OutputTensor]:
        """Parameters first, then the persistent buffers that the checkpoint has."""
        found = [
            OutputTensor(name=self._names.by_key[key], dtype=torch.float32, shape=tuple(entry.place.shape))
            for key, entry in self._full.params.items()
        ]
        persistent = model.state_dict(keep_vars=True)
        for name, buffer in model.named_buffers():
            if name in persistent:
                found.append(OutputTensor(name=name, dtype=buffer.dtype, shape=tuple(buffer.shape)))
        return found

    def _value(self, model: PreTrainedModel, key: str) -> Tensor:
        if key in self._full.params:
            return self._full.read(key).cpu().contiguous()
        buffer: Tensor = model.get_buffer(key)
        return buffer.detach().cpu().contiguous()


def install_saving(model: PreTrainedModel, full: FullTuning, names: StoredNames) -> None:
    """Give a model instance these methods.

    Args:
        model: The model.
        full: Its engine.
        names: What its parameters are called in its checkpoint.
    """
    saving = Saving(model, full, names)
    object.__setattr__(model, "save_pretrained", saving.save_pretrained)
    object.__setattr__(model, "load_state_dict", saving.load_state_dict)


def _refuse(named: Mapping[str, object], others: Mapping[str, object]) -> None:
    defaults = {"safe_serialization": True, "token": None, "save_peft_format": True, "save_original_format": True}
    defaults["distributed_checkpoint"] = False
    given = [name for name, value in named.items() if value is not None]
    given += [name for name, value in others.items() if name not in defaults or defaults[name] is not value]
    if given:
        raise UnsupportedError(
            f"save_pretrained({given[0]}=...)",
            reason="the weights of a fully tuned model are written tensor by tensor from their tier",
            instead="save_pretrained(folder, max_shard_size=...), and what you need done with the folder",
        )


def _shard_bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    text = size.strip()
    for suffix, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if text.upper().endswith(suffix) and text[: -len(suffix)].strip().replace(".", "", 1).isdigit():
            return int(float(text[: -len(suffix)]) * factor)
    return parse_bytes(text, field="max_shard_size")
