"""Plans of models whose weights are not here: from the hub's headers, and from config.json alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import lowmem
from lowmem.planning import read_model
from offload import SourceError
from tests.lowmem.headers.hub_server import COMMIT, HubServer, serving
from tests.zoo.architectures import build, tiny_config

MODEL = "owner/model"
BUDGET = lowmem.Budget(device="64MiB", host="64MiB")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving(llama) as server:
        reach(server, tmp_path, monkeypatch)
        yield server
        huggingface_hub.close_session()


def reach(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT, HF_HOME and XDG_CACHE_HOME do before the libraries are imported."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.file_download, "HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    huggingface_hub.close_session()


def plan_of(model: str | Path, **given: Any) -> dict[str, Any]:
    made = lowmem.plan(model, seq_len=16, device="cpu", budget=BUDGET, **given)
    return json.loads(json.dumps(made.to_dict()).replace(json.dumps(str(model)), '"MODEL"'))


def header_bytes(file: Path) -> int:
    with file.open("rb") as source:
        return 8 + int.from_bytes(source.read(8), "little")


def test_a_plan_of_a_hub_model_is_that_of_its_files_and_reads_headers_only(hub: HubServer, llama: Path) -> None:
    assert plan_of(MODEL) == plan_of(llama)
    for shard in llama.glob("*.safetensors"):
        assert hub.sent_bytes[shard.name] == header_bytes(shard)


def test_headers_are_fetched_once_and_then_no_network_is_needed(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plan_of(MODEL)
    before = hub.sent_bytes.copy()
    assert plan_of(MODEL) == first
    assert hub.sent_bytes == before
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    hub.requests.clear()
    assert plan_of(MODEL) == first
    assert hub.requests == []


def test_a_repository_with_one_file_and_no_index(hub: HubServer, llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    shutil.rmtree(llama)
    model.save_pretrained(llama)
    assert plan_of(MODEL) == plan_of(llama)
    assert hub.sent_bytes["model.safetensors"] == header_bytes(llama / "model.safetensors")


def test_files_that_are_here_already_are_read_here(hub: HubServer, llama: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--owner--model" / "snapshots" / COMMIT
    shutil.copytree(llama, snapshot)
    assert plan_of(MODEL) == plan_of(llama)
    assert not any(hub.sent_bytes[shard.name] for shard in llama.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("model", "message"),
    [("owner/other", "owner/other: neither a local folder nor a hub repository"), (MODEL, "has no safetensors files")],
)
def test_what_is_not_there_is_said(hub: HubServer, llama: Path, model: str, message: str) -> None:
    for file in (*llama.glob("*.safetensors"), llama / "model.safetensors.index.json"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=message):
        plan_of(model)


def test_a_server_that_would_send_whole_files_is_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(llama, serves_ranges=False) as server:
        reach(server, tmp_path, monkeypatch)
        with pytest.raises(FileNotFoundError, match="does not serve parts of files"):
            plan_of(MODEL)
        huggingface_hub.close_session()


@pytest.mark.parametrize("damage", ["length", "offsets"])
def test_a_header_that_lies_is_refused_as_in_a_file(hub: HubServer, llama: Path, damage: str) -> None:
    shard = min(llama.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    if damage == "length":
        raw[:8] = (1 << 40).to_bytes(8, "little")
    else:
        start = raw.index(b'"data_offsets":[0,')
        raw[start : start + 18] = b'"data_offsets":[2,'
    shard.write_bytes(raw)
    with pytest.raises(SourceError, match="header length" if damage == "length" else "data_offsets"):
        plan_of(MODEL)


ARCHITECTURES = ("llama", "mixtral", "qwen3_moe", "gemma3_text", "gpt2", "deepseek_v3", "gpt_oss", "qwen3_next")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_configuration_alone_gives_the_plan_of_its_checkpoint(architecture: str, tmp_path: Path) -> None:
    folder = build(architecture, tmp_path / "whole", dtype=torch.bfloat16)
    alone = tmp_path / "alone"
    alone.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (alone / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    whole, supposed = plan_of(folder), plan_of(alone)
    assert supposed["num_trainable"] == whole["num_trainable"]
    # A class may keep single parameters in fp32.
    assert set(supposed["stored_dtypes"]) <= set(whole["stored_dtypes"])
    assert len(supposed["placement"]["placements"]) == len(whole["placement"]["placements"])
    # Where tensors begin in a page of a file is not known without the file.
    most = 4096 * 64
    for one, other in zip(whole["placement"]["block_bytes"], supposed["placement"]["block_bytes"], strict=True):
        assert abs(one - other) < most
    sizes = {(role["role"], role["tier"], role["phase"]): role["nbytes"] for role in whole["roles"]}
    found = {(role["role"], role["tier"], role["phase"]): role["nbytes"] for role in supposed["roles"]}
    assert sizes.keys() == found.keys()
    for key, nbytes in sizes.items():
        assert abs(found[key] - nbytes) <= (3 * most if key[0] in ("decoder blocks", "block ring") else 0), key


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_block_of_each_kind_says_what_all_do(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(architecture, tmp_path, dtype=torch.bfloat16)
    saved = ["lm_head"] if architecture in ("llama", "mixtral") else None
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=saved)
    few = plan_of(folder, peft_config=config)
    monkeypatch.setattr(read_model, "_names_blocks", lambda _: True)
    assert plan_of(folder, peft_config=config) == few


@pytest.mark.parametrize(
    "chosen",
    [
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": r".*layers\.1\..*q_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj", "layers.2.self_attn.q_proj"]},
    ],
    ids=["layers", "names", "pattern", "excluded"],
)
def test_adapters_of_some_blocks_are_counted_where_they_are(chosen: dict[str, Any], llama: Path) -> None:
    everywhere = plan_of(llama, peft_config=LoraConfig(r=4, target_modules=["q_proj"]))
    once = plan_of(llama, peft_config=LoraConfig(r=4, **chosen))
    assert 3 * once["num_trainable"] == everywhere["num_trainable"]
