"""Synthetic checkpoints are what transformers expects of a Llama."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import checkpoints
from benchmarks.checkpoints import SHAPES, ensure_checkpoint, write_config, write_shards


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_transformers_loads_every_tensor_and_misses_none(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = ensure_checkpoint("tiny", root=tmp_path, dtype=dtype)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    assert sum(parameter.numel() for parameter in model.parameters()) == SHAPES["tiny"].num_parameters
    assert model.lm_head.weight.std().item() == pytest.approx(checkpoints.STD, rel=0.05)
    assert AutoTokenizer.from_pretrained(folder).pad_token == "<pad>"


def test_block_parameters_are_those_of_the_decoder_layers() -> None:
    shape = SHAPES["1.1b"]
    outside = 2 * shape.vocab * shape.hidden + shape.hidden
    assert shape.num_block_parameters == shape.num_parameters - outside
    assert shape.num_parameters == 1_100_048_384


def test_small_shards_split_layers_and_the_index_finds_every_tensor(tmp_path: Path) -> None:
    shape = SHAPES["tiny"]
    write_config(tmp_path, shape, dtype=torch.float32)
    write_shards(tmp_path, shape, dtype=torch.float32, shard_bytes=150_000)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert list(weight_map) == [name for name, _ in shape.tensors()]
    assert len({weight_map[name] for name, _ in shape.layer_tensors(1)}) == 2
    for name, sizes in shape.tensors():
        with safe_open(tmp_path / weight_map[name], "pt") as file:
            assert tuple(file.get_slice(name).get_shape()) == sizes


def test_finished_checkpoint_is_reused(tmp_path: Path) -> None:
    folder = ensure_checkpoint("tiny", root=tmp_path)
    (folder / "config.json").write_text("{}")
    assert ensure_checkpoint("tiny", root=tmp_path) == folder
    assert (folder / "config.json").read_text() == "{}"


def test_interrupted_checkpoint_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "write_shards", fail)
    with pytest.raises(KeyboardInterrupt):
        ensure_checkpoint("tiny", root=tmp_path)
    assert list(tmp_path.iterdir()) == []
