"""`make gpu-check` in tiny sizes: what it runs on a card runs, is measured and is told."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.checkpoints import ExpertsShape
from benchmarks.gpu_check import CheckedJob, check, table

pytestmark = [
    pytest.mark.gpu,
    # transformers and TRL, about their own calls.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # PEFT, about ranks that it sets itself for a mixture's stacks of experts.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]
TINY = (
    CheckedJob(name="plain", shape="tiny", seq_len=32, device=None, mode="plain", num_steps=2),
    CheckedJob(name="streamed", shape="tiny", seq_len=32, device="8MiB", host="0", num_steps=2),
    CheckedJob(name="plain-dora", shape="tiny", seq_len=32, device=None, mode="plain", use_dora=True, num_steps=2),
    CheckedJob(name="dora", shape="tiny", seq_len=32, device="8MiB", host="0", use_dora=True, num_steps=2),
    CheckedJob(name="plain-experts", shape="tiny-experts", seq_len=32, device=None, mode="plain", num_steps=2),
    CheckedJob(name="experts", shape="tiny-experts", seq_len=32, device="8MiB", host="4MiB", num_steps=2),
    CheckedJob(name="full", shape="tiny", seq_len=32, device="64MiB", tuning="full", uses_disk=True, num_steps=2),
)


def test_every_check_is_run_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = ExpertsShape(
        hidden=64, num_layers=2, mlp=32, num_heads=4, num_kv_heads=2, vocab=512, num_experts=8, num_chosen=2
    )
    monkeypatch.setitem(gpu_check.SHAPES, "tiny-experts", experts)
    rows = check(root=tmp_path, only=["cpu", *(job.name for job in TINY)], jobs=TINY)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"benchmark')]
    results = {line["case"]: line for line in lines}
    assert set(results) == {"cpu", *(job.name for job in TINY)}
    assert results["cpu"]["largest_difference"] < 1e-3
    for job in TINY:
        result = results[job.name]
        assert "failed" not in result, result
        assert result["step_s"] > 0
        assert result["peak_allocated_bytes"] > 0
        assert len(result["losses"]) == job.num_steps
    for ours, plain in (("streamed", "plain"), ("dora", "plain-dora"), ("experts", "plain-experts")):
        assert results[ours]["losses"] == pytest.approx(results[plain]["losses"], rel=1e-3)
    text = table(rows)
    assert torch.cuda.get_device_name() in text
    assert text.count("\n| ") == len(rows) + 0


def test_what_there_is_no_room_for_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check.torch.cuda, "mem_get_info", lambda device=None: (1 << 20, 1 << 20))
    ((name, what),) = check(root=tmp_path, only=["streamed"], jobs=TINY)
    assert (name, what) == ("streamed", "left out: the card has 0.0 GiB")
