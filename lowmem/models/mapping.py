"""Which stored tensors make which parameter: transformers' own key mapping, read once and run block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowmem.internals.transformers import Conversions, stored_layout
from lowmem.quantization.format import PackedWeight, values_dtype
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
    inputs: tuple[TensorSpec | PackedWeight, ...]
    """What it is made of, in the order the conversion expects: stored tensors, or weights packed in several of them."""
    dtype: torch.dtype
    """Dtype of the parameters: packed weights are unpacked to it."""
    convert: Callable[[list[Tensor]], dict[str, Tensor]] | None = field(default=None, compare=False)
    """None where the one input is the parameter; else inputs -> parameters by name."""
    cast_first: torch.dtype | None = None
    """Dtype to cast the inputs to before `convert`, where the conversion does arithmetic."""
    undo: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = field(default=None, compare=False)
    """Parameters by name -> what they would be stored as; None where there is no conversion."""

    @property
    def sources(self) -> tuple[TensorSpec, ...]:
        """Stored tensors it reads."""
        return tuple(
            spec for given in self.inputs for spec in (given.parts if isinstance(given, PackedWeight) else (given,))
        )

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats of the packed weights among its inputs; empty where all are stored plainly."""
        return tuple(sorted({given.format for given in self.inputs if isinstance(given, PackedWeight)}))

    @property
    def stored_as(self) -> tuple[str, ...]:
        """Formats and dtypes of its inputs, for plans."""
        return tuple(given.format if isinstance(given, PackedWeight) else str(given.dtype) for given in self.inputs)

    @property
    def plain(self) -> TensorSpec | None:
        """The stored tensor that is the parameter as it is, but for its dtype; None where there is something to do."""
        first = self.inputs[0]
        return first if self.convert is None and isinstance(first, TensorSpec) else None

    def run(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make the parameters by name; views of `stored` where possible.

        They are in the stored dtype, unless there is a `cast_first`; what was packed is in `dtype`.
        """
        tensors = [self._made(given, stored) for given in self.inputs]
        if self.convert is None:
            return {self.targets[0]: tensors[0]}
        if self.cast_first is not None:
            tensors = [tensor.to(self.cast_first) for tensor in tensors]
        return self.convert(tensors)

    def why_not_undone(self) -> str | None:
        """Why the parameters cannot be stored again as they were, in a few words; None where they can, bit by bit."""
        if self.convert is None:
            return None
        if self.cast_first is not None or self.undo is None:
            return "by arithmetic, which rounding does not let undo"
        wanted = {given.name: tuple(given.shape) for given in self.inputs}
        made = self.convert([torch.empty(given.shape, dtype=self.dtype, device="meta") for given in self.inputs])
        found = {name: tuple(value.shape) for name, value in self.undo(made).items()}
        return None if found == wanted else "by a conversion that transformers undoes to other names or shapes"

    def stored_again(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the parameters, all of its targets, are stored as: tensors by stored name, views where possible.

        For recipes that `why_not_undone` says nothing of.
        """
        if self.undo is None:
            return {self.inputs[0].name: params[self.targets[0]]}
        return self.undo(params)

    def run_into(self, stored: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make the parameters where they are to be.

        Args:
            stored: Stored tensors by name.
            places: Contiguous memory of the parameters' shapes and dtypes, by name; not for all of them.

        Returns:
            The parameters that have no place, as `run` makes them.
        """
        first, place = self.inputs[0], places.get(self.targets[0])
        if self.convert is None and isinstance(first, PackedWeight) and place is not None:
            if place.dtype == values_dtype(place.dtype):
                first.dequantise(first.take(stored), place)
            else:
                place.copy_(first.make(stored, place.dtype))
            return {}
        left = {}
        for name, value in self.run(stored).items():
            if name in places:
                places[name].copy_(value)
            else:
                left[name] = value
        return left

    def _made(self, given: TensorSpec | PackedWeight, stored: Mapping[str, Tensor]) -> Tensor:
        return given.make(stored, self.dtype) if isinstance(given, PackedWeight) else stored[given.name]


@dataclass(frozen=True, kw_only=True)
class CheckpointMap:
    """Every parameter's recipe, and what did not match."""

    recipes: Mapping[str, Recipe]
    """By target name; a recipe with several targets stands under each of them."""
    missing: frozenset[str]
    """Names of the model that no stored tensor makes (tied weights among them)."""
    unexpected: frozenset[str]
    """Stored tensors that the model has no place for."""


def map_checkpoint(
    model: PreTrainedModel, tensors: Mapping[str, TensorSpec], packed: Mapping[str, PackedWeight] | None = None
) -> CheckpointMap:
    """Match a checkpoint's tensors with a model's parameters by transformers' own renamings and conversions.

    Runs no conversion on real data: shapes are checked on meta tensors.

    Args:
        model: The model on the meta device.
        tensors: The checkpoint's tensors by stored name.
        packed: Its packed weights by the names that they would have if they were not packed.

    Raises:
        SourceError: A stored shape is not what the configuration says, or a conversion cannot be run.
    """
    state = model.state_dict(keep_vars=True)
    conversions = Conversions(model)
    inputs = _unpacked(tensors, packed or {})
    groups, unexpected = _group(state, conversions, inputs)
    recipes: dict[str, Recipe] = {}
    for first_target, group in groups.items():
        recipe = _recipe(model, first_target, group, inputs, state)
        recipes.update((target, recipe) for target in recipe.targets)
    conversions.remember()
    return CheckpointMap(
        recipes=recipes, missing=frozenset(set(state) - set(recipes)), unexpected=frozenset(unexpected)
    )


def _unpacked(
    tensors: Mapping[str, TensorSpec], packed: Mapping[str, PackedWeight]
) -> dict[str, TensorSpec | PackedWeight]:
    """The checkpoint as it would be without packing: each packed weight stands for its stored tensors."""
    parts = {spec.name for weight in packed.values() for spec in (*weight.parts, *weight.read_once)}
    plain: dict[str, TensorSpec | PackedWeight] = {name: spec for name, spec in tensors.items() if name not in parts}
    return plain | dict(packed)


@dataclass(kw_only=True)
class _Group:
    converter: WeightConverter | None
    keys: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)


def _group(
    state: Mapping[str, Tensor], conversions: Conversions, tensors: Iterable[str]
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


def _recipe(
    model: PreTrainedModel,
    target: str,
    group: _Group,
    stored: Mapping[str, TensorSpec | PackedWeight],
    state: Mapping[str, Tensor],
) -> Recipe:
    inputs = tuple(stored[key] for key in group.keys)
    if type(model.get_submodule(target.rpartition(".")[0])).__name__ == "Conv1D":
        inputs = tuple(given.transposed() if isinstance(given, PackedWeight) else given for given in inputs)
    dtype = model.get_parameter_or_buffer(target).dtype
    if group.converter is None:
        # Two stored names for one parameter: transformers lets the first stand.
        _check_shapes({target: inputs[0].shape}, inputs[0], state)
        return Recipe(targets=(target,), inputs=inputs[:1], dtype=dtype)
    template, keys, patterns = deepcopy(group.converter), tuple(group.keys), tuple(group.patterns)

    def convert(values: list[Tensor]) -> dict[str, Tensor]:
        converter = deepcopy(template)
        for key, pattern, value in zip(keys, patterns, values, strict=True):
            converter.add_tensor(target, key, pattern, value)
        made = converter.convert(target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    made = _convert_on_meta(target, convert, inputs, dtype=dtype)
    _check_shapes({name: value.shape for name, value in made.items()}, inputs[0], state)
    moving = all(type(operation).__name__ in _MOVING_OPERATIONS for operation in template.operations)
    return Recipe(
        targets=tuple(made),
        inputs=inputs,
        dtype=dtype,
        convert=convert,
        cast_first=None if moving else dtype,
        undo=partial(stored_layout, model),
    )


def _convert_on_meta(
    target: str,
    convert: Callable[[list[Tensor]], dict[str, Tensor]],
    inputs: tuple[TensorSpec | PackedWeight, ...],
    *,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    stand_ins = [
        torch.empty(given.shape, dtype=given.dtype if isinstance(given, TensorSpec) else dtype, device="meta")
        for given in inputs
    ]
    try:
        return convert(stand_ins)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
        described = ", ".join(f"{given.name} {list(given.shape)}" for given in inputs)
        raise SourceError(
            _file_of(inputs[0]),
            field=target,
            problem=f"its stored tensors ({described}) cannot be converted: {error}",
            remedy="use the config.json that belongs to these weights",
        ) from error


def _file_of(given: TensorSpec | PackedWeight) -> Path:
    return given.file if isinstance(given, TensorSpec) else given.parts[0].file


def _check_shapes(
    shapes: Mapping[str, tuple[int, ...]], first: TensorSpec | PackedWeight, state: Mapping[str, Tensor]
) -> None:
    for name, shape in shapes.items():
        expected = tuple(state[name].shape) if name in state else None
        if expected != tuple(shape):
            wanted = "no such parameter" if expected is None else f"shape {list(expected)}"
            raise SourceError(
                _file_of(first),
                field=first.name,
                problem=f"stores {name} with shape {list(shape)}, the configuration has {wanted}",
                remedy="use the config.json that belongs to these weights",
            )
