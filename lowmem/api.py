"""`plan` and `from_pretrained`: arguments are checked, refusals come first, and the work is handed on."""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING, get_args

import torch

from lowmem.errors import UnsupportedError
from lowmem.planning.job import Job, Task, Tuning, kind_of
from lowmem.planning.plan import Plan
from lowmem.planning.planner import ASSUMED_RANK, plan_step, rates_for
from lowmem.planning.read_model import corrected, read_shapes
from lowmem.planning.shapes import ModelShapes
from lowmem.planning.step_time import Rates
from offload import Budget

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from lowmem.models.checkpoint import Opened


def from_pretrained(
    model: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    budget: Budget | None = None,
    tuning: Tuning = "adapter",
    quantization: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    chunk_tokens: int | None = None,
    micro_batch: int | None = None,
    num_labels: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Open a checkpoint as the real transformers model, with its decoder blocks left on disk until they are visited.

    The result is what `AutoModelForCausalLM.from_pretrained` gives, class and all, and goes where that goes: PEFT, the
    Trainer, TRL's trainers, `generate`. Its weights are frozen.

    Args:
        model: Local folder, or hub id, of a safetensors checkpoint.
        plan: What `lowmem.plan` answered for this model; planned for a batch of one sequence if not given.
        budget: Bounds for device and host memory, where no plan is given; measured where absent.
        tuning: "adapter": every weight is frozen and PEFT adapters train; "full": every weight is trained, by
            `lowmem.optim.AdamW`.
        quantization: None: weights move as they are stored.
        device: Compute device; the GPU if there is one, else the CPU.
        dtype: Compute dtype; float32 on a CPU, on a GPU bfloat16 where it can.
        chunk_tokens: Tokens of a sequence that go through a block at a time; None for the planner's choice.
        micro_batch: Sequences that go through a block at a time; None for the planner's choice.
        num_labels: Give the sequence classification model with so many outputs, as
            `AutoModelForSequenceClassification` would; a head that the checkpoint does not have is drawn at random and
            trained with `modules_to_save=["score"]`. 1 makes a reward model, and is the default of a plan for "reward".
        revision: Branch, tag or commit of the hub repository.
        trust_remote_code: Run model code that comes with the checkpoint.

    Raises:
        UnsupportedError: An option or the architecture cannot be honoured exactly; nothing was loaded.
        FileNotFoundError: There is no such folder or repository.
        offload.SourceError: A file is missing, damaged, or does not fit the configuration.
        offload.BudgetError: The budget is too small; says the smallest that works.
    """
    from lowmem.full.opening import refuse_unsupported
    from lowmem.loading import load
    from lowmem.models.checkpoint import open_checkpoint, pick_device, pick_dtype, read_config, resolve
    from lowmem.monitoring.training_checks import check_every_trainer
    from lowmem.planning.planner import plan_for

    refuse_options(tuning=tuning, quantization=quantization)
    if plan is not None and (budget is not None or micro_batch is not None or chunk_tokens is not None):
        raise ValueError("give plan, or budget, micro_batch and chunk_tokens, not both: the plan holds them already")
    folder = resolve(model, revision=revision)
    chosen = pick_device(device)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    compute = pick_dtype(dtype, device=chosen, stored=config.dtype or torch.float32)
    if num_labels is None and plan is not None and plan.job.task == "reward":
        num_labels = 1
    opened = open_checkpoint(
        folder,
        name=str(model),
        device=chosen,
        dtype=compute,
        num_labels=num_labels,
        trust_remote_code=trust_remote_code,
    )
    if tuning == "full":
        refuse_unsupported(opened.built, device=chosen, dtype=compute)
    if plan is None:
        plan = plan_for(opened, budget=budget, micro_batch=micro_batch, chunk_tokens=chunk_tokens, tuning=tuning)
    if plan.job.tuning != tuning:
        raise ValueError(f"tuning={tuning!r} with a plan for tuning={plan.job.tuning!r}; plan with the same tuning")
    plan.require_fit()
    check_every_trainer()
    return load(opened, plan=plan)


def plan(
    model: str | os.PathLike[str],
    *,
    task: Task = "sft",
    batch_size: int = 1,
    seq_len: int,
    peft_config: PeftConfig | None = None,
    quantization: str | None = None,
    tuning: Tuning = "adapter",
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
    from lowmem.models.checkpoint import pick_device

    refuse_options(tuning=tuning, quantization=quantization, peft_config=peft_config)
    chosen = pick_device(device)
    job = Job(
        task=task,
        batch_size=batch_size,
        seq_len=seq_len,
        gradient_accumulation_steps=gradient_accumulation_steps,
        completion_tokens=completion_tokens,
        uses_reference=use_reference,
        has_dropout=bool(getattr(peft_config, "lora_dropout", 0.0)),
        num_steps=num_steps,
        micro_batch=micro_batch,
        chunk_tokens=chunk_tokens,
        device=kind_of(chosen),
        tuning=tuning,
    )
    opened = _open(model, device=chosen, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code)
    with closing(opened.source):
        shapes, found = _shapes_for(opened, job, peft_config=peft_config), rates_for(opened, rates)
    return plan_step(shapes, job, budget=(budget or Budget()).measured(chosen), rates=found)


def _open(
    model: str | os.PathLike[str],
    *,
    device: torch.device,
    dtype: torch.dtype | str | None,
    revision: str | None,
    trust_remote_code: bool,
) -> Opened:
    from lowmem.models.checkpoint import open_checkpoint, pick_dtype, read_config, resolve

    folder = resolve(model, revision=revision)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    compute = pick_dtype(dtype, device=device, stored=config.dtype or torch.float32)
    return open_checkpoint(folder, name=str(model), device=device, dtype=compute, trust_remote_code=trust_remote_code)


def refuse_options(*, tuning: str, quantization: str | None, peft_config: PeftConfig | None = None) -> None:
    """Refuse what cannot be planned or loaded yet.

    Raises:
        UnsupportedError: Full tuning, a quantisation, or an adapter that cannot be trained exactly.
    """
    if peft_config is not None:
        from lowmem.adapters.support import check_peft_config

        check_peft_config(peft_config)
    if tuning not in get_args(Tuning):
        raise UnsupportedError(
            f"tuning={tuning!r}", reason="it is not known", instead=f"one of {', '.join(map(repr, get_args(Tuning)))}"
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
        shapes = shapes.with_lora(ASSUMED_RANK)
    return shapes.with_score_head() if job.task == "reward" else shapes


__all__ = ["from_pretrained", "plan", "refuse_options"]
