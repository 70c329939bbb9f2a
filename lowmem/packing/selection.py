"""What of a checkpoint is packed, in which file each tensor will lie, and where. Reads nothing.

One file for what is outside the decoder blocks, then one for each block, whose tensors are read together. In a file,
tensors of whole pages come first, behind a header that ends with a page, so that each begins on a page; the rest
follows, wider elements first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from lowmem.errors import UnsupportedError
from lowmem.models.build import Skeleton, StreamedBlock
from lowmem.models.checkpoint import Described, Opened
from lowmem.models.mapping import Recipe
from lowmem.quantization.packing import Packer
from offload import PAGE_BYTES, BlockSpec, OutputTensor, TensorSpec, shard_header

_LENGTH_BYTES = 8
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


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

    @property
    def num_packed(self) -> int:
        """Parameters that are packed."""
        return sum(len(unit.packed) for unit in self.units)

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


def select(opened: Described, packer: Packer) -> PackSelection:
    """Choose what is packed: linear layers and stacks of experts of the decoder blocks, routers left out.

    Args:
        opened: The checkpoint, or what is known of one that is not here.
        packer: Knows the sizes.

    Raises:
        UnsupportedError: The checkpoint is quantised already, or has nothing that can be packed.
    """
    built = opened.built
    formats = sorted({name for recipe in built.mapping.recipes.values() for name in recipe.formats})
    if formats:
        raise UnsupportedError(
            f"packing a checkpoint that is stored as {', '.join(formats)}",
            reason="its weights would be rounded a second time",
            instead="that checkpoint as it is, without quantization=, or the bf16, fp16 or fp32 one of the same model",
        )
    num_experts = _num_experts(built)
    units: list[OutputUnit] = []
    skipped = [
        name
        for name, module in built.model.named_modules()
        if _is_linear(module) and not any(name.startswith(f"{one.block.name}.") for one in built.blocks)
    ]
    num_files = 1 + len(built.blocks)
    outer = tuple(recipe.sources for recipe in built.resident)
    loose = _loose(opened)
    copied = tuple(dict.fromkeys(spec for specs in outer for spec in specs)) + loose
    units.append(_unit(0, num_files, packer, packed=(), copied=copied, converted=()))
    for number, streamed in enumerate(built.blocks, start=1):
        names = dict(_packable(streamed, num_experts, skipped))
        units.append(_block_unit(number, num_files, packer, streamed=streamed, transposed=names))
    made = PackSelection(units=tuple(units), skipped=tuple(skipped))
    if not made.num_packed:
        raise UnsupportedError(
            f"packing architecture {type(built.model).__name__}",
            reason="its decoder blocks have no linear layers or stacks of experts",
            instead="the checkpoint as it is",
        )
    return made


def _loose(opened: Described) -> tuple[TensorSpec, ...]:
    """Stored tensors that the model has no place for; they are copied."""
    if not isinstance(opened, Opened):
        return ()
    return tuple(opened.source.tensors[name] for name in sorted(opened.built.mapping.unexpected))


def _num_experts(built: Skeleton) -> int | None:
    config = built.model.config.get_text_config()
    counts = (vars(config).get(name) for name in _EXPERT_COUNTS)
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


def _block_unit(
    number: int, num_files: int, packer: Packer, *, streamed: StreamedBlock, transposed: Mapping[str, bool]
) -> OutputUnit:
    shapes = {slot.key: tuple(slot.shape) for slot in streamed.slots}
    packed: list[PackedEntry] = []
    copied: list[TensorSpec] = []
    converted: list[tuple[Recipe, str]] = []
    for recipe in streamed.recipes:
        if not any(target in transposed for target in recipe.targets):
            copied.extend(recipe.sources)
            continue
        for target in recipe.targets:
            if target not in transposed:
                converted.append((recipe, target))
                continue
            is_transposed = transposed[target]
            shape = shapes[target]
            packed.append(
                PackedEntry(
                    recipe=recipe,
                    target=target,
                    name=target if recipe.plain is None else recipe.plain.name,
                    shape=shape[::-1] if is_transposed else shape,
                    is_transposed=is_transposed,
                )
            )
    return _unit(
        number,
        num_files,
        packer,
        packed=tuple(packed),
        copied=tuple(dict.fromkeys(copied)),
        converted=tuple(converted),
        shapes=shapes,
    )


def _unit(
    number: int,
    num_files: int,
    packer: Packer,
    *,
    packed: tuple[PackedEntry, ...],
    copied: tuple[TensorSpec, ...],
    converted: tuple[tuple[Recipe, str], ...],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> OutputUnit:
    outputs = [output for entry in packed for output in packer.outputs(entry.name, entry.shape)]
    outputs += [OutputTensor(name=spec.name, dtype=spec.dtype, shape=spec.shape) for spec in copied]
    outputs += [
        OutputTensor(name=target, dtype=recipe.sources[0].dtype, shape=(shapes or {})[target])
        for recipe, target in converted
    ]
    whole = [output for output in outputs if output.nbytes and output.nbytes % PAGE_BYTES == 0]
    rest = [output for output in outputs if not output.nbytes or output.nbytes % PAGE_BYTES]
    return OutputUnit(
        file=f"model-{number + 1:05d}-of-{num_files:05d}.safetensors",
        packed=packed,
        copied=copied,
        converted=converted,
        outputs=(*whole, *sorted(rest, key=lambda output: -output.dtype.itemsize)),
    )
