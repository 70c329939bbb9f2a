"""The ten lines of README.md, as printed, on whatever this machine computes on."""

from pathlib import Path

import pytest
from datasets import load_dataset
from safetensors import safe_open

from benchmarks.harness import ROOT
from examples.demo_model import DemoShape, make_rows, make_tokenizer, write_model, write_rows

SHAPE = DemoShape(hidden=64, num_layers=2, mlp=176, num_heads=4, num_kv_heads=2)


def ten_lines() -> str:
    text = (ROOT / "README.md").read_text()
    return text.partition("```python\n")[2].partition("```")[0]


# Where there is no GPU, torch says that memory is pinned for nothing.
@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
# Three steps at TRL's learning rate change hardly a bf16 value, and the merge says so.
@pytest.mark.filterwarnings("ignore:rounding to bfloat16 lost:UserWarning")
def test_the_ten_lines_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(16)
    write_model(tmp_path / "model", make_tokenizer(rows), shape=SHAPE)
    write_rows(tmp_path / "rows.jsonl", rows)
    dataset = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")
    monkeypatch.chdir(tmp_path)
    program = ten_lines()
    assert len([line for line in program.splitlines() if line]) == 10
    assert program.count('"Qwen/Qwen3-8B"') == 2
    exec(program.replace("Qwen/Qwen3-8B", str(tmp_path / "model")), {"dataset": dataset})
    with safe_open(next((tmp_path / "merged").glob("*.safetensors")), framework="pt") as merged:
        assert len(merged.keys()) > 10
