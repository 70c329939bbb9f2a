"""The demo's model, tokenizer and data."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.demo import sparkline
from examples.demo_model import DemoShape, make_rows, make_tokenizer, write_model, write_rows

SHAPE = DemoShape(hidden=64, num_layers=6, mlp=176, num_heads=4, num_kv_heads=2)


def test_transformers_loads_the_model_and_its_tokenizer(tmp_path: Path) -> None:
    rows = make_rows(200)
    num_bytes = write_model(tmp_path, make_tokenizer(rows), shape=SHAPE)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    assert num_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert len([*tmp_path.glob("*.safetensors")]) == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = tokenizer.apply_chat_template(rows[0]["prompt"], tokenize=False, add_generation_prompt=True)
    assert text == f"<|user|>\n{rows[0]['prompt'][0]['content']}<|end|>\n<|assistant|>\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_signal_stays_of_one_size_through_the_random_blocks(tmp_path: Path) -> None:
    rows = make_rows(50)
    tokenizer = make_tokenizer(rows)
    write_model(tmp_path, tokenizer, shape=SHAPE)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    states = model(torch.arange(20)[None], output_hidden_states=True).hidden_states
    rms = [state.pow(2).mean().sqrt().item() for state in states[:-1]]
    assert rms[0] == pytest.approx(1.0, rel=0.1)
    assert max(rms) < 2.0


def test_rows_are_the_same_for_the_same_seed_and_use_several_templates(tmp_path: Path) -> None:
    rows = make_rows(300)
    assert rows == make_rows(300)
    assert rows != make_rows(300, seed=1)
    assert len({row["prompt"][0]["content"].split()[0] for row in rows}) >= 3
    write_rows(tmp_path / "train.jsonl", rows)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert statistics.fmean(len(line) for line in lines) < 400


def test_sparkline_spans_from_smallest_to_largest() -> None:
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁" or sparkline([3.0, 2.0, 1.0]) == "█▄▁"
    assert sparkline([1.0, 1.0]) == "▁▁"
