"""When a rank is killed the others end by themselves, say why, and leave nothing; the run goes on bit by bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.zoo.architectures import build

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 10])
def test_a_rank_that_is_killed_takes_nothing_with_it(num: int, tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "model")
    command = [sys.executable, "-W", "ignore", "-m", "tests.lowmem.processes.kill_ranks_job"]
    done = subprocess.run(
        [*command, str(folder), str(tmp_path), str(num)], cwd=ROOT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["left"] == []
    for killed in found["killed"]:
        assert killed["status"] not in (None, 0), f"rank {1 - killed['rank']} did not end: {killed}"
        assert killed["ended_s"] < 60
        assert "ended without a word" in killed["words"], killed
    expected = load_file(tmp_path / "whole" / "final" / "adapter_model.safetensors")
    got = load_file(tmp_path / "killed" / "final" / "adapter_model.safetensors")
    assert expected.keys() == got.keys()
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name
    assert not [path for path in tmp_path.rglob("*") if "lowmem-blocks" in path.name]
