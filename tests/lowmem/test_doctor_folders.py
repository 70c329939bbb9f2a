"""`lowmem doctor FOLDER` on models, adapters, Trainer checkpoints and stores: whole ones pass, each damage is named."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import lowmem
from lowmem.doctor import Check, check_folder
from offload import Store
from tests.lowmem.full_training import full, sft_trainer
from tests.lowmem.tiny_training import word_tokenizer
from tests.offload.test_store import commit
from tests.zoo.architectures import build


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(build("llama", tmp_path_factory.mktemp("llama")))
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model = AutoModelForCausalLM.from_pretrained(llama)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["host", "disk"])
def checkpoint(request: pytest.FixtureRequest, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Trainer checkpoint of full tuning, moments in files or in a store."""
    folder = tmp_path_factory.mktemp(request.param)
    model = full(llama, request.param, folder / "state")
    optimizer = lowmem.optim.AdamW(model, lr=1e-3)
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    sft_trainer(model, folder / "out", optimizer=optimizer, **options).train()
    return folder / "out" / "checkpoint-1"


def copied(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def checks(folder: Path) -> list[Check]:
    return list(check_folder(folder))


def broken(folder: Path) -> list[str]:
    return [f"{check.name}: {check.finding}" for check in checks(folder) if check.is_broken]


def flip(file: Path, position: int = -3) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_whole_folders_pass_and_say_what_they_are(llama: Path, adapter: Path, checkpoint: Path) -> None:
    for folder in (llama, adapter, checkpoint):
        assert broken(folder) == []
        assert checks(folder)[0].finding == "regular files of yours, no links that lead out of it"
    found = {check.name: check.finding for folder in (llama, adapter, checkpoint) for check in checks(folder)}
    assert found["tokenizer"] == "tokenizer.json"
    assert found["adapter"] == f"LORA, 6 tensors, of model {llama}"
    assert found["checkpoint"] == "step 1 of 1"
    assert found["optimizer.pt"].startswith("whole, ")
    assert found["moments"] == "whole, after 1 steps"


def test_a_model_without_a_tokenizer_gets_a_note(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path)
    (folder / "tokenizer.json").unlink()
    (note,) = [check for check in checks(folder) if check.name == "tokenizer"]
    assert "download the tokenizer's files" in note.remedy
    assert not note.is_broken


def test_damaged_adapters_are_named(adapter: Path, tmp_path: Path) -> None:
    folder = copied(adapter, tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    assert any("adapter_config.json: peft_type" in finding for finding in broken(folder))
    (folder / "adapter_model.safetensors").unlink()
    shutil.copy(adapter / "adapter_config.json", folder)
    assert any("no adapter_model.safetensors" in finding for finding in broken(folder))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_damage_of_what_the_trainer_wrote_is_named(name: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path)
    with zipfile.ZipFile(folder / name) as archive:
        stored = archive.read(archive.infolist()[0])
    # Between the parts of such a file is padding, whose bytes mean nothing.
    flip(folder / name, (folder / name).read_bytes().index(stored))
    assert any(finding.startswith(f"{name}: damaged") for finding in broken(folder))
    (folder / name).unlink()
    assert f"{name}: missing" in broken(folder)


def test_a_checkpoint_that_was_cut_off_is_named_with_the_newest_whole_one(checkpoint: Path, tmp_path: Path) -> None:
    cut = tmp_path / "run" / "checkpoint-7"
    (cut / ".saving-half").mkdir(parents=True)
    (found,) = [check for check in check_folder(cut) if check.is_broken]
    assert (found.name, "trainer_state.json" in found.finding) == ("checkpoint", True)
    assert "no other checkpoint" in found.remedy
    shutil.copytree(checkpoint, cut.parent / "checkpoint-3")
    (found,) = [check for check in check_folder(cut) if check.is_broken]
    assert f"resume_from_checkpoint={str(cut.parent / 'checkpoint-3')!r}" in found.remedy


def test_damaged_moments_are_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path)
    files = sorted(
        file for file in (folder / "optimizer_state").rglob("*") if file.is_file() and file.stat().st_size > 99
    )
    flip(max(files, key=lambda file: file.stat().st_size))
    assert any(finding.startswith("moments: ") and "optimizer_state" in finding for finding in broken(folder))
    (moments,) = (folder / "optimizer_state").iterdir()
    moments.rename(moments.with_name("0" * 32))
    assert any(finding.startswith("moments: moments ") and "are not there" in finding for finding in broken(folder))


def test_a_checkpoint_with_a_damaged_model_or_state_is_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path)
    shard = next(folder.glob("model*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 5)
    (folder / "trainer_state.json").write_text("[]")
    names = {finding.partition(":")[0] for finding in broken(folder)}
    assert names >= {"files", "checkpoint"}


def test_a_store_is_whole_or_its_damage_is_named(tmp_path: Path) -> None:
    with Store.create(tmp_path / "store", fingerprint="model A") as store:
        commit(store, 7, a=1, b=2)
    assert broken(tmp_path / "store") == []
    assert checks(tmp_path / "store")[-1].finding == "whole, of step 7, run model A"
    flip(next(file for file in (tmp_path / "store" / "objects").iterdir()), 0)
    assert any(finding.startswith("store: ") for finding in broken(tmp_path / "store"))


def test_pipes_links_and_strangers_are_named(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path)
    os.mkfifo(folder / "pipe")
    (folder / "LICENSE").symlink_to("/etc/hostname")
    (folder / "README.md").symlink_to("config.json")
    (folder / "merges.txt").write_text("")
    (folder / "merges.txt").chmod(0o666)
    found = [f"{check.finding} {check.is_broken}" for check in checks(folder) if check.name == "folder"]
    assert found == [
        "neither files nor folders: pipe True",
        "links that lead out of the folder: LICENSE -> /etc/hostname False",
        "writable by everybody: merges.txt False",
    ]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_files_of_another_user_are_named(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path)
    os.chown(folder / "config.json", 12345, -1)
    assert checks(folder)[0].finding == "of another user, who may change it: config.json (user 12345)"


def test_links_of_the_hub_cache_are_its_own(llama: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in llama.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert checks(snapshot)[0].finding == "regular files of yours, no links that lead out of it"
    assert broken(snapshot) == []


def test_a_damaged_configuration_is_named(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))
    assert any("num_attention_heads" in finding for finding in broken(folder))
