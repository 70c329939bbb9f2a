"""The weights that full tuning starts from: a block's parameters as the checkpoint has them, in the masters' type.

What the runtime visits blocks through when their weights are masters that change: scheduler and unpacker in one.

Making a model trainable in every weight: checks, master weights from the checkpoint, the engine.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.full.disk_tier import DiskTier
from lowmem.full.engine import FullTuning
from lowmem.full.flat import UnitLayout, lay_out_unit
from lowmem.full.gpu_tier import GpuMemoryTier
from lowmem.full.optimizer_engine import OptimizerEngine, tell_engine
from lowmem.full.saving import StoredNames, install_saving
from lowmem.full.shared_state import SharedState
from lowmem.full.tier import MemoryTier, PrivateState, StateMemory, StateTier
from lowmem.internals.torch import parameter_table
from lowmem.internals.transformers import on_optimizer_resume
from lowmem.models.absent import read_now
from lowmem.models.checkpoint import pick_dtype
from lowmem.optim.optimizer import give_to_engine
from lowmem.processes.ranks import ranks
from offload import BlockSpec, Closed, FileIO, PeerLost, StagingBuffer, Trace, lay_out, view_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowmem.models.build import Skeleton
    from lowmem.models.checkpoint import Opened
    from lowmem.planning.plan import Plan


class BaseWeights:
    """Reads blocks and single parameters of the checkpoint. Used from several threads; keeps nothing of the model.

    Args:
        built: Has the recipes; each makes one parameter of one stored tensor.
        layouts: The blocks.
        reader: Reads stored tensors.
    """

    def __init__(self, built: Skeleton, layouts: Sequence[UnitLayout], *, reader: FileIO) -> None:
        self._specs, self._layouts, self._reader = [block.spec for block in built.blocks], layouts, reader
        self._recipes = built.mapping.recipes
        self._lock = threading.Lock()
        self._buffer: StagingBuffer | None = None

    def load(self, index: int, into: Tensor) -> None:
        """Fill a flat buffer with a block's weights."""
        read = lay_out(self._specs[index])
        with self._lock:
            if self._buffer is None or self._buffer.nbytes < read.buffer_bytes:
                self._buffer = StagingBuffer(read.buffer_bytes)
            self._reader.read(read, self._buffer.tensor).wait()
            into[: self._layouts[index].numel].zero_()
            places = {
                place.key: into[place.start : place.stop].view(place.shape) for place in self._layouts[index].places
            }
            # One recipe at a time: what a conversion makes (a block's experts, stacked) is there once.
            for recipe in {id(found): found for found in map(self._recipes.__getitem__, places)}.values():
                stored = {
                    spec.name: view_tensor(self._buffer.tensor, read.tensor_offsets[spec.name], spec=spec)
                    for spec in recipe.sources
                }
                recipe.run_into(stored, places)

    def load_once(self, index: int, into: Tensor) -> None:
        """As `load`, and keep no memory: where a block is read from the checkpoint hardly more than once."""
        self.load(index, into)
        self.release()

    def read(self, key: str) -> Tensor:
        """One parameter."""
        recipe = self._recipes[key]
        stored = read_now(BlockSpec(name=key, tensors=recipe.sources), reader=self._reader, device=torch.device("cpu"))
        return recipe.run(stored)[key].to(recipe.dtype, copy=True)

    def release(self) -> None:
        """Give the buffer back until it is needed again."""
        with self._lock:
            self._buffer = None


class MasterWeights:
    """Lends blocks their newest weights, under the names that `Scheduler` and `Unpacker` have for it.

    Args:
        full: Owns the weights; closed with this.
        engine: Serves its optimizers; kept, because parameters refer to it weakly.
    """

    workspace_bytes = 0
    """Nothing is unpacked: masters are in the compute dtype."""

    def __init__(self, full: FullTuning, engine: OptimizerEngine) -> None:
        self.full, self._engine = full, engine

    @property
    def scheduler(self) -> MasterWeights:
        """This."""
        return self

    @property
    def unpacker(self) -> MasterWeights:
        """This, too."""
        return self

    def memory(self) -> dict[str, int]:
        """Bytes of memory taken, by role."""
        return self.full.tier.memory()

    def find_lost(self, wait_s: float) -> PeerLost | None:
        """Which process that shares the weights has ended, if one has; waits so long for word of it."""
        return self.full.tier.lost(wait_s)

    def expect(self, order: Iterable[int]) -> None:
        """Prefetch blocks for visits in this order."""
        self.full.tier.expect(tuple(order))

    @contextmanager
    def resident(self, block: int) -> Iterator[Mapping[str, Tensor]]:
        """A block's parameters by model name for the time of a visit."""
        with self.full.lend(block) as values:
            yield values

    def unpack(self, index: int, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters, as `resident` gave them."""
        return dict(stored)

    def release(self) -> None:
        """Do nothing: nothing is unpacked."""

    def forget(self) -> None:
        """Do nothing: there is no workspace."""

    def reset(self) -> None:
        """End all visits."""
        self.full.tier.reset()

    def close(self) -> None:
        """Complete the updates under way and give all memory back. May be called twice."""
        self.full.tier.close()


STATE_FOLDER = "weights-and-state"
"""Folder in `Budget.disk` for masters, moments and gradients."""


class Masters:
    """Reads and writes single weights of a model whose engine is made after its parameters are.

    Args:
        moved_dtype: Type in which matrices go to a GPU.
    """

    def __init__(self, moved_dtype: torch.dtype = torch.float32) -> None:
        self.moved_dtype = moved_dtype
        self._full: weakref.ref[FullTuning] | None = None

    def serve(self, full: FullTuning) -> None:
        """Serve an engine, weakly: it owns the parameters that refer to this."""
        self._full = weakref.ref(full)

    def load(self, key: str) -> Tensor:
        """A copy of a weight.

        Raises:
            Closed: The model is gone.
        """
        full = self._engine(key)
        return full.read(key).to(full.params[key].param.device)

    def store(self, key: str, value: Tensor) -> None:
        """Set a weight.

        Raises:
            Closed: The model is gone.
        """
        self._engine(key).write(key, value)

    def checks(self, model: PreTrainedModel) -> tuple[Callable[[], None], ...]:
        """What is called before block 0 of each forward."""
        refusal = partial(refuse_adapter, weakref.ref(model))
        if self.moved_dtype == torch.float32:
            return (refusal,)
        return partial(require_autocast, model.device, self.moved_dtype), refusal

    def _engine(self, key: str) -> FullTuning:
        assert self._full is not None, f"{key} was used before the masters were filled"
        full = self._full()
        if full is None:
            raise Closed(f"{key}: the model that it is a parameter of is gone; open it again")
        return full


def require_autocast(device: torch.device, moved_dtype: torch.dtype) -> None:
    """Refuse a forward outside of autocast to the type in which matrices are moved, where that is not fp32.

    Raises:
        UnsupportedError: Products would mix types.
    """
    kind = device.type
    if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) != moved_dtype:
        name = str(moved_dtype).removeprefix("torch.")
        raise UnsupportedError(
            f"tuning='full' with dtype={name} outside of autocast to {name}",
            reason="matrices come to the GPU in that type, and everything else is fp32",
            instead=f"the trainer's bf16=True, torch.autocast({kind!r}, {moved_dtype}) around the forward, "
            "or dtype=torch.float32",
        )


def moved_name(dtype: torch.dtype | str | None, *, device: torch.device, masters: torch.dtype) -> str | None:
    """Type in which matrices of blocks go to a GPU where every weight is trained, by torch's name; None: as they are.

    Args:
        dtype: What was asked for: bf16 is moved for forwards under autocast.
        device: Compute device; a CPU computes from the masters.
        masters: Type of the master weights; those in bf16 are what goes.
    """
    if dtype is None or device.type == "cpu" or masters == torch.bfloat16:
        return None
    found = pick_dtype(dtype, device=device, stored=torch.float32)
    return "bfloat16" if found == torch.bfloat16 else None


def refuse_adapter(model: weakref.ref[PreTrainedModel]) -> None:
    """Refuse an adapter that PEFT may have put on the model since.

    Raises:
        UnsupportedError: There is one.
    """
    if getattr(model(), "peft_config", None):
        raise UnsupportedError(
            'a PEFT adapter with tuning="full"',
            reason="an adapter is trained on frozen weights",
            instead='tuning="adapter" with the adapter, or tuning="full" without it',
        )


def master_dtype(masters: torch.dtype | str | None, dtype: torch.dtype | str | None, *, tuning: str) -> torch.dtype:
    """Type of the master weights where every weight is trained: what was asked for, else fp32.

    Args:
        masters: "fp32" or "bf16", or a type of torch.
        dtype: The compute dtype that was asked for.
        tuning: What is trained.

    Raises:
        UnsupportedError: Another type, masters without full tuning, or a compute dtype that bf16 masters are not in.
    """
    cpu = torch.device("cpu")
    found = torch.float32 if masters is None else pick_dtype(masters, device=cpu, stored=torch.float32)
    if masters is not None and tuning != "full":
        raise UnsupportedError(
            f"masters={masters!r} with tuning={tuning!r}",
            reason="no weight is changed, so there are no master weights",
            instead="tuning='full', or no masters",
        )
    if found not in (torch.float32, torch.bfloat16):
        raise UnsupportedError(
            f"masters={masters!r}",
            reason="small changes are kept in fp32, or in bf16 by rounding at random",
            instead="masters='fp32' or masters='bf16'",
        )
    if found == torch.bfloat16 and dtype is not None:
        computed = pick_dtype(dtype, device=cpu, stored=torch.float32)
        if computed != torch.bfloat16:
            raise UnsupportedError(
                f"dtype={dtype!r} with masters='bf16'",
                reason="blocks compute from the master weights as they are",
                instead="no dtype, or masters='fp32'",
            )
    return found


def refuse_unsupported(built: Skeleton, *, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what full tuning cannot do exactly, before anything loads.

    Args:
        built: The model on meta.
        device: Compute device.
        dtype: Type of its parameters, which are the master weights.

    Raises:
        UnsupportedError: Names the option or architecture, the reason and what to use instead.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise UnsupportedError(
            f"tuning='full' with dtype={dtype}",
            reason="blocks compute from the master weights, or from copies of them",
            instead="dtype=torch.float32, the default for it, or masters='bf16'",
        )
    for recipe in (*built.resident, *(recipe for block in built.blocks for recipe in block.recipes)):
        if recipe.formats:
            raise UnsupportedError(
                f"tuning='full' on weights that are stored as {', '.join(recipe.formats)}",
                reason="a trained weight would be rounded to a few bits in every step",
                instead="tuning='adapter', or the bf16, fp16 or fp32 checkpoint of the same model",
            )
        why = recipe.why_not_undone()
        if why is not None:
            raise UnsupportedError(
                f"tuning='full' for architecture {type(built.model).__name__}",
                reason=f"{recipe.targets[0]} is made of {len(recipe.sources)} stored tensors {why}",
                instead="tuning='adapter', or a checkpoint that transformers has saved of this model",
            )
    for name, param in built.model.named_parameters():
        if param.dtype != dtype:
            raise UnsupportedError(
                f"tuning='full' for architecture {type(built.model).__name__}",
                reason=f"{name} is of dtype {param.dtype}, and other weights are of {dtype}",
                instead="tuning='adapter'" if dtype == torch.float32 else "masters='fp32'",
            )


def open_full(
    model: PreTrainedModel,
    opened: Opened,
    masters: Masters,
    *,
    plan: Plan,
    reader: FileIO,
    trace: Trace,
) -> MasterWeights:
    """Fill the master weights and make every parameter trainable.

    Args:
        model: As `fill` made it, with absent blocks that load from `masters`.
        opened: The checkpoint it was made from.
        masters: Gets the engine.
        plan: Names the tier.
        reader: Reads stored tensors.
        trace: Where transfers are recorded.

    Raises:
        UnsupportedError: Another type than fp32 with state on disk.
    """
    built, moved_dtype = opened.built, masters.moved_dtype
    if plan.choice.state_tier == "disk" and moved_dtype != torch.float32:
        raise UnsupportedError(
            f"tuning='full' with dtype={moved_dtype} and state on disk",
            reason="weights come from disk in fp32",
            instead="dtype=torch.float32, or a host budget for the state",
        )
    blocks = [{slot.key: _param(slot.module, slot.attribute) for slot in streamed.slots} for streamed in built.blocks]
    inside = {id(param) for params in blocks for param in params.values()}
    outer = {key: param for key, param in model.named_parameters() if id(param) not in inside}
    named = [*((streamed.block.name, params) for streamed, params in zip(built.blocks, blocks, strict=True))]
    named += [(key, {key: param}) for key, param in outer.items()]
    layouts = [
        lay_out_unit(name, [(key, param.shape) for key, param in params.items()], weight_dtype=opened.dtype)
        for name, params in named
    ]
    live = {len(blocks) + index: param for index, param in enumerate(outer.values())}
    base = BaseWeights(built, layouts[: len(blocks)], reader=reader)
    if plan.choice.state_tier == "disk":
        flat = {index: param.data.view(-1) for index, param in live.items()}
        tier: StateTier = _disk_tier(layouts, flat, base, opened, plan=plan, trace=trace)
    else:
        tier = in_memory = _memory_tier(layouts, live, opened, plan=plan, trace=trace, moved_dtype=moved_dtype)
        in_memory.fill(len(blocks), base.load)
        base.release()
    model.requires_grad_(True)
    full = FullTuning(blocks, outer, tier=tier)
    masters.serve(full)
    engine = OptimizerEngine(full, opened_from=opened.folder)
    on_optimizer_resume(tell_engine)
    for entry in full.params.values():
        give_to_engine(entry.param, engine)
    install_saving(model, full, _stored_names(full, built), source=opened.folder)
    return MasterWeights(full, engine)


def _memory_tier(
    layouts: list[UnitLayout],
    live: Mapping[int, Tensor],
    opened: Opened,
    *,
    plan: Plan,
    trace: Trace,
    moved_dtype: torch.dtype,
) -> MemoryTier:
    num_blocks, pin = len(opened.built.blocks), plan.choice.update_share > 0
    memory: StateMemory = PrivateState(layouts, pin=pin)
    if ranks().are_several:
        memory = SharedState(layouts, num_blocks=num_blocks, pin=pin)
    if opened.device.type == "cpu":
        return MemoryTier(layouts, live=live, memory=memory)
    return GpuMemoryTier(
        layouts,
        live=live,
        memory=memory,
        num_blocks=num_blocks,
        device=opened.device,
        num_slots=plan.placement.num_slots,
        num_passes=plan.placement.num_passes,
        trace=trace,
        moved_dtype=moved_dtype,
        update_share=plan.choice.update_share,
        reduces=plan.choice.reduces_gradients,
        takes_bases=plan.choice.takes_bases,
        products=frozenset(
            slot.key
            for streamed in opened.built.blocks
            for slot in streamed.slots
            # Autocast casts what these multiply with; of experts' stacks and other parameters it casts some.
            if isinstance(slot.module, torch.nn.Linear) and slot.attribute == "weight"
        ),
    )


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
        placement=replace(plan.placement, block_bytes=tuple(layout.weight_bytes for layout in layouts[:num_blocks])),
        folder=Path(plan.disk_folder) / STATE_FOLDER,
        fingerprint=sha256(repr((opened.source.fingerprint(), opened.dtype, places)).encode()).hexdigest(),
        load_base=base.load_once,
        read_base=base.read,
        trace=trace,
        device=opened.device,
        update_share=plan.choice.update_share,
    )


def _param(module: torch.nn.Module, attribute: str) -> torch.nn.Parameter:
    param: torch.nn.Parameter | None = parameter_table(module)[attribute]
    assert param is not None, attribute
    return param


def _stored_names(full: FullTuning, built: Skeleton) -> StoredNames:
    """Names in the checkpoint; a parameter that it does not hold (a head of its own made later) keeps its own name."""
    recipes = built.mapping.recipes
    converted = {id(found): found for found in recipes.values() if found.convert is not None}
    apart = {key for found in converted.values() for key in found.targets}
    return StoredNames(
        by_key={
            key: recipes[key].sources[0].name if key in recipes else key for key in full.params if key not in apart
        },
        converted=tuple(converted.values()),
    )
