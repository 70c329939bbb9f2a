"""Minimal inputs of what the fuzzers found."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer

import lowmem
from lowmem.doctor import check_folder
from offload import OffloadError
from tests.fuzz.checkpoints import TINY
from tests.fuzz.damage import copy_folder, edit_json
from tests.fuzz.runs import made, trainable
from tests.lowmem.tiny_training import lora, streamed
from tests.zoo.architectures import build


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(build("llama", tmp_path / "model", changes=TINY, shard_bytes=6000))


GENERATION: dict[str, Callable[[Path], object]] = {
    "none": lambda folder: (folder / "generation_config.json").unlink(),
    "in config.json, as older checkpoints have it": lambda folder: (
        (folder / "generation_config.json").unlink(),
        edit_json(folder / "config.json", {"num_beams": 3, "eos_token_id": [2, 5], "length_penalty": 0.5}),
    ),
    "a file": lambda folder: edit_json(folder / "generation_config.json", {"top_k": 7, "eos_token_id": [2, 5]}),
}


@pytest.mark.parametrize("case", GENERATION)
def test_generation_settings_are_those_that_transformers_reads(case: str, folder: Path) -> None:
    GENERATION[case](folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert json.dumps(streamed(folder).generation_config.to_dict()) == json.dumps(plain.generation_config.to_dict())


def _flip_in_a_record(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    data = bytearray(file.read_bytes())
    # Before it are its local header and what aligns it to 64 bytes.
    data[largest.header_offset + 250] ^= 1
    file.write_bytes(data)


def _mark_as_folders(file: Path) -> None:
    data = bytearray(file.read_bytes())
    at = -1
    while (at := data.find(b"PK\x01\x02", at + 1)) >= 0:
        data[at + 38] |= 0x10
    file.write_bytes(data)


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _flatten_the_last(file: Path) -> None:
    tensors = load_file(file)
    name = max(name for name, tensor in tensors.items() if tensor.dim() == 2)
    save_file(tensors | {name: tensors[name].flatten()}, file, metadata={"format": "pt"})


CHECKPOINTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    f"{name} {what}": (name, damage)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    for what, damage in {
        "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
        "empty": lambda file: os.truncate(file, 0),
        "a pipe": _pipe,
        "a link to itself": lambda file: (file.unlink(), file.symlink_to(file.name)),
    }.items()
} | {
    "records of optimizer.pt marked as folders": ("optimizer.pt", _mark_as_folders),
    "a bit of optimizer.pt": ("optimizer.pt", _flip_in_a_record),
    "an unknown field": ("trainer_state.json", lambda file: edit_json(file, {"architectures": []})),
    "a state of nothing": ("trainer_state.json", lambda file: file.write_text("{}")),
    "a batch of no number": ("trainer_state.json", lambda file: edit_json(file, {"train_batch_size": None})),
    "a step that is text": ("trainer_state.json", lambda file: edit_json(file, {"global_step": "2"})),
    "a number that is a list": ("CONFIG", lambda file: edit_json(file, {"head_dim": [[8]], "r": [[8]]})),
    "weights": ("WEIGHTS", lambda file: file.write_bytes(b"\xff" * 100)),
    "weights of another shape": ("WEIGHTS", lambda file: _flatten_the_last(file)),
}


def test_an_optimizer_of_other_weights_is_refused_by_its_file(tmp_path: Path) -> None:
    model = Path(build("llama", tmp_path / "model"))
    for run in range(2):
        made("full host", model, tmp_path / f"out {run}", tmp_path / "state", say=str, seed=run, max_steps=1).train()
    first, other = (tmp_path / f"out {run}" / "checkpoint-1" for run in range(2))
    shutil.copy(other / "model.safetensors", first / "model.safetensors")
    trainer = made("full host", model, tmp_path / "out", tmp_path / "state", say=str, save_strategy="no")
    with pytest.raises(ValueError, match=r"optimizer\.pt: it belongs to other weights"):
        trainer.train(resume_from_checkpoint=str(first))


@pytest.mark.parametrize("field", ["use_dora", "lora_bias"])
def test_an_adapter_whose_file_lacks_what_its_configuration_says_is_named_with_its_folder(
    field: str, folder: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora()).save_pretrained(adapter)
    edit_json(adapter / "adapter_config.json", {field: True})
    with pytest.raises(ValueError, match=rf"{adapter}: the adapter's file lacks \S*lora_"):
        lowmem.merge(folder, adapter=adapter, output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["config.json", "notes.txt"])
def test_the_doctor_reports_a_link_to_itself(name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(name)
    (entries, *others) = check_folder(folder)
    assert entries.finding == f"links that lead out of the folder: {name} -> {name}"
    assert any(check.is_broken for check in others) == (name != "notes.txt")


@pytest.mark.parametrize("kind", [[], {}, None, 7, [["llama"]]])
def test_a_model_type_that_is_no_text_is_refused(kind: object, folder: Path) -> None:
    edit_json(folder / "config.json", {"model_type": kind})
    with pytest.raises((OffloadError, lowmem.UnsupportedError), match="model_type"):
        streamed(folder)


@pytest.fixture(scope="module", params=["sft", "full host"])
def checkpointed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    work = tmp_path_factory.mktemp("checkpointed")
    model = Path(build("llama", work / "model"))
    made(request.param, model, work / "out", work / "state", say=str, max_steps=1).train()
    return request.param, work


@pytest.fixture(scope="module")
def idle(checkpointed: tuple[str, Path]) -> Trainer:
    """A trainer before its first step, which each refusal leaves as it was."""
    kind, work = checkpointed
    return made(kind, work / "model", work / "idle", work / "idle state", say=str, save_strategy="no")


def _exchange(checkpoint: Path) -> None:
    optimizer, scheduler = ((checkpoint / name).read_bytes() for name in ("optimizer.pt", "scheduler.pt"))
    (checkpoint / "optimizer.pt").write_bytes(scheduler)
    (checkpoint / "scheduler.pt").write_bytes(optimizer)


def _nest(checkpoint: Path, depth: int) -> None:
    for file in checkpoint.glob("*config.json"):
        file.write_text('{"x":' * depth + "1" + "}" * depth)


INCOMPLETE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no optimizer": (r"optimizer\.pt.*missing", lambda folder: (folder / "optimizer.pt").unlink()),
    "no scheduler": (r"scheduler\.pt.*missing", lambda folder: (folder / "scheduler.pt").unlink()),
    "exchanged": (r"optimizer\.pt.*no optimizer's state", _exchange),
    "no weights": ("model", lambda folder: [file.unlink() for file in folder.glob("*model*.safetensors*")]),
    "deep": ("config", lambda folder: _nest(folder, 400)),
    "deeper than any reader goes": ("config", lambda folder: _nest(folder, 10_000)),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_a_trainer_checkpoint_that_would_resume_otherwise_is_refused_by_its_file(
    case: str, checkpointed: tuple[str, Path], idle: Trainer, tmp_path: Path
) -> None:
    _, work = checkpointed
    words, damage = INCOMPLETE[case]
    checkpoint = copy_folder(work / "out" / "checkpoint-1", tmp_path / "checkpoint-1")
    damage(checkpoint)
    with pytest.raises((OffloadError, FileNotFoundError, ValueError), match=words):
        idle.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_damaged_trainer_checkpoint_is_one_sentence_before_anything_of_it_is_loaded(
    case: str, checkpointed: tuple[str, Path], idle: Trainer, tmp_path: Path
) -> None:
    kind, work = checkpointed
    name, damage = CHECKPOINTS[case]
    checkpoint = copy_folder(work / "out" / "checkpoint-1", tmp_path / "checkpoint-1")
    prefix = "adapter_" if kind == "sft" else ""
    name = name.replace("WEIGHTS", f"{prefix}model.safetensors").replace("CONFIG", f"{prefix}config.json")
    damage(checkpoint / name)
    before = trainable(idle.model)
    with pytest.raises((OffloadError, lowmem.UnsupportedError), match=name.replace(".", r"\.")):
        idle.train(resume_from_checkpoint=str(checkpoint))
    for key, value in trainable(idle.model).items():
        assert torch.equal(value, before[key]), key


CUT_OFF: dict[str, Callable[[Path], object]] = {
    "an empty state": lambda folder: os.truncate(folder / "trainer_state.json", 0),
    "no state yet": lambda folder: (folder / "trainer_state.json").unlink(),
    "no scheduler yet": lambda folder: [(folder / name).unlink() for name in ("scheduler.pt", "trainer_state.json")],
    "an optimizer that was cut off": lambda folder: os.truncate(folder / "optimizer.pt", 500),
    "weights that were cut off": lambda folder: [
        os.truncate(file, file.stat().st_size // 2) for file in folder.glob("*model.safetensors")
    ],
    "nothing yet": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


@pytest.fixture(scope="module", params=["sft", "full host"])
def run_of_three(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    work = tmp_path_factory.mktemp("three")
    model = Path(build("llama", work / "model"))
    made(request.param, model, work / "out", work / "state", say=str, max_steps=3).train()
    return request.param, work


@pytest.mark.parametrize("num_damaged", [1, 2, 3])
@pytest.mark.parametrize("case", CUT_OFF)
def test_a_checkpoint_that_was_cut_off_names_the_newest_complete_one(
    case: str, num_damaged: int, run_of_three: tuple[str, Path], tmp_path: Path
) -> None:
    kind, work = run_of_three
    out = copy_folder(work / "out", tmp_path / "out")
    for step in range(4 - num_damaged, 4):
        CUT_OFF[case](out / f"checkpoint-{step}")
    trainer = made(kind, work / "model", out, tmp_path / "state", say=str, save_strategy="no")
    newest = out / f"checkpoint-{3 - num_damaged}"
    words = f"no other checkpoint in {out} is complete"
    if num_damaged < 3:
        words = (
            f"the newest complete one in {out} is {newest.name}: trainer.train(resume_from_checkpoint={str(newest)!r})"
        )
    with pytest.raises((OffloadError, FileNotFoundError), match=rf"checkpoint-3.*{re.escape(words)}$"):
        trainer.train(resume_from_checkpoint=True)
    if (case, num_damaged) == ("an empty state", 1):
        trainer.train(resume_from_checkpoint=str(newest))
        assert trainer.state.global_step > 2
