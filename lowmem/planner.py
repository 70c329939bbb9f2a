"""From a model, a job and a budget to a plan. `plan_step` is pure; `plan` finds out what it needs to know."""

from __future__ import annotations

import os
from contextlib import closing
from itertools import product
from typing import TYPE_CHECKING

import torch

from lowmem.advice import advise
from lowmem.drafts import Room
from lowmem.errors import UnsupportedError
from lowmem.job import TUNINGS, Job, make_job
from lowmem.rates import Rates, assumed_rates, measure_rates
from lowmem.shape_reader import corrected, read_shapes
from lowmem.shapes import ModelShapes
from lowmem.step_plan import Plan
from offload import Budget, measured

if TYPE_CHECKING:
    from peft import PeftConfig

    from lowmem.loading import Opened

_FRAMEWORK_BYTES = 600 << 20
"""RAM of a process that has imported torch, transformers, PEFT, TRL and datasets and has trained on next to nothing."""
_ASSUMED_RANK = 16
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


def plan(
    model: str | os.PathLike[str],
    *,
    task: str = "sft",
    batch_size: int = 1,
    seq_len: int,
    peft_config: PeftConfig | None = None,
    quantization: str | None = None,
    tuning: str = "adapter",
    budget: Budget | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    rates: Rates | str | None = None,
    micro_batch: int | None = None,
    chunk_tokens: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    gradient_accumulation_steps: int = 1,
    completion_tokens: int | None = None,
    use_reference: bool | None = None,
    num_steps: int | None = None,
) -> Plan:
    """Find out what a job takes, before anything is loaded. Reads the configuration and the headers of the shards.

    Args:
        model: Local folder, or hub id, of a safetensors checkpoint.
        task: "sft", "dpo", "kto", "reward", "grpo", "rloo" or "generate".
        batch_size: Examples of one forward (`per_device_train_batch_size`); pairs in DPO and Reward.
        seq_len: Tokens of one sequence, prompt and completion together.
        peft_config: The adapter that will be trained; a LoRA of rank 16 on all linear layers is assumed if not given.
        quantization: None: weights move as they are stored.
        tuning: "adapter": every weight is frozen and PEFT adapters train; "full": every weight is trained.
        budget: Bounds for device and host memory; measured where absent.
        device: Compute device; the GPU if there is one, else the CPU.
        dtype: Compute dtype; float32 on a CPU, on a GPU bfloat16 where it can.
        rates: How fast this machine is: "measure" to find out in about a second, or what an earlier measurement gave.
            Conservative numbers are assumed, and named as such, if not given.
        micro_batch: Sequences that go through a block at a time; None for the planner's choice.
        chunk_tokens: Tokens of a sequence that go through a block at a time; None for the planner's choice. Models
            whose blocks cannot be cut so take whole sequences; the plan says why.
        revision: Branch, tag or commit of the hub repository.
        trust_remote_code: Run model code that comes with the checkpoint.
        gradient_accumulation_steps: Batches per optimizer step; each passes over all weights anew.
        completion_tokens: Tokens generated for each sequence, where the task generates; 256, or half of `seq_len`.
        use_reference: Whether a step computes reference log-probabilities; as TRL's trainer does by default if None.
        num_steps: Optimizer steps of the whole run, to be told how long it takes.

    Returns:
        The plan. It may say that the job does not fit (`fits`), and then what to change (`advice`).

    Raises:
        UnsupportedError: An option or the architecture cannot be honoured exactly.
        FileNotFoundError: There is no such folder or repository.
        offload.SourceError: A file is missing, damaged, or does not fit the configuration.
        ValueError: A number is out of range.
    """
    from lowmem.loading import pick_device

    refuse_options(tuning=tuning, quantization=quantization, peft_config=peft_config)
    chosen = pick_device(device)
    job = make_job(
        task,
        batch_size=batch_size,
        seq_len=seq_len,
        gradient_accumulation_steps=gradient_accumulation_steps,
        completion_tokens=completion_tokens,
        use_reference=use_reference,
        has_dropout=bool(getattr(peft_config, "lora_dropout", 0.0)),
        num_steps=num_steps,
        micro_batch=micro_batch,
        chunk_tokens=chunk_tokens,
        device=chosen.type,
        tuning=tuning,
    )
    opened = _open(model, device=chosen, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
    with closing(opened.source):
        shapes, found = _shapes_for(opened, job, peft_config=peft_config), _rates_for(opened, rates)
    return plan_step(shapes, job, budget=measured(budget or Budget(), chosen), rates=found)


def _open(
    model: str | os.PathLike[str],
    *,
    device: torch.device,
    dtype: torch.dtype | str | None,
    revision: str | None,
    trust_remote_code: bool,
) -> Opened:
    from lowmem.loading import open_checkpoint, pick_dtype, read_config
    from lowmem.models.checkpoint import resolve

    folder = resolve(model, revision=revision)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    compute = pick_dtype(dtype, device=device, stored=config.dtype or torch.float32)
    return open_checkpoint(folder, name=str(model), device=device, dtype=compute, trust_remote_code=trust_remote_code)


def plan_for(
    opened: Opened,
    *,
    budget: Budget | None = None,
    micro_batch: int | None = None,
    chunk_tokens: int | None = None,
    tuning: str = "adapter",
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
    filled = measured(budget or Budget(), opened.device)
    trained = (bare.with_every_weight(),) if tuning == "full" else (bare.with_lora(_ASSUMED_RANK), bare)
    for shapes, seq_len in product(trained, _unplanned_seq_lens(opened)):
        job = make_job(
            "sft" if opened.num_labels is None else "reward",
            batch_size=micro_batch or 1,
            seq_len=seq_len,
            micro_batch=micro_batch,
            chunk_tokens=chunk_tokens,
            device=opened.device.type,
            tuning=tuning,
        )
        made = plan_step(shapes, job, budget=filled, rates=_rates_for(opened, None))
        if made.fits:
            break
    return made


def _unplanned_seq_lens(opened: Opened) -> tuple[int, ...]:
    longest = getattr(opened.built.model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(longest, int):
        return _UNPLANNED_SEQ_LENS
    return tuple(length for length in _UNPLANNED_SEQ_LENS if length <= longest) or (max(1, longest),)


def refuse_options(*, tuning: str, quantization: str | None, peft_config: PeftConfig | None = None) -> None:
    """Refuse what cannot be planned or loaded yet.

    Raises:
        UnsupportedError: Full tuning, a quantisation, or an adapter that cannot be trained exactly.
    """
    if peft_config is not None:
        from lowmem.adapters.support import check_peft_config

        check_peft_config(peft_config)
    if tuning not in TUNINGS:
        raise UnsupportedError(
            f"tuning={tuning!r}", reason="it is not known", instead=f"one of {', '.join(map(repr, TUNINGS))}"
        )
    if tuning == "full" and peft_config is not None:
        raise UnsupportedError(
            'peft_config with tuning="full"',
            reason="an adapter is trained on frozen weights",
            instead='tuning="adapter" with the adapter, or tuning="full" without it',
        )
    if quantization is not None:
        raise UnsupportedError(
            f"quantization={quantization!r}",
            reason="packed weights cannot be streamed yet",
            instead="quantization=None: the stored bf16 or fp16 weights are streamed as they are",
        )


def _shapes_for(opened: Opened, job: Job, *, peft_config: PeftConfig | None) -> ModelShapes:
    from lowmem.full.opening import refuse_unsupported

    if job.tuning == "full":
        refuse_unsupported(opened.built, device=opened.device, dtype=opened.dtype)
    shapes = corrected(read_shapes(opened, peft_config=peft_config), opened, seq_len=job.seq_len)
    if job.tuning == "full":
        shapes = shapes.with_every_weight()
    elif peft_config is None and job.trains:
        shapes = shapes.with_lora(_ASSUMED_RANK)
    return shapes.with_score_head() if job.task == "reward" else shapes


def _rates_for(opened: Opened, rates: Rates | str | None) -> Rates:
    if isinstance(rates, Rates):
        return rates
    if rates is None:
        return assumed_rates(opened.device.type)
    if rates != "measure":
        raise ValueError(f'rates={rates!r}: expected None, "measure" or what lowmem.rates.measure_rates answered')
    return measure_rates(opened.source.files, device=opened.device, dtype=opened.dtype)
