"""ESSA: a population generated as one batch is that population one by one; the strategy finds what it is to find."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

import lowmem
from lowmem.essa.strategy import SeparableCma
from lowmem.streaming.runtime import runtime_of
from tests.lowmem.tiny_trainers import even_words, questions
from tests.lowmem.tiny_training import lora, resident, streamed, word_tokenizer
from tests.zoo.architectures import build


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("llama", tmp_path / "model")
    return tmp_path / "model"


def trainer(
    folder: Path, output: Path, *, stream: bool = True, adapter: LoraConfig | None = None, **options: object
) -> lowmem.ESSATrainer:
    settings: dict[str, object] = {
        "max_steps": 4,
        "population_size": 6,
        "per_device_train_batch_size": 3,
        "max_completion_length": 6,
        "sigma": 1.0,
        "save_steps": 2,
    }
    model = streamed(folder) if stream else resident(folder)
    return lowmem.ESSATrainer(
        model,
        lowmem.ESSAConfig(output_dir=str(output), **(settings | options)),  # type: ignore[arg-type]
        reward_funcs=even_words,
        train_dataset=questions(),
        processing_class=word_tokenizer(),
        peft_config=adapter or lora(lora_dropout=0.0),
    )


def members(made: lowmem.ESSATrainer, num: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(num, made.spectrum.num_values, generator=generator, dtype=torch.float64)


def test_population_in_one_batch_answers_as_its_members_one_by_one(folder: Path, tmp_path: Path) -> None:
    made = trainer(folder, tmp_path / "out")
    rows = [questions()[index] for index in range(4)]
    group = members(made)
    member_of_row = torch.arange(5).repeat_interleave(4)
    with made.spectrum.population(group, member_of_row=member_of_row):
        together = made._answering.generate(rows, num_members=5)
    alone = []
    for member in group:
        with made.spectrum.written(member):
            alone += made._answering.generate(rows, num_members=1)
    assert together == alone
    assert len({tuple(map(tuple, alone[start : start + 4])) for start in range(0, 20, 4)}) > 1, "members were to differ"


def test_members_own_values_reach_their_rows_only(folder: Path, tmp_path: Path) -> None:
    made = trainer(folder, tmp_path / "out")
    group = members(made, 3)
    ids = torch.randint(3, 90, (1, 7))
    with made.spectrum.population(group, member_of_row=torch.arange(3)), torch.no_grad():
        together = made.model(input_ids=ids.repeat(3, 1)).logits
    for index, member in enumerate(group):
        with made.spectrum.written(member), torch.no_grad():
            torch.testing.assert_close(together[index : index + 1], made.model(input_ids=ids).logits)


def test_every_block_is_visited_once_per_token_for_the_whole_population(folder: Path, tmp_path: Path) -> None:
    made = trainer(folder, tmp_path / "out")
    visits: list[int] = []
    runtime_of(made.model).listen(lambda visit: visits.append(visit.block) if visit.started else None)
    made.rewards_of(members(made), [questions()[0]])
    assert len(visits) <= 6 * runtime_of(made.model).num_blocks


def test_factored_adapter_is_the_adapter(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    from peft import get_peft_model

    model = get_peft_model(streamed(folder), lora(lora_dropout=0.0))
    for name, param in model.named_parameters():
        if "lora_B" in name:
            param.data.normal_(0, 0.3)
    ids = torch.randint(3, 90, (2, 7))
    with torch.no_grad():
        want = model(input_ids=ids).logits
    made = lowmem.ESSATrainer(
        model,
        lowmem.ESSAConfig(output_dir=str(tmp_path / "out")),
        reward_funcs=even_words,
        train_dataset=questions(),
        processing_class=word_tokenizer(),
    )
    with made.spectrum.written(made.strategy.mean), torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)


def test_streamed_run_equals_the_resident_one(folder: Path, tmp_path: Path) -> None:
    runs = [trainer(folder, tmp_path / str(stream), stream=stream) for stream in (True, False)]
    for made in runs:
        made.train()
    assert runs[0].log_history == runs[1].log_history
    torch.testing.assert_close(runs[0].strategy.mean, runs[1].strategy.mean, rtol=1e-9, atol=1e-9)


def test_resumed_run_equals_an_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    whole = trainer(folder, tmp_path / "whole")
    whole.train()
    first = trainer(folder, tmp_path / "parts", max_steps=2)
    first.train()
    second = trainer(folder, tmp_path / "parts")
    second.train(resume_from_checkpoint=True)
    assert torch.equal(second.strategy.mean, whole.strategy.mean)
    assert second.log_history == whole.log_history


@pytest.mark.parametrize("damage", ["cut", "empty", "another file", "a field is missing"])
def test_a_damaged_checkpoint_is_one_sentence(damage: str, folder: Path, tmp_path: Path) -> None:
    made = trainer(folder, tmp_path / "out")
    made._save_checkpoint(tmp_path / "out" / "checkpoint-1")
    (state,) = (tmp_path / "out" / "checkpoint-1").iterdir()
    assert state.stat().st_mode & 0o777 == 0o600
    content = state.read_bytes()
    if damage == "a field is missing":
        torch.save({"strategy": made.strategy.state_dict()}, state)
    else:
        state.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "another file": b"x" * 1000}[damage])
    with pytest.raises(ValueError, match=r"essa_state.pt: damaged, or of another adapter"):
        made.train(resume_from_checkpoint=True)


def test_saved_adapter_is_an_ordinary_one(folder: Path, tmp_path: Path) -> None:
    made = trainer(folder, tmp_path / "out")
    made.train()
    ids = torch.randint(3, 90, (2, 7))
    with made.spectrum.written(made.strategy.mean), torch.no_grad():
        want = made.model(input_ids=ids).logits
    loaded = PeftModel.from_pretrained(streamed(folder), str(tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, want)


def test_dora_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(lowmem.UnsupportedError, match="use_dora=False"):
        trainer(folder, tmp_path / "out", adapter=lora(use_dora=True, lora_dropout=0.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"population_size": 5}, "even number"),
        ({"sigma": 0.0}, "more than 0"),
        ({"generation_batch_size": 2}, "answers 3 prompts at once"),
        ({"reward_weights": (1.0, 2.0)}, "one for each reward function"),
    ],
)
def test_settings_out_of_range_are_refused(
    folder: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(folder, tmp_path / "out", **changes)


def test_strategy_finds_the_maximum_of_a_stretched_bowl() -> None:
    scales = torch.logspace(0, 2, 12, dtype=torch.float64)
    target = torch.linspace(-1, 1, 12, dtype=torch.float64)
    strategy = SeparableCma(torch.zeros(12), sigma=0.5, population_size=12, seed=0)
    for _ in range(250):
        strategy.tell(-(scales * (strategy.ask() - target).square()).sum(dim=1))
    torch.testing.assert_close(strategy.mean, target, rtol=0, atol=1e-3)
    assert strategy.sigma < 1e-2


def test_strategy_refuses_scores_that_are_no_numbers() -> None:
    strategy = SeparableCma(torch.zeros(3), sigma=0.5, population_size=4, seed=0)
    with pytest.raises(ValueError, match="finite numbers"):
        strategy.tell(torch.tensor([0.0, float("nan"), 1.0, 2.0]))
