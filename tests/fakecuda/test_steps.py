"""Tiny training steps on the GPU, real or simulated, give what the same steps give on the CPU; and no race is seen.

The matrix: trainers, architectures, placements, boundary tiers, splits, adapters, types, a driver that pins nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch

from tests.fakecuda.steps import Step, run
from tests.zoo.architectures import build

pytestmark = [
    pytest.mark.gpu,
    # transformers, about calls of TRL's own.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    # PEFT, of patterns that it makes itself for stacked experts.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]

TIERS = ("device", "host", "disk")
SPLITS: tuple[dict[str, int], ...] = ({}, {"micro_batch": 1}, {"chunk_tokens": 8})
PLACED = [
    Step(placement=placement, boundary=boundary, **split)  # type: ignore[arg-type]
    for placement, boundary, split in product(
        ("resident", "cached", "streamed", "mixed"), ("device", "host", "disk"), SPLITS
    )
]
TYPED = [
    Step(boundary=boundary, dtype=dtype, autocast=autocast, use_dora=dora)
    for boundary in TIERS
    for dtype, autocast in (("bfloat16", None), ("float32", "bf16"), ("float32", "fp16"))
    for dora in (False, True)
]
# Chunks take no router logits, which TRL asks a mixture of experts for.
FAMILIES = [
    Step(arch=arch, boundary=boundary, **split)
    for (arch, other), boundary in product(
        (("qwen3", SPLITS[2]), ("gemma3_text", SPLITS[2]), ("mixtral", SPLITS[1])), ("device", "host")
    )
    for split in (SPLITS[0], other)
]
# Their expert stacks are used where they lie, by a grouped product that refuses addresses that are not aligned.
STACKED = [Step(arch=arch, dtype="bfloat16", placement="mixed") for arch in ("gpt_oss", "granitemoe")]
TASKS = [
    Step(task=task, boundary=boundary, placement="mixed")
    for task, boundary in product(("dpo", "kto", "reward", "grpo", "rloo"), TIERS)
]
OPTIMIZERS = [
    Step(boundary=boundary, optim=optim)
    for boundary, optim in product(("device", "host"), ("adamw_torch_fused", "adamw_torch"))
]
UNPINNED = [Step(boundary=boundary, placement="mixed") for boundary in TIERS]


@cache
def checkpoint(arch: str, root: Path) -> Path:
    return build(arch, root / arch)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("steps")


@cache
def on_the_cpu(step: Step, root: Path) -> tuple[dict[str, float], ...]:
    return tuple(run(checkpoint(step.arch, root), step, root / "cpu", device="cpu"))


def waits_in_blocks() -> list[tuple[str, str]]:
    """What made the training thread wait for the GPU while it computed a block; nothing is known of a real one."""
    if torch.cuda.get_device_name() != "Simulated GPU":
        return []
    from tests.fakecuda import simulated_gpu

    return [(what, place) for kind, what, place in simulated_gpu.places if kind == "wait in a block"]


def check(step: Step, root: Path, output: Path) -> None:
    # Where blocks and boundaries lie on a CPU changes no bit; one run serves all.
    reference = replace(step, placement="streamed", boundary="device")
    if step.autocast == "fp16":
        reference = replace(reference, autocast=None)  # the Trainer has no fp16 on a CPU
    expected = on_the_cpu(reference, root)
    found = run(checkpoint(step.arch, root), step, output, device="cuda:0")
    assert len(found) == len(expected)
    is_rounded = step.dtype != "float32" or step.autocast is not None
    for ours, theirs in zip(found, expected, strict=True):
        # Generated words differ where kernels round differently; losses of RL steps follow them.
        names = {"loss", "grad_norm"} if step.task in ("sft", "dpo", "kto", "reward") else {"loss"}
        for name in names & ours.keys():
            assert math.isfinite(ours[name])
            tolerance = (0.05 if is_rounded else 2e-4) if name == "loss" else (0.3 if is_rounded else 2e-3)
            if step.task in ("sft", "dpo", "kto", "reward"):
                assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), (name, ours, theirs)


STEPS = [*PLACED, *TYPED, *FAMILIES, *STACKED, *TASKS, *OPTIMIZERS]


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_a_step_on_the_gpu_is_the_step_on_the_cpu(step: Step, root: Path, tmp_path: Path) -> None:
    check(step, root, tmp_path)
    assert not waits_in_blocks()


@pytest.fixture
def driver_that_pins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_name() != "Simulated GPU":
        pytest.skip("a real driver cannot be told to refuse page-locked memory")
    monkeypatch.setenv("FAKECUDA_NO_PIN", "1")


@pytest.mark.usefixtures("driver_that_pins_nothing")
@pytest.mark.filterwarnings("ignore:the driver did not page-lock")
@pytest.mark.parametrize("step", UNPINNED, ids=str)
def test_a_step_without_page_locked_memory_is_slower_and_the_same(step: Step, root: Path, tmp_path: Path) -> None:
    check(step, root, tmp_path)
