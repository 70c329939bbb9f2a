"""Planning a merge: which stored tensors are copied, which rows change, and what the configuration must say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowmem.adapters.updates import Update
from lowmem.errors import UnsupportedError
from lowmem.models.blocks import refuse_config
from lowmem.models.configuration import QUANTIZATION, read_config, take_quantization
from lowmem.models.mapping import CheckpointMap, Recipe, map_checkpoint
from lowmem.quantization.format import PackedWeight
from lowmem.quantization.registry import find_packed
from lowmem.quantization.values import as_values
from offload import OutputTensor, SafetensorsSource, TensorSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from lowmem.adapters.saved_adapter import AdapterFiles, SavedAdapter, WholeLayer

_CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class RowSegment:
    """Consecutive rows of a stored tensor that are consecutive rows of one parameter."""

    start: int
    """First row in the stored tensor."""
    num_rows: int
    """How many."""
    target_start: int
    """First row in the parameter."""
    updates: tuple[Update, ...]
    """What changes them."""


@dataclass(frozen=True, kw_only=True)
class MergedTensor:
    """A tensor of the output and how it is made."""

    output: OutputTensor
    """As it will be stored."""
    source: TensorSpec
    """The stored tensor that it is made of; of another shape where the adapter replaces it by a resized one."""
    segments: tuple[RowSegment, ...] = ()
    """All its rows, where some of them change; empty where it is copied."""
    whole_layer: tuple[WholeLayer, str] | None = None
    """A layer that PEFT merges, and which of its parameters this is."""


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Everything a merge writes."""

    tensors: tuple[MergedTensor, ...]
    """In the order in which they are written."""
    sources: Mapping[str, TensorSpec]
    """Stored tensor of each parameter that is stored as it is in the model."""
    config_changes: Mapping[str, object] = field(default_factory=dict)
    """Fields of config.json that get new values; one that gets None is left out."""
    packed: Mapping[str, PackedWeight] = field(default_factory=dict)
    """Weights of the base that are packed, by the names of the tensors of their values."""


@dataclass(frozen=True, kw_only=True)
class BaseCheckpoint:
    """A checkpoint that an adapter belongs to, matched with its class; none of its weights is read."""

    config: PretrainedConfig
    """Without what it says about packing."""
    model: PreTrainedModel
    """The class, on meta."""
    tensors: Mapping[str, TensorSpec]
    """Its tensors by name, packed ones as their values."""
    packed: Mapping[str, PackedWeight]
    """The packed ones."""
    mapping: CheckpointMap
    """Which of them make which parameter."""


def read_base(
    folder: Path, *, source: SafetensorsSource, trust_remote_code: bool, allows_adapter: bool = False
) -> BaseCheckpoint:
    """Read what an adapter is held against.

    Args:
        folder: The checkpoint's folder.
        source: Its tensors.
        trust_remote_code: As in transformers.
        allows_adapter: Whether the folder may hold an adapter too.

    Raises:
        UnsupportedError: The architecture, or the way it is packed.
        SourceError: The checkpoint does not fit its configuration.
    """
    config = read_config(folder, trust_remote_code=trust_remote_code, allows_adapter=allows_adapter)
    refuse_config(config)
    quantization = take_quantization(config)
    packed = {} if quantization is None else find_packed(quantization, source.tensors, file=folder / _CONFIG)
    tensors = as_values(source.tensors, packed)
    model = _on_meta(folder, {}, trust_remote_code=trust_remote_code)
    return BaseCheckpoint(
        config=config, model=model, tensors=tensors, packed=packed, mapping=map_checkpoint(model, tensors)
    )


def plan_merge(
    folder: Path,
    adapter: Path,
    *,
    source: SafetensorsSource,
    dtype: torch.dtype | None,
    trust_remote_code: bool = False,
) -> MergePlan:
    """Match an adapter's updates with the stored tensors of its base model. Reads no tensor of the base.

    Args:
        folder: The base model's folder.
        adapter: The adapter's folder.
        source: The base model's tensors.
        dtype: Type to store floating-point weights in; None to keep each its own.
        trust_remote_code: As in transformers.

    Raises:
        UnsupportedError: The adapter has no merged form in an ordinary checkpoint of this model.
        ValueError: The adapter does not fit the model.
        SourceError: The checkpoint does not fit its configuration.
    """
    from lowmem.adapters.saved_adapter import read_adapter, read_files

    files = read_files(adapter)
    own_adapter = adapter.resolve() == folder.resolve()
    base = read_base(folder, source=source, trust_remote_code=trust_remote_code, allows_adapter=own_adapter)
    model, mapping, stored, packed = base.model, base.mapping, base.tensors, base.packed
    unpacked = dtype or _unpacked_dtype(base.config)
    changes: dict[str, object] = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
    if packed:
        changes = {"dtype": str(unpacked).removeprefix("torch."), QUANTIZATION: None}
    changes |= _resize(model, files)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    ties, aliases = _ties(model), _aliases(model)
    saved = _also_for(aliases, read_adapter(model, files))
    unknown = sorted((set(saved.updates) | set(saved.whole_layers)) - set(shapes))
    if unknown:
        raise ValueError(f"{adapter}: the adapter changes {unknown[0]}, which the model does not have")
    extras = _untie(ties, saved, mapping)
    if extras is not None:
        changes["tie_word_embeddings"] = False
        _check_unties(folder, changes, ties=ties, trust_remote_code=trust_remote_code)
    outputs = _Outputs(saved=saved, shapes=shapes, dtype=dtype, unpacked=dict.fromkeys(packed, unpacked))
    recipes = {id(recipe): recipe for recipe in mapping.recipes.values()}
    tensors = [tensor for recipe in recipes.values() for tensor in outputs.made_of(recipe)]
    tensors += [outputs.copied(stored[name]) for name in sorted(mapping.unexpected)]
    tensors += [outputs.changed(spec, name, name=name) for name, spec in (extras or {}).items()]
    for tensor in tensors:
        if tensor.output.dtype.is_floating_point and tensor.output.dtype.itemsize == 1:
            raise UnsupportedError(
                f"{tensor.output.name} stored as {tensor.output.dtype}",
                reason="merging into quantised weights would round them again",
                instead="the bf16, fp16 or fp32 checkpoint of the same model",
            )
    position = {name: number for number, name in enumerate(stored)}
    tensors.sort(key=lambda tensor: position.get(tensor.output.name, len(position)))
    plain = {name: recipe.sources[0] for name, recipe in mapping.recipes.items() if recipe.convert is None}
    return MergePlan(tensors=tuple(tensors), sources=plain, config_changes=changes, packed=packed)


def _unpacked_dtype(config: PretrainedConfig) -> torch.dtype:
    """What packed weights are stored in where nobody says: what the model computes in, else bfloat16."""
    named = config.get_text_config().dtype or config.dtype
    known = (torch.float32, torch.bfloat16, torch.float16)
    return named if isinstance(named, torch.dtype) and named in known else torch.bfloat16


# Where PEFT's layers leave an embedding's own weight.
_EMBEDDING_NAMES = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")


def _resize(model: PreTrainedModel, files: AdapterFiles) -> dict[str, object]:
    """Give the model the vocabulary that the adapter was trained with: tokens may have been added for it.

    Returns:
        What the configuration must say.
    """
    config = model.config.get_text_config(decoder=True)
    paths = {id(module): path for path, module in model.named_modules()}
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for name in _EMBEDDING_NAMES if layer is not None else ():
            stored = files.tensors.get(f"base_model.model.{paths[id(layer)]}.{name}")
            if stored is not None and stored.ndim == 2 and stored.shape[0] != layer.weight.shape[0]:
                model.resize_token_embeddings(stored.shape[0], mean_resizing=False)
                return {"vocab_size": config.vocab_size}
    return {}


def _on_meta(folder: Path, changes: Mapping[str, object], *, trust_remote_code: bool) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    for name, value in changes.items():
        setattr(config.get_text_config(decoder=True) if name == "vocab_size" else config, name, value)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _ties(model: PreTrainedModel) -> list[list[str]]:
    """Names of the model's tensors, those that are one tensor together."""
    return _grouped({name: id(value) for name, value in model.state_dict(keep_vars=True).items()})


def _aliases(model: PreTrainedModel) -> list[list[str]]:
    """Names of tensors that several paths lead to because the module itself is shared: an adapter sees one of them."""
    parts = {name: name.rpartition(".") for name in model.state_dict()}
    groups = _grouped({name: (id(model.get_submodule(path)), last) for name, (path, _, last) in parts.items()})
    return [names for names in groups if len(names) > 1]


def _grouped(keys: Mapping[str, object]) -> list[list[str]]:
    """Names, those with the same key together."""
    groups: dict[object, list[str]] = {}
    for name, key in keys.items():
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _also_for(aliases: list[list[str]], saved: SavedAdapter) -> SavedAdapter:
    of = {name: names for names in aliases for name in names}
    updates = {name: found for other, found in saved.updates.items() for name in of.get(other, (other,))}
    whole = {name: found for other, found in saved.whole_layers.items() for name in of.get(other, (other,))}
    return replace(saved, updates=updates, whole_layers=whole)


def _untie(ties: list[list[str]], saved: SavedAdapter, mapping: CheckpointMap) -> dict[str, TensorSpec] | None:
    """What must be stored apart because tied tensors change differently: new names and what they start from.

    None where all that is tied stays tied.
    """
    parted = False
    for names in ties:
        changed = [name for name in names if name in saved.updates or name in saved.whole_layers]
        whole = [saved.whole_layers.get(name) for name in names]
        if not changed or (_same_for_all(names, saved) and all(layer is whole[0] for layer in whole)):
            continue
        if any(whole):
            raise UnsupportedError(
                f"merging an adapter of {changed[0]}",
                reason=f"it is one tensor with {', '.join(name for name in names if name != changed[0])}",
                instead="LoRA on these modules, or PEFT's merge_and_unload on a model that is in memory",
            )
        parted = True
    if not parted:
        return None
    # The configuration has one switch for all ties: every name gets a tensor of its own.
    extras: dict[str, TensorSpec] = {}
    for names in ties:
        stored = next((mapping.recipes[name].sources[0] for name in names if name in mapping.recipes), None)
        if stored is not None:
            extras.update((name, stored) for name in names if name not in mapping.recipes)
    return extras


def _same_for_all(names: list[str], saved: SavedAdapter) -> bool:
    first, *others = (saved.updates.get(name, ()) for name in names)
    return all(
        len(first) == len(other) and all(one.same_as(two) for one, two in zip(first, other, strict=True))
        for other in others
    )


def _check_unties(
    folder: Path, changes: Mapping[str, object], *, ties: list[list[str]], trust_remote_code: bool
) -> None:
    left = [names for names in _ties(_on_meta(folder, changes, trust_remote_code=trust_remote_code)) if len(names) > 1]
    if any(names in ties for names in left):
        raise UnsupportedError(
            f"merging an adapter of one of {', '.join(left[0])}",
            reason="the adapter changes them differently, and the architecture always makes them one tensor",
            instead="an adapter of both (ensure_weight_tying=True), or the adapter without merging",
        )


@dataclass(frozen=True, kw_only=True)
class _Outputs:
    """Makes the output's tensors of stored ones."""

    saved: SavedAdapter
    shapes: Mapping[str, tuple[int, ...]]
    """Of the model's tensors, by name."""
    dtype: torch.dtype | None
    unpacked: Mapping[str, torch.dtype]
    """What tensors are stored in that are packed in the base, by name."""

    def made_of(self, recipe: Recipe) -> list[MergedTensor]:
        """The stored tensors of a recipe after the merge."""
        changed = [name for name in recipe.targets if name in self.saved.updates or name in self.saved.whole_layers]
        first = recipe.sources[0]
        if recipe.convert is None and changed:
            return [self.changed(first, changed[0], name=first.name)]
        if recipe.convert is None and self.shapes[recipe.targets[0]] != first.shape:
            raise UnsupportedError(
                f"merging an adapter whose vocabulary was resized without {recipe.targets[0]}",
                reason="the rows of the added tokens are in neither file",
                instead="the adapter saved with them: save_pretrained(..., save_embedding_layers=True)",
            )
        if not changed:
            return [self.copied(spec) for spec in recipe.sources]
        whole = any(name in self.saved.whole_layers for name in changed)
        whole = whole or any(update.sees_all_rows for name in changed for update in self.saved.updates[name])
        segments = None if whole else _trace_rows(recipe, self.shapes, updates=self.saved.updates)
        if segments is None:
            raise UnsupportedError(
                f"merging an adapter of {changed[0]}",
                reason=f"it is stored in another form ({first.name}), whose rows are not its rows",
                instead="PEFT's merge_and_unload on a model that is in memory",
            )
        return [replace(self.copied(spec), segments=segments[spec.name]) for spec in recipe.sources]

    def changed(self, spec: TensorSpec, target: str, *, name: str) -> MergedTensor:
        """A tensor that is stored as the parameter is, and that an adapter may change."""
        made = self.copied(spec, name=name, shape=self.shapes[target])
        if target in self.saved.whole_layers:
            return replace(made, whole_layer=(self.saved.whole_layers[target], target.rpartition(".")[2]))
        updates = self.saved.updates.get(target, ())
        whole = RowSegment(start=0, num_rows=num_rows(self.shapes[target]), target_start=0, updates=updates)
        return replace(made, segments=(whole,) if updates else ())

    def copied(self, spec: TensorSpec, *, name: str = "", shape: tuple[int, ...] | None = None) -> MergedTensor:
        """A tensor as it is stored, but for the dtype."""
        dtype = self.dtype if self.dtype is not None and spec.dtype.is_floating_point else spec.dtype
        dtype = self.unpacked.get(spec.name, dtype)
        return MergedTensor(
            output=OutputTensor(name=name or spec.name, dtype=dtype, shape=shape or spec.shape), source=spec
        )


def num_rows(shape: tuple[int, ...]) -> int:
    """Rows of a tensor seen as a matrix: all dimensions but the last; one dimension is a column."""
    return torch.Size(shape[:-1] if len(shape) > 1 else shape).numel()


def _trace_rows(
    recipe: Recipe, shapes: Mapping[str, tuple[int, ...]], *, updates: Mapping[str, tuple[Update, ...]]
) -> dict[str, tuple[RowSegment, ...]] | None:
    """Find where a conversion moves each row of the stored tensors, by sending row numbers through it.

    Returns:
        By stored name, which of its rows are which rows of which parameter; None where the conversion does more than
        move whole rows.
    """
    assert recipe.convert is not None
    *starts, total = accumulate((num_rows(spec.shape) for spec in recipe.sources), initial=0)
    numbers = torch.split(torch.arange(total), [num_rows(spec.shape) for spec in recipe.sources])
    markers = [part.reshape(_narrow(spec.shape)) for part, spec in zip(numbers, recipe.sources, strict=True)]
    if recipe.cast_first is not None or len({spec.shape[-1] for spec in recipe.sources if len(spec.shape) > 1}) > 1:
        return None
    try:
        made = recipe.convert(markers)
    except (RuntimeError, ValueError, IndexError):
        return None
    target_of, row_of = torch.full((total,), -1), torch.full((total,), -1)
    for number, (name, rows) in enumerate(made.items()):
        width = {shapes[name][-1]} if len(shapes[name]) > 1 else set()
        if tuple(rows.shape) != _narrow(shapes[name]) or width - {recipe.sources[0].shape[-1]}:
            return None
        target_of[rows.reshape(-1)] = number
        row_of[rows.reshape(-1)] = torch.arange(rows.numel())
    if bool((target_of < 0).any()) or sum(rows.numel() for rows in made.values()) != total:
        return None
    names = list(made)
    segments: dict[str, tuple[RowSegment, ...]] = {}
    for spec, start in zip(recipe.sources, starts, strict=True):
        runs = _runs(target_of, row_of, start, num_rows(spec.shape))
        segments[spec.name] = tuple(
            RowSegment(
                start=first,
                num_rows=count,
                target_start=int(row_of[start + first]),
                updates=updates.get(names[int(target_of[start + first])], ()),
            )
            for first, count in runs
        )
    return segments


def _narrow(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], 1) if len(shape) > 1 else shape


def _runs(target_of: Tensor, row_of: Tensor, start: int, count: int) -> list[tuple[int, int]]:
    targets, rows = target_of[start : start + count], row_of[start : start + count]
    breaks = ((targets.diff() != 0) | (rows.diff() != 1)).nonzero().squeeze(1) + 1
    firsts = [0, *breaks.tolist()]
    return [(first, last - first) for first, last in zip(firsts, [*firsts[1:], count], strict=True)]
