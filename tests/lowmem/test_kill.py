"""A run that is killed and resumed ends with the adapter of the run that was not."""

import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.zoo.architectures import build

_ROOT = Path(__file__).parents[2]


def _start(folder: Path, output: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.lowmem.kill_job", str(folder), str(output)],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(job: subprocess.Popen[str]) -> None:
    out, err = job.communicate(timeout=300)
    assert job.returncode == 0, err[-3000:]
    assert out.endswith("finished\n")


def _kill_within_a_step(job: subprocess.Popen[str], *, after: str, delay_s: float) -> None:
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith(after):
            break
    time.sleep(delay_s)
    job.kill()
    job.communicate(timeout=60)
    assert job.returncode == -9


def test_killed_and_resumed_twice_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    folder = Path(build("llama", tmp_path / "model"))
    whole = _start(folder, tmp_path / "whole")
    rng = random.Random(3)
    for step in (2, 6):
        _kill_within_a_step(_start(folder, tmp_path / "killed"), after=f"step {step}", delay_s=rng.uniform(0, 0.05))
    _finish(_start(folder, tmp_path / "killed"))
    _finish(whole)
    expected = load_file(tmp_path / "whole" / "final" / "adapter_model.safetensors")
    got = load_file(tmp_path / "killed" / "final" / "adapter_model.safetensors")
    assert expected.keys() == got.keys()
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name
