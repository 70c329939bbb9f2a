"""Two trainings into one output folder: the second is refused before it takes a step, and for no longer than needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import offload
from tests.lowmem.full_training import plain_trainer
from tests.lowmem.tiny_training import lora, streamed
from tests.zoo.architectures import build

_TRAINS = """
import sys
from pathlib import Path
from peft import get_peft_model
from tests.lowmem.full_training import plain_trainer
from tests.lowmem.tiny_training import lora, streamed
from transformers import TrainerCallback

class Wait(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("trains", flush=True)
        sys.stdin.read()

model = get_peft_model(streamed(Path(sys.argv[1])), lora())
trainer = plain_trainer(model, Path(sys.argv[2]), save_strategy="steps", save_steps=2)
trainer.add_callback(Wait())
trainer.train()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama")))


def _trainer(folder: Path, output: Path, *, save_strategy: str = "steps") -> Trainer:
    return plain_trainer(get_peft_model(streamed(folder), lora()), output, save_strategy=save_strategy, save_steps=2)


@pytest.mark.parametrize("end", ["ends", "is killed"])
def test_a_second_run_into_an_output_folder_waits_for_the_first(folder: Path, tmp_path: Path, end: str) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", _TRAINS, folder, tmp_path / "out"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert first.stdout is not None
    while (line := first.stdout.readline()) and line != "trains\n":
        pass
    assert line
    trainer = _trainer(folder, tmp_path / "out")
    before = [param.detach().clone() for param in trainer.model.parameters() if param.requires_grad]
    with pytest.raises(offload.FolderInUse, match=r"in use by another run .*give this run another folder"):
        trainer.train()
    after = [param for param in trainer.model.parameters() if param.requires_grad]
    assert all(map(torch.equal, before, after))
    # What saves nothing is nobody's rival.
    _trainer(folder, tmp_path / "out", save_strategy="no").train()
    if end == "is killed":
        first.kill()
    first.communicate()
    trainer.train()
    assert (tmp_path / "out" / "checkpoint-4" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, RuntimeError])
def test_a_training_that_fails_leaves_the_folder(folder: Path, tmp_path: Path, error: type[BaseException]) -> None:
    class Fail(TrainerCallback):
        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
        ) -> None:
            raise error

    failing = _trainer(folder, tmp_path / "out")
    failing.add_callback(Fail())
    with pytest.raises(error):
        failing.train()
    # The first trainer still lives, as in a notebook.
    _trainer(folder, tmp_path / "out").train()
