"""Generation in train mode, as GRPO does it: dropout draws for finished sequences too, as in memory."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from lowmem.generation.decoding import draws_numbers
from tests.lowmem.tiny_training import lora, resident, streamed
from tests.zoo.architectures import build, tiny_model

IDS = torch.arange(24).view(4, 6)


def test_tokens_sampled_with_dropout_are_those_of_the_model_in_memory(tmp_path: Path) -> None:
    folder = build("llama", tmp_path)
    answers = []
    for load in (resident, streamed):
        torch.manual_seed(0)
        model = _adapted(get_peft_model(load(folder), lora(lora_dropout=0.4)))
        torch.manual_seed(1)
        # Many tokens end a sequence, so that some are finished early.
        ends = list(range(60))
        answers.append(model.generate(IDS, max_new_tokens=8, do_sample=True, eos_token_id=ends, pad_token_id=90))
    assert torch.equal(*answers)
    assert bool((answers[0][:, -1] == 90).any())


def _adapted(model: PeftModel) -> PeftModel:
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.normal_(std=0.2)
    return model.train()


@pytest.mark.parametrize(
    ("changes", "training", "draws"),
    [
        ({}, True, False),
        ({"attention_dropout": 0.1}, True, True),
        ({"attention_dropout": 0.1}, False, False),
    ],
)
def test_dropout_is_seen_where_it_is_on(changes: dict[str, object], training: bool, draws: bool) -> None:
    assert draws_numbers(tiny_model("llama", changes).train(training)) is draws


def test_dropout_modules_are_seen() -> None:
    assert draws_numbers(torch.nn.Sequential(torch.nn.Dropout(0.1)))
    assert not draws_numbers(torch.nn.Sequential(torch.nn.Dropout(0.0)))
