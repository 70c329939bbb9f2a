"""The key under which TRL keeps reference log-probabilities: one for each checkpoint, made without reading it."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from trl.trainer.utils import hash_module

from lowmem.internals.stand_in import StandIn
from lowmem.models.absent import AbsentParameter
from tests.lowmem.tiny_trainers import make
from tests.lowmem.tiny_training import lora, streamed
from tests.zoo.architectures import build

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints that differ in one value of a block, file by file of the same size."""
    one = Path(build("llama", tmp_path_factory.mktemp("llama") / "one"))
    other = one.with_name("other")
    shutil.copytree(one, other)
    for file in other.glob("*.safetensors"):
        tensors = load_file(file)
        name = next((name for name in tensors if "layers.1." in name and "proj" in name), None)
        if name is not None:
            tensors[name][0, 0] += 1
            save_file(tensors, file, metadata={"format": "pt"})
            return one, other
    raise AssertionError("no block tensor found")


def key_of(folder: Path) -> str:
    torch.manual_seed(0)
    return hash_module(get_peft_model(streamed(folder), lora()))


def test_the_same_base_has_the_same_key_and_another_base_another(bases: tuple[Path, Path]) -> None:
    one, other = bases
    assert key_of(one) == key_of(one)
    assert key_of(one) != key_of(other)


def test_the_key_is_made_without_reading_a_block(bases: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(streamed(bases[0]), lora())
    monkeypatch.setattr(AbsentParameter, "materialise", lambda self: pytest.fail(f"{self} was read"))
    assert hash_module(model)


def test_other_readers_of_the_state_dict_see_the_weights(bases: tuple[Path, Path]) -> None:
    state = streamed(bases[0]).state_dict()
    assert any(isinstance(value, StandIn) and value.shape == (32, 32) for value in state.values())


def test_the_trainer_keeps_its_log_probabilities_under_that_key(bases: tuple[Path, Path], tmp_path: Path) -> None:
    done = [make("dpo", streamed(base), tmp_path, precompute_ref_log_probs=True, max_steps=1) for base in bases]
    found = []
    for trainer in done:
        trainer.train()
        found.append(torch.tensor(trainer.train_dataset["ref_chosen_logps"]))
    assert not torch.equal(*found)
