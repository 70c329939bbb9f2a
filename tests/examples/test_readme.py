"""The lines of README.md, as printed, on whatever this machine computes on; a tiny model takes the real one's place."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from benchmarks.harness import ROOT
from examples.demo_model import DemoShape, make_rows, make_tokenizer, write_model, write_rows

SHAPE = DemoShape(hidden=256, num_layers=4, mlp=704, num_heads=8, num_kv_heads=4, head_std=0.1)


def printed_lines() -> str:
    text = (ROOT / "README.md").read_text()
    return text.partition("```python\n")[2].partition("```")[0]


# Where there is no GPU, torch says that memory is pinned for nothing.
@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
# A few steps change hardly a bf16 value, and the merge says so.
@pytest.mark.filterwarnings("ignore:rounding to bfloat16 lost:UserWarning")
def test_the_lines_run_as_printed_and_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(160)
    write_model(tmp_path / "smollm2", make_tokenizer(rows), shape=SHAPE)
    (tmp_path / "examples" / "data").mkdir(parents=True)
    write_rows(tmp_path / "examples" / "data" / "pirate.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(printed_lines(), names)
    history = names["trainer"].state.log_history  # type: ignore[attr-defined]
    losses = [log["loss"] for log in history if "loss" in log]
    assert len(losses) == 20
    # Not by luck of one batch: the mean of the last three.
    assert sum(losses[-3:]) / 3 < 2 / 3 * losses[0]
    with safe_open(next((tmp_path / "merged").glob("*.safetensors")), framework="pt") as merged:
        assert len(merged.keys()) > 10
    assert json.loads((tmp_path / "out" / "trace.json").read_text())["otherData"]
    assert "finished" in (tmp_path / "out" / "report.html").read_text()


def test_files_that_readme_names_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    for link in text.split("](")[1:]:
        target = link.partition(")")[0].partition("#")[0]
        if target and "://" not in target:
            assert (ROOT / target).exists(), target


# PEFT imports bitsandbytes, which asks for a package of kernels that nothing here needs; lowmem keeps that quiet.
@pytest.mark.parametrize(
    "text",
    [
        *(path.read_text() for path in sorted((ROOT / "examples").glob("*.py"))),
        *(path.read_text().replace("\\n", "\n") for path in sorted((ROOT / "examples").glob("*.ipynb"))),
        printed_lines(),
    ],
    ids=lambda text: text.strip().splitlines()[0][:40],
)
def test_scripts_to_copy_import_lowmem_before_peft(text: str) -> None:
    if "import lowmem" in text and "from peft import" in text:
        assert text.index("import lowmem") < text.index("from peft import")
