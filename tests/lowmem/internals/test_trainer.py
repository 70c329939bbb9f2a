"""Canaries: what lowmem.internals.transformers takes from transformers is there, and means what it is used for."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, trainer
from transformers.trainer_callback import DefaultFlowCallback

import lowmem
from lowmem.internals.transformers import add_default_callback, before_resume, leave_where_it_is, on_optimizer_resume
from tests.lowmem.tiny_training import resident
from tests.zoo.architectures import build


class Ours(TrainerCallback):
    """Notes the events that it is told of."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_init_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self.events.append("init_end")


class Users(TrainerCallback):
    """What a script passes."""


@pytest.fixture
def callbacks() -> Iterator[list[type[TrainerCallback]]]:
    before = list(trainer.DEFAULT_CALLBACKS)
    yield trainer.DEFAULT_CALLBACKS
    trainer.DEFAULT_CALLBACKS[:] = before


def test_a_trainer_starts_with_the_callback_in_front_of_those_of_the_user(
    callbacks: list[type[TrainerCallback]], tmp_path: Path
) -> None:
    add_default_callback(Ours)
    add_default_callback(Ours)
    model = resident(Path(build("llama", tmp_path / "model")))
    made = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"), callbacks=[Users()])
    kinds = [type(callback) for callback in made.callback_handler.callbacks]
    assert kinds.count(Ours) == 1
    assert kinds.index(DefaultFlowCallback) < kinds.index(Ours) < kinds.index(Users)
    ours = made.callback_handler.callbacks[kinds.index(Ours)]
    assert ours.events == ["init_end"]


def test_a_trainer_without_that_list_is_refused_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(trainer, "DEFAULT_CALLBACKS")
    with pytest.raises(lowmem.UnsupportedError, match=r"transformers 5\.\d+.*DEFAULT_CALLBACKS"):
        add_default_callback(Ours)


def test_a_trainer_that_does_not_read_that_list_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.Trainer, "__init__", lambda self: None)
    with pytest.raises(lowmem.UnsupportedError, match="does not begin with"):
        add_default_callback(Ours)


def test_a_trainer_says_from_which_folder_it_resumes_before_the_optimizer_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_load_optimizer_and_scheduler", Trainer._load_optimizer_and_scheduler)
    said: list[object] = []

    def tell(model: torch.nn.Module, folder: str) -> None:
        said.append((model, folder))

    class Noted(torch.optim.SGD):
        def load_state_dict(self, state_dict: dict[str, object]) -> None:
            said.append("loads")
            super().load_state_dict(state_dict)

    on_optimizer_resume(tell)
    on_optimizer_resume(tell)
    model = resident(Path(build("llama", tmp_path / "model")))
    rows = [{"input_ids": torch.arange(4), "labels": torch.arange(4)} for _ in range(4)]

    def made(steps: int) -> Trainer:
        args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none", max_steps=steps, save_steps=1)
        return Trainer(model, args, train_dataset=rows, optimizers=(Noted(model.parameters(), lr=0.1), None))

    made(1).train()
    # accelerate has an optimizer that it wraps load its own state.
    assert set(said) <= {"loads"}
    said.clear()
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    made(2).train(resume_from_checkpoint=checkpoint)
    assert said[-2:] == [(model, checkpoint), "loads"]
    assert said.count((model, checkpoint)) == 1


@pytest.mark.parametrize("change", ["gone", "another signature"])
def test_a_trainer_that_loads_the_optimizer_in_another_way_is_refused(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if change == "gone":
        monkeypatch.delattr(Trainer, "_load_optimizer_and_scheduler")
    else:
        monkeypatch.setattr(Trainer, "_load_optimizer_and_scheduler", lambda self, folder, name: None)
    with pytest.raises(lowmem.UnsupportedError, match=r"transformers 5\.\d+.*_load_optimizer_and_scheduler"):
        on_optimizer_resume(lambda model, folder: None)


def test_a_trainer_asks_before_it_reads_what_it_resumes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_load_from_checkpoint", Trainer._load_from_checkpoint)
    asked: list[tuple[object, str]] = []

    def check(model: torch.nn.Module, folder: str) -> None:
        asked.append((model, folder))
        raise ValueError("asked before anything is read")

    before_resume(check)
    before_resume(check)
    model = resident(Path(build("llama", tmp_path / "model")))
    made = Trainer(model, TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none"), train_dataset=[{}])
    with pytest.raises(ValueError, match="asked before"):
        made.train(resume_from_checkpoint=str(tmp_path / "nothing there"))
    assert asked == [(model, str(tmp_path / "nothing there"))]


@pytest.mark.parametrize("change", ["gone", "another signature"])
def test_a_trainer_that_begins_to_resume_in_another_way_is_refused(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if change == "gone":
        monkeypatch.delattr(Trainer, "_load_from_checkpoint")
    else:
        monkeypatch.setattr(Trainer, "_load_from_checkpoint", lambda self, folder: None)
    with pytest.raises(lowmem.UnsupportedError, match=r"transformers 5\.\d+.*_load_from_checkpoint"):
        before_resume(lambda model, folder: None)


def test_a_trainer_leaves_placed_models_alone_and_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever other tests have made of transformers' logging: levels, handlers, propagation.
    said: list[str] = []
    monkeypatch.setattr(trainer.logger, "warning", lambda text, *rest: said.append(str(text)))
    monkeypatch.setattr(Trainer, "_move_model_to_device", Trainer._move_model_to_device)
    placed = resident(Path(build("llama", tmp_path / "model")))
    placed.hf_device_map = {"": "cpu"}
    other = resident(tmp_path / "model")
    other.hf_device_map = {"": "cpu"}
    leave_where_it_is(lambda model: model is placed)
    args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none")
    Trainer(placed, args)
    assert not any("multiple devices" in text for text in said)
    Trainer(other, args)
    assert any("multiple devices" in text for text in said)
