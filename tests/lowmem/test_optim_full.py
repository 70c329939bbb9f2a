"""Every optimizer on a model whose weights are all trained from a tier: the same bits as on the model in memory."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import lowmem
from tests.lowmem.tiny_optim import METHODS
from tests.lowmem.tiny_training import resident
from tests.zoo.architectures import build

QUICK = {"GaLore", "FRUGAL", "BAdam"}
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama")))


def trained(model: PreTrainedModel, name: str) -> dict[str, torch.Tensor]:
    """The weights after six steps, which pass refreshes and changes of blocks."""
    model.train()
    optimizer = METHODS[name](model, lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for step in range(6):
        ids = torch.randint(0, 90, (4, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_full_tuning_ends_with_the_same_bits(name: str, folder: Path) -> None:
    expected = trained(resident(folder), name)
    budget = lowmem.Budget(device="64MiB", host="256MiB")
    got = trained(lowmem.from_pretrained(folder, tuning="full", device="cpu", budget=budget), name)
    for key, weight in expected.items():
        assert torch.equal(got[key], weight), key
