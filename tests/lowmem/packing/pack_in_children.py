"""Packs a tiny model in child processes that die: `python -m tests.lowmem.packing.pack_in_children BASE FOLDER 20`.

Children are forked from one process that has imported everything. One counts the instants (writes, flushes, renames)
of a whole bake; then, for 20 of them, one child dies there (SIGKILL) and the next goes on. Prints one JSON line.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401
import torch
import transformers

from lowmem.models.checkpoint import open_checkpoint
from lowmem.packing.place import pack
from offload.files.file import File


def child(work: Callable[[], object]) -> int:
    """Run something in a forked process; returns its exit status, negative where a signal ended it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:  # noqa: BLE001 - the parent sees the status
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Instants:
    """Counts what changes the disk, and dies before the one that was asked for."""

    def __init__(self, deadly: int | None = None) -> None:
        self.count, self._deadly = 0, deadly
        changes = [(os, name) for name in ("fsync", "fdatasync", "replace", "rename", "rmdir", "mkdir")]
        for owner, name in (*changes, (File, "write")):
            setattr(owner, name, self._counting(getattr(owner, name)))

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: object, **kwargs: object) -> object:
            if self.count == self._deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
            return call(*args, **kwargs)

        return counted


def digest(folder: Path) -> dict[str, str]:
    """Checksums of a folder's files."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def run(base: Path, folder: Path, num_deaths: int) -> dict[str, object]:
    """Everything; `base` is a tiny checkpoint, `folder` an empty one."""
    # What transformers imports only when a model is made: once here and not in each child.
    open_checkpoint(base, name="x", device=torch.device("cpu"), dtype="auto").source.close()

    def bake(output: Path) -> Path:
        return pack(base, quantization="nf4", output=output, device="cpu")

    def count() -> None:
        instants = Instants()
        bake(folder / "whole")
        (folder / "count").write_text(str(instants.count))

    assert child(count) == 0
    expected, num = digest(folder / "whole"), int((folder / "count").read_text())
    deaths, same, half, left = 0, 0, 0, 0
    for number in range(num_deaths):
        output = folder / f"killed {number}"
        deadly = number * num // num_deaths

        def die(output: Path = output, deadly: int = deadly) -> None:
            Instants(deadly)
            bake(output)

        deaths += child(die) == -signal.SIGKILL
        half += output.exists() and digest(output) != expected
        assert child(lambda output=output: bake(output)) == 0  # type: ignore[misc]
        same += digest(output) == expected
        left += (folder / f".{output.name}.packing").exists()
    both = folder / "both"
    pids = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            bake(both)
            os._exit(0)
        pids.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return {
        "num_instants": num,
        "deaths": deaths,
        "half_outputs": half,
        "same_after_resuming": same,
        "left_over": left,
        "two_bakers": statuses,
        "two_bakers_same": digest(both) == expected and not (folder / ".both.packing").exists(),
    }


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(json.dumps(run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))
