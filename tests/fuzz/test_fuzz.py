"""A few seconds of each fuzzer; `make fuzz` runs them for as long as one likes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_QUICK = (
    "checkpoints",
    "packed-checkpoints",
    "adapters",
    "stores",
    "trainer-checkpoints",
    "essa-checkpoints",
    "doctors",
    "kills",
)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them in one process, because importing takes longer than the cases."""
    folder = tmp_path_factory.mktemp("fuzz")
    command = [sys.executable, "-m", "tests.fuzz", *_QUICK, "--quick", "--report", str(folder), "--folder", str(folder)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=900, check=False)
    (folder / "output").write_text(done.stdout + done.stderr)
    return folder


@pytest.mark.parametrize("name", _QUICK)
def test_damage_and_kills_end_in_a_refusal_or_the_same_result(name: str, reports: Path) -> None:
    file = reports / f"{name}.json"
    assert file.is_file(), (reports / "output").read_text()[-3000:]
    report = json.loads(file.read_text())
    faults = [
        f"seed {fault['seed']}: {fault['what']}\n{fault['detail']}\n{fault['trace']}" for fault in report["faults"]
    ]
    assert not faults, "\n\n".join(faults)
    assert report["outcomes"], "nothing was run"


@pytest.mark.slow
@pytest.mark.parametrize("kind", range(3))
def test_a_long_run_stays_as_it_is_after_the_first_steps(kind: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "soak", "--only", str(kind), "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
