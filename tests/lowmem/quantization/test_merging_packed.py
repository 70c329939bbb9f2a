"""Merging into packed weights: an ordinary checkpoint with the bits of a merge into their values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import lowmem
from lowmem.quantization.format import PackedWeight
from lowmem.quantization.registry import find_packed
from lowmem.quantization.values import ValueReader, as_values
from offload import SafetensorsSource
from tests.lowmem.quantization.public_layouts import LAYOUTS, STACKS, write_layout
from tests.zoo.architectures import build
from tests.zoo.reference import ATTENTION_ONLY, adapt, resident


def written(name: str, layout: str, folder: Path) -> tuple[Path, Path]:
    changes = {"intermediate_size": 64} if layout in STACKS else {}
    return write_layout(build(name, folder / "zoo", changes=changes), folder / "written", layout)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize(
    ("name", "layout", "options"),
    [
        ("llama", "gptq by activation", {}),
        ("llama", "awq", {"use_dora": True}),
        ("qwen3_moe", "fp8", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
        ("gpt_oss", "mxfp4", {"target_parameters": ["mlp.experts.down_proj"]}),
    ],
)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.filterwarnings("ignore:rounding to bfloat16 lost:UserWarning")
def test_a_merge_has_the_bits_of_a_merge_into_the_values(
    name: str, layout: str, options: dict[str, object], dtype: str | None, tmp_path: Path
) -> None:
    packed, plain = written(name, layout, tmp_path)
    config = LoraConfig(r=4, target_modules=ATTENTION_ONLY, **options)  # type: ignore[arg-type]
    adapt(resident(plain), config).save_pretrained(tmp_path / "adapter")
    merged = lowmem.merge(packed, adapter=tmp_path / "adapter", output=tmp_path / "merged", dtype=dtype)
    expected = lowmem.merge(plain, adapter=tmp_path / "adapter", output=tmp_path / "expected", dtype=dtype)
    found, wanted = tensors_of(merged), tensors_of(expected)
    assert found.keys() - {key for key in found if key.endswith("input_scale")} == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    before = tensors_of(plain)
    assert any(not torch.equal(value.float(), before[key].to(value.dtype).float()) for key, value in found.items())


@pytest.mark.parametrize("layout", ["fp8", "mxfp4", "nf4 stacks"])
def test_parts_of_a_packed_weight_read_as_parts_of_its_values(layout: str, tmp_path: Path) -> None:
    packed, plain = written("gpt_oss" if layout in STACKS else "llama", layout, tmp_path)
    expected = tensors_of(plain)
    with SafetensorsSource(packed) as source:
        found: dict[str, PackedWeight] = find_packed(LAYOUTS[layout][1], source.tensors, file=packed / "config.json")
        specs, reader = as_values(source.tensors, found), ValueReader(found)
        assert specs.keys() == expected.keys()
        for name, spec in specs.items():
            flat = expected[name].reshape(-1)
            size = flat.element_size()
            for start, stop in (
                (0, len(flat)),
                (0, 1),
                (len(flat) // 3, 2 * len(flat) // 3 + 1),
                (len(flat) - 1, len(flat)),
            ):
                part = reader.read(spec, start * size, nbytes=(stop - start) * size)
                assert torch.equal(part, flat[start:stop]), name
        reader.close()
