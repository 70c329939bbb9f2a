"""The documentation: pages made from the code have a line for everything, links lead somewhere, and it builds."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import offload.errors
from docs.make_tables import DOCS, architectures_page, refusals, refusals_page
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
