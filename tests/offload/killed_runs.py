"""Runs that change a store until they are killed, and a look at what is left. `python -m` this; see `main`."""

import os
import random
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from offload.blocks import ObjectLayout, lay_out_object
from offload.buffers import StagingBuffer
from offload.store.store import Store
from offload.store.store_files import verify_store

NAMES = [f"block {i}/state" for i in range(6)]


def layout_of(name: str, version: int) -> ObjectLayout:
    """Sizes differ from object to object, and sometimes from version to version."""
    num = 512 * (1 + 40 * NAMES.index(name)) + 1
    return lay_out_object({"master": (torch.float32, (num + version // 7 % 3,)), "step": (torch.int64, (1,))})


def fill(buffer: Tensor, name: str, version: int) -> None:
    words = buffer.view(torch.int64)
    torch.arange(words.numel(), out=words)
    words.mul_(2 * version + 1).add_(NAMES.index(name))


def versions_of(extra: object) -> dict[str, int]:
    assert isinstance(extra, dict)
    return dict(extra)


def work(folder: Path, *, seed: int, report: int) -> None:
    """Commit step after step for ever; writes a byte to `report` after each commit."""
    rng = random.Random(seed)
    store = Store.open(folder) if Store.exists(folder) else Store.create(folder, fingerprint="killed")
    buffers = [StagingBuffer(4 << 20).tensor for _ in NAMES]
    while True:
        versions = versions_of(store.extra)
        step = store.step + 1
        store.begin_step()
        writes = []
        for name, buffer in zip(NAMES, buffers, strict=True):
            if rng.random() < 0.1 and name in versions:
                store.remove(name)
                del versions[name]
            elif rng.random() < 0.7:
                layout = layout_of(name, step)
                data = buffer[: layout.nbytes]
                fill(data, name, step)
                writes.append(store.write(name, layout, data))
                versions[name] = step
        if rng.random() < 0.15:
            store.abort_step()
            continue
        store.commit(step=step, extra=versions)
        os.write(report, step.to_bytes(4, "little"))
        if rng.random() < 0.2:
            store.save_to(folder / "checkpoint")
        if rng.random() < 0.05 and Store.exists(folder / "checkpoint"):
            store.close()
            Store.restore(folder / "checkpoint", folder)
            store = Store.open(folder)


def check(folder: Path, *, reported: int) -> None:
    """What is left must be a whole step: the last one that was reported, or a later one."""
    checkpoint = folder / "checkpoint"
    for found in (folder, checkpoint):
        if Store.exists(found):
            assert verify_store(found) == (), "every byte is what was written"
    if Store.exists(folder):
        with Store.open(folder) as store:
            versions = versions_of(store.extra)
            assert store.step >= reported or Store.exists(checkpoint), (store.step, reported)
            assert set(store.names()) == set(versions)
            for name, version in versions.items():
                layout = layout_of(name, version)
                assert store.layout(name) == layout
                into = StagingBuffer(layout.nbytes).tensor
                store.load(name, into).wait()
                expect(into, name, version)
    else:
        assert reported == 0
    if Store.exists(checkpoint):
        with Store.open(checkpoint) as store:
            for name, version in versions_of(store.extra).items():
                into = StagingBuffer(layout_of(name, version).nbytes).tensor
                store.load(name, into).wait()
                expect(into, name, version)


def expect(got: Tensor, name: str, version: int) -> None:
    wanted = torch.empty_like(got)
    fill(wanted, name, version)
    assert torch.equal(got, wanted), f"{name} is not of step {version}"


def in_child(body: Callable[[], None]) -> int:
    """Fork: this process has no threads, and must not get any."""
    pid = os.fork()
    if pid:
        return pid
    try:
        body()
    except BaseException as error:  # noqa: BLE001
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)
    os._exit(0)


def main(folder: Path, num_kills: int, seed: int) -> None:
    """Kill runs at random instants; prints "ok" and how many steps there were, or what was wrong."""
    rng = random.Random(seed)
    num_steps = 0
    for i in range(num_kills):
        if rng.random() < 0.1:
            shutil.rmtree(folder, ignore_errors=True)
        reading, report = os.pipe()
        pid = in_child(lambda i=i, report=report: work(folder, seed=seed * 1000 + i, report=report))  # type: ignore[misc]
        os.close(report)
        steps = b""
        if rng.random() < 0.8:
            # Most of the time it is well under way, however slow the machine.
            num_bytes = 4 * rng.randint(1, 4)
            while len(steps) < num_bytes and select.select([reading], [], [], 30)[0]:
                part = os.read(reading, 1 << 16)
                assert part, "the run ended by itself"
                steps += part
        time.sleep(rng.random() * 0.1)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), "the run ended by itself"
        while part := os.read(reading, 1 << 16):
            steps += part
        os.close(reading)
        num_steps += len(steps) // 4
        reported = int.from_bytes(steps[-4:], "little")
        pid = in_child(lambda reported=reported: check(folder, reported=reported))  # type: ignore[misc]
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, f"kill {i}: see above"
    print("ok", num_steps)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
