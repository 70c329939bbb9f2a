"""A step's timeline: arithmetic on overlapping spans, and a PNG that shows every lane, phase and block."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from lowmem.monitoring.timeline import (
    LANE_COLOURS,
    OTHER_COLOUR,
    PHASE_COLOURS,
    BlockPass,
    StepTimeline,
    draw_timeline,
    require_matplotlib,
)
from offload.trace import Span, Trace

MS = 1_000_000
START_NS = 10**15  # perf_counter_ns after some days


def span(lane: str, start_ms: float, end_ms: float, *, name: str = "x", nbytes: int = 0) -> Span:
    return Span(lane, name, START_NS + int(start_ms * MS), START_NS + int(end_ms * MS), nbytes)


def timeline(*spans: Span, duration_ms: float = 100, passes: tuple[BlockPass, ...] = ()) -> StepTimeline:
    end_ns = START_NS + int(duration_ms * MS)
    return StepTimeline(step=2, start_ns=START_NS, end_ns=end_ns, spans=spans, passes=passes)


def visit(block: int, phase: str, start_ms: float, end_ms: float) -> BlockPass:
    return BlockPass(
        block=block, phase=phase, start_ns=START_NS + int(start_ms * MS), end_ns=START_NS + int(end_ms * MS)
    )


def test_parallel_requests_count_once() -> None:
    step = timeline(span("disk", 0, 30), span("disk", 10, 40), span("disk", 60, 70), span("copy", 0, 5))
    assert step.busy_s("disk") == pytest.approx(0.050)
    assert step.busy_percent("disk") == pytest.approx(50)
    assert step.busy_percent("copy") == pytest.approx(5)
    assert step.busy_percent("compute") == 0


def test_only_the_part_within_the_step_counts_as_busy() -> None:
    step = timeline(span("disk", -50, 20, nbytes=7), span("disk", 90, 190, nbytes=11))
    assert step.busy_s("disk") == pytest.approx(0.030)
    # A transfer's bytes belong to the step in which it ends.
    assert step.num_bytes("disk") == 7


def test_spans_of_a_real_trace_can_be_drawn(tmp_path: Path) -> None:
    trace = Trace()
    for number, lane in enumerate(("disk", "copy", "compute", "stall")):
        trace.add(lane, "forward 0", number * 1000, number * 1000 + 900, nbytes=5)
    spans = trace.spans()
    step = StepTimeline(step=1, start_ns=spans[0].start_ns, end_ns=spans[-1].end_ns, spans=spans, passes=())
    draw_timeline(step, tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def colours_in(path: Path) -> set[str]:
    """Colours that fill at least one pixel exactly."""
    pixels = torch.from_numpy(imread(path)).mul(255).round().to(torch.int64)[..., :3].reshape(-1, 3)
    codes = torch.unique(pixels[:, 0] * 65536 + pixels[:, 1] * 256 + pixels[:, 2])
    return {f"#{int(code):06x}" for code in codes}


def test_picture_shows_lanes_phases_and_work_outside_blocks(tmp_path: Path) -> None:
    step = timeline(
        span("disk", 0, 20, nbytes=1 << 20),
        span("copy", 20, 25, nbytes=1 << 20),
        span("stall", 0, 25),
        span("compute", 25, 40, name="forward 0"),
        span("compute", 40, 60, name="the head"),
        span("compute", 60, 90, name="backward 0"),
    )
    path = tmp_path / "new folder" / "step.png"
    draw_timeline(step, path)
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    assert (width, height) == (1800, 585)
    expected = {*LANE_COLOURS.values(), PHASE_COLOURS["forward"], PHASE_COLOURS["backward"], OTHER_COLOUR}
    assert expected <= colours_in(path)
    assert PHASE_COLOURS["no_grad"] not in colours_in(path)


def test_unnamed_compute_takes_its_phase_from_the_visit_around_it(tmp_path: Path) -> None:
    spans = (span("compute", 10, 30, name="layers.0"), span("compute", 50, 90, name="layers.0"))
    passes = (visit(0, "no_grad", 5, 31), visit(0, "backward", 49, 91))
    draw_timeline(timeline(*spans, passes=passes), tmp_path / "step.png")
    colours = colours_in(tmp_path / "step.png")
    assert {PHASE_COLOURS["no_grad"], PHASE_COLOURS["backward"]} <= colours
    assert not {PHASE_COLOURS["forward"], OTHER_COLOUR} & colours


def test_visits_are_drawn_where_no_compute_was_recorded(tmp_path: Path) -> None:
    draw_timeline(timeline(passes=(visit(3, "forward", 0, 40),)), tmp_path / "step.png")
    assert PHASE_COLOURS["forward"] in colours_in(tmp_path / "step.png")


def test_a_step_of_many_blocks_and_requests_draws_in_bounded_time(tmp_path: Path) -> None:
    requests = [span("disk", index / 100, (index + 0.5) / 100, nbytes=1) for index in range(10_000)]
    computed = [span("compute", index / 2, index / 2 + 0.4, name=f"forward {index}") for index in range(200)]
    draw_timeline(timeline(*requests, *computed), tmp_path / "step.png")
    assert LANE_COLOURS["disk"] in colours_in(tmp_path / "step.png")


def test_a_step_without_duration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"step 2 ends at .* not after its start"):
        draw_timeline(timeline(duration_ms=0), tmp_path / "step.png")


def test_absent_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    require_matplotlib()
    monkeypatch.setitem(
        sys.modules, "matplotlib", None
    )  # what the import system puts there for a module that is barred
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lowmem\[plot\]'"):
        require_matplotlib()


def test_importing_the_module_leaves_matplotlib_alone() -> None:
    program = "import sys, lowmem.monitoring.timeline; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
