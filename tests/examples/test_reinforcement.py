"""examples/dpo.py, grpo.py and two_stage.py, as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import ROOT, child_environment
from examples.demo_model import DemoShape, make_rows
from examples.grpo import exact_match, is_a_sentence
from examples.small_inputs import few_questions, preferences, question, questions, write_inputs

SHAPE = DemoShape(hidden=64, num_layers=3, mlp=176, num_heads=4, num_kv_heads=2, head_std=0.4)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    write_inputs(tmp_path, shape=SHAPE, num_questions=4)
    return tmp_path


def run_example(name: str, inputs: Path, *options: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), "--model", str(inputs / "model"), "--host", "0", *options]
    env = {**child_environment(), "HF_HOME": os.environ["HF_HOME"], "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_rewards_are_one_for_the_answer_and_a_little_for_its_form() -> None:
    said = [[{"role": "assistant", "content": text}] for text in (" The sky is blue.", "the sky", "Snow. Is. White.")]
    assert exact_match(said, answer=["The sky is blue."] * 3) == [1.0, 0.0, 0.0]
    assert is_a_sentence(said) == [0.1, 0.0, 0.0]


def test_small_inputs_agree_with_one_another() -> None:
    rows = few_questions(make_rows(200), num_questions=5)
    assert len({question(row) for row in rows}) == len(questions(rows)) == 5
    assert all(row["chosen"] != row["rejected"] for row in preferences(rows))


@pytest.mark.slow
def test_dpo_prefers_the_chosen_answers(inputs: Path) -> None:
    data = str(inputs / "preferences.jsonl")
    options = ["--data", data, "--output", str(inputs / "out"), "--max-steps", "8", "--learning-rate", "3e-3"]
    printed = run_example("dpo.py", inputs, *options, "--seq-len", "64")
    state = json.loads((inputs / "out" / "trainer_state.json").read_text())["log_history"]
    margins = [entry["rewards/margins"] for entry in state if "rewards/margins" in entry]
    assert margins[-1] > margins[0] + 0.05
    assert "rewards/accuracies" in printed
    assert (inputs / "out" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_grpo_goes_on_with_an_adapter_and_earns_more(inputs: Path) -> None:
    sft = ["--data", str(inputs / "sft.jsonl"), "--output", str(inputs / "sft"), "--batch-size", "16"]
    run_example("sft.py", inputs, *sft, "--max-steps", "10", "--learning-rate", "1e-2", "--seq-len", "64")
    options = ["--data", str(inputs / "questions.jsonl"), "--adapter", str(inputs / "sft"), "--learning-rate", "2e-3"]
    options += ["--output", str(inputs / "out"), "--batch-size", "32", "--completion-tokens", "16", "--max-steps", "12"]
    printed = run_example("grpo.py", inputs, *options)
    first, last = (float(word) for word in printed.split("mean reward: ")[1].split("\n")[0].split(" -> "))
    assert last > first


@pytest.mark.slow
def test_one_adapter_goes_through_all_stages(inputs: Path) -> None:
    options = ["--data", str(inputs), "--output", str(inputs / "out"), "--steps", "12", "2", "2", "--seq-len", "48"]
    printed = run_example("two_stage.py", inputs, *options)
    assert [line.split(":")[0] for line in printed.splitlines() if line.startswith("after ")] == [
        "after sft",
        "after dpo",
        "after grpo",
    ]
    for stage in ("sft", "dpo", "grpo"):
        config = json.loads((inputs / "out" / stage / "adapter_config.json").read_text())
        assert config["use_dora"]
