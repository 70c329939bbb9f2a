"""Making a model trainable in every weight: checks, master weights from the checkpoint, the engine."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.full.base_weights import BaseWeights
from lowmem.full.disk_tier import DiskTier
from lowmem.full.engine import FullTuning
from lowmem.full.layout import UnitLayout, lay_out_unit
from lowmem.full.memory_tier import MemoryTier
from lowmem.full.optimizer_engine import OptimizerEngine
from lowmem.full.saving import StoredNames, install_saving
from lowmem.full.tier import StateTier
from lowmem.optim.offloaded import give_to_engine
from offload import FileReader, Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowmem.loading import Opened
    from lowmem.models.build import Skeleton
    from lowmem.step_plan import Plan


STATE_FOLDER = "weights-and-state"
"""Folder in `Budget.disk` for masters, moments and gradients."""


class Masters:
    """Reads and writes single weights of a model whose engine is made after its parameters are."""

    def __init__(self) -> None:
        self.full: FullTuning | None = None
        """The engine, once there is one."""

    def load(self, key: str) -> Tensor:
        """A copy of a weight."""
        assert self.full is not None, f"{key} was read before the masters were filled"
        return self.full.read(key)

    def store(self, key: str, value: Tensor) -> None:
        """Set a weight."""
        assert self.full is not None, f"{key} was written before the masters were filled"
        self.full.write(key, value)


class AdapterRefusal:
    """Called before block 0 of each forward: PEFT may have put an adapter on the model since."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Watch a model, weakly."""
        self._model = weakref.ref(model)

    def __call__(self) -> None:
        """Refuse adapters.

        Raises:
            UnsupportedError: There is one.
        """
        if getattr(self._model(), "peft_config", None):
            raise UnsupportedError(
                'a PEFT adapter with tuning="full"',
                reason="an adapter is trained on frozen weights",
                instead='tuning="adapter" with the adapter, or tuning="full" without it',
            )


def refuse_unsupported(built: Skeleton, *, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what full tuning cannot do exactly, before anything loads.

    Args:
        built: The model on meta.
        device: Compute device.
        dtype: Compute dtype.

    Raises:
        UnsupportedError: Names the option or architecture, the reason and what to use instead.
    """
    if device.type != "cpu":
        raise UnsupportedError(
            f"tuning='full' on {device.type}",
            reason="master weights are used in place so far, which only a processor can",
            instead="device='cpu', or tuning='adapter'",
        )
    if dtype != torch.float32:
        raise UnsupportedError(
            f"tuning='full' with dtype={dtype}",
            reason="blocks compute from the fp32 master weights themselves",
            instead="dtype=torch.float32",
        )
    for recipe in (*built.resident, *(recipe for block in built.blocks for recipe in block.recipes)):
        if recipe.convert is not None:
            raise UnsupportedError(
                f"tuning='full' for architecture {type(built.model).__name__}",
                reason=f"{recipe.targets[0]} is made of {len(recipe.sources)} stored tensors by a conversion, which "
                "saving would have to undo",
                instead="tuning='adapter', or a model whose checkpoint stores each parameter as it is",
            )
    for name, param in built.model.named_parameters():
        if param.dtype != torch.float32:
            raise UnsupportedError(
                f"tuning='full' for architecture {type(built.model).__name__}",
                reason=f"{name} is of dtype {param.dtype}",
                instead="tuning='adapter'",
            )


def open_full(
    model: PreTrainedModel, opened: Opened, masters: Masters, *, plan: Plan, reader: FileReader, trace: Trace
) -> FullTuning:
    """Fill the master weights and make every parameter trainable.

    Args:
        model: As `fill` made it, with absent blocks that load from `masters`.
        opened: The checkpoint it was made from.
        masters: Gets the engine.
        plan: Names the tier.
        reader: Reads stored tensors.
        trace: Where transfers are recorded.
    """
    built = opened.built
    blocks = [{slot.key: _param(slot.module, slot.attribute) for slot in streamed.slots} for streamed in built.blocks]
    inside = {id(param) for params in blocks for param in params.values()}
    outer = {key: param for key, param in model.named_parameters() if id(param) not in inside}
    layouts = [
        *(
            lay_out_unit(streamed.block.name, [(key, param.shape) for key, param in params.items()])
            for streamed, params in zip(built.blocks, blocks, strict=True)
        ),
        *(lay_out_unit(key, [(key, param.shape)]) for key, param in outer.items()),
    ]
    live = {len(blocks) + index: param.data.view(-1) for index, param in enumerate(outer.values())}
    base = BaseWeights(built, layouts[: len(blocks)], reader=reader)
    if plan.choice.state_tier == "disk":
        tier: StateTier = _disk_tier(layouts, live, base, opened, plan=plan, trace=trace)
    else:
        tier = MemoryTier(layouts, live=live)
        for index in range(len(blocks)):
            base.load(index, tier.weight(index))
        base.release()
    full = FullTuning(blocks, outer, tier=tier)
    masters.full = full
    model.requires_grad_(True)
    engine = OptimizerEngine(full)
    for entry in full.params.values():
        give_to_engine(entry.param, engine)
    install_saving(model, full, StoredNames(by_key=_stored_names(full, built)))
    return full


def _disk_tier(
    layouts: list[UnitLayout],
    live: Mapping[int, Tensor],
    base: BaseWeights,
    opened: Opened,
    *,
    plan: Plan,
    trace: Trace,
) -> DiskTier:
    assert plan.disk_folder is not None, "state goes to disk only where there is a folder for it"
    num_blocks = len(opened.built.blocks)
    places = [(layout.name, layout.numel, [(place.key, place.start) for place in layout.places]) for layout in layouts]
    return DiskTier(
        layouts,
        live=live,
        num_blocks=num_blocks,
        # The planner knows the number of weights, not how each is aligned.
        placement=replace(plan.placement, block_bytes=tuple(4 * layout.numel for layout in layouts[:num_blocks])),
        folder=Path(plan.disk_folder) / STATE_FOLDER,
        fingerprint=sha256(repr((opened.source.fingerprint(), places)).encode()).hexdigest(),
        load_base=base.load_once,
        read_base=base.read,
        trace=trace,
    )


def _param(module: torch.nn.Module, attribute: str) -> torch.nn.Parameter:
    param = module._parameters[attribute]
    assert param is not None, attribute
    return param


def _stored_names(full: FullTuning, built: Skeleton) -> dict[str, str]:
    """Names in the checkpoint; a parameter that it does not hold (a head of its own made later) keeps its own name."""
    recipes = built.mapping.recipes
    return {key: recipes[key].sources[0].name if key in recipes else key for key in full.params}


__all__ = ["Masters", "open_full", "refuse_unsupported"]
