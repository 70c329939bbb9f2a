"""The examples over two processes, started as docs/processes.md says: rank 0 alone prints and saves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.harness import ROOT, child_environment
from examples.demo_model import DemoShape
from examples.sft import last_checkpoint
from examples.small_inputs import write_inputs

SHAPE = DemoShape(hidden=64, num_layers=3, mlp=176, num_heads=4, num_kv_heads=2, head_std=0.4)
# Ports chosen by the system, so that such tests may run at a time.
TORCHRUN = ["torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint"]
TORCHRUN += ["localhost:0"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
SHORT = ["--seq-len", "64", "--batch-size", "2", "--max-steps", "2"]
RUNS = {
    "sft": (ACCELERATE, "sft.py", "sft.jsonl", [*SHORT, "--save-steps", "1"]),
    "dpo": (TORCHRUN, "dpo.py", "preferences.jsonl", SHORT),
    "grpo": (
        TORCHRUN,
        "grpo.py",
        "questions.jsonl",
        ["--batch-size", "4", "--max-steps", "1", "--num-generations", "2"],
    ),
    "two_stage": (TORCHRUN, "two_stage.py", "", ["--steps", "1", "1", "1"]),
}


def start(inputs: Path, launcher: list[str], name: str, *options: str) -> subprocess.Popen[str]:
    """A launcher at the head of a process group, as one that a shell starts; what it says goes to files."""
    env = {**child_environment(), "HF_HOME": os.environ["HF_HOME"], "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, str(ROOT / "examples" / name), "--model", str(inputs / "model")]
    with (inputs / "printed").open("w") as printed, (inputs / "warned").open("w") as warned:
        return subprocess.Popen(
            [*command, *options], env=env, stdout=printed, stderr=warned, text=True, start_new_session=True
        )


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    write_inputs(tmp_path, shape=SHAPE, num_questions=4)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "name", "data", "options"), RUNS.values(), ids=RUNS)
def test_two_ranks_print_and_save_once(
    launcher: list[str], name: str, data: str, options: list[str], inputs: Path
) -> None:
    output = inputs / "out"
    given = ["--data", str(inputs / data), "--output", str(output), "--host", "0", *options]
    process = start(inputs, launcher, name, *given)
    assert process.wait(timeout=300) == 0, (inputs / "warned").read_text()[-4000:]
    printed = (inputs / "printed").read_text()
    assert "2 ranks of the machine read blocks once" in printed
    for line in ("decoder blocks", "adapter: ", "merge it: ", "loss: ", "after sft: "):
        assert sum(found.startswith(line) for found in printed.splitlines()) <= 1, line
    assert printed.count("decoder blocks") == 1
    adapter = output / "grpo" if name == "two_stage.py" else output
    assert load_file(adapter / "adapter_model.safetensors")
    assert "after grpo" in printed if name == "two_stage.py" else f"adapter: {output}" in printed


@pytest.mark.slow
def test_interrupted_ranks_say_where_to_go_on_and_do(inputs: Path) -> None:
    output = inputs / "out"
    given = ["--data", str(inputs / "sft.jsonl"), "--output", str(output), "--host", "0", "--seq-len", "64"]
    given += ["--batch-size", "2", "--save-steps", "1"]
    before = set(os.listdir("/dev/shm"))
    process = start(inputs, TORCHRUN, "sft.py", *given, "--max-steps", "2000")
    end_s = time.monotonic() + 240
    while not (output / "checkpoint-2" / "rng_state_1.pth").exists():
        assert process.poll() is None, (inputs / "warned").read_text()[-4000:]
        assert time.monotonic() < end_s
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) != 0
    assert set(os.listdir("/dev/shm")) <= before
    said = (inputs / "warned").read_text()
    assert said.count("run it again with --resume") == 1
    whole = last_checkpoint(str(output))
    assert whole is not None
    assert f"stopped; {whole}: run it again with --resume" in said
    num_steps = int(whole.rpartition("-")[2]) + 2
    process = start(inputs, TORCHRUN, "sft.py", *given, "--max-steps", str(num_steps), "--resume")
    assert process.wait(timeout=240) == 0, (inputs / "warned").read_text()[-4000:]
    state = json.loads((output / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == list(range(1, num_steps + 1))
