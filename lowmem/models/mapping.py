"""Which stored tensors make which parameter: transformers' own key mapping, read once and run block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowmem.internals.transformers import Conversions
from offload import SourceError, TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter


# These only move elements, so they give the same bits in the stored dtype as after a cast to the compute dtype.
_MOVING_OPERATIONS = frozenset(
    """
    Chunk Concatenate MergeModulelist SplitModulelist Transpose Interleave Deinterleave PermuteForRope
    Force16BytesAlignment ErnieFuseAndSplitTextVisionExperts
    """.split()  # noqa: SIM905 - a table is easier to read than 40 quoted lines
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How some parameters come out of some stored tensors."""

    targets: tuple[str, ...]
    """Fully qualified parameter (or buffer) names it makes."""
    sources: tuple[TensorSpec, ...]
    """Stored tensors it reads, in the order the conversion expects them."""
    convert: Callable[[list[Tensor]], dict[str, Tensor]] | None = field(default=None, compare=False)
    """None where the one stored tensor is the parameter; else stored tensors -> parameters by name."""
    cast_first: torch.dtype | None = None
    """Dtype to cast the stored tensors to before `convert`, where the conversion does arithmetic."""

    def run(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make the parameters: by name, in the stored dtype unless `cast_first`; views of `stored` where possible."""
        tensors = [stored[spec.name] for spec in self.sources]
        if self.convert is None:
            return {self.targets[0]: tensors[0]}
        if self.cast_first is not None:
            tensors = [tensor.to(self.cast_first) for tensor in tensors]
        return self.convert(tensors)


@dataclass(frozen=True, kw_only=True)
class CheckpointMap:
    """Every parameter's recipe, and what did not match."""

    recipes: Mapping[str, Recipe]
    """By target name; a recipe with several targets stands under each of them."""
    missing: frozenset[str]
    """Names of the model that no stored tensor makes (tied weights among them)."""
    unexpected: frozenset[str]
    """Stored tensors that the model has no place for."""


def map_checkpoint(model: PreTrainedModel, tensors: Mapping[str, TensorSpec]) -> CheckpointMap:
    """Match a checkpoint's tensors with a model's parameters by transformers' own renamings and conversions.

    Runs no conversion on real data: shapes are checked on meta tensors.

    Args:
        model: The model on the meta device.
        tensors: The checkpoint's tensors by stored name.

    Raises:
        SourceError: A stored shape is not what the configuration says, or a conversion cannot be run.
    """
    state = model.state_dict(keep_vars=True)
    conversions = Conversions(model)
    groups, unexpected = _group(state, conversions, tensors)
    recipes: dict[str, Recipe] = {}
    for first_target, group in groups.items():
        recipe = _recipe(model, first_target, group, tensors)
        _check_shapes(recipe, state)
        recipes.update((target, recipe) for target in recipe.targets)
    conversions.remember()
    return CheckpointMap(
        recipes=recipes, missing=frozenset(set(state) - set(recipes)), unexpected=frozenset(unexpected)
    )


@dataclass(kw_only=True)
class _Group:
    converter: WeightConverter | None
    keys: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)


def _group(
    state: Mapping[str, Tensor], conversions: Conversions, tensors: Mapping[str, TensorSpec]
) -> tuple[dict[str, _Group], set[str]]:
    """Stored keys by the first parameter they make, in the order transformers loads them."""
    groups: dict[str, _Group] = {}
    unexpected: set[str] = set()
    for key in conversions.in_order(tensors):
        target, pattern = conversions.target_of(key, state)
        if target not in state:
            unexpected.add(key)
            continue
        converter = None if pattern is None else conversions.converter(pattern)
        group = groups.setdefault(target, _Group(converter=converter))
        group.keys.append(key)
        group.patterns.append(key if pattern is None else pattern)
    return groups, unexpected


def _recipe(model: PreTrainedModel, target: str, group: _Group, tensors: Mapping[str, TensorSpec]) -> Recipe:
    sources = tuple(tensors[key] for key in group.keys)
    if group.converter is None:
        # Two stored names for one parameter: transformers lets the first stand.
        return Recipe(targets=(target,), sources=sources[:1])
    template, keys, patterns = deepcopy(group.converter), tuple(group.keys), tuple(group.patterns)

    def convert(values: list[Tensor]) -> dict[str, Tensor]:
        converter = deepcopy(template)
        for key, pattern, value in zip(keys, patterns, values, strict=True):
            converter.add_tensor(target, key, pattern, value)
        made = converter.convert(target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    made = _convert_on_meta(target, convert, sources)
    moving = all(type(operation).__name__ in _MOVING_OPERATIONS for operation in template.operations)
    dtype = None if moving else model.get_parameter_or_buffer(target).dtype
    return Recipe(targets=tuple(made), sources=sources, convert=convert, cast_first=dtype)


def _convert_on_meta(
    target: str, convert: Callable[[list[Tensor]], dict[str, Tensor]], sources: tuple[TensorSpec, ...]
) -> dict[str, Tensor]:
    stand_ins = [torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in sources]
    try:
        return convert(stand_ins)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
        described = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in sources)
        raise SourceError(
            sources[0].file,
            field=target,
            problem=f"its stored tensors ({described}) cannot be converted: {error}",
            remedy="use the config.json that belongs to these weights",
        ) from error


def _check_shapes(recipe: Recipe, state: Mapping[str, Tensor]) -> None:
    if recipe.convert is None:
        shapes = {recipe.targets[0]: recipe.sources[0].shape}
    else:
        shapes = {
            name: tuple(value.shape)
            for name, value in _convert_on_meta(recipe.targets[0], recipe.convert, recipe.sources).items()
        }
    for name, shape in shapes.items():
        expected = tuple(state[name].shape) if name in state else None
        if expected != tuple(shape):
            spec = recipe.sources[0]
            wanted = "no such parameter" if expected is None else f"shape {list(expected)}"
            raise SourceError(
                spec.file,
                field=spec.name,
                problem=f"stores {name} with shape {list(shape)}, the configuration has {wanted}",
                remedy="use the config.json that belongs to these weights",
            )
