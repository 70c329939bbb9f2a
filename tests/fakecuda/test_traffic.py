"""What crosses the bus of a GPU in a step, counted by the simulator, is what the plan says."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

import lowmem
from lowmem.models.checkpoint import open_checkpoint
from lowmem.planning.planner import bare_shapes
from lowmem.planning.step_time import bus_traffic
from lowmem.streaming.runtime import runtime_of
from tests.fakecuda.steps import Step, open_model
from tests.fakecuda.test_full import groups, on_gpu
from tests.lowmem.full_training import backward, batches
from tests.zoo.architectures import build

pytestmark = pytest.mark.gpu
SMALL_BYTES = 4 << 10
"""Ids, labels, masks, losses and norms of a tiny step, which plans leave out."""
NUM_STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A megabyte a block, so that padding to pages does not count.
    changes = {"hidden_size": 192, "intermediate_size": 384, "head_dim": 48}
    return Path(build("llama", tmp_path_factory.mktemp("llama"), changes=changes, shard_bytes=2_000_000))


def counted(model: PreTrainedModel, optimizer: torch.optim.Optimizer, *, parts: int) -> tuple[float, float]:
    """Bytes up and down in a step, by the simulator, once the run is under way."""
    if torch.cuda.get_device_name() != "Simulated GPU":
        pytest.skip("a real GPU does not count bytes")
    from tests.fakecuda import simulated_gpu

    for step in range(NUM_STEPS + 1):
        if step == 1:
            settle()
            simulated_gpu.forget()
        for ids in batches(parts, seed=step):
            backward(model, ids.cuda(), parts=parts)
        optimizer.step()
        optimizer.zero_grad()
    seen = settle()
    return seen.get("H2D", 0) / NUM_STEPS, seen.get("D2H", 0) / NUM_STEPS


def settle() -> dict[str, int]:
    """Bytes so far, once what is fetched ahead of the next step has come."""
    from tests.fakecuda import simulated_gpu

    before: dict[str, int] = {}
    num_same = 0
    # A busy machine keeps a thread from running for some tenths of a second.
    while num_same < 8:
        torch.cuda.synchronize()
        time.sleep(0.05)
        now = simulated_gpu.simulator.copied_bytes()
        num_same = num_same + 1 if now == before else 0
        before = now
    return before


def planned(
    model: PreTrainedModel, folder: Path, *, parts: int, masters: torch.dtype = torch.float32
) -> tuple[int, int]:
    """The same by the plan, for the batches of these tests."""
    plan = runtime_of(model).plan
    opened = open_checkpoint(folder, name="tiny", device=torch.device("cuda"), dtype=masters)
    shapes = bare_shapes(opened)
    opened.source.close()
    job = replace(plan.job, batch_size=2, seq_len=12, gradient_accumulation_steps=parts)
    placement = replace(plan.placement, num_passes=job.num_passes)
    is_full = job.tuning == "full"
    return bus_traffic(shapes.with_every_weight() if is_full else shapes, job, plan.choice, placement)


def check(found: tuple[float, float], expected: tuple[int, int]) -> None:
    for direction, ours, theirs in zip(("up", "down"), found, expected, strict=True):
        # A tiny block's parameters are padded to lines and pages, which plans of large ones do not feel.
        assert ours == pytest.approx(theirs, rel=0.02, abs=SMALL_BYTES), (direction, found, expected)


ADAPTED = [
    (Step(placement=placement, boundary=boundary), parts)
    for placement, boundary, parts in (
        ("resident", "device", 1),
        ("streamed", "device", 1),
        ("streamed", "host", 4),
        ("streamed", "disk", 1),
        ("cached", "host", 1),
        ("mixed", "disk", 4),
    )
]


@pytest.mark.parametrize(("step", "parts"), ADAPTED, ids=str)
def test_an_adapters_step_moves_what_the_plan_says(step: Step, parts: int, folder: Path) -> None:
    base = open_model(folder, step, device="cuda:0")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], fused=True)
    check(counted(model, optimizer, parts=parts), planned(base, folder, parts=parts))


@pytest.mark.parametrize(
    ("parts", "share", "masters", "tier"),
    [(1, 0.0, "fp32", "host"), (4, 0.4, "fp32", "host"), (1, 0.0, "bf16", "host"), (1, 0.0, "fp32", "disk")],
)
def test_a_step_of_every_weight_moves_what_the_plan_says(
    parts: int, share: float, masters: str, tier: str, folder: Path, tmp_path: Path
) -> None:
    model = on_gpu(folder, tmp_path if tier == "disk" else None, share=share, masters=masters, ring=2)
    optimizer = lowmem.optim.AdamW(groups(model), lr=1e-3, writer="stochastic")
    dtype = torch.bfloat16 if masters == "bf16" else torch.float32
    check(counted(model, optimizer, parts=parts), planned(model, folder, parts=parts, masters=dtype))
