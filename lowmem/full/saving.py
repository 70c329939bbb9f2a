"""`save_pretrained` and `load_state_dict` of a fully tuned model: tensor by tensor, in bounded RAM."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowmem.adapters.shards import OutputTensor, ShardFile, split_into_shards, write_index
from lowmem.errors import UnsupportedError
from lowmem.full.engine import FullTuning, Saved
from offload import parse_bytes

if TYPE_CHECKING:
    from torch.nn.modules.module import _IncompatibleKeys
    from transformers import PreTrainedModel

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


__all__ = ["Saving", "StoredNames", "install_saving"]
