"""The plan as data: summed up, printed, stored and read back."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from lowmem.planning.job import Job
from lowmem.planning.plan import Plan
from lowmem.planning.planner import plan_step
from lowmem.planning.shapes import BlockShape, LinearShape, Part, itemsize
from lowmem.planning.step_memory import RoleBytes, peak_bytes
from lowmem.planning.step_time import Rates, assumed_rates
from offload import Budget, format_bytes
from offload.budget import format_number, format_seconds
from tests.lowmem.llama_shapes import llama, llama_block


def planned(task: str = "sft", *, device: str = "24MiB", **job: Any) -> Plan:
    shapes = llama(num_blocks=16)
    arguments = {"batch_size": 2, "seq_len": 64, **job}
    return plan_step(
        shapes, Job(task=task, **arguments), budget=Budget(device=device, host="1MiB"), rates=assumed_rates("cpu")
    )


@pytest.mark.parametrize("task", ["sft", "dpo", "kto", "reward", "grpo", "rloo", "generate"])
@pytest.mark.parametrize("device", ["1MiB", "24MiB", "1GiB"])
def test_a_plan_survives_json(task: str, device: str) -> None:
    plan = planned(task, device=device)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_the_text_says_how_long_a_run_takes() -> None:
    plan = planned("grpo", num_steps=500)
    assert f"500 steps take {format_seconds(500 * plan.step_s)}" in str(plan)
    assert f"100 steps take {format_seconds(100 * planned('dpo').step_s)}" in str(planned("dpo"))


def test_a_shared_pass_computes_as_much_as_two() -> None:
    alone, shared = planned("dpo", uses_reference=False), planned("dpo")
    assert shared.passes == alone.passes == 2
    assert shared.time.compute_s > 1.2 * alone.time.compute_s


def test_the_summary_says_what_the_properties_say() -> None:
    plan = planned()
    summary = plan.to_dict()["summary"]
    assert isinstance(summary, dict)
    for name, value in summary.items():
        assert getattr(plan, name) == value


def test_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="version 5, got 7"):
        Plan.from_dict({**planned().to_dict(), "version": 7})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("job", None, "job: expected an object"),
        ("job", {"task": "sft"}, "job: missing fields"),
        ("roles", "many", "roles: expected a list"),
        ("placement", {"placements": ["nowhere"], "block_bytes": [1]}, "placement.placements: 'nowhere'"),
        ("surprise", 1, "unknown fields .'surprise'."),
    ],
)
def test_damaged_plans_are_refused_by_field(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.from_dict({**planned().to_dict(), field: value})


def test_the_text_says_how_much_trains() -> None:
    shapes = llama(num_blocks=16)
    assert planned().num_trainable == shapes.num_adapter_params > 0
    assert f"trains     {shapes.num_adapter_params:,} parameters: LoRA r=8 on all-linear" in str(planned())


def test_values_of_the_wrong_type_are_refused_by_field() -> None:
    stored = planned().to_dict()
    with pytest.raises(ValueError, match=r"job\.batch_size: expected int, got 'two'"):
        Plan.from_dict({**stored, "job": {**stored["job"], "batch_size": "two"}})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"choice\.boundary_tier: expected one of device, host, disk, got 'cloud'"):
        Plan.from_dict({**stored, "choice": {**stored["choice"], "boundary_tier": "cloud"}})  # type: ignore[dict-item]


def test_plans_are_frozen_and_can_be_keys() -> None:
    plan = planned()
    assert {plan: 1}[planned()] == 1
    with pytest.raises(FrozenInstanceError):
        plan.model = "other"  # type: ignore[misc]


@pytest.mark.parametrize("task", ["sft", "dpo", "kto", "reward", "grpo", "rloo", "generate"])
@pytest.mark.parametrize("device", ["1MiB", "24MiB", "1GiB"])
def test_text_is_short_and_names_what_matters(task: str, device: str) -> None:
    plan = planned(task, device=device)
    text = str(plan)
    lines = text.splitlines()
    assert len(lines) < 50
    assert max(map(len, lines)) < 200
    assert lines[0].startswith("FITS" if plan.fits else "DOES NOT FIT")
    assert "tokens/s, limited by" in lines[1]
    for word in (plan.model, task, plan.bottleneck, "assumed", *(role.role for role in plan.roles), *plan.advice):
        assert word in text


def test_the_table_is_aligned() -> None:
    lines = str(planned()).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("role"))
    end = next(index for index, line in enumerate(lines) if line.startswith("peak"))
    column = lines[start].index("device") + len("device")
    for line in (*lines[start + 2 : end - 1], lines[end]):
        assert line[column - 1] != " "
        assert line[column : column + 2] in ("  ", "")


def test_html_holds_the_same_numbers_and_escapes_names() -> None:
    plan = replace(planned(), model="<b>")
    page = plan._repr_html_()
    assert "<b><b>" not in page
    assert "&lt;b&gt;" in page
    assert page.count("<tr>") == len({(role.role, role.phase) for role in plan.roles}) + 2


def test_html_draws_each_tier_up_to_its_budget() -> None:
    plan = planned()
    page = plan._repr_html_()
    assert f"device: {format_bytes(plan.device_bytes)} of {format_bytes(plan.device_budget_bytes)}" in page
    widths = [float(width) for width in re.findall(r"float:left;height:1.2em;width:([0-9.]+)%", page)]
    held = plan.device_bytes / max(plan.device_bytes, plan.device_budget_bytes)
    held += plan.host_bytes / max(plan.host_bytes, plan.host_budget_bytes, 1)
    assert sum(widths) == pytest.approx(100 * held, abs=0.2)


def test_html_names_each_colour_once_and_draws_no_bar_of_nothing() -> None:
    always = [RoleBytes(role=f"role {number}", tier="device", nbytes=100) for number in range(14)]
    # Between the others, so that counting these would use up the colours.
    slivers = [RoleBytes(role=f"sliver {number}", tier="device", nbytes=1) for number in range(6)]
    roles = tuple(role for group in zip(always, [*slivers, *slivers, *slivers], strict=False) for role in group)
    page = replace(planned(), roles=roles, device_budget_bytes=2000, host_budget_bytes=0)._repr_html_()
    colours = re.findall(r"color:(#\w+)\">&#9632;</span> role", page)
    assert len(colours) == len(set(colours)) == 14
    assert "host: nothing" in page
    assert "<th>held while</th>" in page


def test_short_sequences_go_whole_through_a_block() -> None:
    assert planned().chunk_tokens is None


def test_bytes_of_a_role_by_tier() -> None:
    plan = planned()
    tiers = [plan.bytes_of("decoder blocks", tier=tier) for tier in ("device", "host", "disk")]
    assert sum(tiers) == plan.bytes_of("decoder blocks")
    assert plan.bytes_of("nothing") == 0


def test_peaks_take_the_largest_of_phases_that_exclude_each_other() -> None:
    roles = [
        RoleBytes(role="a", tier="device", nbytes=1),
        RoleBytes(role="b", tier="device", nbytes=10, phase="head"),
        RoleBytes(role="c", tier="device", nbytes=20, phase="block"),
        RoleBytes(role="d", tier="host", nbytes=100),
    ]
    assert peak_bytes(roles, "device") == 21
    assert peak_bytes(roles, "host") == 100
    assert peak_bytes(roles, "disk") == 0


@pytest.mark.parametrize(
    "fields", [{"tier": "cloud"}, {"nbytes": -1}, {"phase": "later"}], ids=["tier", "bytes", "phase"]
)
def test_roles_are_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="blocks: tier"):
        RoleBytes(**{"role": "blocks", "tier": "device", "nbytes": 1, **fields})


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="hidden_size is 0"):
        replace(llama_block(), hidden_size=0)
    with pytest.raises(ValueError, match="at least one decoder block"):
        replace(llama(), blocks=())
    with pytest.raises(ValueError, match="0 x 4"):
        LinearShape(part=Part.MLP_IN, in_features=0, out_features=4)
    with pytest.raises(ValueError, match="int8"):
        itemsize("int8")


def test_an_assumed_lora_counts_every_linear_layer() -> None:
    block: BlockShape = replace(llama_block(rank=0), num_adapter_params=0, adapter_bytes=0)
    assert block.with_lora(8) == llama_block(rank=8)


def test_a_score_head_frees_a_tied_embedding() -> None:
    shapes = llama(tied=True)
    scored = shapes.with_score_head()
    assert scored.embedding_bytes == shapes.head_bytes
    assert scored.head_bytes == shapes.hidden_size * 4


def test_rates_must_be_positive() -> None:
    with pytest.raises(ValueError, match="disk_bytes_per_s is 0"):
        Rates(disk_bytes_per_s=0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.32, "320 ms"), (12.34, "12.3 s"), (504, "8.4 min"), (11160, "3.1 h"), (0, "0 ms"), (0.9999, "1,000 ms")),
        *((1e6, "11.6 days"), (1e11, "1,160,000 days")),
    ],
)
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(31_100, "31,100"), (1.234e9, "1,230,000,000"), (98.76, "98.8"), (0.125, "0.125"), (2e-6, "0.000002"), (0, "0")],
)
def test_numbers_are_written_without_exponents(number: float, text: str) -> None:
    assert format_number(number) == text


def test_the_second_line_says_what_goes_through_a_step() -> None:
    words = str(planned(batch_size=8, gradient_accumulation_steps=2, chunk_tokens=32, device="1GiB")).splitlines()[1]
    assert " per step of batch 8 x 64 tokens x 2 in chunks of 32, weights in " in words
