"""The optimizers in transformers' and TRL's trainers: schedules, clipping, accumulation, interrupted and resumed."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from tests.lowmem.tiny_optim import METHODS
from tests.lowmem.tiny_training import resident, texts, word_tokenizer
from tests.zoo.architectures import build

NAMES = [
    "GaLore",
    *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "GaLore"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama")))


def sft(model: PreTrainedModel, name: str, output: Path, **options: object) -> SFTTrainer:
    torch.manual_seed(0)
    defaults: dict[str, object] = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "logging_steps": 1,
        "save_steps": 4,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(str(output), **(defaults | options)),
        train_dataset=texts(),
        processing_class=word_tokenizer(),
        optimizers=(METHODS[name](model, lr=1e-2, weight_decay=0.1), None),
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_trainer_ends_with_the_same_weights(name: str, folder: Path, tmp_path: Path) -> None:
    whole = sft(resident(folder), name, tmp_path / "whole")
    whole.train()
    rates = [entry["learning_rate"] for entry in whole.state.log_history if "learning_rate" in entry]
    assert rates[1] == pytest.approx(1e-2)
    assert rates[-1] < 0.5 * rates[1]
    assert all(entry["grad_norm"] > 0 for entry in whole.state.log_history if "grad_norm" in entry)

    resumed = sft(resident(folder), name, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.state.global_step == 6
    for (key, weight), expected in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(weight, expected), key
