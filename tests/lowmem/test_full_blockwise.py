"""BAdam and LISA on every weight: blocks that are not trained have no gradients, and no backward below the lowest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import lowmem
from lowmem.full.tier import Contribution
from lowmem.optim.optimizer import RuleOptimizer
from lowmem.streaming.runtime import runtime_of
from tests.lowmem.full_training import batches, full, plain_trainer, resident, sft_trainer, weights
from tests.zoo.architectures import build

NUM_BLOCKS = 3
Make = Callable[[PreTrainedModel], RuleOptimizer]
ORDERS: dict[str, tuple[Make, list[set[int]], list[set[int]]]] = {
    # Which blocks are trained in each step, and which a backward visits.
    "BAdam, ascending": (
        lambda model: lowmem.optim.BAdam(model, lr=1e-2, switch_block_every=1, switch_mode="ascending"),
        [{0}, {1}, {2}, {0}],
        [{0, 1, 2}, {1, 2}, {2}, {0, 1, 2}],
    ),
    "BAdam, descending": (
        lambda model: lowmem.optim.BAdam(model, lr=1e-2, switch_block_every=2, switch_mode="descending"),
        [{2}, {2}, {1}, {1}],
        [{2}, {2}, {1, 2}, {1, 2}],
    ),
    # It always trains the embedding, so that a backward goes through all blocks.
    "LISA": (lambda model: lowmem.optim.LISA(model, lr=1e-2, activated_layers=1, interval_steps=2), [], []),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama")))


class Watch:
    """What one model does per step: blocks visited in the backward, blocks whose gradients are kept, their bytes."""

    def __init__(self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.backward: list[set[int]] = [set()]
        self.trained: list[set[int]] = [set()]
        self.written_bytes: list[int] = [0]
        runtime = runtime_of(model)
        tier = runtime.full.tier  # type: ignore[union-attr]
        visit, accumulating = runtime.visit, tier.accumulating

        def visiting(index: int, phase: str, **more: object) -> object:
            if phase == "backward":
                self.backward[-1].add(index)
            return visit(index, phase, **more)  # type: ignore[arg-type]

        @contextmanager
        def taking(index: int, **more: bool) -> Iterator[Callable[[Contribution], None]]:
            with accumulating(index, **more) as take:

                def taking_one(one: Contribution) -> None:
                    self.trained[-1].add(index)
                    take(one)

                yield taking_one

        monkeypatch.setattr(runtime, "visit", visiting)
        monkeypatch.setattr(tier, "accumulating", taking)
        if hasattr(tier, "_gradients"):
            scratch = tier._gradients._scratch
            write = scratch.write

            def writing(slot: object, data: torch.Tensor, **more: object) -> object:
                self.written_bytes[-1] += data.numel()
                return write(slot, data, **more)

            monkeypatch.setattr(scratch, "write", writing)

    def next_step(self) -> None:
        self.backward.append(set())
        self.trained.append(set())
        self.written_bytes.append(0)


def steps(model: PreTrainedModel, optimizer: RuleOptimizer, *, watch: Watch | None = None) -> None:
    for ids in batches(4):
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if watch is not None:
            watch.next_step()


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.parametrize("name", ORDERS)
def test_only_active_blocks_have_gradients_and_the_weights_are_the_resident_models(
    name: str, tier: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, trained, visited = ORDERS[name]
    plain, model = resident(folder), full(folder, tier, tmp_path).train()
    steps(plain, make(plain))
    optimizer = make(model)
    watch = Watch(model, monkeypatch)
    steps(model, optimizer, watch=watch)
    for key, weight in weights(plain).items():
        assert torch.equal(weights(model)[key], weight), key
    if trained:
        assert watch.trained[:-1] == trained
        assert watch.backward[:-1] == visited
    else:
        assert all(len(blocks) == 1 for blocks in watch.trained[:-1])
    if tier == "disk":
        whole = 4 * runtime_of(model).full.tier.layouts[0].numel  # type: ignore[union-attr]
        assert watch.written_bytes[:-1] == [whole] * 4
    runtime_of(model).close()


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_trainers_train_the_same_bits_and_go_on_from_their_checkpoints(tier: str, folder: Path, tmp_path: Path) -> None:
    make = ORDERS["BAdam, ascending"][0]
    plain = resident(folder)
    expected = plain_trainer(plain, tmp_path / "plain", optimizer=make(plain))
    expected.train()
    ends = []
    for number, checkpoint in enumerate((None, tmp_path / "tuned" / "checkpoint-2")):
        model = full(folder, tier, tmp_path / str(number))
        saving = {"save_strategy": "steps", "save_steps": 2}
        trainer = plain_trainer(model, tmp_path / "tuned", optimizer=make(model), **saving)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        ends.append(weights(model))
        runtime_of(model).close()
    for end in ends:
        for key, weight in weights(plain).items():
            assert torch.equal(end[key], weight), key


def test_trl_logs_the_loss_of_the_resident_model(folder: Path, tmp_path: Path) -> None:
    make = ORDERS["LISA"][0]
    losses = []
    for model in (resident(folder), full(folder, "disk", tmp_path)):
        trainer = sft_trainer(model, tmp_path / "out", optimizer=make(model))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)


def test_a_cut_off_run_goes_on_with_the_blocks_that_are_due(folder: Path, tmp_path: Path) -> None:
    make = ORDERS["BAdam, ascending"][0]
    plain = resident(folder)
    steps(plain, make(plain))
    for taken in (range(2), range(2, 4)):
        model = full(folder, "disk", tmp_path).train()
        optimizer = make(model)
        lowmem.full.state_on_disk(optimizer)
        if taken.start:
            assert lowmem.full.resume_last_step(optimizer) == taken.start
        for ids in batches(4)[taken.start : taken.stop]:
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        found = weights(model)
        runtime_of(model).close()
    for key, weight in weights(plain).items():
        assert torch.equal(found[key], weight), key
