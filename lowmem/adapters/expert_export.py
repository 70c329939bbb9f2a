"""An adapter of fused experts written expert by expert, under the names by which inference servers look for it.

PEFT trains a stack of experts as one parameter and saves its factors for all experts in two matrices, under the name of
the module. vLLM and SGLang read an adapter of a mixture of experts by the names that its base checkpoint has:
`mlp.experts.7.gate_proj.lora_A.weight`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lowmem.adapters.merge import taking_the_place_of
from lowmem.adapters.merge_plan import read_base
from lowmem.adapters.saved_adapter import AdapterFiles, read_adapter, read_files
from lowmem.adapters.updates import LowRank
from lowmem.errors import UnsupportedError
from lowmem.experts.stacks import taken_apart
from lowmem.models.checkpoint import resolve
from lowmem.packing.beside import refuse_output
from offload import SafetensorsSource

if TYPE_CHECKING:
    from lowmem.models.mapping import Recipe

_ROOT = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_experts(
    adapter: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write an adapter with its experts one by one, under the names of the base checkpoint's tensors.

    What the adapter does stays the same to the last bit, but for experts whose scaling is not that of the adapter
    (`rank_pattern`, `alpha_pattern`): servers know one scaling, and the quotient goes into their second factor. Layers
    that are no experts are copied. Reads no weight of the base.

    Args:
        adapter: Folder of the adapter, as PEFT's `save_pretrained` and the Trainer write it.
        model: Local folder or hub id of the checkpoint that it was trained on.
        output: Folder to write; must not exist or be empty.
        revision: Branch, tag or commit of the model's hub repository.
        trust_remote_code: As in transformers.

    Returns:
        The output folder.

    Raises:
        UnsupportedError: It has no adapted experts, is no LoRA, or the checkpoint does not store experts one by one.
        ValueError: The adapter does not fit the model.
        FileExistsError: The output folder is not empty.
        offload.SourceError: A file is damaged.
    """
    from safetensors.torch import save_file

    base, folder = resolve(model, revision=revision), Path(adapter).expanduser()
    target = Path(output).expanduser().absolute()
    refuse_output(target, base)
    files = read_files(folder)
    if files.kind != "LORA":
        raise UnsupportedError(
            f"exporting the experts of a {files.kind} adapter", reason="servers read LoRA", instead="a LoRA adapter"
        )
    with SafetensorsSource(base) as source:
        read = read_base(base, source=source, trust_remote_code=trust_remote_code)
        shapes = {name: tuple(value.shape) for name, value in read.model.state_dict().items()}
        saved = read_adapter(read.model, files)
        usual = _usual_scaling(files)
        tensors = dict(files.tensors)
        stacks = {name: updates for name, updates in saved.updates.items() if _is_stack(updates)}
        for name, updates in stacks.items():
            (update,) = updates
            assert isinstance(update, LowRank)
            recipe = read.mapping.recipes[name]
            for old in _keys_of(name, tensors):
                del tensors[old]
            tensors |= _one_by_one(name, update, recipe, shapes[name], usual=usual)
        if not stacks:
            raise UnsupportedError(
                f"exporting the experts of {folder}",
                reason="it adapts no stack of experts",
                instead="the adapter as it is, which servers read",
            )
        _check_names(tensors, set(read.tensors), shapes)
    with taking_the_place_of(target) as unfinished:
        save_file({name: value.contiguous() for name, value in tensors.items()}, unfinished / _WEIGHTS)
        (unfinished / _CONFIG).write_text(json.dumps(_config(folder, tensors), indent=2, sort_keys=True) + "\n")
    return target


def _is_stack(updates: tuple[object, ...]) -> bool:
    return len(updates) == 1 and isinstance(updates[0], LowRank) and updates[0].factors[0].shape[0] > 1


def _usual_scaling(files: AdapterFiles) -> float:
    """What servers multiply each product of factors with."""
    config = files.config
    rank, alpha = getattr(config, "r", 1), getattr(config, "lora_alpha", 1)
    return float(alpha / rank**0.5 if getattr(config, "use_rslora", False) else alpha / rank)


def _keys_of(name: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """Stored factors of the stacks of a module: PEFT nests a wrapper for each."""
    prefix = f"{_ROOT}{name.rpartition('.')[0]}."
    heads = ("lora_A.", "lora_B.", "base_layer.")
    return [key for key in tensors if key.startswith(prefix) and key.removeprefix(prefix).startswith(heads)]


def _one_by_one(
    name: str, update: LowRank, recipe: Recipe, shape: tuple[int, ...], *, usual: float
) -> dict[str, Tensor]:
    apart = None if recipe.convert is None else taken_apart(recipe, shape)
    if apart is None:
        raise UnsupportedError(
            f"exporting the experts of {name} one by one",
            reason="the base checkpoint stores them in one tensor, and servers read such an adapter as PEFT saves it",
            instead="the adapter as it is",
        )
    left, right, scaling = update.factors
    made = {}
    for number, parts in enumerate(apart):
        for part in parts:
            stem = f"{_ROOT}{part.given.name.removesuffix('.weight')}"
            second = left[number, part.rows]
            made[f"{stem}.lora_A.weight"] = right[number].clone()
            made[f"{stem}.lora_B.weight"] = second.clone() if scaling == usual else second * (scaling / usual)
    return made


def _check_names(tensors: Mapping[str, Tensor], stored: set[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Hold each exported name against the base: a server that does not find a name leaves the layer out silently.

    Raises:
        ValueError: A name is none of the checkpoint's, or its factors are not of that tensor's shape.
    """
    known = stored | set(shapes)
    for key, first in tensors.items():
        stem, found, _ = key.partition(".lora_A.weight")
        if not found:
            continue
        weight, second = f"{stem.removeprefix(_ROOT)}.weight", tensors.get(f"{stem}.lora_B.weight")
        if weight not in known:
            raise ValueError(f"{key}: the base checkpoint has no {weight}, and a server would leave this layer out")
        if second is None or second.shape[1] != first.shape[0]:
            raise ValueError(f"{key}: expected a lora_B of rank {first.shape[0]} beside it")


def _config(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """adapter_config.json: experts are modules now, and there are no exceptions to rank and scaling."""
    config: dict[str, object] = json.loads((folder / _CONFIG).read_text())
    modules = {key.partition(".lora_A")[0].rpartition(".")[2] for key in tensors if ".lora_A" in key}
    return config | {
        "target_modules": sorted(modules),
        "target_parameters": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
