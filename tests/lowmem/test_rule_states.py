"""The state of optimizers on disk: the same bits as in RAM; a run that was cut off goes on as if it had not been."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import lowmem
from lowmem.errors import UnsupportedError
from lowmem.full import resume_last_step, state_on_disk
from lowmem.optim.optimizer import RuleOptimizer
from lowmem.streaming.runtime import runtime_of
from tests.lowmem.full_training import backward, batches, full, plain_trainer, resident, weights
from tests.lowmem.tiny_optim import METHODS
from tests.zoo.architectures import build

QUICK = {"GaLore", "AdamW 8-bit", "BAdam"}
NUM_STEPS = 6


def eight_bit(model: PreTrainedModel, **options: object) -> RuleOptimizer:
    return lowmem.optim.AdamW(model, state_dtype="8bit", **options)  # type: ignore[arg-type]


ALL = {**METHODS, "AdamW 8-bit": eight_bit}
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama")))


def made(name: str, model: PreTrainedModel) -> RuleOptimizer:
    return ALL[name](model, lr=1e-3, weight_decay=0.1)


def take_steps(model: PreTrainedModel, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for ids in batches(NUM_STEPS)[steps.start : steps.stop]:
        backward(model, ids)
        optimizer.step()
        optimizer.zero_grad()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for key, weight in expected.items():
        assert torch.equal(found[key], weight), key


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_cut_off_ends_with_the_bits_of_one_in_memory(name: str, folder: Path, tmp_path: Path) -> None:
    plain = resident(folder)
    take_steps(plain, made(name, plain), range(NUM_STEPS))
    first = full(folder, "disk", tmp_path).train()
    optimizer = made(name, first)
    state_on_disk(optimizer)
    take_steps(first, optimizer, range(3))
    runtime_of(first).close()
    second = full(folder, "disk", tmp_path).train()
    optimizer = made(name, second)
    state_on_disk(optimizer)
    assert resume_last_step(optimizer) == 3
    take_steps(second, optimizer, range(3, NUM_STEPS))
    assert_same(weights(second), weights(plain))
    runtime_of(second).close()


@pytest.mark.parametrize("name", ["GaLore", "AdamW 8-bit"])
def test_the_trainer_resumes_from_its_checkpoint(name: str, folder: Path, tmp_path: Path) -> None:
    ends = []
    for number, resumes in enumerate((False, True)):
        scratch, output = tmp_path / f"state{number}", tmp_path / f"out{number}"
        scratch.mkdir()
        for checkpoint in (None, output / "checkpoint-2") if resumes else (None,):
            model = full(folder, "disk", scratch).train()
            optimizer = made(name, model)
            state_on_disk(optimizer)
            steps = 2 if resumes and checkpoint is None else 4
            options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
            trainer = plain_trainer(model, output, optimizer=optimizer, max_steps=steps, **options)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            found = weights(model)
            runtime_of(model).close()
        ends.append(found)
    assert_same(*ends)


def test_a_step_that_fails_leaves_the_last_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = full(folder, "disk", tmp_path).train()
    optimizer = made("GaLore", model)
    state_on_disk(optimizer)
    take_steps(model, optimizer, range(1))
    backward(model, batches(2)[1])
    rule = type(optimizer.rule_of(model.model.layers[1].mlp.up_proj.weight))

    def fail(*_: object, **__: object) -> None:
        raise ArithmeticError("no")

    monkeypatch.setattr(rule, "update", fail)
    with pytest.raises(ArithmeticError):
        optimizer.step()
    monkeypatch.undo()
    runtime_of(model).close()
    again = full(folder, "disk", tmp_path).train()
    optimizer = made("GaLore", again)
    state_on_disk(optimizer)
    assert resume_last_step(optimizer) == 1
    take_steps(again, optimizer, range(1, 2))
    plain = resident(folder)
    take_steps(plain, made("GaLore", plain), range(2))
    assert_same(weights(again), weights(plain))
    runtime_of(again).close()


def test_what_cannot_be_is_refused(folder: Path, tmp_path: Path) -> None:
    in_memory = full(folder, "device", tmp_path)
    with pytest.raises(UnsupportedError, match="state_on_disk"):
        state_on_disk(made("GaLore", in_memory))
    model = full(folder, "disk", tmp_path).train()
    optimizer = made("GaLore", model)
    take_steps(model, optimizer, range(1))
    with pytest.raises(RuntimeError, match="before the first step"):
        state_on_disk(optimizer)
    model.save_pretrained(tmp_path / "saved")
    saved = optimizer.state_dict()
    other = made("GaLore", model)
    state_on_disk(other)
    with pytest.raises(UnsupportedError, match="kept in memory"):
        other.load_state_dict(saved)
    runtime_of(model).close()
