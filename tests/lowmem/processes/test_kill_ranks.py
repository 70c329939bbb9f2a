"""When a rank is killed the others end by themselves, say why, and leave nothing; the run goes on bit by bit."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.lowmem.processes.test_ranks import ROOT, case, of_rank, run_ranks
from tests.zoo.architectures import build


def assert_the_others_ended(folder: Path) -> None:
    """What a job that kills ranks has found in its folder: the others said why, soon, and left nothing."""
    found = json.loads((folder / "found.json").read_text())
    assert found["left"] == []
    for killed in found["killed"]:
        assert killed["status"] not in (None, 0), f"rank {1 - killed['rank']} did not end: {killed}"
        assert killed["ended_s"] < 60
        assert "ended without a word" in killed["words"], killed


@pytest.mark.slow
@pytest.mark.parametrize(("num", "seed"), [(1, 0), (5, 1), (5, 2)])
def test_a_rank_that_is_killed_takes_nothing_with_it(num: int, seed: int, tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "model")
    command = [sys.executable, "-W", "ignore", "-m", "tests.lowmem.processes.kill_ranks_job"]
    command += [str(folder), str(tmp_path), str(num), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert_the_others_ended(tmp_path)
    expected = load_file(tmp_path / "whole" / "final" / "adapter_model.safetensors")
    got = load_file(tmp_path / "killed" / "final" / "adapter_model.safetensors")
    assert expected.keys() == got.keys()
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name
    assert not [path for path in tmp_path.rglob("*") if "lowmem-blocks" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_rank_that_is_killed_while_models_are_opened_takes_the_others_with_it(
    rank: int, when: str, tmp_path: Path
) -> None:
    build("llama", tmp_path / "llama")
    (tmp_path / "cases.json").write_text(json.dumps([case("killed", dies={"rank": rank, "when": when})]))
    before = set(os.listdir("/dev/shm"))
    done = run_ranks(tmp_path, limit_s=240)
    ended_s = time.time() - float((tmp_path / "killed.txt").read_text())
    assert done.returncode != 0
    assert ended_s < 60
    # torchrun's summary names whoever was the first.
    assert f"rank      : {rank} (local_rank: {rank})" in done.stdout + done.stderr
    assert "Signal 9 (SIGKILL)" in done.stdout + done.stderr
    assert set(os.listdir("/dev/shm")) <= before


@pytest.mark.slow
@pytest.mark.parametrize("when", ["after", "training"])
def test_ranks_that_the_launcher_starts_again_hear_nothing_of_those_before(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if when == "training":
        # torch's own process group looks for the ranks of before in a store that torchrun keeps.
        monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    build("llama", tmp_path / "llama")
    dies = {"rank": 1, "when": when, "attempt": "0"}
    (tmp_path / "cases.json").write_text(json.dumps([case("again", dies=dies), case("whole")]))
    done = run_ranks(tmp_path, "--max-restarts", "1", limit_s=300)
    assert done.returncode == 0, done.stderr[-6000:]
    assert (tmp_path / "killed.txt").exists()
    assert "reads and keeps its blocks for itself" not in done.stderr
    again, whole = of_rank(tmp_path, "again", 0), of_rank(tmp_path, "whole", 0)
    for name, weight in whole["adapter"].items():
        assert torch.equal(again["adapter"][name], weight), name
