"""Two real processes: one copy of what is kept, one stream of reads, by the kernel's own counts; copies to two GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from offload.blocks import BlockLayout, lay_out
from offload.sharing.arena import ArenaLayout
from offload.sharing.server import NUM_SLOTS
from tests.offload.kernel_counts import can_swap, page_bytes_of_shared_memory, why_uncounted
from tests.offload.sharing_job import NUM_BLOCKS, blocks_in

ROOT = Path(__file__).resolve().parents[2]
SLOW = pytest.mark.slow


@dataclass(frozen=True, kw_only=True)
class Process:
    """One that `sharing_job` runs."""

    running: subprocess.Popen[str]
    address: str
    """Of the server that it is or asks."""

    def say(self, line: str) -> None:
        assert self.running.stdin is not None
        self.running.stdin.write(f"{line}\n")
        self.running.stdin.flush()

    def hear(self) -> str:
        assert self.running.stdout is not None
        line = self.running.stdout.readline().strip()
        assert line, f"it ended with {self.running.wait(timeout=60)}"
        return line


@contextmanager
def process(folder: Path, how: str, *, device: str = "cpu", num_kept: int) -> Iterator[Process]:
    command = [sys.executable, "-m", "tests.offload.sharing_job", str(folder), how, device, str(num_kept)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            yield Process(running=running, address=running.stdout.readline().strip())
        finally:
            running.kill()


def steps(processes: Sequence[Process], num: int) -> None:
    """Steps of all of them, which wait for each other at the end of each, as DDP makes them."""
    for number in range(num):
        for one in processes:
            one.say("step" if number else "first")
        assert [one.hear() for one in processes] == ["done"] * len(processes)


def ended(processes: Sequence[Process]) -> list[dict[str, Any]]:
    """What the kernel says of each while none of them has left."""
    for one in processes:
        one.say("end")
    found = [json.loads(one.hear()) for one in processes]
    for one in processes:
        one.say("leave")
        assert one.running.wait(timeout=60) == 0
    return found


def run(
    folder: Path, hows: Sequence[str], *, num_steps: int, device: str = "cpu", num_kept: int
) -> list[dict[str, Any]]:
    """Let processes take steps together; the first one serves, or is alone."""
    with ExitStack() as stack:
        started = [stack.enter_context(process(folder, hows[0], device=device, num_kept=num_kept))]
        for _ in hows[1:]:
            other = process(folder, started[0].address, device=device, num_kept=num_kept)
            started.append(stack.enter_context(other))
        steps(started, num_steps)
        return ended(started)


@pytest.fixture
def layouts(tmp_path: Path) -> list[BlockLayout]:
    """Of blocks that lie in the test's folder."""
    return [lay_out(block) for block in blocks_in(tmp_path).blocks]


def test_blocks_that_two_processes_keep_are_one_copy(tmp_path: Path, layouts: list[BlockLayout]) -> None:
    found = run(tmp_path, ["serve", "ask"], num_steps=2, num_kept=NUM_BLOCKS)
    assert {name for one in found for name in one["placements"]} == {"RESIDENT"}
    kept = sum(layout.buffer_bytes for layout in layouts)
    page = page_bytes_of_shared_memory()
    one_copy = sum(-(-layout.buffer_bytes // page) * page for layout in layouts)
    rounding = 1024 * sum(one["mapped"]["num"] for one in found)
    for one in found:
        assert can_swap() or one["mapped"]["rss"] >= 0.9 * kept, "each maps all of them"
        assert one["private_bytes"] < kept / 3, "and has no second copy of its own"
    found_bytes = sum(one["mapped"]["pss"] for one in found)
    assert found_bytes <= one_copy + rounding
    assert can_swap() or found_bytes >= kept - rounding


@pytest.mark.slow
def test_blocks_that_stream_are_read_from_storage_once_for_two_processes(
    tmp_path: Path, layouts: list[BlockLayout]
) -> None:
    if why := why_uncounted(tmp_path):
        pytest.skip(why)
    both = run(tmp_path, ["serve", "ask"], num_steps=5, num_kept=0)
    (alone,) = run(tmp_path, ["alone"], num_steps=5, num_kept=0)
    assert alone["storage_bytes"] > sum(layout.buffer_bytes for layout in layouts)
    # What was on its way at the first step's end, and at the last one's.
    on_its_way = NUM_SLOTS * max(layout.buffer_bytes for layout in layouts)
    assert sum(one["storage_bytes"] for one in both) <= 1.05 * alone["storage_bytes"] + on_its_way
    assert both[1]["storage_bytes"] <= 0.05 * alone["storage_bytes"], "only the first reads"
    passing = NUM_SLOTS * ArenaLayout.of(layouts, num_slots=NUM_SLOTS).slot_bytes
    assert sum(one["mapped"]["pss"] for one in both) <= passing


@pytest.mark.gpu
@pytest.mark.parametrize("num_kept", [pytest.param(0, marks=SLOW), 4, pytest.param(NUM_BLOCKS, marks=SLOW)])
def test_two_processes_copy_to_their_gpus_out_of_the_shared_memory(
    tmp_path: Path, layouts: list[BlockLayout], num_kept: int
) -> None:
    device = "simulated" if "tests.fakecuda.simulated_gpu" in sys.modules else "real"
    found = run(tmp_path, ["serve", "ask"], num_steps=3, device=device, num_kept=num_kept)
    sizes = [layout.buffer_bytes for layout in layouts]
    read = sum(one["bytes_read"] for one in found)
    assert read <= (3 * 2 * sum(sizes) if num_kept < NUM_BLOCKS else sum(sizes))
    for one in found:
        assert one.get("races", []) == []
        if device == "simulated":
            assert one["copied_bytes"] >= 3 * sum(sizes), "each copies for itself"
