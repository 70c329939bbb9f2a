"""A long run of one process: memory, threads, descriptors and mappings stay as they are after the first steps."""

from __future__ import annotations

import gc
import os
from pathlib import Path

from transformers import TrainerCallback

from tests.fuzz.runs import made
from tests.fuzz.workers import Ending, Fault, in_child, note
from tests.zoo.architectures import build

_WARM_STEPS = 100
_EVERY = 50
_NUM_LAST = 3
_LARGEST_GROWTH = 0.01
KINDS = ("sft", "full disk", "dpo")


class Soak:
    """One case is a run of many steps, of each kind in turn; counted are the steps.

    Args:
        num_steps: Of a run.
    """

    limit_s = 3600.0
    limit_bytes = 2 << 30
    cases_per_worker = 1

    def __init__(self, num_steps: int = 2000) -> None:
        self._num_steps = num_steps

    def prepare(self, folder: Path) -> None:
        in_child(lambda: build("llama", folder / "model"))

    def run(self, seed: int, *, prepared: Path, scratch: Path) -> Ending:
        kind = KINDS[seed % len(KINDS)]
        watch = _Watch()
        trainer = made(
            kind,
            prepared / "model",
            scratch / "out",
            scratch / "state",
            say=lambda text: None,
            seed=seed,
            max_steps=self._num_steps,
            gradient_accumulation_steps=1,
            save_strategy="no",
            logging_steps=10**6,
        )
        trainer.add_callback(watch)
        trainer.train()
        first = watch.seen[_WARM_STEPS]
        # A file that a thread has open just then is not one that stays open: the least of the last few.
        at_end = sorted(watch.seen)[-_NUM_LAST:]
        last = {name: min(watch.seen[step][name] for step in at_end) for name in first}
        what = note(scratch, f"{kind}: step {_WARM_STEPS} {first}, steps {at_end} at least {last}")
        for name, value in last.items():
            allowed = first[name] * (1 + _LARGEST_GROWTH) if name == "rss_bytes" else first[name]
            if value > allowed:
                raise Fault(f"{kind}: {name} grows: {what}")
        return Ending("steps without growth", what, self._num_steps)


class _Watch(TrainerCallback):
    def __init__(self) -> None:
        self.seen: dict[int, dict[str, int]] = {}

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        step = state.global_step  # type: ignore[attr-defined]
        if step >= _WARM_STEPS and step % _EVERY == 0:
            gc.collect()
            self.seen[step] = {
                "rss_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
                "threads": len(os.listdir("/proc/self/task")),
                "descriptors": len(os.listdir("/proc/self/fd")),
                "mappings": Path("/proc/self/maps").read_text().count("\n"),
            }


__all__ = ["Soak"]
