"""A run that is killed and resumed ends with the adapter of the run that was not."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.zoo.architectures import build

_ROOT = Path(__file__).parents[2]


def test_killed_and_resumed_twice_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "model")
    command = [sys.executable, "-W", "ignore", "-m", "tests.lowmem.kill_job", str(folder), str(tmp_path), "2", "6"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("finished\n")
    expected = load_file(tmp_path / "whole" / "final" / "adapter_model.safetensors")
    got = load_file(tmp_path / "killed" / "final" / "adapter_model.safetensors")
    assert expected.keys() == got.keys()
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name
