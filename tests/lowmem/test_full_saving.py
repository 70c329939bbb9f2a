"""What a fully tuned model writes: nothing of an older checkpoint is lost, and each checkpoint goes on from itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer

import lowmem
from lowmem.full.saving import FOLDER, check_checkpoint
from lowmem.streaming.runtime import runtime_of
from offload import SourceError, TierFull
from tests.lowmem.full_training import backward, batches, full, plain_trainer, weights
from tests.offload.small_disk import fill, small_disk
from tests.zoo.architectures import build

TIERS = pytest.mark.parametrize("tier", ["device", "disk"])
STATE = ("host", "disk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama")))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def take_a_step(model: PreTrainedModel) -> None:
    optimizer = lowmem.optim.AdamW(model, lr=1e-2)
    backward(model, batches(1)[0])
    optimizer.step()
    optimizer.zero_grad()


@TIERS
@pytest.mark.parametrize("way", ["itself", "a link to it", "relative"])
def test_the_folder_that_is_being_read_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, tier: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    model = full(own, tier, tmp_path / "state")
    before = contents(own)
    target = own
    if way == "a link to it":
        target = tmp_path / "link"
        target.symlink_to(own)
    elif way == "relative":
        monkeypatch.chdir(tmp_path)
        target = Path("own")
    with pytest.raises(lowmem.UnsupportedError, match="the model was opened from this folder"):
        model.save_pretrained(target)
    assert contents(own) == before
    model.save_pretrained(tmp_path / "elsewhere")
    for name, weight in load_file(tmp_path / "elsewhere" / "model.safetensors").items():
        assert (
            torch.equal(weight, load_file(own / "model.safetensors")[name])
            if (own / "model.safetensors").exists()
            else weight.isfinite().all()
        )
    runtime_of(model).close()


SIZES = {"one file": "1GB", "shards": "90KB"}


@pytest.mark.parametrize("older", SIZES)
@pytest.mark.parametrize("newer", SIZES)
def test_a_save_over_an_older_one_removes_what_that_listed_and_nothing_else(
    folder: Path, tmp_path: Path, older: str, newer: str
) -> None:
    model, target = full(folder, "device", tmp_path).train(), tmp_path / "saved"
    target.mkdir()
    model.save_pretrained(target, max_shard_size=SIZES[older])
    ours = set(contents(target))
    strangers = ("model_ema.safetensors", "model-00099-of-00099.safetensors", "notes.txt", "tokenizer.json")
    for name in strangers:
        (target / name).write_bytes(name.encode())
    for _ in range(2):
        take_a_step(model)
        model.save_pretrained(target, max_shard_size=SIZES[newer])
    found = contents(target)
    for name in strangers:
        assert found.pop(name) == name.encode()
    assert {name for name in found if name.endswith(".json")} <= ours | {"model.safetensors.index.json"}
    assert ("model.safetensors.index.json" in found) == (newer == "shards")
    listed = (
        set(json.loads(found["model.safetensors.index.json"])["weight_map"].values())
        if newer == "shards"
        else {"model.safetensors"}
    )
    assert {name for name in found if name.endswith(".safetensors")} == listed
    loaded = AutoModelForCausalLM.from_pretrained(target)
    for name, weight in weights(model).items():
        assert torch.equal(weights(loaded)[name], weight), name


def steps_of_a_save(monkeypatch: pytest.MonkeyPatch, *, at: int) -> Callable[[], int]:
    """Have the process end at the n-th change of a folder; returns how many there were."""
    done = 0

    def counted(name: str) -> None:
        real = getattr(os, name)

        def call(*args: object, **more: object) -> object:
            nonlocal done
            done += 1
            if done == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **more)

        monkeypatch.setattr(os, name, call)

    for name in ("rename", "replace", "unlink", "fsync", "mkdir", "rmdir"):
        counted(name)
    return lambda: done


def forked(work: Callable[[], None]) -> int:
    """Do it in a child; its status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("shards", "shards"),
        *(
            pytest.param(one, other, marks=pytest.mark.slow)
            for one in SIZES
            for other in SIZES
            if "one file" in (one, other)
        ),
    ],
)
def test_a_kill_at_any_instant_of_a_save_leaves_the_older_checkpoint_or_the_new_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: str, newer: str
) -> None:
    model = full(folder, "device", tmp_path).train()
    start = tmp_path / "start"
    model.save_pretrained(start, max_shard_size=SIZES[older])
    first = weights(model)
    take_a_step(model)
    second = weights(model)
    (start / "model_ema.safetensors").write_bytes(b"theirs")

    def which(target: Path) -> str:
        loaded = weights(AutoModelForCausalLM.from_pretrained(target))
        for name, expected in (("older", first), ("newer", second)):
            if all(torch.equal(loaded[key], weight) for key, weight in expected.items()):
                return name
        raise AssertionError("a mixture")

    found, at, killed = [], 0, True
    while killed:
        at += 1
        target = shutil.copytree(start, tmp_path / f"{at}")

        def save(at: int = at, target: Path = target) -> None:
            steps_of_a_save(monkeypatch, at=at)
            model.save_pretrained(target, max_shard_size=SIZES[newer])

        status = forked(save)
        killed = os.WIFSIGNALED(status)
        assert killed or os.WEXITSTATUS(status) == 0
        found.append(which(target))
        assert (target / "model_ema.safetensors").read_bytes() == b"theirs"
        # The next save is whole whatever was left, and clears it away.
        model.save_pretrained(target, max_shard_size=SIZES[newer])
        assert which(target) == "newer"
        assert not list(target.glob(".saving-*"))
        shutil.rmtree(target)
    assert found[0] == "older"
    assert found[-1] == "newer"
    assert found == sorted(found, reverse=True), "once the new one is there it stays"
    assert len(found) > 10


def test_a_full_disk_leaves_the_older_checkpoint(folder: Path, tmp_path: Path) -> None:
    model = full(folder, "device", tmp_path).train()
    with small_disk(tmp_path / "disk", nbytes=16 << 20, kind="tmpfs") as disk:
        model.save_pretrained(disk / "saved")
        before = contents(disk / "saved")
        take_a_step(model)
        filler = fill(disk, leave_bytes=64 << 10)
        with pytest.raises(TierFull, match="No space left"):
            model.save_pretrained(disk / "saved")
        assert contents(disk / "saved") == before
        filler.unlink()
        model.save_pretrained(disk / "saved")
        assert contents(disk / "saved") != before


def trained(
    folder: Path, tier: str, scratch: Path, output: Path, *, resume: Path | None = None, seed_lr: float = 3e-3
) -> dict[str, torch.Tensor]:
    """Four steps of the Trainer with a checkpoint after the second, or from a checkpoint on."""
    model = full(folder, tier, scratch)
    optimizer = lowmem.optim.AdamW(model, lr=seed_lr)
    trainer = plain_trainer(model, output, optimizer=optimizer, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    found = weights(model)
    runtime_of(model).close()
    return found


@pytest.fixture(scope="module", params=STATE)
def run(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, torch.Tensor]]:
    root = tmp_path_factory.mktemp("run")
    return request.param, root, trained(folder, request.param, root / "state", root / "out")


@pytest.mark.parametrize("what", ["another run in the old place", "the old place gone", "moved"])
def test_a_checkpoint_elsewhere_goes_on_from_itself(
    folder: Path, tmp_path: Path, run: tuple[str, Path, dict[str, torch.Tensor]], what: str
) -> None:
    tier, root, expected = run
    output = shutil.copytree(root / "out", tmp_path / "out", symlinks=True)
    copied = tmp_path / "copied"
    (shutil.move if what == "moved" else shutil.copytree)(output / "checkpoint-2", copied)
    shutil.rmtree(output)
    if what == "another run in the old place":
        trained(folder, tier, tmp_path / "other", output, seed_lr=1e-2)
    found = trained(folder, tier, tmp_path / "state", tmp_path / "resumed", resume=copied)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_moments_of_other_weights_and_missing_ones_are_refused(
    folder: Path, tmp_path: Path, run: tuple[str, Path, dict[str, torch.Tensor]]
) -> None:
    tier, root, _ = run
    one = shutil.copytree(root / "out" / "checkpoint-2", tmp_path / "one", symlinks=True)
    other = shutil.copytree(root / "out" / "checkpoint-4", tmp_path / "other", symlinks=True)
    shutil.copy(other / "optimizer.pt", one / "optimizer.pt")
    with pytest.raises(FileNotFoundError, match=r"moments [0-9a-f]{32} .* are not there"):
        trained(folder, tier, tmp_path / "state", tmp_path / "out", resume=one)
    if tier != "disk":
        shutil.rmtree(one / FOLDER)
        shutil.copytree(other / FOLDER, one / FOLDER)
        with pytest.raises(ValueError, match="belongs to other weights"):
            trained(folder, tier, tmp_path / "state2", tmp_path / "out", resume=one)


def _entry(change: Callable[[dict[str, object]], None]) -> Callable[[Path], None]:
    def spoil(checkpoint: Path) -> None:
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        change(state)
        torch.save(state, checkpoint / "optimizer.pt")

    return spoil


def _set(*path: object, value: object) -> Callable[[Path], None]:
    def change(state: dict[str, object]) -> None:
        inner: object = state
        for key in path[:-1]:
            inner = inner[key]  # type: ignore[index]
        inner[path[-1]] = value  # type: ignore[index]

    return _entry(change)


def _moments(checkpoint: Path) -> Path:
    (moments,) = (checkpoint / FOLDER).iterdir()
    return min(file for file in moments.rglob("*") if file.suffix in (".safetensors", ".bin"))


def _flip(checkpoint: Path) -> None:
    file = _moments(checkpoint)
    data = bytearray(file.read_bytes())
    data[-7] ^= 4
    file.write_bytes(data)


def _cut(checkpoint: Path) -> None:
    file = _moments(checkpoint)
    file.write_bytes(file.read_bytes()[:-100])


def _remove(checkpoint: Path) -> None:
    _moments(checkpoint).unlink()


def _rename_tensor(checkpoint: Path) -> None:
    file = _moments(checkpoint)
    tensors = load_file(file)
    save_file({f"{name}x": value for name, value in tensors.items()}, file)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no dictionary": (_set("lowmem_full", value=[]), r"optimizer\.pt: lowmem_full: expected an object"),
    "steps as text": (_set("lowmem_full", "num_steps", value="2"), r"optimizer\.pt: lowmem_full\.num_steps"),
    "negative steps": (_set("lowmem_full", "num_steps", value=-1), r"optimizer\.pt: lowmem_full\.num_steps"),
    "steps of nothing": (_set("lowmem_full", "steps", value={"x": 1}), r"optimizer\.pt: lowmem_full\.steps\.x"),
    "a key that is no text": (_set("lowmem_full", "steps", value={5: 1}), r"optimizer\.pt: lowmem_full\.steps\.5"),
    "a file elsewhere": (
        _set("lowmem_full", "moments", "checksums", value={"../x": 1}),
        r"optimizer\.pt: lowmem_full\.moments\.checksums\.\.\./x",
    ),
    "states": (_set("lowmem_full", "states", value={"x": 1}), r"optimizer\.pt: lowmem_full\.states\.x"),
    "moments elsewhere": (
        _set("lowmem_full", "moments", "identifier", value="../x"),
        r"optimizer\.pt: lowmem_full\.moments\.identifier",
    ),
    "no moments": (_entry(lambda state: state["lowmem_full"].pop("moments")), r"lowmem_full\.moments"),  # type: ignore[attr-defined]
    "whether on disk": (_set("lowmem_full", "states_on_disk", value=3), r"lowmem_full\.states_on_disk"),
    "groups": (_set("param_groups", value=3), r"param_groups: expected a list"),
    "learning rate": (_set("param_groups", 0, "lr", value="x"), r"param_groups: field 'lr'"),
    "betas": (_set("param_groups", 0, "betas", value=(1, "x")), r"param_groups: field 'betas'"),
    "a missing field": (_entry(lambda state: state["param_groups"][0].pop("eps")), r"param_groups: field 'eps'"),  # type: ignore[index]
    "state": (_set("state", value=[]), r"state: expected a dictionary"),
}
IN_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit": (_flip, r"(safetensors|store\.json): .*(checksum|not those that were written)"),
    "a short file": (_cut, r"(safetensors|bin|store\.json): "),
    "a missing file": (_remove, r"(safetensors|bin|store\.json): "),
    "other tensors": (_rename_tensor, r"safetensors: .*exp_avg: expected fp32"),
}


@pytest.fixture(scope="module")
def idle(
    folder: Path, run: tuple[str, Path, dict[str, torch.Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> Trainer:
    """A trainer before its first step, which each refusal leaves as it was."""
    tier, scratch = run[0], tmp_path_factory.mktemp("idle")
    model = full(folder, tier, scratch / "state")
    optimizer = lowmem.optim.AdamW(model, lr=3e-3)
    return plain_trainer(model, scratch / "out", optimizer=optimizer, save_strategy="no")


@pytest.mark.parametrize("damage", [*DAMAGE, *IN_FILES])
def test_a_damaged_checkpoint_is_one_sentence_with_file_and_field(
    tmp_path: Path, run: tuple[str, Path, dict[str, torch.Tensor]], idle: Trainer, damage: str
) -> None:
    tier, root, _ = run
    if tier == "disk" and damage == "other tensors":
        pytest.skip("a store's files have no names of tensors in them")
    checkpoint = shutil.copytree(root / "out" / "checkpoint-2", tmp_path / "checkpoint", symlinks=True)
    spoil, match = {**DAMAGE, **IN_FILES}[damage]
    spoil(checkpoint)
    before = weights(idle.model)
    with pytest.raises((SourceError, ValueError), match=match) as caught:
        idle.train(resume_from_checkpoint=str(checkpoint))
    assert "\n" not in str(caught.value)
    for name, weight in weights(idle.model).items():
        assert torch.equal(weight, before[name]), name


def test_a_checkpoint_can_be_checked_without_opening_the_model(
    tmp_path: Path, run: tuple[str, Path, dict[str, torch.Tensor]]
) -> None:
    _, root, _ = run
    saved = check_checkpoint(root / "out" / "checkpoint-2")
    assert saved is not None
    assert saved.num_steps == 2
    assert check_checkpoint(tmp_path) is None
    for name in ("steps as text", "moments elsewhere", "a flipped bit", "a short file", "a missing file"):
        checkpoint = shutil.copytree(root / "out" / "checkpoint-2", tmp_path / name, symlinks=True)
        spoil, match = {**DAMAGE, **IN_FILES}[name]
        spoil(checkpoint)
        with pytest.raises(SourceError, match=match):
            check_checkpoint(checkpoint)
    checkpoint = shutil.copytree(root / "out" / "checkpoint-2", tmp_path / "cut", symlinks=True)
    (checkpoint / "optimizer.pt").write_bytes((checkpoint / "optimizer.pt").read_bytes()[:500])
    with pytest.raises(SourceError, match=r"optimizer\.pt: file: torch cannot read it"):
        check_checkpoint(checkpoint)
