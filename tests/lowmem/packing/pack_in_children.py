"""Packs a tiny model in child processes that die: `python -m tests.lowmem.packing.pack_in_children BASE FOLDER 20`.

With the folder of an adapter behind it, the adapter is merged into a packed folder instead. Children are forked from
one process that has imported everything. One counts the instants (writes, copies, flushes, renames, removals) of a
whole bake; then, for 20 of them, one child dies there (SIGKILL) and the next goes on. Prints one JSON line.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401
import peft  # noqa: F401
import torch
import transformers

import lowmem
from lowmem.models.checkpoint import open_checkpoint
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
        changes = [(os, name) for name in ("fsync", "fdatasync", "replace", "rename", "rmdir", "mkdir", "unlink")]
        for owner, name in (*changes, (File, "write"), (shutil, "copyfile"), (Path, "write_text")):
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


def run(base: Path, folder: Path, num_deaths: int, adapter: Path | None = None) -> dict[str, object]:
    """Everything; `base` is a tiny checkpoint, `folder` an empty one, `adapter` one of it to merge."""
    # What transformers imports only when a model is made: once here and not in each child.
    open_checkpoint(base, name="x", device=torch.device("cpu"), dtype="auto").source.close()

    given = digest(base), None if adapter is None else digest(adapter)

    def bake(output: Path) -> Path:
        if adapter is not None:
            return lowmem.merge(base, adapter=adapter, output=output, quantization="nf4")
        return lowmem.pack(base, quantization="nf4", output=output, device="cpu")

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
        "inputs_same": given == (digest(base), None if adapter is None else digest(adapter)),
    }


def check_kills(base: Path, folder: Path, num_deaths: int, adapter: Path | None = None) -> None:
    """Run this file in a process of its own, and fail unless nothing was lost: arguments as `run`."""
    arguments = [str(base), str(folder), str(num_deaths), *([] if adapter is None else [str(adapter)])]
    done = subprocess.run([sys.executable, "-m", __name__, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("num_instants") > 40
    assert found == {
        "deaths": num_deaths,
        "half_outputs": 0,
        "same_after_resuming": num_deaths,
        "left_over": 0,
        "two_bakers": [0, 0],
        "two_bakers_same": True,
        "inputs_same": True,
    }


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    # What packing does to the adapter's change is a warning.
    warnings.simplefilter("ignore", UserWarning)
    print(json.dumps(run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), *map(Path, sys.argv[4:]))))
