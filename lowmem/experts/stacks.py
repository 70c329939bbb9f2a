"""Where each single expert of a block lies among its stored tensors.

A stack of experts is one parameter of the model. A checkpoint holds it as one tensor, or as tensors for each expert
that transformers' conversion stacks and joins. Which tensor becomes which rows of which expert is found by running that
conversion once on small numbered stand-ins: whatever it is, its result says where every element came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowmem.internals.experts import experts_traits
from lowmem.models.build import ParamSlot, StreamedBlock
from lowmem.models.mapping import Recipe
from lowmem.quantization.format import PackedWeight, piece_of, values_dtype
from offload import BlockSpec, TensorSpec


@dataclass(frozen=True, kw_only=True)
class MatrixRows:
    """Some rows of one expert's matrix, and what they are made of."""

    given: TensorSpec | PackedWeight
    """A stored tensor or a packed weight that is these rows, or an entry of one."""
    wholes: tuple[TensorSpec, ...]
    """The stored tensors that its parts are, or are pieces of."""
    rows: slice
    """The rows."""

    @property
    def alone(self) -> tuple[TensorSpec, ...]:
        """What is read to have these rows and nothing else."""
        return self.given.parts if isinstance(self.given, PackedWeight) else (self.given,)

    def write(self, stored: Mapping[str, Tensor], matrix: Tensor) -> None:
        """Write the rows of a matrix.

        Args:
            stored: By name, on the compute device: `wholes` or `alone`.
            matrix: The expert's, contiguous, in the compute dtype.
        """
        out = matrix[self.rows]
        parts = [_part(stored, whole, own) for whole, own in zip(self.wholes, self.alone, strict=True)]
        if not isinstance(self.given, PackedWeight):
            out.copy_(parts[0])
            return
        into = out if out.dtype == values_dtype(out.dtype) else torch.empty_like(out, dtype=values_dtype(out.dtype))
        self.given.dequantise(parts, into)
        if into is not out:
            out.copy_(into)


def _part(stored: Mapping[str, Tensor], whole: TensorSpec, own: TensorSpec) -> Tensor:
    if own.name in stored:
        return stored[own.name]
    start = own.offset_bytes - whole.offset_bytes
    raw = stored[whole.name].view(-1).view(torch.uint8)[start : start + own.nbytes]
    return raw.view(own.dtype).view(own.shape)


@dataclass(frozen=True, kw_only=True)
class ExpertStack:
    """One stack of a block, expert by expert."""

    slot: ParamSlot
    """The parameter."""
    experts: tuple[tuple[MatrixRows, ...], ...]
    """What each expert's matrix is made of."""

    @property
    def matrix_bytes(self) -> int:
        """Bytes of one expert's matrix in the compute dtype."""
        return self.slot.shape[1:].numel() * self.slot.dtype.itemsize

    def make(self, number: int, stored: Mapping[str, Tensor], matrix: Tensor) -> None:
        """Write one expert's matrix.

        Args:
            number: Which expert.
            stored: Stored tensors by name, on the compute device: those of the block, or those of this expert alone.
            matrix: Shape `slot.shape[1:]`, contiguous, in the compute dtype.
        """
        for rows in self.experts[number]:
            rows.write(stored, matrix)


@dataclass(frozen=True, kw_only=True)
class RoutedExperts:
    """The module of experts of a block, whose stacks can be taken apart."""

    module: nn.Module
    """The module."""
    block: nn.Module
    """The block that it stands in."""
    stacks: Mapping[str, ExpertStack]
    """By the name of the parameter in the module."""
    router: ParamSlot | None = None
    """What scores experts, (experts, inputs), where exactly one parameter of the block has that shape."""

    @property
    def num_experts(self) -> int:
        """How many there are."""
        return len(next(iter(self.stacks.values())).experts)

    @property
    def keys(self) -> frozenset[str]:
        """Names of the stacks in the model."""
        return frozenset(stack.slot.key for stack in self.stacks.values())

    @property
    def is_packed(self) -> bool:
        """Whether any of them has to be unpacked."""
        firsts = (stack.experts[0] for stack in self.stacks.values())
        return any(isinstance(rows.given, PackedWeight) for first in firsts for rows in first)

    @property
    def is_adapted(self) -> bool:
        """Whether an adapter stands on a stack now: PEFT forms it whole in each forward."""
        wrappers = (module for module in self.block.modules() if hasattr(module, "parameter_name"))
        return any(self.module in wrapper.modules() for wrapper in wrappers)

    def alone(self, number: int, *, name: str) -> BlockSpec:
        """What is read to have one expert and nothing else.

        Args:
            number: Which expert.
            name: The block's, for errors and traces.
        """
        rows = (rows for stack in self.stacks.values() for rows in stack.experts[number])
        specs = {spec.name: spec for one in rows for spec in one.alone}
        return BlockSpec(name=f"{name} expert {number}", tensors=tuple(specs.values()))


def routed_experts(streamed: StreamedBlock) -> RoutedExperts | None:
    """The routed experts of a block.

    Args:
        streamed: The block.

    Returns:
        None for a block without them, and where they cannot be taken apart: several modules of them, a module that
        transformers does not run by a registered function, or stored tensors that are not one expert's each.
    """
    described = {module: experts_traits(module) for module in streamed.block.module.modules()}
    found = [(module, traits) for module, traits in described.items() if traits is not None]
    if len(found) != 1:
        return None
    ((module, traits),) = found
    slots = {slot.attribute: slot for slot in streamed.slots if slot.module is module}
    recipes = {target: recipe for recipe in streamed.recipes for target in recipe.targets}
    stacks = {}
    for name in (traits.up, traits.down):
        slot = slots.get(name)
        recipe = None if slot is None else recipes.get(slot.key)
        experts = None if slot is None or recipe is None else taken_apart(recipe, slot.shape)
        if slot is None or experts is None:
            return None
        stacks[name] = ExpertStack(slot=slot, experts=experts)
    inputs = stacks[traits.up].slot.shape[1 if traits.is_transposed else 2]
    scoring = (stacks[traits.up].slot.shape[0], inputs)
    routers = [slot for slot in streamed.slots if tuple(slot.shape) == scoring and slot.module is not module]
    return RoutedExperts(
        module=module,
        block=streamed.block.module,
        stacks=stacks,
        router=routers[0] if len(routers) == 1 else None,
    )


def without_stacks(streamed: StreamedBlock, experts: RoutedExperts) -> StreamedBlock:
    """What is left of a block: its parameters, recipes and stored tensors without those of the experts' stacks."""
    keys = experts.keys
    recipes = tuple(recipe for recipe in streamed.recipes if not keys & set(recipe.targets))
    specs = {spec.name: spec for recipe in recipes for spec in recipe.sources}
    return replace(
        streamed,
        slots=tuple(slot for slot in streamed.slots if slot.key not in keys),
        recipes=recipes,
        spec=BlockSpec(name=f"{streamed.spec.name} without experts", tensors=tuple(specs.values())),
    )


def taken_apart(recipe: Recipe, shape: Sequence[int]) -> tuple[tuple[MatrixRows, ...], ...] | None:
    """What each expert of a stack is made of.

    Args:
        recipe: Makes the stack, and nothing else.
        shape: Of the stack: (experts, rows, columns).

    Returns:
        By expert; None where stored tensors are not one expert's each, or do not lie below one another in it.
    """
    if len(recipe.targets) != 1 or recipe.cast_first is not None or len(shape) != 3:
        return None
    if recipe.convert is None:
        origins: list[list[_Origin] | None] = [[(0, number)] for number in range(shape[0])]
    else:
        stand_ins = _numbered(recipe.inputs)
        result = recipe.convert(list(stand_ins))[recipe.targets[0]]
        if result.ndim != 3 or len(result) != shape[0]:
            return None
        owners = _owners(stand_ins)
        origins = [_origins(matrix, owners) for matrix in result.tolist()]
    apart = [None if found is None else _rows_of(found, recipe, shape) for found in origins]
    return None if None in apart else tuple(rows for rows in apart if rows is not None)


def _rows_of(found: Sequence[_Origin], recipe: Recipe, shape: Sequence[int]) -> tuple[MatrixRows, ...] | None:
    rows, end = [], 0
    for number, index in found:
        whole = recipe.inputs[number]
        given = whole if index is None else _entry(whole, index)
        if given is None or given.shape[-1] != shape[2]:
            return None
        start, end = end, end + given.shape[-2]
        wholes = whole.parts if isinstance(whole, PackedWeight) else (whole,)
        rows.append(MatrixRows(given=given, wholes=wholes, rows=slice(start, end)))
    return tuple(rows) if end == shape[1] else None


def _entry(whole: TensorSpec | PackedWeight, index: int) -> TensorSpec | PackedWeight | None:
    if isinstance(whole, PackedWeight):
        return None if whole.entry is None else whole.entry(index)
    return piece_of(whole, index, num=whole.shape[0], shape=whole.shape[1:])


_SMALL = (4, 6)


def _numbered(inputs: Sequence[TensorSpec | PackedWeight]) -> list[Tensor]:
    """A small stand-in for each input, every element with a number of its own."""
    numbered, start = [], 0
    for given in inputs:
        shape = (*given.shape[:-2], *_SMALL) if len(given.shape) >= 2 else tuple(given.shape)
        count = torch.Size(shape).numel()
        numbered.append(torch.arange(start, start + count).view(shape))
        start += count
    return numbered


_Origin = tuple[int, int | None]
"""Number of an input, and which entry of it; None for all of it."""


_Matrix = list[list[int]]


def _owners(stand_ins: Sequence[Tensor]) -> dict[int, tuple[_Origin, _Matrix]]:
    """Each matrix among the stand-ins by the number of its first element."""
    owners = {}
    for number, stand_in in enumerate(stand_ins):
        if stand_in.ndim in (2, 3):
            for index, matrix in enumerate(stand_in.view(-1, *stand_in.shape[-2:]).tolist()):
                owners[matrix[0][0]] = (number, index if stand_in.ndim == 3 else None), matrix
    return owners


def _origins(matrix: _Matrix, owners: Mapping[int, tuple[_Origin, _Matrix]]) -> list[_Origin] | None:
    """Which inputs lie below one another in a result; None if they do not lie so."""
    found, row = [], 0
    while row < len(matrix):
        origin, owned = owners.get(matrix[row][0], (None, None))
        if origin is None or owned is None or matrix[row : row + len(owned)] != owned:
            return None
        found.append(origin)
        row += len(owned)
    return found
