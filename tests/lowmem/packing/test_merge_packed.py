"""Merging into packed folders: the codes of the merged values, the bytes of what the adapter leaves alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lowmem
from lowmem.adapters import merged_values
from lowmem.cli import app
from lowmem.errors import UnsupportedError
from lowmem.packing.place import verify_pack
from tests.lowmem.packing.pack_in_children import check_kills, digest
from tests.lowmem.quantization.checkpoints import tensors_of
from tests.zoo.architectures import build
from tests.zoo.reference import ATTENTION_ONLY, adapt, batch_of, resident
from tests.zoo.streamed import streamed

# Rows that end with a block: bitsandbytes 0.50 is wrong about others on processors.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
STACKS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def adapter_for(base: Path, folder: Path, **options: Any) -> Path:
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION_ONLY, **options})
    model = adapt(resident(base), config)
    model.save_pretrained(folder)
    return folder


def merged(base: Path, adapter: Path, output: Path, quantization: str = "nf4") -> Path:
    with pytest.warns(UserWarning, match=f"packing to {quantization} moved the merged weights by"):
        return lowmem.merge(base, adapter=adapter, output=output, quantization=quantization)


def without_states(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors_of(folder).items() if ".quant_state." not in name}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("llama") / "base", dtype=torch.bfloat16, changes=WIDE)


@pytest.fixture(scope="module")
def adapter(llama: Path) -> Path:
    return adapter_for(llama, llama.parent / "adapter")


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"use_dora": True, "modules_to_save": ["lm_head"]}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("phi3", {}),
        ("qwen3_moe", STACKS),
    ],
)
def test_merged_values_are_quantised_unrounded(
    name: str, options: dict[str, Any], quantization: str, tmp_path: Path
) -> None:
    base = build(name, tmp_path / "base", dtype=torch.float32, changes=WIDE if name == "llama" else None)
    adapter = adapter_for(base, tmp_path / "adapter", **options)
    found = merged(base, adapter, tmp_path / "merged", quantization)
    in_two_steps = lowmem.merge(base, adapter=adapter, output=tmp_path / "plain", dtype="float32")
    expected = lowmem.pack(in_two_steps, quantization=quantization, output=tmp_path / "expected", device="cpu")
    wanted, stored = without_states(expected), without_states(found)
    assert stored.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(stored[key], value), key
    assert verify_pack(found) == []
    assert json.loads((found / "config.json").read_text()).get("quantization_config")
    if name == "llama":
        logits = AutoModelForCausalLM.from_pretrained(found, dtype=torch.float32).train()(**batch_of()).logits
        torch.testing.assert_close(streamed(found)(**batch_of()).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"), [("llama", {}), ("qwen3_moe", {"target_parameters": STACKS["target_parameters"][:1]})]
)
def test_what_the_adapter_leaves_alone_keeps_its_bytes(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    base = build(name, tmp_path / "base", dtype=torch.bfloat16, changes=WIDE if name == "llama" else None)
    packed = lowmem.pack(base, quantization="nf4", output=tmp_path / "packed", device="cpu")
    adapter = adapter_for(base, tmp_path / "adapter", **options)
    before, after = tensors_of(packed), tensors_of(merged(packed, adapter, tmp_path / "merged"))
    assert before.keys() == after.keys()
    changed = {key.partition(".absmax")[0] for key in before if not torch.equal(before[key], after[key])}
    touched = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj")
    assert changed
    assert all(any(part in key for part in touched) for key in changed)
    assert sum("down_proj" in key for key in before) > 4
    assert all(json.loads(bytes(after[key].tolist()))["dtype"] == "bfloat16" for key in after if ".quant_state." in key)


def test_merge_into_a_base_of_another_format_is_quantised_anew(llama: Path, adapter: Path, tmp_path: Path) -> None:
    packed = lowmem.pack(llama, quantization="int8", output=tmp_path / "packed", device="cpu")
    found = merged(packed, adapter, tmp_path / "merged")
    assert all(value.dtype != torch.int8 for value in tensors_of(found).values())
    plain = lowmem.merge(packed, adapter=adapter, output=tmp_path / "plain", dtype="float32")
    expected = lowmem.pack(plain, quantization="nf4", output=tmp_path / "expected", device="cpu")
    stored = without_states(found)
    for key, value in without_states(expected).items():
        assert torch.equal(stored[key].float(), value.to(stored[key].dtype).float()), key


def test_interrupted_merge_goes_on_and_another_adapter_begins_anew(
    llama: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = digest(merged(llama, adapter, tmp_path / "expected"))
    values = merged_values.MergedValues.values
    calls: list[str] = []

    def interrupted(self: merged_values.MergedValues, tensor: Any) -> Iterator[torch.Tensor]:
        calls.append(tensor.output.name)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return values(self, tensor)

    def interrupt(output: Path) -> None:
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(merged_values.MergedValues, "values", interrupted)
            with pytest.raises(KeyboardInterrupt):
                lowmem.merge(llama, adapter=adapter, output=output, quantization="nf4")
        assert not output.exists()

    interrupt(tmp_path / "merged")
    begun = {file: file.stat().st_mtime_ns for file in (tmp_path / ".merged.packing").glob("model-*.safetensors")}
    assert begun
    assert digest(merged(llama, adapter, tmp_path / "merged")) == expected
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "merged").glob("model-*.safetensors")}
    assert all(kept[file.name] == time for file, time in begun.items())
    # Nothing is left to do, or to say.
    assert lowmem.merge(llama, adapter=adapter, output=tmp_path / "merged", quantization="nf4") == tmp_path / "merged"
    interrupt(tmp_path / "again")
    other = adapter_for(llama, tmp_path / "other", r=2)
    found = digest(merged(llama, other, tmp_path / "again"))
    assert found == digest(merged(llama, other, tmp_path / "whole"))
    assert found != expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_killed_merges_go_on_and_two_of_them_share(kind: str, llama: Path, adapter: Path, tmp_path: Path) -> None:
    base = llama
    if kind == "packed":
        base = lowmem.pack(llama, quantization="nf4", output=tmp_path / "base", device="cpu")
    (tmp_path / "merges").mkdir()
    check_kills(base, tmp_path / "merges", 20, adapter)


def test_what_cannot_be_is_refused_before_anything_is_written(llama: Path, adapter: Path, tmp_path: Path) -> None:
    def refused(match: str, kind: type[Exception] = UnsupportedError, **options: Any) -> None:
        given = {"adapter": adapter, "output": tmp_path / "out", "quantization": "nf4"} | options
        with pytest.raises(kind, match=match):
            lowmem.merge(given.pop("model", llama), **given)
        assert not (tmp_path / "out").exists()

    refused("quantization='nf3' is not supported", quantization="nf3")
    refused("dtype='float32' with quantization='nf4': give one of them", ValueError, dtype="float32")
    refused("max_shard_bytes='1GB' with quantization", ValueError, max_shard_bytes="1GB")
    refused("is not this model packed in this way", FileExistsError, output=llama.parent / "adapter")
    refused("is inside the model's folder", ValueError, output=llama / "inner")
    refused("nowhere", FileNotFoundError, adapter=tmp_path / "nowhere")


@pytest.mark.filterwarnings("default:packing to nf4 moved:UserWarning")
def test_command_merges_and_says_what_packing_moves(llama: Path, adapter: Path, tmp_path: Path) -> None:
    arguments = ["merge", str(llama), "--adapter", str(adapter), "--output", str(tmp_path / "merged")]
    told = CliRunner().invoke(app, [*arguments, "--quantization", "nf4"])
    assert told.exit_code == 0
    assert "lowmem: packing to nf4 moved the merged weights by" in told.stderr
    assert CliRunner().invoke(app, ["pack", str(tmp_path / "merged"), "--verify"]).exit_code == 0
    ids = torch.tensor([[5, 17, 9]])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ours = streamed(tmp_path / "merged")
    plain = resident(llama)
    with torch.no_grad():
        for key, param in plain.named_parameters():
            param.copy_(ours.get_parameter(key).clone())
    assert torch.equal(ours.generate(ids, **options), plain.generate(ids, **options))
