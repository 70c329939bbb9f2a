"""Building the genuine transformers model with absent blocks: everything outside the blocks is real.

And what a visit then makes of a block: its parameters in the compute dtype, in one reused piece of device memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError, some_of
from lowmem.internals.stand_in import StandIn
from lowmem.internals.torch import buffer_table, hold_parameter, leave_out_of_ddp, parameter_table, put_parameter
from lowmem.internals.transformers import (
    finish_loading,
    keep_in_fp32,
    leave_placement_alone,
    mark_initialised,
    may_be_missing,
    stored_layout,
)
from lowmem.models.absent import AbsentParameter
from lowmem.models.blocks import DecoderBlock, find_blocks, first_alike
from lowmem.models.configuration import naming_field
from lowmem.models.mapping import CheckpointMap, Recipe, map_checkpoint
from lowmem.models.whole import install_whole
from lowmem.processes.ranks import ranks
from lowmem.quantization.format import PackedWeight
from offload import BlockSpec, SourceError, StagingBuffer, TensorSpec, round_up

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


_WRAPPERS = ("", "base_model.", "base_model.model.")
"""What stands before the model's own names: nothing, or what PEFT's wrappers put there (of prompts; of adapters)."""

ReadTensors = Callable[[BlockSpec], dict[str, Tensor]]
"""Reads stored tensors now, by stored name, into new memory on the compute device."""


@dataclass(frozen=True, kw_only=True)
class ParamSlot:
    """One parameter of a block: where it hangs in the model."""

    module: torch.nn.Module
    """The module that holds it; stays the same object when an adapter wraps that module."""
    attribute: str
    """Its name in the module."""
    key: str
    """Its fully qualified name in the model as loaded."""
    shape: torch.Size
    """Shape in the model."""
    dtype: torch.dtype
    """Compute dtype."""


@dataclass(frozen=True, kw_only=True)
class StreamedBlock:
    """A decoder block, its parameters' places and the recipes that make them."""

    block: DecoderBlock
    """The module and its raw forward."""
    slots: tuple[ParamSlot, ...]
    """Its parameters."""
    recipes: tuple[Recipe, ...]
    """What makes them; every stored tensor is read by exactly one."""
    spec: BlockSpec
    """Its stored tensors."""


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """A model on the meta device together with what its checkpoint holds for it. Nothing is loaded yet."""

    model: PreTrainedModel
    """The real class, on meta."""
    blocks: tuple[StreamedBlock, ...]
    """Its decoder blocks in visiting order."""
    resident: tuple[Recipe, ...]
    """Recipes of all that stays on the device: embeddings, norms, head, buffers."""
    mapping: CheckpointMap
    """Every recipe, missing and unexpected names."""
    folder: Path
    """Where the checkpoint lies."""

    @property
    def resident_bytes(self) -> int:
        """Bytes of the parameters outside the blocks in the compute dtype; tied weights count once."""
        state = self.model.state_dict(keep_vars=True)
        return sum(
            state[name].numel() * state[name].dtype.itemsize for recipe in self.resident for name in recipe.targets
        )


def skeleton(
    config: PretrainedConfig,
    tensors: Mapping[str, TensorSpec],
    *,
    dtype: torch.dtype,
    folder: Path,
    classifies: bool = False,
    trust_remote_code: bool = False,
    packed: Mapping[str, PackedWeight] | None = None,
) -> Skeleton:
    """Build a model on meta and match it with its checkpoint.

    Args:
        config: The model's configuration, without its `quantization_config`.
        tensors: The checkpoint's tensors by stored name.
        dtype: Compute dtype.
        folder: Where the checkpoint lies, for error messages.
        classifies: Whether to build the sequence classification model; its head may be missing in the checkpoint.
        trust_remote_code: As in transformers.
        packed: Its packed weights by the names that they would have if they were not.

    Raises:
        UnsupportedError: The architecture cannot be streamed.
        SourceError: The checkpoint does not fit the configuration.
    """
    model = _on_meta(config, dtype=dtype, folder=folder, classifies=classifies, trust_remote_code=trust_remote_code)
    blocks = find_blocks(model)
    mapping = map_checkpoint(model, tensors, packed)
    body = f"{model.base_model_prefix}."
    drawn = {name for name in mapping.missing if classifies and not name.startswith(body)}
    _check_missing(model, mapping.missing - drawn, mapping, folder)
    by_block, resident = _assigned(model, blocks, mapping)
    return Skeleton(
        model=model,
        mapping=mapping,
        folder=folder,
        resident=tuple(resident),
        blocks=tuple(_streamed(model, block, recipes) for block, recipes in zip(blocks, by_block, strict=True)),
    )


def skeleton_of_config(
    config: PretrainedConfig, *, dtype: torch.dtype, folder: Path, trust_remote_code: bool = False
) -> Skeleton:
    """Build a model on meta and suppose the checkpoint that transformers would save of it; nothing else is needed.

    Of blocks that are alike, the first stands for the others: what their stored tensors are is found out once.

    Args:
        config: The model's configuration; its dtype is the one that is stored.
        dtype: Compute dtype.
        folder: Where the configuration comes from, for error messages.
        trust_remote_code: As in transformers.

    Raises:
        UnsupportedError: The architecture cannot be streamed.
        SourceError: A value in the configuration cannot be.
    """
    # Building the model notes the compute dtype there.
    stored_dtype = config.dtype or torch.float32
    model = _on_meta(config, dtype=dtype, folder=folder, classifies=False, trust_remote_code=trust_remote_code)
    blocks = find_blocks(model)
    first = first_alike(blocks)
    others = tuple(f"{blocks[index].name}." for index in range(len(blocks)) if first[index] != index)
    tied = getattr(model, "all_tied_weights_keys", {})
    state = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in tied and not name.startswith(others)
    }
    tensors = _supposed(stored_layout(model, state), dtype=stored_dtype, file=folder / "config.json")
    mapping = map_checkpoint(model, tensors)
    by_block, resident = _assigned(model, blocks, mapping)
    known = {index: _streamed(model, blocks[index], by_block[index]) for index in set(first)}
    return Skeleton(
        model=model,
        mapping=mapping,
        folder=folder,
        resident=tuple(resident),
        blocks=tuple(replace(known[index], block=block) for index, block in zip(first, blocks, strict=True)),
    )


def _supposed(stored: Mapping[str, Tensor], *, dtype: torch.dtype, file: Path) -> dict[str, TensorSpec]:
    """Tensors one after the other, as they lie in a file."""
    specs: dict[str, TensorSpec] = {}
    end = 0
    for name, tensor in stored.items():
        kept = dtype if tensor.is_floating_point() else tensor.dtype
        nbytes = tensor.numel() * kept.itemsize
        specs[name] = TensorSpec(
            name=name, dtype=kept, shape=tuple(tensor.shape), file=file, offset_bytes=end, nbytes=nbytes
        )
        end += nbytes
    return specs


def _on_meta(
    config: PretrainedConfig, *, dtype: torch.dtype, folder: Path, classifies: bool, trust_remote_code: bool
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto_class = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    with torch.device("meta"), naming_field(folder / "config.json", config.to_dict()):
        model: PreTrainedModel = auto_class.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    keep_in_fp32(model, dtype)
    return model


def _assigned(
    model: PreTrainedModel, blocks: Sequence[DecoderBlock], mapping: CheckpointMap
) -> tuple[list[list[Recipe]], list[Recipe]]:
    """Recipes of each block, and of what is outside them."""
    prefixes = {f"{block.name}.": index for index, block in enumerate(blocks)}
    by_block: list[list[Recipe]] = [[] for _ in blocks]
    resident: list[Recipe] = []
    for recipe in {id(recipe): recipe for recipe in mapping.recipes.values()}.values():
        owners = {next((prefixes[each] for each in prefixes if name.startswith(each)), None) for name in recipe.targets}
        if len(owners) > 1:
            raise UnsupportedError(
                f"architecture {type(model).__name__}",
                reason=f"one stored tensor makes {', '.join(recipe.targets)}, in several blocks",
                instead="a model whose decoder blocks are stored apart",
            )
        owner = owners.pop()
        (resident if owner is None else by_block[owner]).append(recipe)
    return by_block, resident


def _check_missing(model: PreTrainedModel, without: frozenset[str], mapping: CheckpointMap, folder: Path) -> None:
    tied = getattr(model, "all_tied_weights_keys", {})
    has = mapping.recipes
    missing = [
        name
        for name in sorted(without)
        if not (name in tied and (tied[name] in has or name in has))
        and not (name in tied.values() and any(has.get(k) for k, v in tied.items() if v == name))
        and not may_be_missing(model, name)
    ]
    if missing:
        raise SourceError(
            folder,
            field="tensors",
            problem=f"the configuration asks for {some_of(missing)}, which no shard holds",
            remedy="download the missing shards, or use the config.json that belongs to these weights",
        )


def _streamed(model: PreTrainedModel, block: DecoderBlock, recipes: list[Recipe]) -> StreamedBlock:
    slots = tuple(
        ParamSlot(
            module=module,
            attribute=attribute,
            key=".".join(filter(None, (block.name, path, attribute))),
            shape=param.shape,
            dtype=param.dtype,
        )
        for path, module in block.module.named_modules()
        for attribute, param in module.named_parameters(recurse=False)
    )
    specs = tuple({spec.name: spec for recipe in recipes for spec in recipe.sources}.values())
    return StreamedBlock(
        block=block, slots=slots, recipes=tuple(recipes), spec=BlockSpec(name=block.name, tensors=specs)
    )


def fill(
    built: Skeleton,
    *,
    device: torch.device,
    read: ReadTensors,
    load: Callable[[str], Tensor],
    store: Callable[[str, Tensor], None] | None = None,
    absent: frozenset[str] = frozenset(),
) -> PreTrainedModel:
    """Turn a meta model into one that trains: real where it is small, absent in the blocks.

    Args:
        built: What `skeleton` answered; its model is changed in place.
        device: Compute device.
        read: Reads stored tensors now.
        load: Reads one parameter's true values by name, on the compute device in the compute dtype.
        store: Takes one parameter's new values by name, where the blocks' weights are to be trained; else None.
        absent: Names outside the blocks that stay absent too (an embedding table whose rows are gathered).

    Returns:
        The model, in eval mode, with every parameter frozen.
    """
    model = built.model
    in_blocks = _place_absent(built, device=device, load=load, store=store, absent=absent)
    buffers = {name for name, _ in model.named_buffers()}
    for streamed in built.blocks:
        for recipe in streamed.recipes:
            if any(name in buffers for name in recipe.targets):
                _load_now(model, recipe, device=device, read=read, only=buffers)
    for recipe in built.resident:
        if not absent.intersection(recipe.targets):
            _load_now(model, recipe, device=device, read=read, only=None)
    finish_loading(model, missing=built.mapping.missing - in_blocks, device=device)
    _refuse_unfilled(model)
    model.requires_grad_(False)
    leave_placement_alone(model, device, launched=ranks().launched)
    leave_out_of_ddp(model, prefixes=_WRAPPERS, is_left_out=lambda param: isinstance(param, StandIn))
    blocks = {streamed.block.name: streamed.block.module for streamed in built.blocks}
    install_whole(model, folder=built.folder, block_names=blocks)
    return model.eval()


def _place_absent(
    built: Skeleton,
    *,
    device: torch.device,
    load: Callable[[str], Tensor],
    store: Callable[[str, Tensor], None] | None,
    absent: frozenset[str],
) -> set[str]:
    placed: set[str] = set()

    def place(module: torch.nn.Module, attribute: str, key: str, shape: torch.Size, dtype: torch.dtype) -> None:
        param = AbsentParameter.of(
            shape,
            dtype=dtype,
            device=device,
            key=key,
            load=partial(load, key),
            store=None if store is None else partial(store, key),
        )
        mark_initialised(param)
        put_parameter(module, attribute, param)
        hold_parameter(module, attribute, param.refuse_replacing)
        placed.add(key)

    for streamed in built.blocks:
        for slot in streamed.slots:
            place(slot.module, slot.attribute, slot.key, slot.shape, slot.dtype)
    for key in absent:
        path, _, attribute = key.rpartition(".")
        param = built.model.get_parameter(key)
        place(built.model.get_submodule(path), attribute, key, param.shape, param.dtype)
    return placed


def _load_now(
    model: PreTrainedModel, recipe: Recipe, *, device: torch.device, read: ReadTensors, only: set[str] | None
) -> None:
    stored = read(BlockSpec(name=recipe.targets[0], tensors=recipe.sources))
    for name, value in recipe.run(stored).items():
        if only is not None and name not in only:
            continue
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        old = parameter_table(module).get(attribute)
        dtype = (old if old is not None else buffer_table(module)[attribute]).dtype
        # A view would keep the whole staging memory alive.
        real = value.to(device=device, dtype=dtype, copy=True).contiguous()
        if old is not None:
            real = torch.nn.Parameter(real, requires_grad=False)
            put_parameter(module, attribute, real)
        else:
            buffer_table(module)[attribute] = real
        mark_initialised(real)


def _refuse_unfilled(model: PreTrainedModel) -> None:
    left = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
    left += [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if left:
        raise UnsupportedError(
            f"architecture {type(model).__name__}",
            reason=f"{left[0]} is never given a value",
            instead="a model that transformers' from_pretrained loads completely",
        )


_ALIGN_BYTES = 64
"""A cache line: every parameter begins on one, as torch's own allocations do."""


class Unpacker:
    """Makes a block's parameters from its stored tensors.

    A stored tensor that already is the parameter is used where it lies; everything else is written to a workspace of
    the largest block's size, which holds one block at a time and is allocated once.

    Args:
        blocks: The model's blocks.
        device: Compute device.
    """

    def __init__(self, blocks: Sequence[StreamedBlock], *, device: torch.device) -> None:
        self._blocks = blocks
        self._device = device
        self._offsets = [_workspace_offsets(block) for block in blocks]
        self._buffer: Tensor | None = None
        self._holds: int | None = None
        self._views: dict[str, Tensor] = {}

    @property
    def workspace_bytes(self) -> int:
        """Size of the workspace: 0 where every parameter is used where it lies."""
        return max((end for _, end in self._offsets), default=0)

    def unpack(self, index: int, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make the parameters of a block.

        Args:
            index: Number of the block.
            stored: Its stored tensors by stored name, on the compute device.

        Returns:
            Its parameters by model name. They are valid while `stored` is and until another block is unpacked.
        """
        block, (offsets, _) = self._blocks[index], self._offsets[index]
        if self._holds != index:
            self._holds, self._views = None, self._cut(block, offsets)
        values: dict[str, Tensor] = {}
        for recipe in block.recipes:
            if self._holds == index and all(target in offsets for target in recipe.targets):
                continue
            values.update(recipe.run_into(stored, self._views))
        self._holds = index
        return values | self._views

    def release(self) -> None:
        """Do nothing at a visit's end: the workspace may serve the next visit to the same block."""

    def forget(self) -> None:
        """Take the workspace's contents for stale, after an error in the middle of unpacking."""
        self._holds = None

    def close(self) -> None:
        """Release the workspace."""
        self._buffer, self._holds, self._views = None, None, {}

    def _cut(self, block: StreamedBlock, offsets: Mapping[str, int]) -> dict[str, Tensor]:
        if not offsets:
            return {}
        if self._buffer is None:
            self._buffer = allocate(self.workspace_bytes, self._device)
        shapes = {slot.key: slot for slot in block.slots}
        views = {}
        for name, offset in offsets.items():
            slot = shapes[name]
            nbytes = slot.shape.numel() * slot.dtype.itemsize
            views[name] = self._buffer[offset : offset + nbytes].view(slot.dtype).view(slot.shape)
        return views


def allocate(nbytes: int, device: torch.device) -> Tensor:
    """Workspace for unpacked weights, uint8."""
    if device.type == "cpu":
        # Huge pages: fewer faults on first touch, and fewer table walks in every product that reads the weights.
        return StagingBuffer(nbytes).tensor
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _workspace_offsets(block: StreamedBlock) -> tuple[dict[str, int], int]:
    """Where each parameter that is not used in place lies in the workspace, and the bytes they take together."""
    slots = {slot.key: slot for slot in block.slots}
    offsets: dict[str, int] = {}
    end = 0
    for recipe in block.recipes:
        for name in recipe.targets:
            if name not in slots:
                continue
            slot = slots[name]
            if recipe.plain is not None and recipe.plain.dtype == slot.dtype:
                continue
            offsets[name] = end
            nbytes = slot.shape.numel() * slot.dtype.itemsize
            end += round_up(nbytes, _ALIGN_BYTES)
    return offsets, end
