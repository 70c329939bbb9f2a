"""What the tests of full tuning share: budgets for each tier, the resident model beside, the same loop for both."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import lowmem

TIERS = ("device", "host", "disk")
SMALL_DEVICE, DISK_DEVICE = "250KiB", "450KiB"
NUM_WORDS = 90


def full(folder: Path, tier: str, scratch: Path) -> PreTrainedModel:
    """The model with every weight trainable and its state in one tier."""
    budget = {
        "device": lowmem.Budget(device="64MiB", host="0"),
        "host": lowmem.Budget(device=SMALL_DEVICE, host="64MiB"),
        "disk": lowmem.Budget(device=DISK_DEVICE, host="0", disk=scratch),
    }[tier]
    plan = lowmem.plan(folder, seq_len=16, batch_size=2, tuning="full", budget=budget, device="cpu")
    assert plan.choice.state_tier == tier, plan
    return lowmem.from_pretrained(folder, tuning="full", plan=plan, device="cpu")


def resident(folder: Path) -> PreTrainedModel:
    """The same model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


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
