"""The bar within a step: what it predicts from visits, the disk rate, and what it prints."""

import builtins
import io
import itertools
import sys
from types import SimpleNamespace

import IPython.display
import pytest
from IPython.display import HTML

from lowmem.monitoring.progress import ByteRate, StepEstimate, StepProgress
from lowmem.progress_line import say, showing_bytes


def estimate(num_blocks: int = 4, num_forwards: int = 1, planned_step_s: float | None = None) -> StepEstimate:
    return StepEstimate(num_blocks=num_blocks, num_forwards=num_forwards, planned_step_s=planned_step_s)


def run_step(step: StepEstimate, start_s: float, *, forward_s: float, backward_s: float, num_blocks: int = 4) -> float:
    now_s = start_s
    step.start_step(now_s)
    for phase, visit_s in (("forward", forward_s), ("backward", backward_s)):
        for _ in range(num_blocks):
            now_s += visit_s
            step.finish_visit(phase, now_s)
    step.finish_step(now_s)
    return now_s


def test_nothing_is_predicted_from_nothing() -> None:
    step = estimate()
    step.start_step(0)
    assert step.step_left_s(1) is None
    assert step.run_left_s(1, 10) is None


def test_the_plan_predicts_until_the_first_visit_ends() -> None:
    step = estimate(planned_step_s=20)
    step.start_step(100)
    assert step.step_left_s(105) == 15
    assert step.run_left_s(105, 2) == 15 + 2 * 20
    assert step.step_left_s(150) == 0


def test_the_first_step_is_extrapolated_from_its_forward() -> None:
    step = estimate()
    step.start_step(0)
    step.finish_visit("forward", 1)
    step.finish_visit("forward", 2)
    left_s = step.step_left_s(2)
    assert left_s is not None
    assert left_s == 2 * 1 + 4 * 2.5
    assert (step.num_done, step.num_expected) == (2, 8)


def test_later_steps_are_predicted_from_measured_visits() -> None:
    step = estimate()
    now_s = run_step(step, 0, forward_s=1, backward_s=3)
    step.start_step(now_s)
    assert step.step_left_s(now_s) == pytest.approx(4 * 1 + 4 * 3)
    step.finish_visit("forward", now_s + 1)
    assert step.step_left_s(now_s + 1) == pytest.approx(3 * 1 + 4 * 3)
    assert step.run_left_s(now_s + 1, 5) == pytest.approx(15 + 5 * 16)


def test_the_slow_first_step_does_not_spoil_the_runs_estimate() -> None:
    step = estimate()
    now_s = run_step(step, 0, forward_s=100, backward_s=100)
    for _ in range(3):
        now_s = run_step(step, now_s, forward_s=1, backward_s=1)
    step.start_step(now_s)
    left_s, step_left_s = step.run_left_s(now_s, 10), step.step_left_s(now_s)
    assert left_s is not None
    assert step_left_s is not None
    assert left_s - step_left_s == pytest.approx(10 * 8)


def test_passes_that_were_not_foreseen_are_learnt() -> None:
    step = estimate(num_forwards=1)
    step.start_step(0)
    for second in range(12):
        step.finish_visit("no_grad", second)
    assert step.num_expected == 8 + 12
    step.finish_step(12)
    step.start_step(20)
    assert step.num_expected == 12


def test_accumulated_micro_steps_are_foreseen() -> None:
    assert estimate(num_blocks=4, num_forwards=3).num_expected == 24


def test_rate_is_that_of_the_last_seconds() -> None:
    totals = iter([0, 100, 200, 200, 200, 200, 200])
    rate = ByteRate(lambda: next(totals))
    assert rate.bytes_per_s(0) == 0
    assert rate.bytes_per_s(1) == 100
    assert rate.bytes_per_s(2) == 100
    assert [rate.bytes_per_s(float(now)) for now in (3, 4, 5, 6)][-1] == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, *, every_s: float | None) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    clock = itertools.count()
    # A millisecond passes from one look at the clock to the next, however busy the machine is.
    monkeypatch.setattr("lowmem.monitoring.progress.monotonic", lambda: next(clock) / 1000)
    progress = StepProgress(estimate(), read_bytes=lambda: next(clock) * 1000, every_s=every_s)
    progress.start_step(3, 9)
    for phase in ("forward", "backward"):
        for block in range(4):
            progress.visit(block, 4, phase, started=True)
            progress.visit(block, 4, phase, started=False)
    progress.finish_step()
    progress.visit(2, 4, "no_grad", started=True)
    progress.close()
    return stream.getvalue()


def test_bar_names_step_direction_block_rate_and_times_left(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Terminal(), every_s=0)
    for part in ("step 3/9 forward 1/4", "step 3/9 backward 4/4", "/s from disk", "step 00:00 left", "run 00:00 left"):
        assert part in text
    assert "\rno grad 3/4" in text  # outside a step: no step and no time left


def test_bar_waits_between_refreshes(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, Terminal(), every_s=60)
    assert "forward 1/4" in text
    assert "forward 2/4" not in text


def test_log_files_get_few_refreshes_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem.monitoring.progress.EVERY_S", 0.0)
    assert "forward 2/4" in shown(monkeypatch, Terminal(), every_s=None)
    assert "forward 2/4" not in shown(monkeypatch, io.StringIO(), every_s=None)


def test_log_files_get_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, io.StringIO(), every_s=0)
    assert not set(text) & set("\r\x1b|")
    lines = text.splitlines()
    assert len(lines) == 17  # one for each visit's start and end, as often as was asked for
    assert all(line.startswith("lowmem: ") for line in lines)
    assert lines[0].startswith("lowmem: step 3/9, forward 1/4") or "step 3/9 forward 1/4" in lines[0]
    assert "run 00:00 left" in lines[3]


def test_what_lies_between_steps_is_part_of_what_is_left() -> None:
    step = estimate()
    now_s = 0.0
    for _ in range(4):
        now_s = run_step(step, now_s, forward_s=1, backward_s=1) + 5  # an evaluation after each step, say
    step.start_step(now_s)
    left_s, step_left_s = step.run_left_s(now_s, 10), step.step_left_s(now_s)
    assert left_s is not None
    assert step_left_s is not None
    assert left_s - step_left_s == pytest.approx(10 * (8 + 5))


def test_nothing_is_printed_without_a_visit(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    progress = StepProgress(estimate(), read_bytes=lambda: 0)
    progress.start_step(1, 1)
    progress.finish_step()
    progress.close()
    assert stream.getvalue() == ""


def test_in_a_notebook_nothing_of_it_goes_to_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which notebooks show as they show errors."""
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    pages: list[str] = []
    cell = SimpleNamespace(update=lambda page: pages.append(page.data))

    def display(page: HTML, *, display_id: bool) -> SimpleNamespace:
        assert display_id
        pages.append(page.data)
        return cell

    monkeypatch.setattr(IPython.display, "display", display)
    with showing_bytes("merging", 100, delay_s=0.0) as tell:
        tell(60)
        tell(40)
    say("packing once")
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out == "lowmem: packing once\n"
    assert "merging, 60 B of 100 B" in pages[0]
    assert pages[-1] == "", "taken away at its end"
