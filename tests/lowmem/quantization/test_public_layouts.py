"""Checkpoints in public layouts: found whole, and refused where an option is not known or parts do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem.errors import UnsupportedError
from lowmem.quantization.format import PackedWeight
from lowmem.quantization.registry import find_packed, format_of
from offload import SafetensorsSource, SourceError
from tests.lowmem.quantization.public_layouts import LAYOUTS, STACKS, write_layout
from tests.zoo.architectures import build


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """Writes a tiny model in a layout: the quantised checkpoint and the plain one of its values."""

    def write(layout: str) -> tuple[Path, Path]:
        name, changes = ("gpt_oss", {"intermediate_size": 64}) if layout in STACKS else ("llama", {})
        return write_layout(build(name, tmp_path / "zoo", changes=changes), tmp_path / "written", layout)

    return write


def found_in(folder: Path, layout: str) -> dict[str, PackedWeight]:
    with SafetensorsSource(folder) as source:
        return find_packed(LAYOUTS[layout][1], source.tensors, file=folder / "config.json")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_packed_weight_is_found_with_its_values(
    layout: str, dtype: torch.dtype, written: Callable[[str], tuple[Path, Path]]
) -> None:
    packed, plain = written(layout)
    found = found_in(packed, layout)
    stored, expected = load_file(packed / "model.safetensors"), load_file(plain / "model.safetensors")
    left = set(stored)
    for name, weight in found.items():
        assert weight.shape == expected[name].shape
        assert torch.equal(weight.make(stored, dtype), expected[name].to(dtype)), name
        left -= {part.name for part in (*weight.parts, *weight.read_once)}
    assert {name for name in left if not name.endswith("input_scale")} == set(expected) - set(found)


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("fp8", {"weight_block_size": [48]}, "weight_block_size"),
        ("fp8", {"weight_block_size": [0, 40]}, "weight_block_size"),
        ("fp8", {"fmt": "e5m2"}, "fmt='e5m2'"),
        ("fp8", {"secret_rotation": True}, "secret_rotation"),
        ("fp8 per row", {"format": "pack-quantized"}, "compressed-tensors"),
        ("fp8 per row", {"transform_config": {"hadamard": 1}}, "transform_config"),
        ("gptq", {"bits": 3}, "bits=3"),
        ("gptq", {"bits": "4"}, "bits='4'"),
        ("gptq", {"group_size": 0}, "group_size=0"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ("gptq", {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic"),
        ("awq", {"version": "gemv"}, "version='gemv'"),
        ("awq", {"zero_point": False}, "zero_point=False"),
        ("mxfp4", {"block": 16}, "block=16"),
        ("nf4 stacks", {"bnb_4bit_quant_type": [1, 32]}, "bnb_4bit_quant_type=[1, 32]"),
    ],
)
def test_an_unknown_option_is_refused_by_name(layout: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        format_of(LAYOUTS[layout][1] | changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "suffix", "change", "message"),
    [
        ("fp8", "_scale_inv", None, "expected its scales under one of"),
        ("fp8", "_scale_inv", lambda scales: scales[:-1], "expected scales"),
        ("fp8", "_scale_inv", lambda scales: scales.int(), "floating-point type"),
        ("gptq", ".qzeros", None, "which no file holds"),
        ("gptq", ".scales", lambda scales: scales[:, :-8], "expected shape"),
        ("gptq", ".g_idx", lambda index: index + 1, "expected groups 0 to"),
        ("awq", ".scales", lambda scales: scales.long(), "expected float16"),
        ("awq", ".qweight", lambda words: words[:, :-1], "expected shape"),
        ("mxfp4", "_scales", None, "which no file holds"),
        ("mxfp4", "_blocks", lambda blocks: blocks[..., :8], "inputs / 32, 16"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused_before_weights_are_read(
    layout: str,
    suffix: str,
    change: Callable[[torch.Tensor], torch.Tensor] | None,
    message: str,
    written: Callable[[str], tuple[Path, Path]],
) -> None:
    packed, _ = written(layout)
    file = packed / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in sorted(tensors) if key.endswith(suffix))
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file)
    with pytest.raises(SourceError, match=r"model\.safetensors") as caught:
        found_in(packed, layout)
    assert message in str(caught.value)
