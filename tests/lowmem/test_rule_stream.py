"""Rules on weights on disk: whatever the order of the parameters, each meets its own weight and gradient, once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowmem.full.engine import FullTuning
from lowmem.full.tier import WEIGHT
from lowmem.streaming.runtime import runtime_of
from offload import ReadError
from tests.lowmem.full_training import backward, batches, full, resident, weights
from tests.lowmem.tiny_optim import METHODS
from tests.zoo.architectures import build

QUICK = {"APOLLO", "Fira", "LISA"}
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Iterator[PreTrainedModel]:
    model = full(folder, "disk", tmp_path).train()
    yield model
    runtime_of(model).close()


def tuning_of(model: PreTrainedModel) -> FullTuning:
    tuning = runtime_of(model).full
    assert tuning is not None
    return tuning


def descend(weight: Tensor, gradient: Tensor) -> None:
    weight.sub_(gradient, alpha=0.5)


def block_keys(tuning: FullTuning) -> list[str]:
    keys = [key for key, entry in tuning.params.items() if entry.unit < tuning.num_blocks]
    return sorted(keys, key=lambda key: (tuning.params[key].unit, tuning.params[key].place.start))


ORDERS = {
    "as they lie": lambda keys: keys,
    "backwards": lambda keys: keys[::-1],
    "every other, then the rest": lambda keys: [*keys[::2], *keys[1::2]],
    "some": lambda keys: keys[3::5],
}


@pytest.mark.parametrize("is_announced", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_each_parameter_meets_its_own_gradient(
    model: PreTrainedModel, folder: Path, order: str, *, is_announced: bool
) -> None:
    plain, tuning = resident(folder), tuning_of(model)
    for step, ids in enumerate(batches(2)):
        for one in (model, plain):
            one.zero_grad()
            backward(one, ids)
        keys = ORDERS[order](block_keys(tuning))
        following = dict(pairwise(keys)) if is_announced else {}
        for key in keys:
            tuning.change(key, descend, gradient=None, upcoming=following.get(key))
        tuning.step({}, number=step + 1, record={})
        with torch.no_grad():
            for key in keys:
                param = plain.get_parameter(key)
                descend(param, param.grad)
        found = weights(model)
        for key, weight in weights(plain).items():
            assert torch.equal(found[key], weight), key


def test_a_rule_that_fails_leaves_the_weights_as_they_were(model: PreTrainedModel) -> None:
    tuning = tuning_of(model)
    before = weights(model)
    backward(model, batches(1)[0])
    first, second, *_ = block_keys(tuning)

    def fail(weight: Tensor, gradient: Tensor) -> None:
        weight.sub_(gradient)
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError):
        tuning.change(first, fail, gradient=None, upcoming=second)
    found = weights(model)
    for key, weight in before.items():
        assert torch.equal(found[key], weight), key
    entry = tuning.params[first]
    gradient = tuning.tier.read_gradient(entry.unit, entry.place)
    tuning.change(first, descend, gradient=None)
    tuning.step({}, number=1, record={})
    assert torch.equal(tuning.tier.read(entry.unit, WEIGHT, entry.place), before[first] - 0.5 * gradient)


def test_an_error_while_reading_ahead_comes_out_and_the_last_step_stays(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = tuning_of(model)
    for number, ids in enumerate(batches(2)):
        model.zero_grad()
        backward(model, ids)
        if number == 0:
            for key in block_keys(tuning):
                tuning.change(key, descend, gradient=None)
            tuning.step({}, number=1, record={})
    before = weights(model)
    first, *_, last = block_keys(tuning)

    def broken(*_: object, **__: object) -> None:
        raise ReadError(Path("weight"), offset_bytes=0, nbytes=4096, reason="injected")

    with monkeypatch.context() as patch:
        patch.setattr(tuning.tier.files, "start_load", broken)  # type: ignore[attr-defined]
        with pytest.raises(ReadError, match="injected"):
            tuning.change(first, descend, gradient=None, upcoming=last)
    assert tuning.tier.files.step == 1  # type: ignore[attr-defined]
    found = weights(model)
    for key, weight in before.items():
        assert torch.equal(found[key], weight), key


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_ends_with_the_same_bits(name: str, folder: Path, tmp_path: Path) -> None:
    ends = []
    for model in (resident(folder), full(folder, "disk", tmp_path).train()):
        optimizer = METHODS[name](model, lr=1e-3, weight_decay=0.1)
        for ids in batches(6):
            backward(model, ids)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(weights(model))
    for key, weight in ends[0].items():
        assert torch.equal(ends[1][key], weight), key
