"""Letting a runtime run a model's blocks: what a call of a streamed block does before its weights are brought.

A plan is made before a model is loaded, from what was said of the job, or supposed where nothing was said. The first
training forward knows better: its batch, its longest sequence, and which parameters really train. A batch that no plan
so far covers is planned for within the same budget; what does not fit is refused before anything is computed.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from lowmem.errors import UnsupportedError
from lowmem.planning.planner import plan_again
from lowmem.planning.read_model import with_what_trains
from lowmem.streaming.block import run_block
from lowmem.streaming.call import BlockCall, Split, SplitChoice
from lowmem.streaming.reference import ReferencePass
from lowmem.streaming.runtime import Runtime, give_runtime, refuse_second_thread
from offload import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowmem.planning.plan import Plan
    from lowmem.planning.shapes import ModelShapes, OptimizerShape
    from lowmem.planning.step_time import Rates
    from lowmem.streaming.boundary import BoundaryTier
    from lowmem.streaming.runtime import BlockSource


RatesOf = Callable[..., "Rates"]
"""Rates for a model planned so, with these sizes, that trains under `autocast` or not: what is kept of this machine."""


class StreamedForward:
    """Runs the blocks of one model in the place of their own forwards.

    The blocks hold it, and it holds the runtime weakly: the runtime holds the blocks, and a model that is dropped must
    be freed without a cyclic collection.
    """

    def __init__(self, runtime: Runtime, *, before_first: Sequence[Callable[[], None]]) -> None:
        self._runtime = weakref.ref(runtime)
        self._before_first = tuple(before_first)
        task = runtime.plan.job
        self._reference = ReferencePass(expects_reference=task.task in ("dpo", "kto") and bool(task.uses_reference))
        runtime.on_reset(self._reference.forget)
        self._thread: int | None = None

    def call(self, index: int, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """Run one block as its module would: recorded where gradients will be asked for, else just run.

        Args:
            index: Number of the block.
            args: Positional arguments of its forward, the hidden states (batch, tokens, hidden) first.
            kwargs: Keyword arguments.

        Raises:
            UnsupportedError: The model is compiled, or another thread has begun a forward since this one did.
            RuntimeError: The model that the block belongs to was freed.
        """
        runtime = self._runtime()
        if runtime is None:
            raise RuntimeError(
                f"block {index} has outlived its streamed model, which brings its weights; keep a reference to it"
            )
        if torch.compiler.is_compiling():
            raise UnsupportedError(
                "torch.compile",
                reason="a compiled graph cannot have its weights exchanged from block to block",
                instead="the model as it is",
            )
        if index == 0:
            for callback in self._before_first:
                callback()
        # Some models skip blocks at random, block 0 too.
        if index == 0 or self._thread is None:
            self._thread = threading.get_ident()
        elif self._thread != threading.get_ident():
            refuse_second_thread()
        if runtime.full is not None:
            # Weights that change between two forwards are not compared; and a full run's reference is another model.
            return run_block(runtime, index, args, kwargs)
        return self._reference.call(runtime, index, args, kwargs)


def attach(model: torch.nn.Module, runtime: Runtime, *, before_first: Sequence[Callable[[], None]] = ()) -> None:
    """Let the runtime run a model's blocks.

    Replaces `forward` on the block instances, which serves training, evaluation and generation alike and does not
    depend on gradient checkpointing being on. The model owns the runtime, and so does the list of its blocks: an inner
    model that outlives its head still runs.

    Trainers make the embeddings' output require gradients, for checkpointing's sake. A streamed block asks its own
    parameters, so that is left out: it would keep the embeddings throughout the step, and their gradient.

    Args:
        model: A transformers model.
        runtime: Has its blocks.
        before_first: Called before block 0 of each forward, to check or prepare what was added to the model.
    """
    path = runtime.blocks[0].block.name.rpartition(".")[0]
    for owner in (model, model.get_submodule(path)):
        give_runtime(owner, runtime)
    object.__setattr__(model, "enable_input_require_grads", lambda: None)
    _show_plan(model, runtime.plan)
    streamed = StreamedForward(runtime, before_first=before_first)
    for index, module in enumerate(runtime.modules):
        module.forward = _forward_of(streamed, index)


def _show_plan(model: torch.nn.Module, plan: Plan) -> None:
    """Have `model.lowmem_plan` and the model's repr say what is streamed; wrappers such as PEFT's hand both on."""
    object.__setattr__(model, "lowmem_plan", plan)
    object.__setattr__(model, "extra_repr", partial(_summary, plan))


def _summary(plan: Plan) -> str:
    counts = Counter(place.value for place in plan.placements)
    blocks = ", ".join(f"{count} {place}" for place, count in counts.items())
    device = f"{format_bytes(plan.device_bytes)} of {format_bytes(plan.device_budget_bytes)}"
    return f"(streamed by lowmem): {len(plan.placements)} blocks, {blocks}; device {device}; see .lowmem_plan"


def _forward_of(streamed: StreamedForward, index: int) -> Callable[..., object]:
    def forward(*args: object, **kwargs: object) -> object:
        return streamed.call(index, args, kwargs)

    return forward


class Replanning(SplitChoice):
    """Chooses how calls are split, after the plan that covers the batch of the training forward that they belong to.

    Args:
        plan: What was planned.
        shapes: The model's sizes; of its adapters only what was supposed.
        can_chunk: Whether the model's blocks can be walked along the sequence.
        tier_of: Makes the tier of boundary activations that a plan names.
        source_of: Brings blocks as a plan places them, in the place of what brought them before; None where blocks
            cannot move.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        shapes: ModelShapes,
        can_chunk: bool,
        tiers_of: Callable[[Plan], tuple[BoundaryTier, BoundaryTier | None]],
        source_of: Callable[[Plan], BlockSource] | None,
    ) -> None:
        super().__init__(plan, can_chunk=can_chunk)
        self._shapes = shapes
        self._tiers_of, self._source_of = tiers_of, source_of
        self._rates_of: RatesOf | None = None
        self._plans: list[Plan] = [] if plan.is_supposed else [plan]
        self._seen: set[tuple[int, int, bool]] = set()
        self._watched: tuple[weakref.ref[PreTrainedModel], weakref.ref[Runtime]] | None = None

    def watch(self, model: PreTrainedModel, runtime: Runtime, *, rates_of: RatesOf | None = None) -> None:
        """Have a runtime follow the plans from now on. Both are referred to weakly.

        Args:
            model: Its blocks are the runtime's.
            runtime: Runs them.
            rates_of: The rates of a job that differs from what was planned; None for those of the plan.
        """
        self._rates_of = rates_of
        self._watched = weakref.ref(model), weakref.ref(runtime)

    def __call__(self, call: BlockCall) -> Split:
        """How a call is split; the first one of a training forward larger than any planned for is planned for.

        Raises:
            BudgetError: The batch does not fit the budget in any way; nothing was computed.
        """
        if torch.is_grad_enabled() and self._watched is not None:
            model, runtime = (reference() for reference in self._watched)
            if model is not None and runtime is not None and not runtime.is_visiting:
                autocast = torch.is_autocast_enabled(model.device.type)
                num_tokens = max(1, call.num_tokens // call.batch_size)
                self._cover(model, runtime, call.batch_size, num_tokens, autocast=autocast)
        return super().__call__(call)

    def _cover(
        self, model: PreTrainedModel, runtime: Runtime, num_sequences: int, seq_len: int, *, autocast: bool
    ) -> None:
        # All blocks of a forward ask, and the first asks before anything runs.
        if (num_sequences, seq_len, autocast) in self._seen:
            return
        num_trainable = sum(param.numel() for param in model.parameters() if param.requires_grad)
        if not num_trainable:
            return
        told = runtime.optimizer or (None if runtime.full is None else runtime.full.optimizer)
        optimizer = told or self._shapes.optimizer
        covers = partial(_covers, num_trainable=num_trainable, optimizer=optimizer, autocast=autocast)
        plan = next((plan for plan in self._plans if covers(plan, num_sequences, seq_len)), None)
        if plan is None:
            self._shapes = replace(self._shapes, optimizer=optimizer)
            if num_trainable != self._shapes.num_trainable:
                self._shapes = with_what_trains(self._shapes, model, runtime.blocks)
            rates = None if self._rates_of is None else self._rates_of(runtime.plan, self._shapes, autocast=autocast)
            job = {"num_sequences": num_sequences, "seq_len": seq_len}
            plan = plan_again(runtime.plan, self._shapes, **job, autocast=autocast, rates=rates)
            plan.require_fit()
            # Plans for other places of the blocks are of no use once these have moved.
            self._plans = [known for known in self._plans if known.placement == plan.placement]
            self._plans.insert(0, plan)
        if plan is not runtime.plan:
            self._follow(model, runtime, plan)
        self._seen.add((num_sequences, seq_len, autocast))

    def _follow(self, model: PreTrainedModel, runtime: Runtime, plan: Plan) -> None:
        if plan.placement != runtime.plan.placement:
            assert self._source_of is not None
            runtime.bring_blocks_from(self._source_of(plan))
        kept = (plan.boundary_tier, plan.choice.keeps_products)
        if kept != (runtime.plan.boundary_tier, runtime.plan.choice.keeps_products):
            # What a graph still keeps in a tier before has its own reference to it.
            runtime.boundaries, runtime.products = self._tiers_of(plan)
        super().__init__(plan, can_chunk=self._can_chunk)
        runtime.plan = plan
        _show_plan(model, plan)
        self._seen.clear()


def _covers(
    plan: Plan,
    num_sequences: int,
    seq_len: int,
    *,
    num_trainable: int,
    optimizer: OptimizerShape | None,
    autocast: bool,
) -> bool:
    job = plan.job
    if job.autocast and not autocast and job.tuning == "adapter" and plan.compute_dtype != "float32":
        # Adapters compute in fp32 then, which takes more.
        return False
    if num_sequences > job.num_sequences or seq_len > job.seq_len or num_trainable > plan.num_trainable:
        return False
    if optimizer is None or optimizer.is_flat:
        return True
    kept = ("optimizer state", "exp_avg", "exp_avg_sq")
    planned_bytes = sum(role.nbytes for role in plan.roles if role.role in kept and role.tier != "disk")
    return optimizer.state_bytes <= planned_bytes
