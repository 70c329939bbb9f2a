"""Every trainer, LoRA, DoRA and adapters of idle experts, with and without accumulation: two and four ranks are one.

Slow. What TRL does by process is made the same for any number of them (`same_for_any_ranks` in `ranks_job`): each case
can be held against one process with the whole batch. GRPO and RLOO with samples of their own are held against TRL's
model in memory in as many processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lowmem.processes.test_ranks import (
    ADAMW,
    STACKS,
    WITHOUT_BALANCE,
    assert_close,
    case,
    launch,
    of_rank,
    run_alone,
)
from tests.zoo.architectures import build

pytestmark = pytest.mark.slow

PER_RANK = 2
NUM_EXPERTS = 64
TASKS = ("sft", "dpo", "kto", "reward", "grpo", "rloo")
ADAPTERS: dict[str, dict[str, object]] = {"lora": {}, "dora": {"use_dora": True}, "experts": STACKS}
SAMPLED = ("grpo", "rloo")
# GRPO has no reference unless it is told to.
WITH_REFERENCE = {"beta": 0.05}


def named(task: str, adapter: str, accumulation: int, *, sampled: bool = False) -> dict[str, Any]:
    options: dict[str, object] = {
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": PER_RANK,
        "max_steps": 3,
    }
    if task == "grpo":
        options |= WITH_REFERENCE
    if adapter == "experts" and task != "reward":
        options |= WITHOUT_BALANCE
    name = f"{task}-{adapter}-{accumulation}{'-sampled' if sampled else ''}"
    model = "experts" if adapter == "experts" else "llama"
    same = {} if sampled else {"same_for_any_ranks": True}
    return case(name, task, model, adapter=ADAPTERS[adapter], options=options, num_rows=96, **same)


Ran = tuple[Path, int, str]


@pytest.fixture(scope="module")
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """What so many ranks did with an adapter in all cases: importing takes longer than most of the runs."""
    num_ranks, adapter = request.param
    folder = tmp_path_factory.mktemp(f"{num_ranks}-{adapter}")
    build("llama", folder / "llama")
    # So many that a batch of a few words leaves some without a token, on one rank and on all of them.
    build("qwen3_moe", folder / "experts", changes={"num_experts": NUM_EXPERTS, "num_experts_per_tok": 2})
    cases = [named(task, adapter, accumulation) for task in TASKS for accumulation in (1, 4)]
    sampled = [named(task, adapter, 1, sampled=True) for task in SAMPLED]
    plain = [{**one, "name": f"{one['name']}-plain", "streamed": False} for one in sampled]
    launch(folder, [*cases, *sampled, *plain], num_ranks=num_ranks, limit_s=900)
    return folder, num_ranks, adapter


LAUNCHES = [(num_ranks, adapter) for num_ranks in (2, 4) for adapter in ADAPTERS]
every_launch = pytest.mark.parametrize("ran", LAUNCHES, indirect=True, ids=[f"{num}-{name}" for num, name in LAUNCHES])


def assert_same_bits(folder: Path, name: str, num_ranks: int) -> None:
    first = of_rank(folder, name, 0)
    assert first["is_wrapped"]
    for rank in range(1, num_ranks):
        other = of_rank(folder, name, rank)
        for key, value in first["adapter"].items():
            assert torch.equal(other["adapter"][key], value), (rank, key)


@every_launch
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("task", TASKS)
def test_ranks_train_what_one_process_trains_with_the_whole_batch(
    task: str, accumulation: int, ran: Ran, tmp_path: Path
) -> None:
    folder, num_ranks, adapter = ran
    one = named(task, adapter, accumulation)
    assert_same_bits(folder, one["name"], num_ranks)
    options = {**one["options"], "per_device_train_batch_size": num_ranks * PER_RANK}
    alone = run_alone({**one, "model": str(folder / one["model"]), "options": options}, tmp_path)
    found = of_rank(folder, one["name"], 0)
    # Other values that are logged are means over what a process has, and then over processes.
    for record in (*found["records"], *alone["records"]):
        for key in set(record) - {"loss", "grad_norm"}:
            del record[key]
    assert_close(found, alone)
    if adapter == "experts":
        trained, idle = idle_experts(found["adapter"])
        assert trained > 0
        assert idle > 0, "no expert was idle: the case shows nothing of those"


@every_launch
@pytest.mark.parametrize("task", SAMPLED)
def test_ranks_that_sample_train_what_the_plain_model_trains_in_as_many(task: str, ran: Ran) -> None:
    folder, num_ranks, adapter = ran
    name = named(task, adapter, 1, sampled=True)["name"]
    assert_same_bits(folder, name, num_ranks)
    assert_close(of_rank(folder, name, 0), of_rank(folder, f"{name}-plain", 0))


def idle_experts(adapter: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Experts whose adapter has left its zeros, and those whose has not.

    PEFT's adapter of a stack of experts has B of shape (out_features, rank * experts), ranks of an expert apart.
    """
    trained = idle = 0
    for name, weight in adapter.items():
        if "experts" in name and "lora_B" in name:
            by_expert = weight.reshape(weight.shape[0], -1, NUM_EXPERTS).abs().amax(dim=(0, 1))
            trained += int((by_expert > 0).sum())
            idle += int((by_expert == 0).sum())
    return trained, idle


def test_four_ranks_go_on_where_two_stopped(tmp_path: Path) -> None:
    build("llama", tmp_path / "llama")
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **ADAMW}
    launch(tmp_path, [case("two", options=options)])
    resumed = case(
        "four",
        output="on",
        resume=str(tmp_path / "two" / "checkpoint-2"),
        options={"max_steps": 4, "per_device_train_batch_size": 1, **ADAMW},
    )
    launch(tmp_path, [resumed], num_ranks=4, limit_s=400)
    assert_same_bits(tmp_path, "four", 4)
    found, whole = of_rank(tmp_path, "four", 0), of_rank(tmp_path, "two", 0)
    for record in (*found["records"], *whole["records"]):
        del record["num_tokens"]  # TRL counts from the resume on
    assert_close(found, whole)
