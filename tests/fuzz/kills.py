"""Runs, saves and merges that are killed at random instants, and what is left of them."""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lowmem
from tests.fuzz.runs import KINDS, NUM_STEPS, digest, run, trainable
from tests.fuzz.workers import Ending, Fault, in_child, note
from tests.lowmem.full_training import backward, batches, full, weights
from tests.lowmem.kill_job import last_complete_checkpoint
from tests.lowmem.tiny_training import streamed
from tests.zoo.architectures import build

_MOST_KILLS = 5
"""Of one run; then it may end."""
_NUM_SAVES = 6
# From few files to many and back: shards of the older save have names that the newer has not.
_SIZES = ("50KB", "20KB", "10MB")
_SAVES = {"save full disk": "disk", "save full host": "host"}
"""Where the state of what is saved is."""
_FROZEN_SAVES = ("save frozen", "save by accelerate", "save adapter")
_KINDS = (*KINDS, *_SAVES, *_FROZEN_SAVES, "merge")


class Kills:
    """One case is a run that is killed up to five times and then ends; counted are the kills.

    Args:
        kinds: Of what is killed: those of `runs`, "save " and what is saved, "merge".
    """

    limit_s = 300.0
    limit_bytes = 2 << 30
    cases_per_worker = 1000

    def __init__(self, kinds: tuple[str, ...] = _KINDS) -> None:
        self._kinds = kinds

    def prepare(self, folder: Path) -> None:
        model = folder / "model"
        in_child(lambda: build("llama", model))
        in_child(lambda: build("llama", folder / "other model", seed=1))
        in_child(lambda: _make_adapter(folder))
        expected: dict[str, object] = {}
        for kind in self._kinds:
            work = folder / kind
            if kind == "merge":
                _undisturbed(lambda say, work=work: _merge(folder, work, say))  # type: ignore[misc]
                expected[kind] = _files(work / "out 0")
            elif kind in (*_SAVES, *_FROZEN_SAVES):
                said = _undisturbed(lambda say, kind=kind, work=work: _save_again(kind, model, work, say))  # type: ignore[misc]
                expected[kind] = [line.split()[2] for line in said if line.startswith("saving")]
            else:
                said = _undisturbed(lambda say, kind=kind, work=work: run(kind, model, work, say=say))  # type: ignore[misc]
                expected[kind] = _steps(said)
                assert len(_steps(said)) == NUM_STEPS, said
        (folder / "expected.json").write_text(json.dumps(expected))

    def run(self, seed: int, *, prepared: Path, scratch: Path) -> Ending:
        rng = random.Random(seed)
        expected = json.loads((prepared / "expected.json").read_text())
        kind = rng.choice(self._kinds)
        note(scratch, kind)
        if kind == "merge":
            return _killed_merges(prepared, scratch, rng, expected=expected[kind])
        if kind in (*_SAVES, *_FROZEN_SAVES):
            return _killed_saves(kind, prepared, scratch, rng, expected=expected[kind])
        return _killed_runs(kind, prepared, scratch, rng, expected=expected[kind])


def _killed_runs(kind: str, prepared: Path, scratch: Path, rng: random.Random, *, expected: dict[str, str]) -> Ending:
    """Every step of every run has the weights of the run that nobody killed."""
    num_kills = 0
    while True:
        before = last_complete_checkpoint(scratch / "out")
        with _child(lambda say: run(kind, prepared / "model", scratch, say=say)) as child:
            killed = num_kills < _MOST_KILLS and _kill_somewhen(child, rng)
        num_kills += killed
        note(scratch, f"{kind}, {num_kills} kills, last child said {child.said}")
        for step, found in _steps(child.said).items():
            if found != expected[step]:
                raise Fault(f"{kind}: other weights after a resume: step {step} after {num_kills} kills")
        after = last_complete_checkpoint(scratch / "out")
        if before is not None and (after is None or _number(after) < _number(before)):
            raise Fault(f"{kind}: an older checkpoint is lost: {before.name}")
        if not killed:
            child.check_ended()
            return Ending("kills survived", kind, num_kills)


def _killed_saves(kind: str, prepared: Path, scratch: Path, rng: random.Random, *, expected: list[str]) -> Ending:
    """A save over an older one leaves the older or the newer weights, whole, as transformers loads them."""
    num_kills = 0
    output = scratch / "saved"
    strangers = {"model_ema.safetensors": b"ours", "notes.txt": b"ours too"}
    while num_kills < _MOST_KILLS:
        shutil.rmtree(scratch / "state", ignore_errors=True)
        with _child(lambda say: _save_again(kind, prepared / "model", scratch, say)) as child:
            child.hear("saved 0")
            for name, data in strangers.items():
                (output / name).write_bytes(data)
            killed = _kill_somewhen(child, rng)
        if not killed:
            child.check_ended()
        num_kills += killed
        saved = [line.split() for line in child.said if line.startswith("sav")]
        allowed = {expected[int(number)] for word, number, *_ in saved[-1:] if word == "saving"}
        allowed |= {expected[max(int(number) for word, number, *_ in saved if word == "saved")]}
        note(scratch, f"{kind}, {num_kills} kills, last child said {child.said}")
        found = _in_child_text(lambda: _loaded_digest(output))
        if found not in allowed:
            raise Fault(f"{kind}: neither the older nor the newer weights: {found}")
        if any((output / name).read_bytes() != data for name, data in strangers.items() if (output / name).exists()):
            raise Fault(f"{kind}: a stranger's file was written")
        if missing := [name for name in strangers if not (output / name).exists()]:
            raise Fault(f"{kind}: a stranger's file was removed: {missing}")
    return Ending("kills survived", kind, num_kills)


def _killed_merges(prepared: Path, scratch: Path, rng: random.Random, *, expected: dict[str, str]) -> Ending:
    """A merge's output is whole or not there, and the next merge to the same place works."""
    num_kills = 0
    while num_kills < _MOST_KILLS:
        with _child(lambda say: _merge(prepared, scratch / "merges", say)) as child:
            killed = _kill_somewhen(child, rng)
        if not killed:
            child.check_ended()
        num_kills += killed
        for output in (scratch / "merges").glob("out *"):
            if _files(output) != expected:
                raise Fault(f"merge: an output that is not whole: {sorted(_files(output).keys() ^ expected.keys())}")
            shutil.rmtree(output)
    with _child(lambda say: _merge(prepared, scratch / "merges", say)) as child:
        pass
    child.check_ended()
    return Ending("kills survived", "merge", num_kills)


def _save_again(kind: str, folder: Path, work: Path, say: Callable[[str], object]) -> None:
    """Train step by step, saving over the save before; of frozen models, one and another in turn."""
    (work / "state").mkdir(parents=True, exist_ok=True)
    if kind == "save adapter":
        _save_adapter(folder, work, say)
        return
    if kind in _FROZEN_SAVES:
        _save_in_turn(kind, (folder, folder.with_name("other model")), work, say)
        return
    model = full(folder, _SAVES[kind], work / "state").train()
    optimizer = lowmem.optim.AdamW(model, lr=1e-2)
    for number, ids in enumerate(batches(_NUM_SAVES)):
        backward(model, ids)
        optimizer.step()
        optimizer.zero_grad()
        say(f"saving {number} {digest(weights(model))}\n")
        model.save_pretrained(work / "saved", max_shard_size=_SIZES[number % 3])
        say(f"saved {number}\n")


def _save_in_turn(kind: str, folders: tuple[Path, Path], work: Path, say: Callable[[str], object]) -> None:
    models = [streamed(folder) for folder in folders]
    if not (work / "saved").exists():
        models[0].config.save_pretrained(work / "saved")  # accelerate writes weights alone
    for number in range(_NUM_SAVES):
        model = models[number % 2]
        say(f"saving {number} {digest(weights(model))}\n")
        if kind == "save frozen":
            model.save_pretrained(work / "saved", max_shard_size=_SIZES[number % 3])
        else:
            Accelerator(cpu=True).save_model(model, work / "saved", max_shard_size=_SIZES[number % 3])
        say(f"saved {number}\n")


def _save_adapter(folder: Path, work: Path, say: Callable[[str], object]) -> None:
    torch.manual_seed(0)
    model = get_peft_model(streamed(folder), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for number in range(_NUM_SAVES):
        for parameter in trainable(model):
            with torch.no_grad():
                model.get_parameter(parameter).add_(0.1)
        say(f"saving {number} {digest(get_peft_model_state_dict(model))}\n")
        model.save_pretrained(str(work / "saved"))
        say(f"saved {number}\n")


def _loaded_digest(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        json.loads((folder / "adapter_config.json").read_text())
        return digest(load_file(folder / "adapter_model.safetensors"))
    return digest(weights(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)))


def _make_adapter(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter in trainable(adapted):
        with torch.no_grad():
            adapted.get_parameter(parameter).add_(0.1)
    adapted.save_pretrained(folder / "adapter")


def _merge(prepared: Path, outputs: Path, say: Callable[[str], object]) -> None:
    outputs.mkdir(exist_ok=True)
    for number in range(8):
        say(f"step {number} merging\n")
        lowmem.merge(
            prepared / "model", adapter=prepared / "adapter", output=outputs / f"out {number}", max_shard_bytes=30_000
        )


def _files(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def _steps(said: list[str]) -> dict[str, str]:
    return {line.split()[1]: line.split()[2] for line in said if line.startswith("step")}


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


class _Child:
    """A forked run and what it says."""

    def __init__(self, pid: int, hears: int) -> None:
        self.pid, self._hears = pid, hears
        self.said: list[str] = []
        self._rest = ""
        self.status: int | None = None

    def hear(self, beginning: str, *, num: int = 1, timeout_s: float = 120.0) -> bool:
        """Listen until so many lines begin so; False if the child ends before."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if sum(line.startswith(beginning) for line in self.said) >= num:
                return True
            if not select.select([self._hears], [], [], 1.0)[0]:
                continue
            if not self._take():
                return False
        raise Fault(f"a child said nothing for {timeout_s:.0f} s: {self.said}")

    def _take(self) -> bool:
        part = os.read(self._hears, 1 << 16).decode()
        *lines, self._rest = (self._rest + part).split("\n")
        self.said += lines
        return bool(part)

    def finish(self) -> None:
        """Listen to the end and take its exit code."""
        while self._take():
            pass
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._hears)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def check_ended(self) -> None:
        if self.status != 0:
            raise Fault(f"a run ended by itself: exit code {self.status}, {self.said[-3:]}")


@contextmanager
def _child(work: Callable[[Callable[[str], object]], None]) -> Iterator[_Child]:
    """A forked process that does something and says how far it is; it has ended when the context does."""
    hears, says = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(hears)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            torch.set_num_threads(1)
            work(lambda text: os.write(says, text.encode()))
            status = 0
        except BaseException as error:  # noqa: BLE001
            os.write(says, f"error {type(error).__name__}: {str(error)[:300]}\n".encode())
        finally:
            os._exit(status)
    os.close(says)
    child = _Child(pid, hears)
    try:
        yield child
    except BaseException:
        child.kill()
        raise
    finally:
        child.finish()


def _kill_somewhen(child: _Child, rng: random.Random) -> bool:
    """Kill a child at a random instant; False if it has ended by itself before."""
    if rng.random() < 0.15:
        time.sleep(rng.uniform(0.0, 0.5))
    else:
        # Most of the time it is well under way.
        child.hear("", num=rng.randint(1, 6))
        time.sleep(rng.expovariate(4.0))
    child.kill()
    child.status = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    return child.status == -signal.SIGKILL


def _undisturbed(work: Callable[[Callable[[str], object]], None]) -> list[str]:
    with _child(work) as child:
        pass
    child.check_ended()
    return child.said


def _in_child_text(work: Callable[[], str]) -> str:
    """What a function returns in a process of its own, or the error it raises."""
    with _child(lambda say: say(work() + "\n")) as child:  # type: ignore[arg-type]
        pass
    return child.said[-1] if child.said else ""


__all__ = ["Kills"]
