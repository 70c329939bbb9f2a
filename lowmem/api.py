"""`from_pretrained`: checks its arguments, plans if nobody has, and hands on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from offload import Budget

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowmem.step_plan import Plan


def from_pretrained(
    model: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    budget: Budget | None = None,
    tuning: str = "adapter",
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
    from lowmem.loading import load, open_checkpoint, pick_device, pick_dtype, read_config
    from lowmem.models.checkpoint import resolve
    from lowmem.planner import plan_for, refuse_options

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
    return load(opened, plan=plan)


__all__ = ["from_pretrained"]
