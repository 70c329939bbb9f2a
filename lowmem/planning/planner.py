"""From a model, a job and a budget to a plan. `plan_step` is pure; `plan` finds out what it needs to know."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

from lowmem.planning.advice import advise, changes_that_fit, fastest_batch, hiding_batch
from lowmem.planning.job import Job, Tuning, kind_of
from lowmem.planning.optimizer_sizes import OptimizerChoice, read_optimizer
from lowmem.planning.plan import THIS_MACHINE, Plan
from lowmem.planning.read_model import max_positions, read_shapes
from lowmem.planning.search import Memory, Room
from lowmem.planning.shapes import ModelShapes
from lowmem.planning.step_memory import Choice
from lowmem.planning.step_time import Rates, assumed_rates
from lowmem.processes.ranks import ranks
from offload import Budget, PlacementPlan

if TYPE_CHECKING:
    from lowmem.models.checkpoint import Described


_FRAMEWORK_BYTES = 600 << 20
"""RAM of a process that has imported torch, transformers, PEFT, TRL and datasets and has trained on next to nothing."""


ASSUMED_RANK = 16


_UNPLANNED_SEQ_LENS = (2048, 1024, 512, 256, 128, 64, 32)
"""Sequence lengths to try where nobody said how long they will be."""


def plan_again(
    made: Plan,
    shapes: ModelShapes,
    *,
    num_sequences: int,
    seq_len: int,
    autocast: bool | None = None,
    rates: Rates | None = None,
) -> Plan:
    """Plan for the batch that really arrives at a model that is loaded. Pure.

    Blocks stay where they are if the batch fits so; else they find other places, but for the state of full tuning.

    Args:
        made: What the model was loaded with.
        shapes: The model with what really trains.
        num_sequences: Sequences of a training forward.
        seq_len: Tokens of each, padding included.
        autocast: As in `Job`; None for what was planned.
        rates: Of the job as it is; None for those that it was planned with.

    Returns:
        A plan within the same budget, or one that does not fit and says why.
    """
    paired = made.job.num_sequences // made.job.batch_size
    job = replace(
        made.job,
        batch_size=-(-num_sequences // paired),
        seq_len=seq_len,
        completion_tokens=min(made.job.num_decodes, seq_len),
        has_mask=made.job.has_mask or num_sequences > 1,
        autocast=made.job.autocast if autocast is None else autocast,
    )
    made = made if rates is None else replace(made, rates=rates)
    planned = _within(made, shapes, job, placement=made.placement)
    return planned if planned.fits or job.tuning == "full" else _within(made, shapes, job)


def plan_alone(made: Plan, shapes: ModelShapes) -> Plan:
    """Plan within the same budget for a process that keeps its cached blocks for itself, after all. Pure.

    Args:
        made: What the model is loaded with.
        shapes: The model.
    """
    planned = _within(made, shapes, replace(made.job, num_sharing=1))
    return replace(planned, is_supposed=made.is_supposed)


def _within(made: Plan, shapes: ModelShapes, job: Job, *, placement: PlacementPlan | None = None) -> Plan:
    """Another job of a loaded model, within the same budget."""
    budget = Budget(device=made.device_budget_bytes, host=made.host_budget_bytes, disk=made.disk_folder)
    return plan_step(shapes, job, budget=budget, rates=made.rates, loaded=made.choice, placement=placement)


def plan_step(
    shapes: ModelShapes,
    job: Job,
    *,
    budget: Budget,
    rates: Rates,
    loaded: Choice | None = None,
    placement: PlacementPlan | None = None,
    machine: str = THIS_MACHINE,
    finds_batch: bool = False,
    memory: Memory | None = None,
) -> Plan:
    """Plan one step. Pure: no model, no device, no file.

    Among the ways to fit, takes the largest micro-batch that still makes products faster, then the shortest predicted
    step, then what moves least. If there is none, the plan says so (`fits`) and describes the smallest one.

    Args:
        shapes: The model's sizes.
        job: What a step is to do.
        budget: With both sizes given.
        rates: Of disk, copies and computation.
        loaded: How the model was loaded, if it was: its embedding and its state stay where they are.
        placement: Where its blocks are, if they are to stay there too.
        machine: What the rates and the budget are those of, in words.
        finds_batch: Take the batch with which most tokens go through per second, instead of the job's.
        memory: What the machine has: advice stays within it; None for no bound.

    Raises:
        ValueError: A size of the budget is missing.
    """
    if budget.device_bytes is None or budget.host_bytes is None:
        raise ValueError("budget: both sizes have to be given here; offload.measured fills in what is missing")
    sizes = budget.device_bytes, budget.host_bytes
    room = Room(shapes, job, rates, *sizes, budget.disk is not None, loaded, placement, memory)
    if finds_batch:
        room = room.with_batch_size(fastest_batch(room))
    best = room.best()
    drafted = best or room.smallest
    changes = () if best is not None or loaded is not None else changes_that_fit(room)
    return Plan(
        model=shapes.name,
        adapter=shapes.adapter,
        num_trainable=shapes.num_trainable,
        compute_dtype=shapes.compute_dtype,
        moved_dtype=shapes.moved_dtype,
        stored_dtypes=shapes.stored_dtypes,
        job=room.job,
        choice=drafted.choice,
        placement=drafted.placement,
        roles=drafted.roles,
        time=drafted.time,
        rates=rates,
        device_budget_bytes=budget.device_bytes,
        host_budget_bytes=budget.host_bytes,
        smallest_device_bytes=room.smallest.device_bytes,
        disk_folder=None if budget.disk is None else str(budget.disk),
        unchunkable=shapes.unchunkable,
        is_supposed=False,
        framework_bytes=_FRAMEWORK_BYTES,
        advice=advise(room, drafted, fits=best is not None, changes=changes),
        machine=machine,
        optimizer=shapes.optimizer,
        hiding_batch=None if best is None else hiding_batch(room, best),
        changes=changes,
    )


def plan_for(
    opened: Described,
    *,
    budget: Budget | None = None,
    rates: Rates | None = None,
    micro_batch: int | None = None,
    chunk_tokens: int | None = None,
    tuning: Tuning = "adapter",
    moved_dtype: str | None = None,
    optimizer: OptimizerChoice | None = None,
) -> Plan:
    """Plan for a model that is about to be loaded for a job that nobody has described.

    Supposes training of a LoRA of rank 16 on one sequence of the longest of a few lengths that fits; if none does, of
    an adapter so small that it does not count.

    Args:
        opened: The checkpoint; left as it is.
        budget: Bounds; measured where absent.
        rates: Of this machine; assumed where absent.
        micro_batch: As in `plan`.
        chunk_tokens: As in `plan`.
        tuning: As in `plan`.
        moved_dtype: As in `ModelShapes.with_every_weight`.
        optimizer: As in `plan`.
    """
    bare = bare_shapes(opened)
    filled = (budget or Budget()).measured(opened.device)
    every = bare.with_every_weight(moved_dtype)
    trained = [every] if tuning == "full" else [bare.with_lora(ASSUMED_RANK), bare]
    model = opened.built.model
    trained = [replace(shapes, optimizer=read_optimizer(optimizer, shapes, model)) for shapes in trained]
    for shapes, seq_len in product(trained, _unplanned_seq_lens(opened)):
        job = Job(
            task="sft" if opened.num_labels is None else "reward",
            batch_size=micro_batch or 1,
            seq_len=seq_len,
            micro_batch=micro_batch,
            chunk_tokens=chunk_tokens,
            device=kind_of(opened.device),
            tuning=tuning,
            num_sharing=ranks().local_size,
        )
        made = plan_step(shapes, job, budget=filled, rates=rates or assumed_rates(job.device))
        if made.fits:
            break
    return replace(made, is_supposed=True)


def read_with_assumed_adapter(opened: Described, *, seq_len: int) -> ModelShapes:
    """A model's sizes with the LoRA that is assumed where none is given: what PEFT makes of "all-linear".

    That takes in routed experts, of which PEFT forms each adapted stack whole.

    Args:
        opened: The checkpoint; its meta model gets the adapter's modules, and can then no longer be loaded.
        seq_len: Tokens of a sequence.
    """
    from peft import LoraConfig

    config = LoraConfig(r=ASSUMED_RANK, target_modules="all-linear")
    try:
        shapes = read_shapes(opened, peft_config=config, seq_len=seq_len)
    except ValueError:
        # PEFT cannot adapt one of its layers; the user's own configuration will leave it out.
        return read_shapes(opened, seq_len=seq_len).with_lora(ASSUMED_RANK)
    return replace(shapes, adapter=f"LoRA r={ASSUMED_RANK} on all linear layers (assumed)")


def bare_shapes(opened: Described) -> ModelShapes:
    """A model's sizes as it is loaded, before anything in it trains."""
    bare = read_shapes(opened, seq_len=_UNPLANNED_SEQ_LENS[2])
    return bare if opened.num_labels is None else bare.with_score_head()


def _unplanned_seq_lens(opened: Described) -> tuple[int, ...]:
    longest = max_positions(opened.built.model.config) or _UNPLANNED_SEQ_LENS[0]
    return tuple(length for length in _UNPLANNED_SEQ_LENS if length <= longest) or (longest,)
