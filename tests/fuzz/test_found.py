"""Minimal inputs of what the fuzzers found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.fuzz.checkpoints import TINY
from tests.fuzz.damage import edit_json
from tests.lowmem.tiny_training import streamed
from tests.zoo.architectures import build


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(build("llama", tmp_path / "model", changes=TINY, shard_bytes=6000))


GENERATION: dict[str, Callable[[Path], object]] = {
    "none": lambda folder: (folder / "generation_config.json").unlink(),
    "in config.json, as older checkpoints have it": lambda folder: (
        (folder / "generation_config.json").unlink(),
        edit_json(folder / "config.json", {"num_beams": 3, "eos_token_id": [2, 5], "length_penalty": 0.5}),
    ),
    "a file": lambda folder: edit_json(folder / "generation_config.json", {"top_k": 7, "eos_token_id": [2, 5]}),
}


@pytest.mark.parametrize("case", GENERATION)
def test_generation_settings_are_those_that_transformers_reads(case: str, folder: Path) -> None:
    GENERATION[case](folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert json.dumps(streamed(folder).generation_config.to_dict()) == json.dumps(plain.generation_config.to_dict())
