"""Adapters of fused experts, exported one by one: the same change of every expert, under the checkpoint's names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from lowmem.adapters.expert_export import export_experts
from lowmem.errors import UnsupportedError
from tests.lowmem.quantization.public_layouts import write_layout
from tests.zoo.architectures import build
from tests.zoo.reference import ATTENTION_ONLY, adapt, resident

WEIGHTS = "adapter_model.safetensors"
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture
def base(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: build(name, tmp_path / "zoo")


def save_adapter(base: Path, folder: Path, **options: object) -> torch.nn.Module:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION_ONLY, **options)  # type: ignore[arg-type]
    model = adapt(resident(base), config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("options", [{}, {"alpha_pattern": {"gate_up_proj": 32}}], ids=["plain", "own scaling"])
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_every_expert_changes_as_before(
    name: str, options: dict[str, object], base: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = base(name)
    stacks = {"qwen3_moe": STACKS, "mixtral": ["experts.gate_up_proj", "experts.down_proj"]}[name]
    model = save_adapter(folder, tmp_path / "adapter", target_parameters=stacks, **options)
    output = export_experts(tmp_path / "adapter", model=folder, output=tmp_path / "exported")
    found, before = (
        load_file(output / "adapter_model.safetensors"),
        load_file(tmp_path / "adapter/adapter_model.safetensors"),
    )
    stored = {
        key: tuple(value.shape) for file in folder.glob("*.safetensors") for key, value in load_file(file).items()
    }
    merged = model.merge_and_unload().state_dict()
    original = resident(folder).state_dict()
    num_experts = 0
    for key, first in found.items():
        weight = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        if ".lora_A." not in key:
            continue
        second = found[key.replace("lora_A", "lora_B")]
        assert weight in stored
        assert (second.shape[0], first.shape[1]) == stored[weight]
        if ".experts." not in key:
            assert torch.equal(first, before[key])
            continue
        num_experts += 1
        change = second @ first * (8 / 4)
        module, _, rest = weight.partition(".experts.")
        number, leaf = int(rest.split(".")[0]), rest.split(".")[1]
        stack = "down_proj" if leaf in ("down_proj", "w2") else "gate_up_proj"
        target = next(
            key for key in original if key.endswith(f"experts.{stack}") and f"layers.{module.split('.')[2]}." in key
        )
        whole = (merged[target] - original[target])[number]
        half = len(whole) // 2
        part = {"gate_proj": whole[:half], "w1": whole[:half], "up_proj": whole[half:], "w3": whole[half:]}.get(
            leaf, whole
        )
        torch.testing.assert_close(change, part, rtol=1e-4, atol=1e-6)
        assert part.any()
    assert num_experts == sum(".experts." in key and key.endswith(".weight") for key in stored)
    config = json.loads((output / "adapter_config.json").read_text())
    leaves = {key.split(".")[-3] for key in found}
    assert config["target_parameters"] is None
    assert set(config["target_modules"]) == leaves


def test_a_packed_base_names_its_experts_too(base: Callable[[str], Path], tmp_path: Path) -> None:
    packed, plain = write_layout(base("qwen3_moe"), tmp_path / "written", "gptq")
    save_adapter(plain, tmp_path / "adapter", target_parameters=STACKS)
    by = [
        load_file(
            export_experts(tmp_path / "adapter", model=one, output=tmp_path / str(n)) / "adapter_model.safetensors"
        )
        for n, one in enumerate((packed, plain))
    ]
    assert by[0].keys() == by[1].keys()
    assert all(torch.equal(value, by[1][key]) for key, value in by[0].items())


def test_what_servers_read_as_it_is_is_refused(base: Callable[[str], Path], tmp_path: Path) -> None:
    folder = base("qwen3_moe")
    save_adapter(folder, tmp_path / "attention")
    with pytest.raises(UnsupportedError, match="adapts no stack of experts"):
        export_experts(tmp_path / "attention", model=folder, output=tmp_path / "out")
    fused = build("gpt_oss", tmp_path / "fused")
    save_adapter(fused, tmp_path / "stacks", target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(UnsupportedError, match="stores them in one tensor"):
        export_experts(tmp_path / "stacks", model=fused, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
