"""What a run reports of a GPU is the GPU's own: when it computed, when it waited for blocks, what it has reserved."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lowmem
from lowmem.monitoring.monitor import StepRecorder
from lowmem.streaming.runtime import runtime_of
from offload import ComputeTimes, Trace
from tests.fakecuda.steps import Step, open_model
from tests.lowmem.full_training import backward, batches
from tests.zoo.architectures import build

pytestmark = pytest.mark.gpu
TIED_NS = 20_000_000


def test_times_of_the_device_are_told_once_they_are_over() -> None:
    trace = Trace()
    times = ComputeTimes(torch.device("cuda", 0), trace)
    before_ns = time.perf_counter_ns()
    start = times.now()
    torch.ones(8, device="cuda").sum()
    times.add("compute", "a sum", start, times.now())
    at_once = times.now()
    times.add("stall", "too short to tell", at_once, at_once)
    assert not trace.spans()
    times.settle()
    (span,) = trace.spans()
    assert before_ns - TIED_NS <= span.start_ns <= span.end_ns <= time.perf_counter_ns() + TIED_NS


def test_a_step_is_accounted_for_by_the_device(tmp_path: Path) -> None:
    model = open_model(build("llama", tmp_path / "llama"), Step(), device="cuda:0").train()
    model.get_input_embeddings().weight.requires_grad_(True)
    runtime = runtime_of(model)
    recorder = StepRecorder(model, runtime)
    recorder.start_step(1)
    backward(model, batches(1)[0].cuda())
    record, timeline = recorder.finish_step()
    recorder.close()
    computed = [span.name for span in timeline.spans if span.lane == "compute"]
    num = runtime.num_blocks
    assert computed == [*(f"forward {i}" for i in range(num)), *(f"backward {i}" for i in reversed(range(num)))]
    # The device's clock is tied to the host's within some milliseconds where the machine is busy.
    assert 0 < timeline.busy_s("compute") + record.stall_s <= record.duration_s * 1.05 + 0.02
    assert record.device_peak_bytes >= torch.cuda.memory_allocated()


@pytest.fixture
def _uncapped() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("_uncapped")
def test_a_budget_is_a_cap_where_that_is_asked_for(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "llama")
    model = lowmem.from_pretrained(folder, budget=lowmem.Budget(device="8MiB", host=0), device="cuda", cap_device=True)
    model(batches(1)[0].cuda())
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(torch.cuda.memory_reserved() + (64 << 20), dtype=torch.uint8, device="cuda")
    with pytest.raises(lowmem.UnsupportedError, match=r"cap_device=True on a CPU.*control group"):
        lowmem.from_pretrained(folder, device="cpu", cap_device=True)
