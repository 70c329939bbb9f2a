"""What is done to a streamed model as a whole: saved, copied, pickled, cast, resized; as ever, or refused at once."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from lowmem.errors import UnsupportedError, untested
from lowmem.internals.stand_in import StandIn, keeping_last_read
from lowmem.internals.torch import call_before_apply, parameter_table, put_parameter
from lowmem.models.absent import AbsentParameter
from offload import replacing_checkpoint

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel
    from transformers import PreTrainedModel

SHARD = "2GB"
"""Largest file unless the user says otherwise: a shard is in RAM while it is written."""
_CARD = "README.md"
_FOLDER = "_lowmem_folder"
"""Attribute of a model: the folder of its checkpoint."""
_WRITTEN_IN_PLACE = ("push_to_hub", "variant", "distributed_checkpoint")
"""Options of transformers' `save_pretrained` that need the folder itself."""


def install_whole(model: PreTrainedModel, *, folder: Path, block_names: Mapping[str, nn.Module]) -> None:
    """Give a model instance these ways.

    Args:
        model: Filled, with absent parameters in its blocks.
        folder: Its checkpoint, which is never written to.
        block_names: Its decoder blocks by module path.
    """
    refuse_copy(
        model,
        what="copy.deepcopy(model)",
        reason="a copy would hold every weight of the checkpoint",
        instead="the adapter's own reference (peft's disable_adapter, which TRL uses when given peft_config), or a "
        "second streamed model",
    )
    refuse_copy(
        model,
        what="torch.save(model)",
        reason="its weights, open files and threads cannot be pickled",
        instead="model.save_pretrained(folder), or trainer.save_model, which saves the adapter",
        method="__reduce_ex__",
    )
    for name, block in block_names.items():
        refuse_copy(
            block,
            what=f"a copy of the decoder block {name} (modules_to_save)",
            reason="a trained copy of a whole block would not be streamed",
            instead="modules_to_save with modules inside the blocks, or LoRA on the block's layers",
        )
    for module in _with_ancestors(model, block_names):
        call_before_apply(module, _refuse_cast)
    own = weakref.ref(model)

    def save_pretrained(save_directory: str | os.PathLike[str], *args: object, **kwargs: object) -> object:
        return _save(alive(own), save_directory, args, kwargs, folder=folder)

    vars(model)["save_pretrained"] = save_pretrained
    vars(model)[_FOLDER] = folder
    install_bounded_saving()
    install_saving_of_adapters()


def alive(own: weakref.ref[PreTrainedModel]) -> PreTrainedModel:
    """The model whose method is called: held weakly, so that it is freed as soon as its user drops it.

    Raises:
        RuntimeError: It is gone, as in `lowmem.from_pretrained(folder).save_pretrained(other)`.
    """
    model = own()
    if model is None:
        raise RuntimeError("the model is gone: keep what lowmem.from_pretrained returns in a variable")
    return model


def _save(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    args: tuple[object, ...],
    kwargs: dict[str, object],
    *,
    folder: Path,
) -> object:
    """`save_pretrained` of the class, shard by shard: weights are read as their shard is written.

    An older checkpoint in the folder is replaced when the new one is on the disk. Written in place, as by the class,
    are files of another name (`variant`) and what goes to the hub, whose repository is named after the folder.
    """
    _refuse_own_folder("save_pretrained", save_directory, folder)
    # The fifth of transformers' own arguments.
    if len(args) < 4:
        kwargs.setdefault("max_shard_size", SHARD)
    write = type(model).save_pretrained
    given = signature(write).bind(model, save_directory, *args, **kwargs).arguments
    with keeping_last_read():
        if any(given.get(name) for name in _WRITTEN_IN_PLACE) or not given.get("is_main_process", True):
            return write(model, save_directory, *args, **kwargs)
        with replacing_checkpoint(Path(save_directory)) as beside:
            return write(model, beside, *args, **kwargs)


def _refuse_own_folder(method: str, save_directory: str | os.PathLike[str], folder: Path) -> None:
    if os.path.exists(save_directory) and os.path.samefile(save_directory, folder):
        raise UnsupportedError(
            f"{method}({os.fspath(save_directory)!r})",
            reason="the model's weights are read from this folder while it is saved",
            instead="another folder",
        )


def refuse_copy(module: nn.Module, *, what: str, reason: str, instead: str, method: str = "__deepcopy__") -> None:
    """Make `copy.deepcopy(module)`, or whatever else calls a method of it to copy it, a clear refusal.

    Args:
        module: The module; the refusal hangs on this instance.
        what: The copy, or the option that asks for it, as the user knows it.
        reason: Why it cannot be.
        instead: What to do.
        method: Which method; `__reduce_ex__` where it is pickled.
    """

    def refuse(argument: object) -> NoReturn:
        raise UnsupportedError(what, reason=reason, instead=instead)

    vars(module)[method] = refuse


def _with_ancestors(model: nn.Module, block_names: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    paths = {""}
    for name in block_names:
        parts = name.split(".")
        paths.update(".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return (model.get_submodule(path) for path in sorted(paths))


def _refuse_cast(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Refuse `.to()`, `.half()` and the like before any tensor has changed, if they would change an absent one."""
    absent = (param for param in module.parameters() if isinstance(param, StandIn))
    for dtype, device in {(param.dtype, param.device) for param in absent}:
        made = change(torch.empty(0, dtype=dtype, device=device))
        if made.dtype != dtype:
            raise UnsupportedError(
                f"casting a streamed model to {made.dtype}",
                reason="its blocks are read in the compute dtype that it was opened with "
                "(model.half(), .bfloat16(), .to(dtype) and bf16_full_eval ask for another)",
                instead=f'lowmem.from_pretrained(..., dtype="{str(made.dtype).removeprefix("torch.")}")',
            )
        if made.device != device:
            raise UnsupportedError(
                f"moving a streamed model to {made.device}",
                reason="its blocks are brought to the device that it was opened for",
                instead=f'lowmem.from_pretrained(..., device="{made.device}")',
            )


def install_resizing(model: PreTrainedModel, *, room_bytes: int, tuning: str) -> None:
    """Have `resize_token_embeddings` bring a table that is on disk into memory first, or refuse at once.

    Args:
        model: Its input embedding may be gathered from disk.
        room_bytes: Device memory that the plan leaves.
        tuning: "full" where every weight is trained.
    """
    own = weakref.ref(model)

    def resize(new_num_tokens: int | None = None, *args: object, **kwargs: object) -> nn.Module:
        model = alive(own)
        if tuning == "full":
            raise UnsupportedError(
                'resize_token_embeddings with tuning="full"',
                reason="the master weights and their state have the checkpoint's shapes",
                instead="a checkpoint whose vocabulary was resized before (transformers: resize, save_pretrained)",
            )
        _bring_table(model.get_input_embeddings(), new_num_tokens, room_bytes=room_bytes)
        resized: nn.Module = type(model).resize_token_embeddings(model, new_num_tokens, *args, **kwargs)
        return resized

    vars(model)["resize_token_embeddings"] = resize


def _bring_table(table: nn.Module, num_rows: int | None, *, room_bytes: int) -> None:
    weight = parameter_table(table).get("weight")
    if not isinstance(weight, AbsentParameter) or num_rows in (None, weight.shape[0]):
        return
    needed = max(weight.shape[0], num_rows or 0) * weight.shape[1] * weight.dtype.itemsize
    if needed > room_bytes:
        raise UnsupportedError(
            "resize_token_embeddings with the embedding table on disk",
            reason=f"the changed table takes {needed} bytes of device memory, the plan leaves {room_bytes}",
            instead="a larger Budget.device, or a checkpoint whose vocabulary was resized before",
        )
    put_parameter(table, "weight", nn.Parameter(weight.materialise(), requires_grad=False))


_SAVE_PARAMETERS = ("self", "model", "save_directory", "max_shard_size", "safe_serialization")


def install_bounded_saving() -> None:
    """Replace `Accelerator.save_model` by one that saves a streamed model shard by shard, unless it is already.

    It asks a model for its state dict, makes every weight contiguous at once and does the rest itself, so there is
    nothing of the model's to hook. All other models are handed to the method that was there.

    Raises:
        UnsupportedError: This accelerate has another `save_model`.
    """
    from accelerate import Accelerator

    shipped = Accelerator.save_model
    if hasattr(shipped, "lowmem"):
        return
    if tuple(signature(shipped).parameters) != _SAVE_PARAMETERS:
        raise untested(
            "accelerate", f"Accelerator.save_model has other parameters than {', '.join(_SAVE_PARAMETERS[1:])}"
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
        for module in plain.modules():
            if _FOLDER in vars(module):
                _refuse_own_folder("Accelerator.save_model", save_directory, vars(module)[_FOLDER])
        if self.is_main_process:
            save_in_shards(
                plain.state_dict(), Path(save_directory), size=SHARD if max_shard_size == default else max_shard_size
            )

    save_model.lowmem = True  # type: ignore[attr-defined]
    return save_model


def save_in_shards(state: dict[str, Tensor], folder: Path, *, size: int | str) -> None:
    """Write a state dict as `model*.safetensors`, as accelerate does, with one shard in RAM at a time.

    Args:
        state: Tensors and stand-ins by name; of several names of one tensor the first is written.
        folder: Made if need be; an earlier save in it is replaced when this one is on the disk.
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
    with replacing_checkpoint(folder) as beside:
        for file, names in split.filename_to_tensors.items():
            with keeping_last_read():
                save_file({name: once[name].contiguous() for name in names}, beside / file, metadata={"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (beside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def install_saving_of_adapters() -> None:
    """Have `PeftModel.save_pretrained` of a streamed model write beside an older adapter, unless it does already.

    PEFT truncates the older one's weights and writes the new ones in their place, which a kill would lose both in. All
    other models are handed to the method that was there.
    """
    from peft import PeftModel

    shipped = PeftModel.save_pretrained
    if hasattr(shipped, "lowmem"):
        return

    @wraps(shipped)
    def save_pretrained(self: PeftModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        is_main = signature(shipped).bind(self, save_directory, *args, **kwargs).arguments.get("is_main_process", True)
        is_streamed = any(isinstance(param, StandIn) for param in self.parameters())
        folder = Path(save_directory)
        if not is_streamed or not is_main or folder.is_file():
            shipped(self, save_directory, *args, **kwargs)
            return
        with replacing_checkpoint(folder) as beside:
            # PEFT adds to a model card that is there.
            if (folder / _CARD).is_file():
                shutil.copyfile(folder / _CARD, beside / _CARD)
            shipped(self, str(beside), *args, **kwargs)

    save_pretrained.lowmem = True  # type: ignore[attr-defined]
    PeftModel.save_pretrained = save_pretrained
