"""The report of a run: one page without anything from elsewhere, drawn from facts and the last steps."""

import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lowmem.monitoring.account import LossPoint, RoleMemory, RunFacts, StepPoint, evenly_chosen
from lowmem.monitoring.report import report_html, save_report
from lowmem.monitoring.timeline import StepTimeline
from offload import Span

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def facts(*, state: str = "running", num_points: int = 40) -> RunFacts:
    return RunFacts(
        title="a/model <8B> | sft | batch 8 x 128 tokens",
        state=state,  # type: ignore[arg-type]
        num_steps=100,
        planned_s={"step": 2.0, "compute": 1.5, "disk": 1.0, "copy": 0.0},
        planned_peak_bytes=900 << 20,
        peak_bytes=850 << 20,
        memory=(
            RoleMemory(role="decoder blocks", planned_bytes=100 << 20, measured_bytes=100 << 20),
            RoleMemory(role="temporaries", planned_bytes=300 << 20, measured_bytes=None),
            RoleMemory(role="peak", planned_bytes=900 << 20, measured_bytes=850 << 20),
        ),
        steps=tuple(
            StepPoint(step=i, duration_s=2 + 1 / i, tokens_per_s=500.0, stall_percent=3.0)
            for i in range(1, num_points + 1)
        ),
        losses=tuple(LossPoint(step=i, loss=1 + 3 / i) for i in range(1, num_points + 1)),
        starts_ns=tuple((i, i * 10**9) for i in range(1, num_points + 1)),
        plan="FITS <all of it>",
    )


def steps(*, num_blocks: int = 30) -> tuple[StepTimeline, ...]:
    second = 10**9
    made = []
    for step in range(3):
        start = step * 10 * second
        spans = [Span("stall", "block 0", start, start + second // 2, 0)]
        for number in range(2 * num_blocks):
            at = start + second + number * 8 * second // (2 * num_blocks)
            phase = "forward" if number < num_blocks else "backward"
            block = number if number < num_blocks else 2 * num_blocks - 1 - number
            spans.append(Span("disk", f"block {block}", at, at + second // 20, 1 << 20))
            spans.append(Span("compute", f"{phase} {block}", at, at + 7 * second // (2 * num_blocks), 0))
        made.append(
            StepTimeline(step=step + 1, start_ns=start, end_ns=start + 10 * second, spans=tuple(spans), passes=())
        )
    return tuple(made)


class Tags(HTMLParser):
    """What a page is made of, and whether everything that is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_from_elsewhere_and_is_well_formed() -> None:
    page = report_html(facts(), steps(), left_s=75.0)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert not {"script", "link", "img", "iframe"} & set(tags.seen)
    assert "http" not in page.replace("http-equiv", "")
    assert "a/model &lt;8B&gt;" in page
    assert "FITS &lt;all of it&gt;" in page
    for words in ("40 / 100", "running", "waiting: nothing under way", "step 3, ", "left"):
        assert words in page


def test_only_a_page_of_a_run_that_goes_on_loads_itself_anew() -> None:
    assert 'http-equiv="refresh"' in report_html(facts(), steps())
    for state in ("finished", "interrupted"):
        page = report_html(facts(state=state), steps())
        assert 'http-equiv="refresh"' not in page
        assert state in page


@pytest.mark.parametrize("num_points", [0, 1, 2])
def test_the_first_moments_of_a_run_have_a_page(num_points: int) -> None:
    page = report_html(facts(num_points=num_points), steps()[:num_points])
    assert "nan" not in page
    assert ("Nothing yet" in page) == (num_points == 0)


def test_long_runs_make_small_pages_quickly(tmp_path: Path) -> None:
    points = evenly_chosen(range(1, 100_001))
    assert len(points) <= 500
    assert points[-1] == 100_000
    start_s = time.process_time()
    save_report(tmp_path / "out" / "report.html", facts(num_points=500), steps(num_blocks=2000))
    assert time.process_time() - start_s < 1
    assert (tmp_path / "out" / "report.html").stat().st_size < 400_000


def test_a_browser_draws_the_page(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    save_report(tmp_path / "report.html", facts(), steps())
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,1500"]
    page = (tmp_path / "report.html").as_uri()
    command = [browser, *options, f"--user-data-dir={tmp_path / 'profile'}"]
    shot = tmp_path / "report.png"
    subprocess.run([*command, f"--screenshot={shot}", page], check=True, capture_output=True, timeout=120)
    dumped = subprocess.run([*command, "--dump-dom", page], check=True, capture_output=True, text=True, timeout=120)
    assert shot.read_bytes().startswith(b"\x89PNG")
    assert len(re.findall("<rect", dumped.stdout)) > 100  # the timeline is there as drawn by the browser
