"""Tiny training steps on a chosen device, with every placement, boundary tier and split forced, not planned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

import lowmem
from lowmem.loading import load
from lowmem.models.checkpoint import open_checkpoint, pick_device
from lowmem.planning.planner import plan_for
from offload import Placement, PlacementPlan
from tests.lowmem import tiny_trainers


@dataclass(frozen=True, kw_only=True)
class Step:
    """One way to run a tiny training step."""

    task: str = "sft"
    arch: str = "llama"
    placement: str = "streamed"
    """"resident", "cached" (in host RAM), "streamed", or "mixed"."""
    boundary: str = "device"
    """"device", "host" or "disk": where what lies between blocks is kept."""
    micro_batch: int | None = None
    chunk_tokens: int | None = None
    dtype: str = "float32"
    """What blocks compute in."""
    autocast: str | None = None
    """"bf16" or "fp16": the Trainer's option."""
    use_dora: bool = False
    dropout: float = 0.0
    optim: str = "sgd"

    def __str__(self) -> str:
        # What differs from the default, which names the test.
        changed = {name: value for name, value in vars(self).items() if value != getattr(Step, name)}
        return "-".join(f"{name}={value}" for name, value in changed.items()) or "default"


def open_model(folder: Path, step: Step, *, device: str) -> PreTrainedModel:
    """A tiny checkpoint opened with the placements and tiers that a step names, and a ring of two slots."""
    opened = open_checkpoint(
        folder,
        name=str(folder),
        device=pick_device(device),
        dtype=getattr(torch, step.dtype),
        num_labels=1 if step.task == "reward" else None,
    )
    scratch = folder.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    budget = lowmem.Budget(device="64MiB", host="64MiB", disk=scratch if step.boundary == "disk" else None)
    plan = plan_for(opened, budget=budget, micro_batch=step.micro_batch, chunk_tokens=step.chunk_tokens)
    num_blocks = len(plan.placement.block_bytes)
    on_gpu = device != "cpu"
    placement = PlacementPlan(
        placements=_placements(step.placement, num_blocks),
        block_bytes=plan.placement.block_bytes,
        device_is_host=not on_gpu,
        num_staging=2,
        num_slots=2 if on_gpu else 0,
        num_passes=plan.placement.num_passes,
    )
    choice = replace(plan.choice, boundary_tier=step.boundary, embedding_on_disk=False)
    # A plan for more than will come, so that nothing is planned again for the batch that arrives.
    job = replace(plan.job, batch_size=16)
    model = load(opened, plan=replace(plan, choice=choice, placement=placement, job=job, is_supposed=False))
    if step.task == "reward":  # the checkpoint has no head: the same one wherever it runs
        with torch.no_grad():
            model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(7)))
    return model


def _placements(kind: str, num_blocks: int) -> tuple[Placement, ...]:
    if kind == "mixed":
        return ((Placement.RESIDENT, Placement.STREAMED, Placement.HOST) * num_blocks)[:num_blocks]
    return (
        {"resident": Placement.RESIDENT, "cached": Placement.HOST, "streamed": Placement.STREAMED}[kind],
    ) * num_blocks


def run(folder: Path, step: Step, output: Path, *, device: str, num_steps: int = 2) -> list[dict[str, float]]:
    """Train a tiny adapter with TRL's trainer; what it logged for each step."""
    model = open_model(folder, step, device=device)
    options: dict[str, object] = {
        "max_steps": num_steps,
        "use_cpu": device == "cpu",
        "bf16": step.autocast == "bf16",
        "fp16": step.autocast == "fp16",
        "optim": step.optim,
    }
    if step.arch == "granitemoe":
        # Its class in transformers looks for a number of experts that its configuration calls otherwise.
        options["router_aux_loss_coef"] = 0.0
    if step.optim != "sgd":
        options["learning_rate"] = 1e-3
    adapter = {"use_dora": step.use_dora, "lora_dropout": step.dropout}
    done = tiny_trainers.trained(step.task, model, output, adapter=adapter, **options)
    return tiny_trainers.records(done)
