"""A short training run in a process of its own, to be killed: python -m tests.lowmem.kill_job FOLDER OUTPUT."""

import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from tests.lowmem.tiny_training import streamed, trainer

NUM_STEPS = 12


def last_complete_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written to its end: the Trainer writes its state last."""
    written = [folder for folder in output.glob("checkpoint-*") if (folder / "trainer_state.json").is_file()]
    return max(written, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


class _Say(TrainerCallback):
    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        print(f"step {state.global_step}", flush=True)  # type: ignore[attr-defined]


def main(folder: Path, output: Path) -> None:
    torch.set_num_threads(1)
    done = trainer(
        streamed(folder), output, max_steps=NUM_STEPS, save_strategy="steps", save_steps=1, callbacks=[_Say()]
    )
    checkpoint = last_complete_checkpoint(output)
    print(f"resuming {checkpoint}", flush=True)
    done.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    done.save_model(str(output / "final"))
    print("finished", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
