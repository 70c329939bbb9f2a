"""Two ranks, one killed again and again: python -m tests.lowmem.processes.kill_ranks_job FOLDER SCRATCH NUM SEED.

A pair in SCRATCH/whole is left alone. NUM times for each rank, a pair in SCRATCH/killed starts or goes on, one of it is
killed at some instant, and the other has a minute to end by itself: there is no launcher that would end it. The last
pair goes on to the end. All are forked from this process, which has imported everything and started nothing.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainerCallback

import lowmem.adapters.dora
import lowmem.api  # what opening and training import lazily: once, not in each run
import lowmem.generation.hooks  # noqa: F401
from lowmem.monitoring.resume_checks import newest_complete
from lowmem.streaming.boundary import DiskBoundaries
from lowmem.streaming.runtime import runtime_of
from offload import Scratch
from tests.lowmem.tiny_training import trainer
from tests.zoo.streamed import streamed

NUM_STEPS = 40
END_S = 60.0


class _Say(TrainerCallback):
    def __init__(self, say: int) -> None:
        self._say = say

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        os.write(self._say, b"%d\n" % state.global_step)  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two ranks that run."""

    pids: tuple[int, int]
    hear: int
    """Steps that rank 0 has ended."""
    words: tuple[Path, Path]
    """What each of them said at its end."""


def start(folder: Path, output: Path) -> Pair:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    hear, say = os.pipe()
    output.mkdir(parents=True, exist_ok=True)
    words = (output / "rank0.txt", output / "rank1.txt")
    pids = tuple(_fork(rank, port, folder, output, say, words[rank]) for rank in range(2))
    os.close(say)
    return Pair(pids=pids, hear=hear, words=words)  # type: ignore[arg-type]


def _fork(rank: int, port: int, folder: Path, output: Path, say: int, words: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"GROUP_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        train(folder, output, say if rank == 0 else os.open(os.devnull, os.O_WRONLY))
        status = 0
    except BaseException:
        words.write_text(traceback.format_exc())
        raise
    finally:
        os._exit(status)


def train(folder: Path, output: Path, say: int) -> None:
    torch.set_num_threads(1)
    # The first to get there saves: both must have seen the same checkpoint before.
    checkpoint = newest_complete(output, is_adapter=True)
    model = streamed(folder)
    runtime = runtime_of(model)
    runtime.boundaries.close()
    # Of both, as Budget(disk=...) is.
    scratch = output.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    runtime.boundaries = DiskBoundaries(torch.device("cpu"), Scratch(scratch), num_buffers=1)
    done = trainer(
        model,
        output,
        max_steps=NUM_STEPS,
        save_strategy="steps",
        save_steps=1,
        per_device_train_batch_size=2,
        callbacks=[_Say(say)],
    )
    done.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    done.save_model(str(output / "final"))


def wait(pid: int, limit_s: float) -> int | None:
    """How a process has ended, or None if it has not."""
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.02)
    return None


def kill(rank: int, folder: Path, output: Path, chance: random.Random) -> dict[str, object]:
    """Start a pair, kill one of it while it trains; what became of the other.

    While they are opening the model it is the launcher who ends the others: torch waits half an hour for a rank that
    does not come.
    """
    pair = start(folder, output)
    num_steps = chance.randint(1, 3)
    with os.fdopen(pair.hear) as said:
        for _ in range(num_steps):
            said.readline()
        time.sleep(chance.random() * 0.2)
        os.kill(pair.pids[rank], signal.SIGKILL)
        start_s = time.monotonic()
        os.waitpid(pair.pids[rank], 0)
        status = wait(pair.pids[1 - rank], END_S)
        ended_s = time.monotonic() - start_s
        if status is None:
            os.kill(pair.pids[1 - rank], signal.SIGKILL)
            os.waitpid(pair.pids[1 - rank], 0)
    words = pair.words[1 - rank]
    text = words.read_text() if words.exists() else ""
    words.unlink(missing_ok=True)
    return {"rank": rank, "steps": num_steps, "status": status, "ended_s": ended_s, "words": text}


def finish(pair: Pair) -> None:
    """Let a pair go on to its end."""
    for pid in pair.pids:
        assert wait(pid, 400) == 0, [path.read_text() for path in pair.words if path.exists()]
    os.close(pair.hear)


def main(folder: Path, scratch: Path, num: int, seed: int) -> None:
    chance = random.Random(seed)
    finish(start(folder, scratch / "whole"))
    before = set(os.listdir("/dev/shm"))
    found = [kill(rank, folder, scratch / "killed", chance) for _ in range(num) for rank in (0, 1)]
    finish(start(folder, scratch / "killed"))
    left = sorted((set(os.listdir("/dev/shm")) - before) | set(os.listdir(scratch / "scratch")))
    (scratch / "found.json").write_text(json.dumps({"killed": found, "left": left}))
    print("finished", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
