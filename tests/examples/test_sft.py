"""examples/sft.py, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import ROOT, child_environment
from examples import sft
from examples.demo_model import DemoShape, make_rows, make_tokenizer, write_model, write_rows

SHAPE = DemoShape(hidden=64, num_layers=6, mlp=176, num_heads=4, num_kv_heads=2)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    rows = make_rows(64)
    write_model(tmp_path / "model", make_tokenizer(rows), shape=SHAPE)
    write_rows(tmp_path / "train.jsonl", rows)
    return tmp_path


def test_rows_with_the_columns_of_alpaca_become_prompts_and_completions(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Translate.", "input": "bonjour", "output": "hello", "text": "all of it"},
        {"instruction": "Say hello.", "input": "", "output": "Hello!", "text": "all of it"},
    ]
    (tmp_path / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = sft.load_rows(str(tmp_path / "alpaca.jsonl"))
    assert found.column_names == ["prompt", "completion"]
    assert found[0]["prompt"] == [{"role": "user", "content": "Translate.\n\nbonjour"}]
    assert found[1]["prompt"] == [{"role": "user", "content": "Say hello."}]
    assert found[1]["completion"] == [{"role": "assistant", "content": "Hello!"}]


def test_rows_with_other_columns_are_named_with_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "Why?", "answer": "Because."}\n')
    with pytest.raises(SystemExit, match=r"its columns are answer, question; expected one of: text; messages; "):
        sft.load_rows(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "cut.jsonl",
            '{"text": "Arr."}\n\n{"text": "Ar\n{"text": "Arr."}\n',
            r"line 3 is not JSON \(.*: \{\"text\": \"Ar$",
        ),
        ("list.jsonl", '{"text": "Arr."}\n["Arr."]\n', r"line 2 is not an object with columns: \[\"Arr.\"\]$"),
        ("empty.jsonl", "", "the file is empty; expected one JSON object on each line"),
        ("blank.jsonl", "\n\n", "the file is empty; expected one JSON object on each line"),
        ("none.jsonl", None, "no such file"),
    ],
)
def test_a_damaged_file_is_one_sentence_that_names_the_line(
    name: str, text: str | None, says: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=rf"^--data \S+{name}: {says}"):
        sft.load_rows(str(tmp_path / name))


def test_the_pirates_chats_are_whole_and_different() -> None:
    rows = sft.load_rows(str(ROOT / "examples" / "data" / "pirate.jsonl"))
    questions = [row["prompt"][0]["content"] for row in rows]
    assert 150 <= len(rows) == len(set(questions)) <= 300
    answers = [row["completion"][0]["content"] for row in rows]
    assert all("matey" in answer.lower() or "arr" in answer.lower() or "hearty" in answer.lower() for answer in answers)


def test_resuming_where_nothing_is_says_so_before_anything_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["sft.py", "--model", "nowhere", "--data", "nothing", "--output", str(tmp_path), "--resume"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit, match=f"--resume: no checkpoint in {tmp_path}; leave it out"):
        sft.main()
    monkeypatch.setattr(sys, "argv", [*given, str(tmp_path / "checkpoint-9")])
    with pytest.raises(SystemExit, match=f"--resume: no checkpoint {tmp_path / 'checkpoint-9'}; leave it out"):
        sft.main()


@pytest.mark.parametrize(
    ("state", "options", "is_finished"),
    [
        ({"global_step": 40, "epoch": 0.4}, ["--max-steps", "40"], True),
        ({"global_step": 40, "epoch": 0.4}, ["--max-steps", "41"], False),
        ({"global_step": 40, "epoch": 0.4}, [], False),
        ({"global_step": 100, "epoch": 1.0}, [], True),
        ({"global_step": 100, "epoch": 1.0}, ["--epochs", "2"], False),
        ({"global_step": 4, "epoch": 4 / 7}, ["--epochs", "0.5"], True),
        ("not json", [], False),
        ({"unknown": 1}, [], False),
        (None, [], False),
    ],
)
def test_a_finished_run_is_known_by_its_last_checkpoint(
    state: object, options: list[str], is_finished: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sft.py", "--model", "m", "--data", "d", *options])
    if state is not None:
        text = state if isinstance(state, str) else json.dumps(state)
        (tmp_path / "trainer_state.json").write_text(text)
    assert sft.is_finished(str(tmp_path), sft.parse()) == is_finished


def test_resuming_a_finished_run_trains_nothing_and_says_where_its_adapter_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    last = tmp_path / "checkpoint-40"
    last.mkdir()
    (last / "trainer_state.json").write_text(json.dumps({"global_step": 40, "max_steps": 40, "epoch": 0.4}))
    given = ["sft.py", "--model", "nowhere", "--data", "nothing", "--output", str(tmp_path), "--max-steps", "40"]
    monkeypatch.setattr(sys, "argv", [*given, "--resume"])
    sft.main()
    shown = capsys.readouterr().out
    assert shown.startswith(f"nothing is left to train: {last} has all steps")
    assert f"lowmem merge nowhere --adapter {last}" in shown


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path: Path) -> None:
    assert sft.last_checkpoint(str(tmp_path / "nowhere")) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11"):
        (tmp_path / name).mkdir()
    assert sft.last_checkpoint(str(tmp_path)) is None
    for name in ("checkpoint-9", "checkpoint-10"):
        (tmp_path / name / "trainer_state.json").write_text("{}")
    assert sft.last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")


def run_sft(inputs: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / "sft.py"), "--output", str(inputs / "out")]
    command += ["--model", str(inputs / "model"), "--data", str(inputs / "train.jsonl"), *options]
    env = {**child_environment(), "HF_HOME": os.environ["HF_HOME"], "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_trains_saves_and_goes_on_where_it_stopped(inputs: Path) -> None:
    train = ["--host", "0", "--batch-size", "4", "--save-steps", "2", "--seq-len", "64"]
    first = run_sft(inputs, *train, "--max-steps", "2")
    assert first.returncode == 0, first.stderr
    names = ("adapter_model.safetensors", "trace.json", "timeline.png", "trainer_state.json")
    assert all((inputs / "out" / name).stat().st_size > 0 for name in names)
    second = run_sft(inputs, *train, "--max-steps", "4", "--resume")
    assert second.returncode == 0, second.stderr
    history = json.loads((inputs / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]


@pytest.mark.slow
def test_plan_that_does_not_fit_stops_before_anything_loads(inputs: Path) -> None:
    done = run_sft(inputs, "--device", "1KiB", "--host", "0")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert not (inputs / "out").exists()
