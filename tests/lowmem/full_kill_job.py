"""Kill a run with state on disk again and again: python -m tests.lowmem.full_kill_job FOLDER SCRATCH NUM_KILLS.

Each child opens the model, goes on from the last whole step, checks its weights against those of a run that nobody
killed, says so, and trains on; it is killed at a random instant after that. Children are forked from a process that has
imported everything and started nothing, because importing takes longer than training.
"""

import os
import random
import shutil
import signal
import sys
import time
from hashlib import sha256
from pathlib import Path

import torch

import lowmem
from lowmem.full import resume_last_step
from offload import SourceError
from tests.lowmem.full_training import backward, batches, full, weights

NUM_STEPS = 60
_WRONG = 3


def digest(model: torch.nn.Module) -> str:
    """Of all weights."""
    found = sha256()
    for name, weight in sorted(weights(model).items()):
        found.update(name.encode() + weight.numpy().tobytes())
    return found.hexdigest()


def child(folder: Path, scratch: Path, expected: list[str] | None, say: int) -> None:
    """Train from the last whole step to the end, writing a byte when the start was right and one for each step."""
    torch.set_num_threads(1)
    model = full(folder, "disk", scratch).train()
    optimizer = lowmem.optim.AdamW(model, lr=3e-3)
    try:
        start = resume_last_step(optimizer)
    except SourceError:
        start = 0
    if expected is not None and digest(model) != expected[start]:
        os._exit(_WRONG)
    os.write(say, b"r" if expected is not None else digest(model).encode())
    for step in range(start, NUM_STEPS):
        for ids in batches(2, seed=step):
            backward(model, ids, parts=2)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if expected is None:
            os.write(say, digest(model).encode())
    if expected is not None and digest(model) != expected[NUM_STEPS]:
        os._exit(_WRONG)
    os._exit(0)


def start(folder: Path, scratch: Path, expected: list[str] | None) -> tuple[int, int]:
    """Fork a child; its number, and where to hear from it."""
    hear, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(folder, scratch, expected, say)
        finally:
            os._exit(1)
    os.close(say)
    return pid, hear


def main(folder: Path, scratch: Path, num_kills: int) -> None:
    """Print how many kills were followed by a right resume, and how many steps had been taken at the kills."""
    pid, hear = start(folder, scratch / "whole", None)
    with os.fdopen(hear, "rb") as said:
        text = said.read().decode()
    assert os.waitpid(pid, 0)[1] == 0
    expected = [text[64 * step : 64 * (step + 1)] for step in range(NUM_STEPS + 1)]
    assert len(set(expected)) == NUM_STEPS + 1
    rng = random.Random(4)
    num_right = num_killed = num_finished = 0
    while num_killed < num_kills:
        pid, hear = start(folder, scratch / "killed", expected)
        said = os.read(hear, 1)
        if said:
            num_right += 1
            time.sleep(rng.uniform(0.0, 0.3))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        os.close(hear)
        if os.WIFSIGNALED(status):
            num_killed += 1
            continue
        assert os.WEXITSTATUS(status) == 0, f"exit {os.WEXITSTATUS(status)} after {num_killed} kills"
        num_finished += 1
        shutil.rmtree(scratch / "killed")
    print(f"{num_killed} kills, {num_right} right starts, {num_finished} runs to the end", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
