"""ESSA: a population generated as one batch is that population one by one; the strategy finds what it is to find."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    # In the values of one of the factors: torch.load would take them.
    data[data.index(b"PK\x03\x04", 4000) + 250] ^= 1
    file.write_bytes(data)


def _mark_as_folders(file: Path) -> None:
    data = bytearray(file.read_bytes())
    at = -1
    # Attributes in the list of records, which has no checksum: torch.load would read nothing, without a word.
    while (at := data.find(b"PK\x01\x02", at + 1)) >= 0:
        data[at + 38] |= 0x10
    file.write_bytes(data)


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _with(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def rewrite(file: Path) -> None:
        state = torch.load(file, weights_only=True)
        change(state)
        torch.save(state, file)

    return rewrite


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "another file": lambda file: file.write_bytes(b"x" * 1000),
    "a bit": _flip,
    "records marked as folders": _mark_as_folders,
    "a pipe": _pipe,
    "a link to itself": lambda file: (file.unlink(), file.symlink_to(file.name)),
    "a field is missing": _with(lambda state: state.pop("spectrum")),
    "a factor is missing": _with(lambda state: state["spectrum"].pop("up.1")),
    "another shape": _with(lambda state: state["spectrum"].update({"down.0": torch.zeros(1, 1)})),
    "another type": _with(lambda state: state["strategy"].update(mean=state["strategy"]["mean"].half())),
    "no number": _with(lambda state: state["strategy"]["path"].fill_(float("nan"))),
    "no variance": _with(lambda state: state["strategy"]["variance"].zero_()),
    "sigma is text": _with(lambda state: state["strategy"].update(sigma="1")),
    "steps below zero": _with(lambda state: state["strategy"].update(num_steps=-1)),
    "a log of text": _with(lambda state: state.update(log_history="abc")),
    "a list": lambda file: torch.save([], file),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_sentence_and_changes_nothing(damage: str, folder: Path, tmp_path: Path) -> None:
    made = trainer(folder, tmp_path / "out")
    made._save_checkpoint(tmp_path / "out" / "checkpoint-1")
    (tmp_path / "out" / "checkpoint-best").mkdir()
    (state,) = (tmp_path / "out" / "checkpoint-1").iterdir()
    assert state.stat().st_mode & 0o777 == 0o600
    DAMAGES[damage](state)
    before = [value.clone() for value in made.spectrum.state_dict().values()]
    with pytest.raises(ValueError, match=r"essa_state.pt: damaged, or of another adapter"):
        made.train(resume_from_checkpoint=str(state.parent) if damage.startswith("a link") else True)
    assert all(map(torch.equal, before, made.spectrum.state_dict().values()))
    assert made.strategy.num_steps == len(made.log_history) == 0


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
