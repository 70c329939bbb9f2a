"""From a model, a job and a budget to a plan. `plan_step` is pure; `plan` finds out what it needs to know."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from lowmem.planning.advice import advise
from lowmem.planning.job import Job, Tuning, kind_of
from lowmem.planning.plan import Plan
from lowmem.planning.read_model import corrected, read_shapes
from lowmem.planning.search import Room
from lowmem.planning.shapes import ModelShapes
from lowmem.planning.step_time import Rates, assumed_rates, measure_rates
from offload import Budget

if TYPE_CHECKING:
    from lowmem.models.checkpoint import Opened


_FRAMEWORK_BYTES = 600 << 20
"""RAM of a process that has imported torch, transformers, PEFT, TRL and datasets and has trained on next to nothing."""


ASSUMED_RANK = 16


_UNPLANNED_SEQ_LENS = (2048, 1024, 512, 256, 128, 64, 32)
"""Sequence lengths to try where nobody said how long they will be."""


def plan_step(shapes: ModelShapes, job: Job, *, budget: Budget, rates: Rates) -> Plan:
    """Plan one step. Pure: no model, no device, no file.

    Among the ways to fit, takes the largest micro-batch that still makes products faster, then the shortest predicted
    step, then what moves least. If there is none, the plan says so (`fits`) and describes the smallest one.

    Args:
        shapes: The model's sizes.
        job: What a step is to do.
        budget: With both sizes given.
        rates: Of disk, copies and computation.

    Raises:
        ValueError: A size of the budget is missing.
    """
    if budget.device_bytes is None or budget.host_bytes is None:
        raise ValueError("budget: both sizes have to be given here; offload.measured fills in what is missing")
    room = Room(shapes, job, rates, budget.device_bytes, budget.host_bytes, budget.disk is not None)
    best = room.best()
    drafted = best or room.smallest
    return Plan(
        model=shapes.name,
        adapter=shapes.adapter,
        compute_dtype=shapes.compute_dtype,
        stored_dtypes=shapes.stored_dtypes,
        job=job,
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
        framework_bytes=_FRAMEWORK_BYTES,
        advice=advise(room, drafted, fits=best is not None),
    )


def plan_for(
    opened: Opened,
    *,
    budget: Budget | None = None,
    micro_batch: int | None = None,
    chunk_tokens: int | None = None,
    tuning: Tuning = "adapter",
) -> Plan:
    """Plan for a model that is about to be loaded for a job that nobody has described.

    Supposes training of a LoRA of rank 16 on one sequence of the longest of a few lengths that fits; if none does, of
    an adapter so small that it does not count.

    Args:
        opened: The checkpoint; left as it is.
        budget: Bounds; measured where absent.
        micro_batch: As in `plan`.
        chunk_tokens: As in `plan`.
        tuning: As in `plan`.
    """
    bare = corrected(read_shapes(opened), opened, seq_len=_UNPLANNED_SEQ_LENS[2])
    if opened.num_labels is not None:
        bare = bare.with_score_head()
    filled = (budget or Budget()).measured(opened.device)
    trained = (bare.with_every_weight(),) if tuning == "full" else (bare.with_lora(ASSUMED_RANK), bare)
    for shapes, seq_len in product(trained, _unplanned_seq_lens(opened)):
        job = Job(
            task="sft" if opened.num_labels is None else "reward",
            batch_size=micro_batch or 1,
            seq_len=seq_len,
            micro_batch=micro_batch,
            chunk_tokens=chunk_tokens,
            device=kind_of(opened.device),
            tuning=tuning,
        )
        made = plan_step(shapes, job, budget=filled, rates=rates_for(opened, None))
        if made.fits:
            break
    return made


def _unplanned_seq_lens(opened: Opened) -> tuple[int, ...]:
    longest = getattr(opened.built.model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(longest, int):
        return _UNPLANNED_SEQ_LENS
    return tuple(length for length in _UNPLANNED_SEQ_LENS if length <= longest) or (max(1, longest),)


def rates_for(opened: Opened, rates: Rates | str | None) -> Rates:
    """The rates given, measured ("measure"), or assumed (None).

    Raises:
        ValueError: Anything else.
    """
    if isinstance(rates, Rates):
        return rates
    if rates is None:
        return assumed_rates(kind_of(opened.device))
    if rates != "measure":
        raise ValueError(
            f'rates={rates!r}: expected None, "measure" or what lowmem.planning.step_time.measure_rates answered'
        )
    return measure_rates(opened.source.files, device=opened.device, dtype=opened.dtype)
