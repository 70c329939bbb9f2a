"""Results are single JSON lines that carry what is needed to judge them."""

import json
from pathlib import Path

import pytest

from benchmarks.checkpoints import ensure_checkpoint
from benchmarks.harness import emit, emit_skip, last_json, sample
from benchmarks.lockstep import LockstepJob
from benchmarks.raw_disk import SETTINGS, best_setting, read_raw
from benchmarks.sft_job import Job, parse


def test_warmup_is_left_out_of_median_and_spread() -> None:
    found = sample([9.0, 1.0, 3.0, 2.0], num_warmup=1)
    assert found.to_dict() == {"median": 2.0, "min": 1.0, "max": 3.0, "num_repeats": 3, "num_warmup": 1}


def test_series_without_more_than_warmup_is_refused() -> None:
    with pytest.raises(ValueError, match="2 measurements leave none after 2 of warm-up"):
        sample([1.0, 2.0], num_warmup=2)


def test_result_is_one_line_with_machine_and_versions(capsys: pytest.CaptureFixture[str]) -> None:
    emit("bench", "case", step_s={"median": 1.5})
    emit_skip("bench", "other", "no disk")
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["step_s"] == {"median": 1.5}
    assert first["hardware"]["num_cores"] >= 1
    assert first["versions"]["torch"]
    assert second["skipped"] == "no disk"


def test_report_is_the_last_json_object_of_the_output() -> None:
    assert last_json('{"a": 1}\nnoise\n{"b": 2}\nbye\n') == {"b": 2}
    with pytest.raises(ValueError, match="no JSON object"):
        last_json("Traceback\n")


def test_job_survives_its_command_line() -> None:
    job = Job(folder=Path("/models/x"), mode="streamed", batch_size=8, device_budget="1GiB", num_steps=2)
    assert parse(job.arguments()) == (job, False)


def test_raw_read_reads_what_was_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(4 << 20))
    try:
        rate = read_raw([file], SETTINGS[0], max_bytes=2 << 20)
    except OSError as error:
        pytest.skip(f"no O_DIRECT under {tmp_path}: {error}")
    assert rate.nbytes == 2 << 20
    assert best_setting([file], max_bytes=1 << 20) in SETTINGS


@pytest.mark.slow
def test_jobs_in_lockstep_step_once_per_turn_and_report(tmp_path: Path) -> None:
    job = Job(folder=ensure_checkpoint("tiny", root=tmp_path), mode="plain", seq_len=16, num_steps=2)
    with LockstepJob(job) as first, LockstepJob(job) as second:
        turns = [child.step() for _ in range(2) for child in (first, second)]
        reports = [first.finish(), second.finish()]
    assert all(step_s > 0 for step_s in turns)
    assert reports[0]["step_s"] == [turns[0], turns[2]]
    assert reports[0]["losses"] == reports[1]["losses"]


@pytest.mark.slow
def test_job_that_fails_says_how(tmp_path: Path) -> None:
    job = Job(folder=tmp_path / "absent", mode="plain")
    with LockstepJob(job) as child, pytest.raises(RuntimeError, match="the job ended with status 1"):
        child.step()
