"""State on disk survives kills, full disks and failing ones; one run at a time has a folder."""

import errno
import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import lowmem
from lowmem.full import resume_last_step
from lowmem.streaming.runtime import runtime_of
from offload import Closed, FolderInUse, OffloadError, SourceError, TierFull, WriteError
from tests.lowmem.full_training import backward, batches, full, plain_trainer, weights
from tests.offload.small_disk import fill, small_disk
from tests.zoo.architectures import build

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama")))


@pytest.mark.parametrize("num_kills", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_every_killed_run_goes_on_from_a_whole_step(folder: Path, tmp_path: Path, num_kills: int) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.lowmem.full_kill_job", str(folder), str(tmp_path)]
    done = subprocess.run([*command, str(num_kills)], cwd=_ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"{num_kills} kills")


def _train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, batches(1, seed=step)[0])
        optimizer.step()
        optimizer.zero_grad()


def _train_and_save(model: PreTrainedModel, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    _train(model, optimizer, range(2, 4))
    model.save_pretrained(folder)


def test_the_second_run_on_a_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    model = full(folder, "disk", tmp_path)
    with pytest.raises(FolderInUse):
        full(folder, "disk", tmp_path)
    runtime_of(model).close()
    runtime_of(full(folder, "disk", tmp_path)).close()


def test_a_second_model_on_a_folder_is_told_which_call_of_this_process_has_it_and_how_to_free_it(
    folder: Path, tmp_path: Path
) -> None:
    first = full(folder, "disk", tmp_path)
    optimizer = lowmem.optim.AdamW(first)
    held = (
        r"this process itself \(the model opened by line \d+ of .*full_training\.py: return lowmem\.from_pretrained\(.*"
        r"\)\); delete what .* such as an optimizer or a Trainer, or give this run another folder"
    )
    with pytest.raises(FolderInUse, match=held) as caught:
        full(folder, "disk", tmp_path)
    assert caught.value.is_own
    del first, optimizer, caught
    runtime_of(full(folder, "disk", tmp_path)).close()


@pytest.mark.parametrize("tier", ["device", "disk"])
def test_a_deleted_model_takes_its_threads_along_and_leaves_its_folder_to_the_next(
    folder: Path, tmp_path: Path, tier: str
) -> None:
    before = {thread.name for thread in threading.enumerate()}
    for number in range(3):
        model = full(folder, tier, tmp_path).train()
        optimizer = lowmem.optim.AdamW(model, lr=1e-2)
        if number and tier == "disk":
            assert resume_last_step(optimizer) == number
        _train(model, optimizer, range(number, number + 1))
        trained = weights(model)
        tuning = weakref.ref(runtime_of(model).full)
        param = model.model.layers[0].mlp.up_proj.weight
        del model
        gc.collect()
        assert tuning() is None
        assert not {thread.name for thread in threading.enumerate()} - before
        # What outlives the model says that it is gone.
        with pytest.raises(RuntimeError, match="an optimizer of a model that is gone"):
            optimizer.step()
        with pytest.raises(Closed, match=r"up_proj.weight: the model that it is a parameter of is gone"):
            param + 0
        del optimizer, param
    whole = full(folder, "device", tmp_path).train()
    _train(whole, lowmem.optim.AdamW(whole, lr=1e-2), range(3))
    for name, weight in weights(whole).items() if tier == "disk" else ():
        assert torch.equal(trained[name], weight), name


def test_a_trained_model_is_released_with_its_trainer(folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        model = full(folder, "disk", tmp_path / "state")
        trainer = plain_trainer(model, tmp_path / "out", optimizer=lowmem.optim.AdamW(model), max_steps=1)
        trainer.train()
        del model, trainer
        gc.collect()
    full(folder, "disk", tmp_path / "state")


def test_a_closed_run_goes_on_from_its_last_step_and_a_new_one_starts_afresh(folder: Path, tmp_path: Path) -> None:
    whole = full(folder, "device", tmp_path).train()
    _train(whole, lowmem.optim.AdamW(whole, lr=1e-2), range(6))
    first = full(folder, "disk", tmp_path).train()
    _train(first, lowmem.optim.AdamW(first, lr=1e-2), range(3))
    runtime_of(first).close()
    # A run that does not ask for it starts from the checkpoint, and leaves the state alone until its first step.
    fresh = full(folder, "disk", tmp_path).train()
    before = weights(full(folder, "device", tmp_path))
    for name, weight in weights(fresh).items():
        assert torch.equal(weight, before[name]), name
    runtime_of(fresh).close()
    second = full(folder, "disk", tmp_path).train()
    optimizer = lowmem.optim.AdamW(second, lr=5.0)
    assert resume_last_step(optimizer) == 3
    assert optimizer.param_groups[0]["lr"] == 1e-2
    _train(second, optimizer, range(3, 6))
    for name, weight in weights(whole).items():
        assert torch.equal(weights(second)[name], weight), name
    runtime_of(second).close()
    third = full(folder, "disk", tmp_path).train()
    optimizer = lowmem.optim.AdamW(third, lr=1e-2)
    _train(third, optimizer, range(1))
    runtime_of(third).close()
    fourth = full(folder, "disk", tmp_path).train()
    assert resume_last_step(lowmem.optim.AdamW(fourth)) == 1


def test_without_a_committed_step_there_is_nothing_to_go_on_from(folder: Path, tmp_path: Path) -> None:
    model, in_memory = full(folder, "disk", tmp_path), full(folder, "device", tmp_path)
    with pytest.raises(SourceError, match="nothing was committed"):
        resume_last_step(lowmem.optim.AdamW(model))
    with pytest.raises(lowmem.UnsupportedError, match="keeps its state in memory"):
        resume_last_step(lowmem.optim.AdamW(in_memory))
    with pytest.raises(lowmem.UnsupportedError, match="resuming GaLore"):
        resume_last_step(lowmem.optim.GaLore(model, rank=4))
    with pytest.raises(ValueError, match="expected an optimizer of lowmem"):
        resume_last_step(torch.optim.SGD(torch.nn.Linear(2, 2).parameters()))


def test_state_whose_bytes_have_changed_is_not_gone_on_from(folder: Path, tmp_path: Path) -> None:
    model = full(folder, "disk", tmp_path).train()
    optimizer = lowmem.optim.AdamW(model, lr=1e-2)
    _train_and_save(model, optimizer, tmp_path / "saved")
    runtime_of(model).close()
    state = tmp_path / "weights-and-state"
    objects = json.loads((state / "store.json").read_text())["objects"].values()
    file = state / "objects" / max(objects, key=lambda entry: entry["nbytes"])["file"]
    raw = bytearray(file.read_bytes())
    raw[4321] ^= 1
    file.write_bytes(raw)
    again = full(folder, "disk", tmp_path).train()
    optimizer = lowmem.optim.AdamW(again, lr=1e-2)
    with pytest.raises(SourceError, match=r"store\.json: objects\..*\.file: the bytes of .* are not those that"):
        resume_last_step(optimizer)


def test_state_of_another_checkpoint_is_not_taken(folder: Path, tmp_path: Path) -> None:
    model = full(folder, "disk", tmp_path / "state").train()
    _train(model, lowmem.optim.AdamW(model), range(1))
    runtime_of(model).close()
    other = Path(build("llama", tmp_path / "other", seed=7))
    with pytest.raises(SourceError, match="the state of another run"):
        full(other, "disk", tmp_path / "state")


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.ENOSPC, TierFull), (errno.EIO, WriteError)], ids=["full disk", "failing disk"]
)
@pytest.mark.parametrize("after", [0, 25])
def test_a_disk_that_gives_out_stops_the_run_with_its_last_step_intact(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[OffloadError], after: int
) -> None:
    model = full(folder, "disk", tmp_path).train()
    optimizer = lowmem.optim.AdamW(model, lr=1e-2)
    _train(model, optimizer, range(2))
    after_two = weights(model)
    writes = 0
    real = os.pwritev

    def failing(fd: int, buffers: object, offset: int) -> int:
        nonlocal writes
        writes += 1
        if writes > after:
            raise OSError(number, os.strerror(number))
        return real(fd, buffers, offset)  # type: ignore[arg-type]

    files = runtime_of(model).full.tier.files._store._files  # type: ignore[union-attr]
    monkeypatch.setattr(files, "_io", replace(files._io, pwrite=failing))
    with pytest.raises(expected):
        _train_and_save(model, optimizer, tmp_path / "saved")
    runtime_of(model).close()
    again = full(folder, "disk", tmp_path).train()
    optimizer = lowmem.optim.AdamW(again, lr=1e-2)
    assert resume_last_step(optimizer) in (2, 3)
    if optimizer.param_groups[0]["clock"] == 2:
        for name, weight in weights(again).items():
            assert torch.equal(weight, after_two[name]), name
    _train(again, optimizer, range(optimizer.param_groups[0]["clock"], 4))
    whole = full(folder, "device", tmp_path).train()
    _train(whole, lowmem.optim.AdamW(whole, lr=1e-2), range(4))
    for name, weight in weights(whole).items():
        assert torch.equal(weights(again)[name], weight), name


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_a_run_on_a_really_full_disk_goes_on_when_there_is_room(folder: Path, tmp_path: Path, kind: str) -> None:
    with small_disk(tmp_path / "disk", nbytes=16 << 20, kind=kind) as disk:
        model = full(folder, "disk", disk / "state").train()
        optimizer = lowmem.optim.AdamW(model, lr=1e-2)
        _train(model, optimizer, range(1))
        after_one = weights(model)
        # The second version of the state needs room of its own; the file system needs some to say that it is full.
        filler = fill(disk, leave_bytes=64 << 10)
        with pytest.raises(TierFull, match=r"state.*(full|No space)"):
            _train_and_save(model, optimizer, tmp_path / "saved")
        runtime_of(model).close()
        filler.unlink()
        again = full(folder, "disk", disk / "state").train()
        optimizer = lowmem.optim.AdamW(again, lr=1e-2)
        assert resume_last_step(optimizer) == 1
        for name, weight in weights(again).items():
            assert torch.equal(weight, after_one[name]), name
        _train(again, optimizer, range(1, 4))
        whole = full(folder, "device", tmp_path).train()
        _train(whole, lowmem.optim.AdamW(whole, lr=1e-2), range(4))
        for name, weight in weights(whole).items():
            assert torch.equal(weights(again)[name], weight), name
        runtime_of(again).close()
