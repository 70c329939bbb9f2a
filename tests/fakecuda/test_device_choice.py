"""Which device a model computes on, and in which type: machines with two cards, cards without bf16."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import lowmem
from lowmem.models.checkpoint import pick_device, pick_dtype
from tests.fakecuda.steps import Step, run
from tests.zoo.architectures import build

pytestmark = [
    pytest.mark.gpu,
    # transformers, about calls of TRL's own.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _only_simulated() -> None:
    if torch.cuda.get_device_name() != "Simulated GPU":
        pytest.skip("a real machine has the cards that it has")


@pytest.fixture
def _two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("_two_cards")
@pytest.mark.filterwarnings("ignore:2 GPUs are visible")
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_a_trainer_with_two_cards_in_the_machine_trains_on_one(task: str, tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "llama")
    step = Step(task=task)
    with_two = run(folder, step, tmp_path / "two", device="cuda")
    with_one = run(folder, step, tmp_path / "cpu", device="cpu")
    for ours, theirs in zip(with_two, with_one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-4)


@pytest.mark.usefixtures("_two_cards")
def test_of_two_cards_the_first_is_taken_and_said() -> None:
    with pytest.warns(UserWarning, match="2 GPUs are visible, .* uses one: the first, Simulated GPU; CUDA_VISIBLE"):
        assert pick_device(None) == torch.device("cuda", 0)
    with pytest.raises(lowmem.UnsupportedError, match=r"device='cuda:1'.*first GPU.*CUDA_VISIBLE_DEVICES=1"):
        pick_device("cuda:1")


def test_one_card_is_nothing_to_speak_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick_device("cuda") == torch.device("cuda", 0)


@pytest.fixture
def _no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)


@pytest.mark.usefixtures("_no_bf16")
def test_a_card_that_emulates_bf16_computes_in_fp32_and_says_so() -> None:
    with pytest.warns(UserWarning, match=r"Simulated GPU does not compute in bf16.* computing in fp32. dtype=.fp16"):
        assert pick_dtype(None, device=torch.device("cuda"), stored=torch.bfloat16) == torch.float32
    assert pick_dtype(None, device=torch.device("cuda"), stored=torch.float16) == torch.float16
    assert pick_dtype("bf16", device=torch.device("cuda"), stored=torch.bfloat16) == torch.bfloat16
