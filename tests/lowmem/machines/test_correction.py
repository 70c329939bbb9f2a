"""Steps that correct what was predicted, and growth beyond the plan."""

from __future__ import annotations

import pytest

import lowmem
from lowmem.machines.correction import StepCorrection, first_touch_s, growth_beyond
from lowmem.planning.job import Job
from lowmem.planning.plan import Plan
from lowmem.planning.planner import plan_step
from lowmem.planning.step_time import assumed_rates
from tests.lowmem.llama_shapes import llama

GIB = 1 << 30


def planned(device: str) -> Plan:
    job = Job(task="sft", seq_len=64, device=device)  # type: ignore[arg-type]
    return plan_step(llama(), job, budget=lowmem.Budget(device="1GiB", host="1GiB"), rates=assumed_rates("cpu"))


def test_the_first_step_counts_by_its_usual_blocks() -> None:
    correction = StepCorrection()
    assert correction.step_s is None
    visits = [("forward", 5.0), *[("forward", 1.0)] * 9, *[("backward", 2.0)] * 9, ("backward", 2.5)]
    correction.see(5 + 9 + 18 + 2.5 + 3, visits)
    assert correction.step_s == pytest.approx(10 + 20 + 3)


@pytest.mark.parametrize(("planned_s", "expected_s"), [(None, 4.0), (0.5, 1.5), (9.0, 4.0)])
def test_the_first_update_makes_state_and_counts_as_planned(planned_s: float | None, expected_s: float) -> None:
    correction = StepCorrection(planned_s)
    correction.see(14.0, [("forward", 1.0)] * 10, update_s=3.0)
    assert correction.step_s == pytest.approx(10 + expected_s)


def test_an_update_that_later_forwards_wait_for_is_added() -> None:
    correction = StepCorrection(late_s=3.0)
    correction.see(14.0, [("forward", 1.0)] * 10)
    assert correction.step_s == pytest.approx(17.0)
    correction.see(18.0, [])
    assert correction.step_s == 18


def test_memory_that_only_the_first_step_touches_is_left_out() -> None:
    correction = StepCorrection(touch_s=2.0)
    correction.see(14.0, [("forward", 1.0)] * 10)
    assert correction.step_s == pytest.approx(12.0)
    correction = StepCorrection(touch_s=11.0)
    correction.see(14.0, [("forward", 1.0)] * 9 + [("forward", 0.5)])
    assert correction.step_s == pytest.approx(5.0)
    full = Job(seq_len=64, tuning="full")
    plans = [
        plan_step(shapes, job, budget=lowmem.Budget(device="4GiB", host=0), rates=assumed_rates("cpu"))
        for shapes, job in ((llama(), Job(seq_len=64)), (llama().with_every_weight(), full))
    ]
    assert all(first_touch_s(plan) > 0 for plan in plans)
    assert first_touch_s(planned("cuda")) == 0


def test_later_steps_replace_it_by_their_median() -> None:
    correction = StepCorrection()
    for step_s in (50.0, 10.0, 12.0, 11.0):
        correction.see(step_s, [])
    assert correction.step_s == 11
    for _ in range(30):
        correction.see(5.0, [])
    assert correction.step_s == 5


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_growth_beyond_the_plan_is_told_once_it_is_more_than_libraries_take(device: str) -> None:
    plan = planned(device)
    host_bytes = plan.host_bytes + (plan.device_bytes if device == "cpu" else 0)
    assert growth_beyond(plan, host_growth_bytes=host_bytes + GIB // 5, device_peak_bytes=0) is None
    told = growth_beyond(plan, host_growth_bytes=host_bytes + GIB, device_peak_bytes=0)
    assert told is not None
    assert "the process has grown by 1." in told


def test_growth_of_a_gpu_is_told() -> None:
    told = growth_beyond(planned("cuda"), host_growth_bytes=0, device_peak_bytes=2 * GIB)
    assert told is not None
    assert told.startswith("the GPU has held 2.00 GiB, and ")
