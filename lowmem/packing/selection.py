"""What of a checkpoint is packed, in which file each tensor will lie, and where. Reads nothing.

One file for what is outside the decoder blocks, then one for each block, whose tensors are read together. In a file,
tensors of whole pages come first, behind a header that ends with a page, so that each begins on a page; the rest
follows, wider elements first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from lowmem.errors import UnsupportedError
from lowmem.models.build import Skeleton, StreamedBlock
from lowmem.models.configuration import EXPERT_COUNTS
from lowmem.models.mapping import Recipe
from lowmem.quantization.format import PackedWeight
from lowmem.quantization.packing import Packer
from offload import PAGE_BYTES, BlockSpec, OutputTensor, TensorSpec, shard_header

Included = Literal["embeddings", "head"]
"""What can be packed outside the blocks, where it is asked for."""

_LENGTH_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class PackedEntry:
    """A parameter that is packed."""

    recipe: Recipe
    """What makes it."""
    target: str
    """Its name in the model."""
    name: str
    """Its name in the output: the stored one, or the model's where it is made of several stored tensors."""
    shape: tuple[int, ...]
    """Its shape as it is packed: (out, in), with experts in front."""
    is_transposed: bool
    """Whether the model keeps it as (in, out)."""
    dtype: torch.dtype | None = None
    """Dtype that it is said to have been quantised from; that of its values if None."""


@dataclass(frozen=True, kw_only=True)
class OutputUnit:
    """One file of the output."""

    file: str
    """Its name."""
    packed: tuple[PackedEntry, ...]
    """What is packed in it."""
    copied: tuple[TensorSpec, ...]
    """Stored tensors that go into it as they are."""
    converted: tuple[tuple[Recipe, str], ...]
    """Parameters that are made of the same stored tensors as packed ones, and are stored as they are in the model."""
    outputs: tuple[OutputTensor, ...]
    """Its tensors, in the order in which they are written."""

    @property
    def header_bytes(self) -> int:
        """Bytes before the first tensor: whole pages."""
        return _LENGTH_BYTES + len(shard_header(self.outputs, align_bytes=PAGE_BYTES))

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.header_bytes + sum(output.nbytes for output in self.outputs)

    def specs(self, folder: Path) -> Iterator[TensorSpec]:
        """Where its tensors are, or will be."""
        offset = self.header_bytes
        for output in self.outputs:
            yield TensorSpec(
                name=output.name,
                dtype=output.dtype,
                shape=output.shape,
                file=folder / self.file,
                offset_bytes=offset,
                nbytes=output.nbytes,
            )
            offset += output.nbytes


@dataclass(frozen=True, kw_only=True)
class PackSelection:
    """A whole output."""

    units: tuple[OutputUnit, ...]
    """Its files."""
    skipped: tuple[str, ...]
    """Paths of linear layers that stay as they are."""

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(unit.nbytes for unit in self.units)

    def as_found(self, built: Skeleton, packer: Packer) -> Skeleton:
        """A model as it will be found when the folder is opened, for plans before it is; outside the blocks as it is.

        Args:
            built: What was selected from. Blocks may stand for one another, as those of a configuration alone do.
            packer: The one that it was selected for.
        """
        blocks = zip(built.blocks, self.units[1:], strict=True)
        return replace(built, blocks=tuple(_as_found(one, unit, built.folder, packer) for one, unit in blocks))


def _as_found(streamed: StreamedBlock, unit: OutputUnit, folder: Path, packer: Packer) -> StreamedBlock:
    specs = {spec.name: spec for spec in unit.specs(folder)}
    packed = {id(entry.recipe) for entry in unit.packed}
    recipes = []
    for recipe in streamed.recipes:
        if id(recipe) not in packed:
            recipes.append(replace(recipe, inputs=tuple(specs[spec.name] for spec in recipe.sources)))
    for entry in unit.packed:
        weight = packer.found(entry.name, entry.shape, specs)
        weight = weight.transposed() if entry.is_transposed else weight
        recipes.append(Recipe(targets=(entry.target,), inputs=(weight,), dtype=entry.recipe.dtype))
    for recipe, target in unit.converted:
        recipes.append(Recipe(targets=(target,), inputs=(specs[target],), dtype=recipe.dtype))
    read = {spec.name: spec for recipe in recipes for spec in recipe.sources}
    spec = BlockSpec(name=streamed.spec.name, tensors=tuple(read.values()))
    return replace(streamed, recipes=tuple(recipes), spec=spec)


def select(
    built: Skeleton,
    packer: Packer,
    *,
    tensors: Mapping[str, TensorSpec] | None = None,
    include: Collection[Included] = (),
    keeps_packed: bool = False,
    said_dtype: torch.dtype | None = None,
) -> PackSelection:
    """Choose what is packed: linear layers and stacks of experts of the decoder blocks, routers left out.

    Args:
        built: The model, matched with its checkpoint.
        packer: Knows the sizes.
        tensors: The checkpoint's tensors by name, where they are here: those that the model has no place for are
            copied too.
        include: What is packed outside the blocks.
        keeps_packed: Copy weights that are packed in the same format already; else they are refused.
        said_dtype: Dtype that weights are said to have been quantised from; that of their values if None.

    Raises:
        UnsupportedError: The checkpoint is quantised already, has nothing that can be packed, or `include` has what
            this model cannot have packed.
    """
    formats = {name for recipe in built.mapping.recipes.values() for name in recipe.formats}
    if formats - ({packer.settings["format"]} if keeps_packed else set()):
        raise UnsupportedError(
            f"packing a checkpoint that is stored as {', '.join(sorted(formats))}",
            reason="its weights would be rounded a second time",
            instead="that checkpoint as it is, without quantization=, or the bf16, fp16 or fp32 one of the same model",
        )
    num_experts = _num_experts(built)
    outer = _outer(built, include)
    skipped = [
        name
        for name, module in built.model.named_modules()
        if _is_linear(module)
        and f"{name}.weight" not in outer
        and not any(name.startswith(f"{one.block.name}.") for one in built.blocks)
    ]
    num_files = 1 + len(built.blocks)
    state = {name: tuple(value.shape) for name, value in built.model.state_dict().items()}
    loose = tuple((tensors or {})[name] for name in sorted(built.mapping.unexpected if tensors else ()))
    numbered = partial(_unit_of, num_files=num_files, packer=packer, said_dtype=said_dtype)
    units = [numbered(0, built.resident, transposed=outer, shapes=state, loose=loose)]
    for number, streamed in enumerate(built.blocks, start=1):
        names = dict(_packable(streamed, num_experts, skipped))
        shapes = {slot.key: tuple(slot.shape) for slot in streamed.slots}
        units.append(numbered(number, streamed.recipes, transposed=names, shapes=shapes))
    made = PackSelection(units=tuple(units), skipped=tuple(skipped))
    if not any(unit.packed for unit in units) and not formats:
        raise UnsupportedError(
            f"packing architecture {type(built.model).__name__}",
            reason="its decoder blocks have no linear layers or stacks of experts",
            instead="the checkpoint as it is",
        )
    return made


def _outer(built: Skeleton, include: Collection[Included]) -> dict[str, bool]:
    """Names of the parameters outside the blocks that are packed; none is kept as (in, out).

    Raises:
        UnsupportedError: They are one table, or no table or layer of the usual kind.
    """
    model = built.model
    modules = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    names = {id(param): name for name, param in model.named_parameters()}
    tied = getattr(model, "all_tied_weights_keys", {})
    found = {}
    for part in sorted(include):
        module = modules[part]
        weight = getattr(module, "weight", None)
        name = names.get(id(weight), "")
        what = f"include={part} of {type(model).__name__}"
        is_shared = modules["embeddings"].weight is getattr(modules["head"], "weight", None)
        if is_shared or name in tied or name in tied.values():
            reason = "embeddings and head are one table, which would be rounded for both"
            raise UnsupportedError(what, reason=reason, instead="packing without it")
        if not isinstance(module, nn.Embedding if part == "embeddings" else nn.Linear) or not name:
            raise UnsupportedError(what, reason=f"it is no ordinary {_KINDS[part]}", instead="packing without it")
        found[name] = False
    return found


_KINDS = {"embeddings": "table", "head": "linear layer"}


def _num_experts(built: Skeleton) -> int | None:
    config = built.model.config.get_text_config()
    counts = (vars(config).get(name) for name in EXPERT_COUNTS)
    return next((count for count in counts if isinstance(count, int)), None)


def _is_linear(module: nn.Module) -> bool:
    # transformers' Conv1D keeps its weight as (in, out). Classes derived from Linear may read theirs in their own way.
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _packable(streamed: StreamedBlock, num_experts: int | None, skipped: list[str]) -> Iterator[tuple[str, bool]]:
    """Names of a block's parameters that are packed, and whether they are kept as (in, out); notes what is skipped."""
    for slot in streamed.slots:
        module, path = slot.module, slot.key.rpartition(".")[0]
        if _is_linear(module) and slot.attribute == "weight":
            # A router, or the gate of a shared expert: few rows, and each decides where tokens go.
            if num_experts is not None and isinstance(module, nn.Linear) and module.out_features in (1, num_experts):
                skipped.append(path)
            else:
                yield slot.key, type(module).__name__ == "Conv1D"
        elif len(slot.shape) == 3 and min(slot.shape) > 1 and not isinstance(module, nn.Conv1d | nn.Conv2d):
            yield slot.key, False


def _unit_of(
    number: int,
    recipes: Sequence[Recipe],
    *,
    transposed: Mapping[str, bool],
    shapes: Mapping[str, tuple[int, ...]],
    num_files: int,
    packer: Packer,
    said_dtype: torch.dtype | None,
    loose: Sequence[TensorSpec] = (),
) -> OutputUnit:
    """A file of what some recipes make: what `transposed` names is packed, the rest is copied."""
    packed: list[PackedEntry] = []
    copied: list[TensorSpec] = []
    converted: list[tuple[Recipe, str]] = []
    for recipe in recipes:
        if recipe.formats or not any(target in transposed for target in recipe.targets):
            copied.extend(recipe.sources)
            copied.extend(spec for one in recipe.inputs if isinstance(one, PackedWeight) for spec in one.read_once)
            continue
        for target in recipe.targets:
            if target not in transposed:
                converted.append((recipe, target))
                continue
            shape = shapes[target]
            entry = PackedEntry(
                recipe=recipe,
                target=target,
                name=target if recipe.plain is None else recipe.plain.name,
                shape=shape[::-1] if transposed[target] else shape,
                is_transposed=transposed[target],
                dtype=said_dtype,
            )
            packed.append(entry)
    copied = list(dict.fromkeys((*copied, *loose)))
    outputs = [output for entry in packed for output in packer.outputs(entry.name, entry.shape)]
    outputs += [OutputTensor(name=spec.name, dtype=spec.dtype, shape=spec.shape) for spec in copied]
    outputs += [
        OutputTensor(name=target, dtype=recipe.sources[0].dtype, shape=shapes[target]) for recipe, target in converted
    ]
    whole = [output for output in outputs if output.nbytes and output.nbytes % PAGE_BYTES == 0]
    rest = [output for output in outputs if not output.nbytes or output.nbytes % PAGE_BYTES]
    return OutputUnit(
        file=f"model-{number + 1:05d}-of-{num_files:05d}.safetensors",
        packed=tuple(packed),
        copied=tuple(copied),
        converted=tuple(converted),
        outputs=(*whole, *sorted(rest, key=lambda output: -output.dtype.itemsize)),
    )
