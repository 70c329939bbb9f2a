"""What happens before the first block of a forward: adapters are checked and prepared, TRL's head becomes ours.

Opening a checkpoint as a streamed model: check, plan, build, attach. In that order, so that refusals come first.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.experts.products import run_experts
from lowmem.experts.visiting import (
    ExpertScheduler,
    ExpertUnpacker,
    Phase,
    expert_reader,
    experts_by_block,
    experts_per_token,
    with_dense_blocks,
)
from lowmem.full.opening import Masters, MasterWeights, open_full
from lowmem.host_memory import give_back_freed, process_peak_bytes, temporaries_begin
from lowmem.internals.experts import GROUPED, experts_implementation, use_experts_forward
from lowmem.internals.torch import has_fast_bf16
from lowmem.internals.trl import hash_by_fingerprint, trainers_are_imported
from lowmem.internals.trl import install as install_head
from lowmem.models.absent import GatheredEmbedding, read_now
from lowmem.models.blocks import can_chunk
from lowmem.models.build import Skeleton, Unpacker, fill
from lowmem.models.checkpoint import Opened, gatherable_embedding, pick_dtype
from lowmem.models.whole import install_resizing
from lowmem.planning.planner import bare_shapes, plan_alone
from lowmem.planning.step_memory import KEPT_PRODUCTS, NUM_PRODUCT_BUFFERS, num_boundary_buffers
from lowmem.processes.node import NodeBlocks, share_blocks
from lowmem.streaming.attach import RatesOf, Replanning, attach
from lowmem.streaming.boundary import BoundaryTier, ProductBoundaries
from lowmem.streaming.boundary_tiers import tier_for
from lowmem.streaming.chunking.attention import enable_chunks
from lowmem.streaming.head import TiledLogProbFunction
from lowmem.streaming.norms import tile_outer_norms
from lowmem.streaming.runtime import Runtime
from offload import (
    BlockSpec,
    BudgetError,
    FileIO,
    Scheduler,
    Trace,
    available_ram_bytes,
    format_bytes,
    open_device,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowmem.planning.plan import Plan
    from lowmem.planning.shapes import ModelShapes
    from offload import PeerLost


class Preparation:
    """Called before block 0 of each forward, because PEFT and TRL change a model after it was made.

    A forward without gradients looks for new configurations only. A training forward looks at every module (some
    milliseconds): adapters may be taken off and put on again under the same name and configuration.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self._adapters: tuple[object, ...] = ()
        self._has_head = False
        self._warned = False

    def __call__(self) -> None:
        """Check and prepare what is new.

        Raises:
            UnsupportedError: An adapter that cannot be trained exactly on a streamed model.
        """
        model = self._model()
        if model is None:
            return
        configs = getattr(model, "peft_config", None) or {}
        adapters = tuple((name, id(config)) for name, config in configs.items())
        if adapters != self._adapters or (configs and torch.is_grad_enabled()):
            self._prepare_adapters(model)
            if adapters != self._adapters and model.device.type == "cpu":
                # What PEFT read to initialise them, whole weights for DoRA's, would stay in the heap from now on.
                give_back_freed()
            self._adapters = adapters
        temporaries_begin()
        # TRL looks its head up after the blocks have run, so the first forward is soon enough; without TRL, no import.
        if not self._has_head and trainers_are_imported():
            install_head(TiledLogProbFunction.apply).register(model)
            self._has_head = True

        if not self._warned and torch.is_autocast_enabled("cpu") and model.device.type == "cpu" and not has_fast_bf16():
            self._warned = True
            warnings.warn(
                "bf16 autocast on a processor without bf16 instructions: matrix products are up to a hundred times "
                "slower than in fp32; give SFTConfig(bf16=False), which TRL's default is not",
                stacklevel=2,
            )

    def _prepare_adapters(self, model: torch.nn.Module) -> None:
        from lowmem.adapters.dora import install as install_dora
        from lowmem.adapters.support import check_peft_model

        check_peft_model(model)
        install_dora(model, frozen_base=True)


_ROW_THREADS = 4
"""Requests in flight where rows of an embedding table are read one by one."""


def prepare_device(device: torch.device, plan: Plan | None) -> None:
    """Have libraries take their memory on a GPU now; with a plan, have torch refuse more than its budget beyond that.

    Args:
        device: What computes.
        plan: The one to keep to; None not to.

    Raises:
        UnsupportedError: The device is a CPU.
    """
    if device.type == "cuda":
        _make_workspaces(device)
    if plan is None:
        return
    if device.type == "cpu":
        raise UnsupportedError(
            "cap_device=True on a CPU",
            reason="its memory is the process's, which the system limits",
            instead="a control group's limit (systemd-run --scope -p MemoryMax=...), or no cap_device",
        )
    # The allocator counts what it has reserved, whatever is free in it.
    torch.cuda.empty_cache()
    total_bytes = torch.cuda.mem_get_info(device)[1]
    allowed_bytes = torch.cuda.memory_reserved(device) + plan.device_budget_bytes
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed_bytes / total_bytes), device)


def _make_workspaces(device: torch.device) -> None:
    """Multiply once in this thread and once in autograd's: cuBLAS takes a workspace from torch's allocator for each.

    They are 32 MiB on Hopper and later, 8 before, and stay for as long as the process does: no budget has them.
    """
    factor = torch.ones(16, 16, device=device, dtype=torch.float16, requires_grad=True)
    torch.autograd.grad((factor @ factor).sum(), factor)


def load(opened: Opened, *, plan: Plan, rates_of: RatesOf | None = None) -> PreTrainedModel:
    """Make the streamed model: read what stays resident, start the scheduler, take over the blocks.

    Args:
        opened: A checked checkpoint; its files are closed with the model.
        plan: What goes where.
        rates_of: As `Replanning.watch` has it.

    Raises:
        OffloadError: A file cannot be read, or memory cannot be had.
    """
    from lowmem.adapters.support import refuse_before_changes
    from lowmem.generation.cache import KvRoom
    from lowmem.generation.hooks import GenerationHooks

    built, device, idle_bytes = opened.built, opened.device, process_peak_bytes()
    shapes = _shapes_within_memory(opened, plan)
    with ExitStack() as stack:
        stack.callback(opened.source.close)
        reader = _open_reader(opened, plan)
        stack.callback(reader.close)
        trace = Trace()
        tables = _Weights(built, reader=reader, device=device)
        moved_dtype = pick_dtype(plan.moved_dtype or "fp32", device=device, stored=torch.float32)
        masters = Masters(moved_dtype) if plan.job.tuning == "full" else None
        gathered = gatherable_embedding(built) if plan.embedding_on_disk else None
        model = fill(
            built,
            device=device,
            read=lambda block: read_now(block, reader=reader, device=device),
            load=tables.load if masters is None else masters.load,
            store=None if masters is None else masters.store,
            absent=frozenset(() if gathered is None else (gathered,)),
        )
        if gathered is not None:
            stack.callback(_gather_rows(model.get_input_embeddings(), gathered, opened).close)
        install_resizing(model, room_bytes=plan.device_budget_bytes - plan.device_bytes, tuning=plan.job.tuning)
        weights: _FrozenWeights | MasterWeights
        if masters is None:
            node, plan = _share(opened, plan, shapes, reader=reader)
            stack.callback(node.close)
            weights = _open_frozen(model, built, plan=plan, reader=reader, node=node, device=device, trace=trace)
        else:
            weights = open_full(model, opened, masters, plan=plan, reader=reader, trace=trace)
        stack.callback(weights.close)
        chunks = can_chunk(model) is None
        if chunks:
            enable_chunks(model)
        tile_outer_norms(model, [streamed.block.module for streamed in built.blocks])
        tiers = Tiers(device=device, trace=trace)
        stack.callback(tiers.close)
        move = weights.move if isinstance(weights, _FrozenWeights) else None
        choose_split = Replanning(plan, shapes=shapes, can_chunk=chunks, tiers_of=tiers.open, source_of=move)
        boundaries, products = tiers.open(plan)
        runtime = Runtime(
            built.blocks,
            scheduler=weights.scheduler,
            unpacker=weights.unpacker,
            boundaries=boundaries,
            plan=plan,
            trace=trace,
            device=device,
            choose_split=choose_split,
        )
        # From here on they live as long as the runtime, and must not keep it alive. Closed in reverse: the scheduler
        # waits for the reads that still write into its buffers.
        weakref.finalize(runtime, stack.pop_all().close)
    runtime.full, runtime.idle_bytes, runtime.products = weights.full, idle_bytes, products
    runtime.find_lost = weights.find_lost
    if isinstance(weights, _FrozenWeights):
        runtime.announce = weights.announce
    runtime.generation = GenerationHooks(model, room=KvRoom.of(plan))
    checks = () if masters is None else masters.checks(model)
    attach(model, runtime, before_first=(*checks, Preparation(model)))
    choose_split.watch(model, runtime, rates_of=rates_of)
    if masters is None:
        refuse_before_changes()
        hash_by_fingerprint(model, opened.source.fingerprint())
    _give_generation_config(model, opened.folder)
    return model


def _open_reader(opened: Opened, plan: Plan) -> FileIO:
    rates = plan.rates
    return FileIO(
        num_threads=rates.disk_num_threads, request_bytes=rates.disk_request_bytes, stamps=opened.source.stamps
    )


def _share(opened: Opened, plan: Plan, shapes: ModelShapes, *, reader: FileIO) -> tuple[NodeBlocks, Plan]:
    """How this process's blocks come, and the plan for that: with a copy of its own where it cannot share.

    Raises:
        BudgetError: It cannot share, and its part of the budget is too small for a copy of its own.
    """
    specs = [streamed.spec for streamed in opened.built.blocks]
    node = share_blocks(specs, reader=reader, files=opened.source.stamps, pin=opened.device.type == "cuda")
    if node.note:
        warnings.warn(node.note, stacklevel=2)
    if not node.is_shared and plan.job.num_sharing > 1:
        plan = plan_alone(plan, shapes)
        plan.require_fit()
    return node, replace(plan, advice=(*plan.advice, node.note)) if node.note else plan


def _gather_rows(embedding: torch.nn.Module, name: str, opened: Opened) -> FileIO:
    """Look up an embedding's rows on disk; returns what reads them, to be closed."""
    # Its own threads: the rows of a token must not wait for the blocks that are being fetched ahead.
    rows = FileIO(num_threads=_ROW_THREADS, stamps=opened.source.stamps)
    spec = opened.built.mapping.recipes[name].sources[0]
    GatheredEmbedding(embedding, spec=spec, reader=rows, dtype=opened.dtype, device=opened.device)
    return rows


def _shapes_within_memory(opened: Opened, plan: Plan) -> ModelShapes:
    """What the first training forward may be planned for anew with; read while the model is without weights.

    Raises:
        BudgetError: The machine has not the memory that the plan takes.
    """
    _require_memory(plan, opened.device)
    shapes = replace(bare_shapes(opened), optimizer=plan.optimizer)
    return shapes.with_every_weight(plan.moved_dtype) if plan.job.tuning == "full" else shapes


class Tiers:
    """Tiers of boundary activations and products that plans have named; closed together, for a graph may keep one.

    On a processor, one that nothing refers to any more is gone, with its memory, threads and files.
    """

    def __init__(self, *, device: torch.device, trace: Trace) -> None:
        self._device, self._trace = device, trace
        self._tiers: WeakSet[BoundaryTier] = WeakSet()
        self._held: list[BoundaryTier] = []

    def open(self, plan: Plan) -> tuple[BoundaryTier, BoundaryTier | None]:
        """The tier that a plan names for boundary activations, and one like it if large products are kept.

        Raises:
            WriteError: The plan's folder cannot be written.
        """
        boundaries = self._open(plan, num_buffers=num_boundary_buffers(self._device.type))
        if not plan.choice.keeps_products:
            return boundaries, None
        if plan.boundary_tier == "disk":
            return boundaries, self._open(plan, num_buffers=NUM_PRODUCT_BUFFERS)
        return boundaries, ProductBoundaries(plan.bytes_of(KEPT_PRODUCTS, tier=plan.boundary_tier))

    def _open(self, plan: Plan, *, num_buffers: int) -> BoundaryTier:
        tier = tier_for(
            self._device,
            planned=plan.boundary_tier,
            disk=None if plan.disk_folder is None else Path(plan.disk_folder),
            num_buffers=num_buffers,
            trace=self._trace,
        )
        self._tiers.add(tier)
        if self._device.type != "cpu":
            # Copies may be under way that only closing it waits for.
            self._held.append(tier)
        return tier

    def close(self) -> None:
        """Release everything."""
        for tier in list(self._tiers):
            tier.close()


def _require_memory(plan: Plan, device: torch.device) -> None:
    """Refuse a plan that the budget allows and the machine does not.

    Raises:
        BudgetError: It takes more than there is.
    """
    on_cpu = device.type == "cpu"
    sizes = [("RAM", plan.host_bytes + (plan.device_bytes if on_cpu else 0), available_ram_bytes())]
    if not on_cpu:
        sizes.append(("device memory", plan.device_bytes, torch.cuda.mem_get_info(device)[1]))
    for what, needed_bytes, there_bytes in sizes:
        if needed_bytes > there_bytes:
            raise BudgetError(
                f"the plan for {plan.model} takes {format_bytes(needed_bytes)} of {what}, and this machine has "
                f"{format_bytes(there_bytes)} left: plan with a smaller lowmem.Budget, or with none, which measures",
                needed_bytes=needed_bytes,
            )


def _open_frozen(
    model: PreTrainedModel,
    built: Skeleton,
    *,
    plan: Plan,
    reader: FileIO,
    node: NodeBlocks,
    device: torch.device,
    trace: Trace,
) -> _FrozenWeights:
    # Not the skeleton, which has the model: these outlive it.
    blocks, experts = built.blocks, experts_by_block(built.blocks)
    schedule = partial(
        Scheduler,
        read=node.reader.read,
        keep=node.keep,
        visited=node.visited,
        device=open_device(device),
        trace=trace,
    )
    if not any(experts) or experts_implementation(model) != GROUPED:
        specs = [streamed.spec for streamed in blocks]
        unpacker = Unpacker(blocks, device=device)
        return _FrozenWeights(
            lambda plan: schedule(specs, plan=plan.placement), plan, unpacker=unpacker, find_lost=node.lost
        )
    use_experts_forward(model, "lowmem_grouped_mm", run_experts)
    num_per_token = experts_per_token(built.model.config)
    # Whole blocks come from the node's reader; single experts, and blocks without theirs, are this rank's own.
    single, foresight = expert_reader(blocks, experts, num_per_token=num_per_token, reader=reader, device=device)

    def open_experts(plan: Plan) -> ExpertScheduler:
        specs, both = with_dense_blocks(blocks, experts, plan.placement)
        return ExpertScheduler(
            schedule(specs, plan=both),
            experts,
            plan=plan.placement,
            num_per_token=num_per_token,
            reader=single,
            foresight=foresight,
        )

    def close() -> None:
        single.close()
        if foresight is not None:
            foresight.close()

    one_by_one = ExpertUnpacker(blocks, experts, reader=single, device=device, foresight=foresight)
    return _FrozenWeights(open_experts, plan, unpacker=one_by_one, find_lost=node.lost, closed_last=close)


class _FrozenWeights:
    """Weights that stay in the checkpoint and never change; packed experts among them may be taken one by one."""

    full = None

    def __init__(
        self,
        schedule: Callable[[Plan], Scheduler | ExpertScheduler],
        plan: Plan,
        *,
        unpacker: Unpacker | ExpertUnpacker,
        find_lost: Callable[[float], PeerLost | None],
        closed_last: Callable[[], None] = lambda: None,
    ) -> None:
        self._schedule, self._closed_last, self.find_lost = schedule, closed_last, find_lost
        self.scheduler, self.unpacker = schedule(plan), unpacker

    def announce(self, phase: Phase, num_tokens: int) -> None:
        """Say what the next visit is for."""
        if isinstance(self.scheduler, ExpertScheduler):
            self.scheduler.announce(phase, num_tokens)

    def move(self, plan: Plan) -> Scheduler | ExpertScheduler:
        """Bring blocks as another plan places them; the memory of those that were there before is free first."""
        self.scheduler.close()
        self.scheduler = self._schedule(plan)
        return self.scheduler

    def close(self) -> None:
        """Stop the transfers and free the buffers."""
        self.scheduler.close()
        self._closed_last()


class _Weights:
    """Reads one parameter's true values, for code that looks at an absent weight outside a visit."""

    def __init__(self, built: Skeleton, *, reader: FileIO, device: torch.device) -> None:
        self._recipes = built.mapping.recipes
        self._dtypes = {slot.key: slot.dtype for streamed in built.blocks for slot in streamed.slots}
        self._default = built.model.dtype
        self._reader, self._device = reader, device

    def load(self, key: str) -> Tensor:
        recipe = self._recipes[key]
        stored = read_now(BlockSpec(name=key, tensors=recipe.sources), reader=self._reader, device=self._device)
        # A clone: the caller may keep it, and must not keep the staging memory of a whole expert stack alive.
        return recipe.run(stored)[key].to(self._dtypes.get(key, self._default), copy=True).contiguous()


def _give_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Read what `from_pretrained` reads: generation_config.json, else what older checkpoints have in config.json."""
    if model.can_generate():
        model.adjust_generation_fn(
            generation_config=None,
            from_auto_class=False,
            from_pipeline=None,
            pretrained_model_name_or_path=folder,
            cache_dir=None,
            force_download=False,
            proxies=None,
            local_files_only=True,
            token=None,
            revision=None,
            subfolder="",
            trust_remote_code=False,
        )
