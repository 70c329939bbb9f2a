"""Runs that are killed, and one that is not: python -m tests.lowmem.kill_job FOLDER SCRATCH STEP...

A run in SCRATCH/killed is killed within the step after each STEP, then goes on to its end; one in SCRATCH/whole is left
alone. Each is a process forked from this one, which has imported everything and started nothing, because importing
takes longer than training.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from transformers import TrainerCallback

import lowmem.adapters.dora
import lowmem.api  # what opening and training import lazily: once, not in each run
import lowmem.generation.hooks  # noqa: F401
from tests.lowmem.tiny_training import streamed, trainer

NUM_STEPS = 12


def _is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the Trainer writes its state last, in place."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True


def last_complete_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    written = filter(_is_complete, output.glob("checkpoint-*"))
    return max(written, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


class _Say(TrainerCallback):
    def __init__(self, say: int, last: int) -> None:
        self._say, self._last = say, last

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        step: int = state.global_step  # type: ignore[attr-defined]
        os.write(self._say, b"%d\n" % step)
        if step == self._last:
            signal.pause()


def train(folder: Path, output: Path, say: int, last: int) -> None:
    """Train to the end; or until `last` steps are over, and wait to be killed."""
    torch.set_num_threads(1)
    done = trainer(
        streamed(folder), output, max_steps=NUM_STEPS, save_strategy="steps", save_steps=1, callbacks=[_Say(say, last)]
    )
    checkpoint = last_complete_checkpoint(output)
    done.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    done.save_model(str(output / "final"))


def start(folder: Path, output: Path, *, last: int = NUM_STEPS + 1) -> tuple[int, int]:
    """Fork a run; its number, and where to hear of its steps."""
    hear, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(hear)
            train(folder, output, say, last)
            status = 0
        finally:
            if status:
                traceback.print_exc()
            os._exit(status)
    os.close(say)
    return pid, hear


def kill_after(step: int, folder: Path, output: Path, delay_s: float) -> None:
    """Kill a run a moment after it has said that a step is over; on a busy machine, before the one after next is."""
    pid, hear = start(folder, output, last=step + 2)
    with os.fdopen(hear) as said:
        heard = next((line for line in said if int(line) == step), None)
        assert heard is not None, f"the run ended without step {step}"
        time.sleep(delay_s)
        os.kill(pid, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def finish(pid: int, hear: int) -> None:
    """Let a run go on to its end."""
    with os.fdopen(hear) as said:
        said.read()
    assert os.waitpid(pid, 0)[1] == 0


def main(folder: Path, scratch: Path, steps: list[int]) -> None:
    rng = random.Random(3)
    whole = start(folder, scratch / "whole")
    for step in steps:
        kill_after(step, folder, scratch / "killed", rng.uniform(0, 0.05))
    finish(*start(folder, scratch / "killed"))
    finish(*whole)
    print("finished", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [int(step) for step in sys.argv[3:]])
