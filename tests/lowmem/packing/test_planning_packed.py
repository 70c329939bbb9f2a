"""Plans for packed weights before anything is packed: the sizes that the packed folder then has."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lowmem
from lowmem.cli import app
from lowmem.experts.visiting import ExpertScheduler
from lowmem.models.checkpoint import open_checkpoint
from lowmem.packing.place import as_if_packed
from lowmem.planning.planner import bare_shapes
from lowmem.streaming.runtime import runtime_of
from offload import Budget
from tests.zoo.architectures import build, tiny_config

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
BIG = lowmem.Machine(gpu="RTX 4090", ram="64GiB", disk_gbps=1)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_sizes_before_packing_are_those_after(name: str, quantization: str, tmp_path: Path) -> None:
    base = build(name, tmp_path / "base", dtype=torch.bfloat16)
    packed = lowmem.pack(base, quantization=quantization, output=tmp_path / "packed", device="cpu")
    before, after = (
        open_checkpoint(folder, name=str(folder), device=torch.device("cpu"), dtype=None) for folder in (base, packed)
    )
    with closing(before.source), closing(after.source):
        expected, found = bare_shapes(after), bare_shapes(as_if_packed(before, quantization))
    assert found.blocks == expected.blocks
    assert (found.stored_bytes, found.workspace_bytes) == (expected.stored_bytes, expected.workspace_bytes)
    assert set(found.stored_dtypes) == set(expected.stored_dtypes)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_configuration_alone_is_planned_as_its_checkpoint(name: str, tmp_path: Path) -> None:
    base = build(name, tmp_path / "base", dtype=torch.bfloat16)
    (tmp_path / "bare").mkdir()
    shutil.copy(base / "config.json", tmp_path / "bare")
    plans = [lowmem.plan(folder, seq_len=16, quantization="nf4", machine=BIG) for folder in (base, tmp_path / "bare")]
    assert plans[0].placement == plans[1].placement
    assert plans[0].roles == plans[1].roles


def test_command_plans_what_is_not_packed_yet(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype=torch.bfloat16, changes=WIDE)
    options = ["--seq-len", "16", "--on", "cpu", "--device", "1GiB", "--host", "0", "--json"]
    told = [CliRunner().invoke(app, ["plan", str(base), *options, *more]) for more in ([], ["--quantization", "nf4"])]
    plain, packed = (json.loads(one.stdout) for one in told)
    made = lowmem.plan(base, seq_len=16, quantization="nf4", device="cpu", budget=Budget(device="1GiB", host="0"))
    assert packed["placement"]["block_bytes"] == list(made.placement.block_bytes)
    assert sum(packed["placement"]["block_bytes"]) < 0.5 * sum(plain["placement"]["block_bytes"])
    assert packed["stored_dtypes"] != plain["stored_dtypes"]
    refused = CliRunner().invoke(app, ["plan", str(base), *options, "--quantization", "nf5"])
    assert isinstance(refused.exception, lowmem.UnsupportedError)


def test_search_says_what_packed_weights_would_change_and_leaves_the_choice(tmp_path: Path) -> None:
    changes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "head_dim": 128}
    changes["num_hidden_layers"] = 24
    base = tmp_path / "base"
    tiny_config("llama", changes | {"dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}).save_pretrained(base)
    slow = lowmem.Machine(gpu="RTX 4090", ram="8GiB", vram="3GiB", disk_gbps=0.1)
    budget = Budget(device="2GiB", host="0")
    found = lowmem.plan(base, seq_len=64, batch_size="auto", machine=slow, budget=budget)
    advised = [text for text in found.advice if "quantization=" in text]
    assert [text.partition('"')[2].partition('"')[0] for text in advised] == ["int8", "nf4"]
    assert all("another result" in text for text in advised)
    packed = lowmem.plan(base, seq_len=64, batch_size="auto", machine=slow, budget=budget, quantization="nf4")
    assert f"a batch of {packed.batch_size} takes" in advised[1]
    assert not any("quantization=" in text for text in packed.advice)
    # Only where it was searched: an ordinary plan looks at one form of the model.
    assert not any("quantization=" in text for text in lowmem.plan(base, seq_len=64, machine=slow).advice)


def test_unpacking_counts_on_a_card_too(tmp_path: Path) -> None:
    changes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "head_dim": 128}
    base = tmp_path / "base"
    tiny_config("llama", changes | {"dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}).save_pretrained(base)
    plain, packed = (lowmem.plan(base, seq_len=64, machine=BIG, quantization=name) for name in (None, "nf4"))
    assert packed.time.compute_s > plain.time.compute_s
    assert packed.time.copy_s < plain.time.copy_s or plain.time.copy_s == packed.time.copy_s == 0


def test_rates_measured_before_packing_are_those_that_the_packed_folder_is_planned_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = build("qwen3_moe", tmp_path / "base", dtype=torch.bfloat16)
    told = CliRunner().invoke(app, ["bench", str(base), "--on", "cpu", "--quantization", "nf4"])
    assert told.exit_code == 0, told.output
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    blocks = {line["trains"]: line for line in lines if line["probe"] == "blocks"}
    # Nobody can train every weight of it. PEFT has no DoRA for stacks of experts: attention is measured with it.
    assert blocks.keys() == {"lora", "lora of experts", "dora"}
    assert blocks["lora"]["backward_calls_s"] != blocks["lora of experts"]["backward_calls_s"]
    assert "skipped" not in blocks["dora"]
    assert blocks["lora"]["unpack_s"] > 0
    options: dict[str, Any] = {"seq_len": 16, "device": "cpu", "budget": Budget(device="64MiB", host="0")}
    packed = lowmem.pack(base, quantization="nf4", output=tmp_path / "packed", device="cpu")
    before = lowmem.plan(base, quantization="nf4", **options)
    after = lowmem.plan(packed, **options)
    assert before.rates.shape is not None
    assert before.rates == after.rates
    assert before.step_s == pytest.approx(after.step_s)
    assert lowmem.plan(base, **options).rates.shape is None


def test_generation_is_planned_with_the_experts_that_tokens_go_to(tmp_path: Path) -> None:
    changes = {"num_experts": 32, "num_experts_per_tok": 2, "num_hidden_layers": 4, "moe_intermediate_size": 256}
    base = build("qwen3_moe", tmp_path / "base", changes=changes | {"hidden_size": 64, "mlp_only_layers": []})
    packed = lowmem.pack(base, quantization="int8", output=tmp_path / "packed", device="cpu")
    budget = Budget(device=0, host=0)

    def planned(num_prompt: int, num_tokens: int) -> lowmem.Plan:
        length = num_prompt + num_tokens
        options: dict[str, Any] = {"task": "generate", "seq_len": length, "completion_tokens": num_tokens}
        return lowmem.plan(packed, device="cpu", budget=budget, **options)

    one, many = planned(3, 2), planned(3, 12)
    per_token = (many.time.read_bytes - one.time.read_bytes) / 10
    whole = many.placement.streamed_bytes
    assert per_token < 0.4 * whole
    # What is really read, alignment of each expert's parts to pages left out.
    model = lowmem.from_pretrained(packed, plan=replace(many, device_budget_bytes=1 << 30), device="cpu")
    source = runtime_of(model).scheduler
    assert isinstance(source, ExpertScheduler)
    reads: list[int] = []

    def note(ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        reads.append(source.bytes_read)
        return torch.zeros(len(ids), dtype=torch.bool)

    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(torch.tensor([[5, 17, 9]]), stopping_criteria=[note], **options)
    assert (reads[-1] - reads[1]) / 10 < 0.6 * whole
    # Whole blocks for a prompt that most experts are needed for.
    assert planned(64, 1).time.read_bytes >= 0.9 * whole
