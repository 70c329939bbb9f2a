"""Streamed reward models: the sequence classification class, with a head that the checkpoint need not have."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import lowmem
from tests.lowmem.tiny_training import streamed
from tests.zoo.architectures import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama")))


def test_a_language_model_becomes_a_reward_model_with_a_head_drawn_from_the_seed(folder: Path) -> None:
    torch.manual_seed(0)
    model = streamed(folder, num_labels=1)
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert model.score.weight.shape == (1, 32)
    assert not model.score.weight.is_meta
    assert float(model.score.weight.std()) > 0
    torch.manual_seed(0)
    assert torch.equal(model.score.weight, streamed(folder, num_labels=1).score.weight)


def test_a_stored_reward_model_scores_as_transformers_does(folder: Path, tmp_path: Path) -> None:
    kept = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    kept.config.pad_token_id = 90
    kept.save_pretrained(tmp_path)
    ids = torch.randint(0, 80, (3, 6))
    with torch.no_grad():
        expected = kept.eval()(ids).logits
        assert torch.equal(streamed(tmp_path, num_labels=1)(ids).logits, expected)


def test_a_plan_for_reward_opens_a_reward_model(folder: Path) -> None:
    plan = lowmem.plan(
        folder, task="reward", seq_len=16, batch_size=2, budget=lowmem.Budget(device="64MiB", host="0"), device="cpu"
    )
    assert lowmem.from_pretrained(folder, plan=plan, device="cpu").config.num_labels == 1


def test_labels_are_refused_by_name_where_transformers_has_no_such_model(tmp_path: Path) -> None:
    folder = build("granite", tmp_path)
    with pytest.raises(lowmem.UnsupportedError, match="num_labels=1 with architecture granite"):
        streamed(folder, num_labels=1)


def test_fewer_than_one_label_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="num_labels=0"):
        streamed(folder, num_labels=0)
