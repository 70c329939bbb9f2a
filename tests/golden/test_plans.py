"""Plans of ten jobs, word for word as recorded in plans.json: a change of the planner is seen, and recorded on purpose.

LOWMEM_RECORD=1 python -m pytest tests/golden      writes them anew
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, LlamaConfig

import lowmem
from tests.lowmem.sparse_checkpoint import write_sparse
from tests.zoo.architectures import tiny_config

RECORDED = Path(__file__).parent / "plans.json"
ALL_LINEAR = LoraConfig(r=16, target_modules="all-linear")
DORA = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], use_dora=True)
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "1.1b-lora": ("1.1b", {"seq_len": 512, "peft_config": ALL_LINEAR, "device": "1.5GiB", "host": "0"}),
    "1.1b-lora-batch": (
        "1.1b",
        {"seq_len": 512, "batch_size": 8, "peft_config": ALL_LINEAR, "device": "2GiB", "host": "1GiB"},
    ),
    "1.1b-bf16-chunks": (
        "1.1b",
        {"seq_len": 4096, "dtype": "bfloat16", "peft_config": ALL_LINEAR, "device": "1GiB", "host": "0", "disk": "x"},
    ),
    "1.1b-dora-dpo": (
        "1.1b",
        {"task": "dpo", "seq_len": 256, "batch_size": 2, "peft_config": DORA, "device": "3GiB", "host": "512MiB"},
    ),
    "1.1b-full-host": ("1.1b", {"seq_len": 256, "tuning": "full", "device": "2GiB", "host": "20GiB"}),
    "1.1b-full-disk": ("1.1b", {"seq_len": 256, "tuning": "full", "device": "1.5GiB", "host": "1GiB", "disk": "x"}),
    "1.1b-grpo": (
        "1.1b",
        {"task": "grpo", "seq_len": 384, "batch_size": 8, "completion_tokens": 128, "device": "2GiB", "host": "2GiB"},
    ),
    "1.1b-too-small": ("1.1b", {"seq_len": 512, "peft_config": ALL_LINEAR, "device": "64MiB", "host": "0"}),
    "mixtral-kto": (
        "mixtral",
        {"task": "kto", "seq_len": 32, "batch_size": 2, "peft_config": ALL_LINEAR, "device": "2MiB", "host": "0"},
    ),
    "gemma3-resident": ("gemma3_text", {"seq_len": 32, "peft_config": ALL_LINEAR, "device": "1GiB", "host": "1GiB"}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    large = LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=22,
        intermediate_size=5632,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
    )
    configs = {"1.1b": large, "mixtral": tiny_config("mixtral"), "gemma3_text": tiny_config("gemma3_text")}
    return {name: write_sparse(tmp_path_factory.mktemp(name), config) for name, config in configs.items()}


def planned(folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    given = dict(arguments)
    budget = lowmem.Budget(device=given.pop("device"), host=given.pop("host"), disk=given.pop("disk", None))
    # Read back as saved: what is compared is what a file would hold, without the folder's own name.
    made = lowmem.plan(folder, budget=budget, device="cpu", **given)
    return json.loads(json.dumps(made.to_dict()).replace(json.dumps(str(folder))[1:-1], "MODEL"))


@pytest.fixture(autouse=True)
def _of_any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    # Advice keeps to the RAM that there is.
    monkeypatch.setattr("lowmem.machines.cards.installed_ram_bytes", lambda: 24 << 30)


@pytest.mark.parametrize("name", JOBS)
def test_plan_is_as_recorded(name: str, folders: dict[str, Path]) -> None:
    model, arguments = JOBS[name]
    assert AutoConfig.from_pretrained(folders[model]) is not None
    assert torch.get_default_dtype() == torch.float32
    found = planned(folders[model], arguments)
    recorded = json.loads(RECORDED.read_text()) if RECORDED.is_file() else {}
    if os.environ.get("LOWMEM_RECORD"):
        RECORDED.write_text(json.dumps(recorded | {name: found}, indent=1, sort_keys=True) + "\n")
        return
    assert found == recorded[name]
