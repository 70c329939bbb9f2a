"""The notebook, headless and in a folder of its own: every cell runs, nothing is pink, and what it shows is there."""

import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import LlamaConfig

import lowmem
from benchmarks.harness import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")


COUNT = """
import gc
from transformers import LlamaForCausalLM
gc.collect()
sum(issubclass(type(found), LlamaForCausalLM) and hasattr(found, "lowmem_plan") for found in gc.get_objects())
"""


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run the notebook, and the cells of plan and training a second time, with fewer steps."""
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    repeated = [cell.source for cell in notebook.cells if "lowmem.plan(" in cell.source or "SFTTrainer(" in cell.source]
    notebook.cells += [nbformat.v4.new_code_cell(source.replace("max_steps=16", "max_steps=3")) for source in repeated]
    notebook.cells.append(nbformat.v4.new_code_cell(COUNT))
    (tmp_path / "examples").mkdir(exist_ok=True)
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "examples")}}
    )
    client.execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_the_budget_for_the_real_model_is_enough(tmp_path: Path) -> None:
    source = (ROOT / "examples" / "quickstart.ipynb").read_text()
    found = re.search(r'device=\\"(\w+)\\" if MODEL.name == \\"smollm2\\"', source)
    assert found is not None
    # Of SmolLM2-135M; a plan needs its configuration only.
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    config = LlamaConfig(**sizes, **heads, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    budget = lowmem.Budget(device=found[1], host="0")
    assert "batch_size=8, seq_len=128" in source
    assert lowmem.plan(tmp_path, batch_size=8, seq_len=128, peft_config=lora, budget=budget, device="cpu").fits


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_every_cell_runs_also_twice_and_nothing_is_pink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = run(tmp_path, monkeypatch)
    pink = [output["text"] for output in outputs if output.get("name") == "stderr"]
    assert not pink, pink
    assert outputs[-1]["data"]["text/plain"] == "1", "streamed models that earlier cells opened are held"
    shown = [output["data"] for output in outputs if "data" in output]
    printed = [{"text/plain": output["text"]} for output in outputs if output.get("name") == "stdout"]
    texts = [data.get("text/plain", "") + data.get("text/html", "") for data in (*shown, *printed)]
    for words in ("FITS", "(streamed by lowmem)", "finished after 16 steps", "lowmem/step_s", "Training Loss"):
        assert any(words in text for text in texts), words
    assert sum("image/png" in data for data in shown) == 2  # the timeline, once for each training
    assert (tmp_path / "examples" / "merged" / "config.json").is_file()
    assert "finished" in (tmp_path / "examples" / "out" / "report.html").read_text()
