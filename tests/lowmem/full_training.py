"""What the tests of full tuning share: budgets for each tier, the resident model beside, the same loop for both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import lowmem
from tests.lowmem.tiny_training import texts, word_tokenizer

TIERS = ("device", "host", "disk")
NUM_WORDS = 90


def full(folder: Path, tier: str, scratch: Path, *, masters: str | None = None) -> PreTrainedModel:
    """The model with every weight trainable and its state in one tier."""
    host, disk = ("64MiB" if tier == "host" else 0), (scratch if tier == "disk" else None)

    def planned(device: int | str) -> lowmem.Plan:
        budget = lowmem.Budget(device=device, host=host, disk=disk)
        # Whole batches: parts of one are summed in another order than the resident model's.
        shape: dict[str, Any] = {"seq_len": 24, "batch_size": 4, "micro_batch": 4}
        return lowmem.plan(folder, **shape, tuning="full", masters=masters, budget=budget, device="cpu")

    plan = planned("64MiB" if tier == "device" else planned(0).smallest_device_bytes)
    assert plan.choice.state_tier == tier, plan
    # Room for optimizers that keep their state in RAM wherever the weights are.
    plan = replace(plan, device_budget_bytes=plan.device_budget_bytes + (64 << 20))
    return lowmem.from_pretrained(folder, tuning="full", plan=plan, device="cpu")


def resident(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the true weights by name."""
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def batches(num: int, *, seed: int = 0) -> list[torch.Tensor]:
    """Token ids of shape (2, 12)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, NUM_WORDS, (2, 12), generator=generator) for _ in range(num)]


def backward(model: PreTrainedModel, ids: torch.Tensor, *, parts: int = 1) -> float:
    """One micro-step; returns the loss."""
    loss = model(input_ids=ids, labels=ids).loss
    (loss / parts).backward()
    return float(loss.detach())


def plain_trainer(
    model: PreTrainedModel, output: Path, *, optimizer: torch.optim.Optimizer | None = None, **options: object
) -> Trainer:
    """The Trainer of transformers, with the model's own loss: 4 steps of 4 sequences, clipped at 1, cosine schedule."""
    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for batch in batches(12) for ids in batch]
    return Trainer(
        model=model,
        args=TrainingArguments(str(output), **(TRAINING | options)),
        train_dataset=rows,
        optimizers=(optimizer, None),
    )


TRAINING: dict[str, object] = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def sft_trainer(
    model: PreTrainedModel,
    output: Path,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    peft_config: LoraConfig | None = None,
    **options: object,
) -> SFTTrainer:
    """TRL's SFTTrainer as users make it: 4 steps of 4 sequences in fp32, clipped at 1, cosine schedule."""
    torch.manual_seed(0)
    return SFTTrainer(
        model=model,
        args=SFTConfig(str(output), **(TRAINING | options)),
        train_dataset=texts(),
        processing_class=word_tokenizer(),
        peft_config=peft_config,
        optimizers=(optimizer, None),
    )
