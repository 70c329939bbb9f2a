"""The batch that really arrives is planned for at the first training step, or refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import lowmem
from lowmem.planning.plan import Plan
from lowmem.streaming.boundary import DiskBoundaries
from lowmem.streaming.runtime import Visit, runtime_of
from offload import BudgetError, Placement
from tests.zoo.architectures import build

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
WIDE = {"num_hidden_layers": 6, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {**WIDE, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024}
    return build("llama", tmp_path_factory.mktemp("zoo"), changes=changes)


def smallest(folder: Path, **job: Any) -> int:
    return lowmem.plan(
        folder,
        peft_config=LORA,
        budget=lowmem.Budget(device=0, host=0, disk=job.pop("disk", None)),
        device="cpu",
        **job,
    ).smallest_device_bytes


def trained(model: Any, *, num_sequences: int, seq_len: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = get_peft_model(model, LORA).train()
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.02)
    return gradients(model, num_sequences=num_sequences, seq_len=seq_len)


def gradients(model: Any, *, num_sequences: int, seq_len: int) -> dict[str, torch.Tensor]:
    model.zero_grad()
    tokens = torch.randint(3, 90, (num_sequences, seq_len), generator=torch.Generator().manual_seed(seq_len))
    loss = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss
    loss.backward()
    found = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    return {"loss": loss.detach(), **found}


def visits_of(model: Any) -> list[Visit]:
    seen: list[Visit] = []
    runtime_of(model).listen(seen.append)
    return seen


@pytest.fixture(params=["blocks stay", "blocks move", "boundaries go to disk"])
def case(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> tuple[str, lowmem.Budget]:
    disk = tmp_path / "disk" if request.param == "boundaries go to disk" else None
    needed = smallest(folder, batch_size=8, seq_len=64, disk=disk)
    extra = 1 << 30 if request.param == "blocks stay" else 64 << 10
    return request.param, lowmem.Budget(device=needed + extra, host=0, disk=disk)


def test_the_batch_that_arrives_is_planned_for_and_trains_as_a_plain_model(
    folder: Path, case: tuple[str, lowmem.Budget]
) -> None:
    kind, budget = case
    model = lowmem.from_pretrained(folder, budget=budget, device="cpu")
    runtime = runtime_of(model)
    supposed = runtime.plan
    assert supposed.is_supposed
    found = trained(model, num_sequences=8, seq_len=64)
    plan = runtime.plan
    assert (plan.job.num_sequences, plan.seq_len, plan.fits) == (8, 64, True)
    assert plan.num_trainable == sum(param.numel() for param in model.parameters() if param.requires_grad)
    assert plan.device_budget_bytes == supposed.device_budget_bytes
    if kind == "blocks stay":
        assert plan.placement == supposed.placement
    if kind == "blocks move":
        assert Placement.STREAMED in plan.placements
    assert isinstance(runtime.boundaries, DiskBoundaries) == (kind == "boundaries go to disk")
    expected = trained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), num_sequences=8, seq_len=64)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_batch_that_does_not_fit_is_refused_before_the_first_block(folder: Path) -> None:
    model = lowmem.from_pretrained(
        folder, budget=lowmem.Budget(device=smallest(folder, batch_size=1, seq_len=32), host=0), device="cpu"
    )
    seen, plan = visits_of(model), runtime_of(model).plan
    with pytest.raises(BudgetError, match=r"needs at least .* bytes\)\. .*gradient_accumulation_steps=64") as caught:
        trained(model, num_sequences=64, seq_len=256)
    assert seen == []
    assert runtime_of(model).plan is plan
    assert lowmem.plan(
        folder,
        batch_size=64,
        seq_len=256,
        peft_config=LORA,
        budget=lowmem.Budget(device=caught.value.needed_bytes, host=0),
        device="cpu",
    ).fits


def test_a_plan_is_kept_to_where_it_covers_and_made_again_where_it_does_not(folder: Path) -> None:
    budget = lowmem.Budget(device="1GiB", host=0)
    plan = lowmem.plan(folder, batch_size=4, seq_len=64, peft_config=LORA, budget=budget, device="cpu")
    plan = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    model = lowmem.from_pretrained(folder, plan=plan, device="cpu")
    runtime = runtime_of(model)
    trained(model, num_sequences=4, seq_len=64)
    gradients(model, num_sequences=2, seq_len=16)
    assert runtime.plan is plan
    gradients(model, num_sequences=2, seq_len=96)
    longer = runtime.plan
    assert (longer.job.num_sequences, longer.seq_len) == (2, 96)
    gradients(model, num_sequences=4, seq_len=48)
    assert runtime.plan is plan, "plans for the same places of the blocks stay known"
    gradients(model, num_sequences=2, seq_len=96)
    assert runtime.plan is longer


def test_a_half_type_outside_of_autocast_is_planned_for(folder: Path) -> None:
    budget = lowmem.Budget(device="1GiB", host=0)
    job = {"batch_size": 4, "seq_len": 64, "dtype": "bfloat16", "device": "cpu"}
    plan = lowmem.plan(folder, peft_config=LORA, budget=budget, **job)  # type: ignore[arg-type]
    runtime = runtime_of(model := lowmem.from_pretrained(folder, plan=plan, device="cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        trained(model, num_sequences=4, seq_len=64)
    assert runtime.plan is plan
    gradients(model, num_sequences=4, seq_len=64)
    alone = runtime.plan
    assert (plan.job.autocast, alone.job.autocast) == (True, False)
    wanted = [one.bytes_of("block recomputation", tier="device") for one in (plan, alone)]
    assert wanted[0] < wanted[1]
    # What takes more covers what takes less.
    gradients(model, num_sequences=2, seq_len=64)
    assert runtime.plan is alone
    told = lowmem.plan(folder, peft_config=LORA, budget=budget, autocast=False, **job)  # type: ignore[arg-type]
    assert told.smallest_device_bytes > plan.smallest_device_bytes


def test_a_half_type_outside_of_autocast_is_refused_where_the_budget_has_no_room(folder: Path) -> None:
    job = {"batch_size": 4, "seq_len": 64, "dtype": "bfloat16", "device": "cpu", "peft_config": LORA}
    bounds = lowmem.plan(folder, budget=lowmem.Budget(device=0, host=0), **job)  # type: ignore[arg-type]
    tight = lowmem.Budget(device=bounds.smallest_device_bytes, host=0)
    plan = lowmem.plan(folder, budget=tight, **job)  # type: ignore[arg-type]
    model = lowmem.from_pretrained(folder, plan=plan, device="cpu")
    seen = visits_of(model)
    with pytest.raises(BudgetError):
        trained(model, num_sequences=4, seq_len=64)
    assert seen == []
    with torch.autocast("cpu", torch.bfloat16):
        assert trained(lowmem.from_pretrained(folder, plan=plan, device="cpu"), num_sequences=4, seq_len=64)


def test_an_adapter_larger_than_planned_is_planned_for(folder: Path) -> None:
    budget = lowmem.Budget(device="1GiB", host=0)
    small = LoraConfig(r=1, target_modules=["q_proj"])
    model = lowmem.from_pretrained(
        folder, plan=lowmem.plan(folder, seq_len=32, peft_config=small, budget=budget, device="cpu"), device="cpu"
    )
    trained(model, num_sequences=1, seq_len=16)
    plan = runtime_of(model).plan
    assert plan.num_trainable == sum(param.numel() for param in model.parameters() if param.requires_grad)
    assert plan.adapter == "LoRA r=4 on " + ", ".join(sorted(model.peft_config["default"].target_modules))


def test_forwards_without_gradients_change_no_plan(folder: Path) -> None:
    model = lowmem.from_pretrained(folder, budget=lowmem.Budget(device="64MiB", host=0), device="cpu")
    plan = runtime_of(model).plan
    with torch.no_grad():
        model(input_ids=torch.ones(64, 32, dtype=torch.long))
    model(input_ids=torch.ones(64, 32, dtype=torch.long))
    assert runtime_of(model).plan is plan


def test_every_weight_is_planned_for_with_the_batch_that_arrives(folder: Path) -> None:
    model = lowmem.from_pretrained(
        folder, tuning="full", budget=lowmem.Budget(device="64MiB", host="64MiB"), device="cpu"
    )
    placement = runtime_of(model).plan.placement
    gradients(model.train(), num_sequences=8, seq_len=32)
    plan = runtime_of(model).plan
    assert (plan.job.num_sequences, plan.seq_len, plan.placement) == (8, 32, placement)
    assert plan.num_trainable == sum(param.numel() for param in model.parameters())


def test_more_memory_than_the_machine_has_is_refused_before_anything_loads(folder: Path) -> None:
    plan = lowmem.plan(
        folder, batch_size=4096, seq_len=2048, budget=lowmem.Budget(device="900TiB", host=0), device="cpu"
    )
    assert plan.fits
    with pytest.raises(BudgetError, match=r"takes .* of RAM, and this machine has .* left"):
        lowmem.from_pretrained(folder, plan=plan, device="cpu")
