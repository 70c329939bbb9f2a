"""The documentation: pages made from the code have a line for everything, links lead somewhere, and it builds."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import offload.errors
from benchmarks.hardware_table import MODELS, plan_on, table
from docs.make_tables import DOCS, architectures_page, refusals, refusals_page
from lowmem.machines.cards import find_card
from offload import OffloadError
from tests.zoo.architectures import ARCHITECTURES

ROOT = DOCS.parent
PAGES = sorted(path for path in DOCS.glob("*.md") if path.name != "refusals.md")


def test_every_refusal_has_its_line() -> None:
    found, page = refusals(), refusals_page()
    # Each call of the class in the code, however it is written; the definition itself is none.
    num_calls = sum(
        len(re.findall(r"(?<!class )\bUnsupportedError\(", path.read_text()))
        for path in (ROOT / "lowmem").rglob("*.py")
    )
    assert len(found) == num_calls > 80
    assert page.count("\n| ") == num_calls + page.count("| refused | because | instead |")
    whole = [refusal for refusal in found if refusal.what != "…" or refusal.reason != "…"]
    assert len(whole) > 0.9 * num_calls


def test_every_error_of_ours_has_its_line_in_troubleshooting() -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    errors = [
        name
        for name, kind in vars(offload.errors).items()
        if isinstance(kind, type) and issubclass(kind, OffloadError) and kind is not OffloadError and name[0] != "_"
    ]
    assert len(errors) >= 8
    for name in [*errors, "UnsupportedError"]:
        assert f"| `{name}` |" in text, name


def test_every_architecture_has_its_line() -> None:
    text = (DOCS / "architectures.md").read_text()
    names = [line.split("|")[1].strip().replace("\\", "") for line in text.splitlines() if line.startswith("| ")][1:]
    assert names == list(ARCHITECTURES)


@pytest.mark.slow
def test_the_page_of_architectures_is_what_the_survey_finds() -> None:
    assert (DOCS / "architectures.md").read_text() == architectures_page()


def _planned_rows() -> list[list[str]]:
    lines = (ROOT / "README.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.endswith("| planned |")]


def _plain(name: str) -> str:
    return re.sub(r"[ -]", "", name.partition(",")[0])


@pytest.mark.parametrize("row", _planned_rows(), ids=lambda row: _plain(row[0]))
def test_planned_rows_of_readme_are_what_the_planner_says(row: list[str], tmp_path: Path) -> None:
    name = next(known for known in MODELS if _plain(known) == _plain(row[0]))
    gpu, _, ram = row[1].partition(", ")
    card = next(gpu[:end] for end in range(len(gpu), 0, -1) if _is_card(gpu[:end]))
    batch_size, seq_len = map(int, row[2].split(" x "))
    machine = (card, ram.replace(" RAM", "").replace(" ", ""), 5.0)
    plan = plan_on(tmp_path, name, machine, batch_size=batch_size, seq_len=seq_len)
    assert plan.fits
    assert row[3] == f"{plan.device_bytes / 2**30:.1f}, {plan.kept_host_bytes / 2**30:.1f}"
    assert row[4] == f"{plan.step_s:.0f}"


def _is_card(name: str) -> bool:
    try:
        return bool(find_card(name))
    except ValueError:
        return False


@pytest.mark.slow
def test_the_page_of_hardware_is_what_the_planner_says() -> None:
    assert (DOCS / "hardware.md").read_text() == "\n".join(table()) + "\n"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert not [page.name for page in PAGES if not re.search(rf": {re.escape(page.name)}$", navigation, re.M)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        name = target.partition("#")[0]
        if name and "://" not in name and name != "refusals.md":  # which `make docs` writes
            assert (page.parent / name).exists(), f"{page.name}: {target}"


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    refused = DOCS / "refusals.md"
    was_there = refused.exists()
    refused.write_text(refusals_page())
    try:
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
        env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    finally:
        if not was_there:
            refused.unlink()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "lowmem.from_pretrained" in (tmp_path / "site" / "api.html").read_text()


def test_make_help_has_a_line_for_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    printed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in set(phony.split()) - {"help"}:
        assert re.search(rf"^make {target} +\S", printed, re.MULTILINE), target
    # As ever: `make` alone installs.
    assert ".DEFAULT_GOAL := setup" in makefile


def test_benchmarks_do_not_tell_of_kernels_that_nothing_runs() -> None:
    code = (
        "import logging, benchmarks\n"
        "log = logging.getLogger('bitsandbytes.backends.cpu.ops')\n"
        "log.warning('Failed to load CPU gemm_4bit_forward from kernels-community: ...')\n"
        "log.warning('something else')\n"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stderr
    assert said == "something else\n"
