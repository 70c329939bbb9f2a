"""What crosses the bus of a GPU in a step, counted by the simulator, is what the plan says."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

import lowmem
from lowmem.models.checkpoint import open_checkpoint
from lowmem.planning.optimizer_sizes import read_optimizer
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


def counted(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, *, parts: int, autocast: bool = False
) -> tuple[float, float]:
    """Bytes up and down in a step, by the simulator, once the run is under way."""
    if torch.cuda.get_device_name() != "Simulated GPU":
        pytest.skip("a real GPU does not count bytes")
    from tests.fakecuda import simulated_gpu

    for step in range(NUM_STEPS + 1):
        if step == 1:
            settle()
            simulated_gpu.forget()
        for ids in batches(parts, seed=step):
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast, cache_enabled=False):
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
    model: PreTrainedModel,
    folder: Path,
    *,
    parts: int,
    masters: torch.dtype = torch.float32,
    optimizer: Any = None,
) -> tuple[int, int]:
    """The same by the plan, for the batches of these tests."""
    plan = runtime_of(model).plan
    opened = open_checkpoint(folder, name="tiny", device=torch.device("cuda"), dtype=masters)
    shapes = bare_shapes(opened)
    if plan.job.tuning == "full":
        shapes = shapes.with_every_weight(plan.moved_dtype)
        shapes = replace(shapes, optimizer=read_optimizer(optimizer, shapes, opened.built.model))
    opened.source.close()
    job = replace(plan.job, batch_size=2, seq_len=12, gradient_accumulation_steps=parts)
    return bus_traffic(shapes, job, plan.choice, replace(plan.placement, num_passes=job.num_passes))


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


@pytest.mark.parametrize(("method", "parts"), [("galore", 1), ("galore", 4), ("fira", 1)])
def test_a_step_of_a_projected_optimizer_moves_what_the_plan_says(method: str, parts: int, folder: Path) -> None:
    make = {"galore": partial(lowmem.optim.GaLore, rank=16), "fira": partial(lowmem.optim.Fira, rank=16)}[method]
    model = on_gpu(folder, ring=2, optimizer=make, gradient_accumulation_steps=parts)
    assert runtime_of(model).plan.choice.reduces_gradients == (method == "galore" and parts == 1)
    check(counted(model, make(model, lr=1e-3), parts=parts), planned(model, folder, parts=parts, optimizer=make))


@pytest.mark.parametrize(
    ("parts", "share", "masters", "moments", "tier"),
    [
        (1, 0.0, "fp32", "fp32", "host"),
        (4, 0.4, "fp32", "fp32", "host"),
        (1, 0.4, "bf16", "8bit", "host"),
        (1, 0.4, "fp32", "fp32", "disk"),
        (1, 1.0, "bf16", "bf16", "disk"),
    ],
)
def test_a_step_of_every_weight_moves_what_the_plan_says(
    parts: int, share: float, masters: str, moments: str, tier: str, folder: Path, tmp_path: Path
) -> None:
    model = on_gpu(folder, tmp_path if tier == "disk" else None, share=share, masters=masters, ring=2)
    adamw = partial(lowmem.optim.AdamW, writer="stochastic", state_dtype=moments)
    dtype = torch.bfloat16 if masters == "bf16" else torch.float32
    expected = planned(model, folder, parts=parts, masters=dtype, optimizer=adamw)
    check(counted(model, adamw(groups(model), lr=1e-3), parts=parts), expected)


def test_matrices_that_move_as_bf16_are_counted_so(folder: Path) -> None:
    model, fp32 = on_gpu(folder, dtype="bf16", ring=2), on_gpu(folder, ring=2)
    expected = planned(model, folder, parts=1)
    assert max(expected) < 0.6 * max(planned(fp32, folder, parts=1))
    check(counted(model, lowmem.optim.AdamW(groups(model), lr=1e-3), parts=1, autocast=True), expected)
    plans = [runtime_of(one).plan for one in (model, fp32)]
    rings = [plan.bytes_of("block ring", tier="device") for plan in plans]
    assert rings[0] < 0.6 * rings[1]
    assert lowmem.Plan.from_dict(plans[0].to_dict()) == plans[0]


def test_a_plan_for_another_type_of_moved_matrices_is_refused(folder: Path) -> None:
    job = {"tuning": "full", "seq_len": 12, "device": "cuda", "budget": lowmem.Budget(device="64MiB", host="64MiB")}
    plan = lowmem.plan(folder, **job)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype of matrices on the GPU: None.*bfloat16"):
        lowmem.from_pretrained(folder, tuning="full", plan=plan, dtype="bf16")
