"""Packing: the codes of bitsandbytes, folders that transformers loads, bakes that are killed, damage that is named."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

import lowmem
from lowmem.cli import app
from lowmem.doctor import check_folder
from lowmem.errors import UnsupportedError
from lowmem.packing.place import verify_pack
from lowmem.quantization.manifest import MANIFEST
from offload import PAGE_BYTES, Budget, SafetensorsSource, SourceError, TierFull
from offload.files.file import File, write_failure
from tests.lowmem.packing.pack_in_children import check_kills, digest
from tests.lowmem.quantization.checkpoints import tensors_of
from tests.zoo.architectures import build
from tests.zoo.reference import adapt, batch_of, lora, resident, run
from tests.zoo.streamed import streamed

# Rows that end with a block: bitsandbytes 0.50 is wrong about others on processors.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture(autouse=True)
def _pefts_own_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("llama") / "base", dtype=torch.bfloat16, changes=WIDE)


@pytest.fixture(scope="module")
def nf4(llama: Path) -> Path:
    return lowmem.pack(llama, quantization="nf4", output=llama.parent / "nf4", device="cpu")


def by_bitsandbytes(name: str, weight: Tensor, quantization: str) -> dict[str, Tensor]:
    """A weight's stored tensors as bitsandbytes' own functions make them of the whole of it."""
    if quantization == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.view(-1, weight.shape[-1]).to(torch.float16))
        return {name: codes, f"{name.removesuffix('.weight')}.SCB": scales}
    packed, state = functional.quantize_4bit(weight, quant_type=quantization, compress_statistics=True)
    return {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "phi3"])
def test_codes_are_those_of_bitsandbytes(name: str, quantization: str, tmp_path: Path) -> None:
    base = build(name, tmp_path / "base", dtype=torch.bfloat16)
    packed = lowmem.pack(base, quantization=quantization, output=tmp_path / "packed", device="cpu")
    stored, before = tensors_of(packed), tensors_of(base)
    weights = dict(resident(base, dtype=torch.bfloat16).named_parameters())
    num_packed = 0
    for key in (key for key in stored if key.endswith(".SCB") or ".quant_state." in key):
        key = key.partition(".quant_state.")[0].removesuffix(".SCB")
        key = key if key in stored else f"{key}.weight"
        weight = before[key] if key in before else weights[key]
        parts = by_bitsandbytes(key, weight.t().contiguous() if name == "gpt2" else weight, quantization)
        for part, value in parts.items():
            if "quant_state" in part:
                ours, theirs = (json.loads(bytes(tensor.tolist())) for tensor in (stored[part], value))
                assert ours == theirs
            else:
                assert torch.equal(stored[part].view(-1), value.view(-1)), part
        num_packed += 1
    assert num_packed >= 8
    # Everything else is what it was.
    untouched = before.keys() & stored.keys()
    assert {name for name in before if "norm" in name or "embed" in name or "gate.weight" in name} <= untouched
    for key in untouched:
        if stored[key].dtype == before[key].dtype:
            assert torch.equal(stored[key], before[key])


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_transformers_loads_a_packed_folder_and_computes_its_values(quantization: str, tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", changes=WIDE)
    packed = lowmem.pack(base, quantization=quantization, output=tmp_path / "packed", device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).train()
    ours = streamed(packed)
    plain = resident(base)
    with torch.no_grad():
        for key, param in plain.named_parameters():
            param.copy_(ours.get_parameter(key).clone())
        ids = batch_of()["input_ids"]
        logits = theirs(ids).logits
        if quantization == "int8":  # Its own forward multiplies the scales in another order.
            torch.testing.assert_close(logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(logits, plain(ids).logits)
    linears = [module for module in theirs.modules() if isinstance(module, nn.Linear)]
    assert sum(type(module) is not nn.Linear for module in linears) == len(linears) - 1  # The head stays.


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_quantization_of_an_ordinary_checkpoint_trains_on_its_values(name: str, tmp_path: Path) -> None:
    base = build(name, tmp_path / "base", dtype=torch.bfloat16)
    plan = lowmem.plan(
        base, batch_size=2, seq_len=16, quantization="nf4", device="cpu", budget=Budget(device="64MiB", host="0")
    )
    ours = lowmem.from_pretrained(base, plan=plan, quantization="nf4", packed_dir=tmp_path / "packed")
    plain = resident(base)
    with torch.no_grad():
        for key, param in plain.named_parameters():
            param.copy_(ours.get_parameter(key).clone())
    outcomes = [run(adapt(model, lora(name)), batch_of()) for model in (plain, ours)]
    assert torch.equal(outcomes[0].loss, outcomes[1].loss)
    assert all(torch.equal(outcomes[1].gradients[key], value) for key, value in outcomes[0].gradients.items())
    assert ours.config.name_or_path == str(base)


def test_packed_folder_is_kept_in_the_cache_and_found_again(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options: dict[str, Any] = {"quantization": "int8", "device": "cpu", "budget": Budget(device="64MiB", host="0")}
    lowmem.from_pretrained(llama, **options)
    (made,) = (tmp_path / "lowmem" / "packed").iterdir()
    said = capsys.readouterr().err
    assert str(made) in said
    assert made.name.startswith("base-int8-")
    before = digest(made)
    times = {file: file.stat().st_mtime_ns for file in made.iterdir()}
    lowmem.from_pretrained(llama, **options)
    assert "packing" not in capsys.readouterr().err
    assert (digest(made), {file: file.stat().st_mtime_ns for file in made.iterdir()}) == (before, times)


def test_weights_of_whole_pages_begin_on_pages(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype=torch.bfloat16, changes={**WIDE, "hidden_size": 256})
    packed = lowmem.pack(base, quantization="nf4", output=tmp_path / "packed", device="cpu")
    with SafetensorsSource(packed) as source:
        whole = [spec for spec in source.tensors.values() if spec.nbytes % PAGE_BYTES == 0]
    assert len(whole) > 12
    assert all(spec.offset_bytes % PAGE_BYTES == 0 for spec in whole)


@pytest.mark.parametrize("num_deaths", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_bakes_go_on_and_two_bakers_share(num_deaths: int, llama: Path, tmp_path: Path) -> None:
    check_kills(llama, tmp_path, num_deaths)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_stacks_have_the_shape_of_the_models_parameter(name: str, tmp_path: Path) -> None:
    base = build(name, tmp_path / "base", dtype=torch.bfloat16)
    packed = lowmem.pack(base, quantization="nf4", output=tmp_path / "packed", device="cpu")
    shapes = {key: list(param.shape) for key, param in resident(base).named_parameters()}
    found = {
        key.partition(".quant_state.")[0]: json.loads(bytes(value.tolist()))["shape"]
        for key, value in tensors_of(packed).items()
        if ".quant_state." in key
    }
    stacks = {key: shape for key, shape in found.items() if len(shape) == 3}
    assert len(stacks) >= 4
    assert all(shapes[key] == shape for key, shape in found.items())


def test_full_disk_is_said_and_the_next_call_goes_on(
    llama: Path, nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "packed"
    written: list[str] = []
    write = File.write

    def failing(file: File, *args: Any, **kwargs: Any) -> None:
        written.append(file.path.name)
        if len(written) == 60:
            raise write_failure(file.path, OSError(errno.ENOSPC, "No space left on device"))
        write(file, *args, **kwargs)

    monkeypatch.setattr(File, "write", failing)
    with pytest.raises(TierFull, match=r"No space left on device.*the next call goes on"):
        lowmem.pack(llama, quantization="nf4", output=output, device="cpu")
    assert not output.exists()
    first, written[:] = set(written[:-1]), ["no more failures"] * 100
    lowmem.pack(llama, quantization="nf4", output=output, device="cpu")
    assert digest(output) == digest(nf4)
    again = set(written[100:])
    assert len(first & again) == 1  # The file that was not finished.
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(TierFull, match=r"^disk: \S+other needs .* KiB, 1000 B are free"):
        lowmem.pack(llama, quantization="nf4", output=tmp_path / "other", device="cpu")


def test_damage_in_an_unfinished_bake_is_made_anew(
    llama: Path, nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "packed"

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lowmem.packing.bake.write_index", stop)
        with pytest.raises(KeyboardInterrupt):
            lowmem.pack(llama, quantization="nf4", output=output, device="cpu")
    work = tmp_path / ".packed.packing"
    _flip(work / "model-00002-of-00004.safetensors")
    (work / "model-00003-of-00004.safetensors").unlink()
    lowmem.pack(llama, quantization="nf4", output=output, device="cpu")
    assert digest(output) == digest(nf4)


def _flip(file: Path, position: int = -100) -> None:
    raw = bytearray(file.read_bytes())
    raw[position] ^= 1
    file.write_bytes(raw)


def test_flipped_byte_is_named(nf4: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(nf4, tmp_path / "copy")
    assert verify_pack(copy) == []
    with SafetensorsSource(copy) as source:
        spec = source.tensors["model.layers.1.mlp.up_proj.weight"]
    _flip(spec.file, spec.offset_bytes + 17)
    assert verify_pack(copy) == [spec.name]
    told = CliRunner().invoke(app, ["pack", str(copy), "--verify"])
    assert (told.exit_code, told.stdout) == (1, f"damaged: {spec.name}\n")
    assert any(check.is_broken and spec.name in check.finding for check in check_folder(copy))
    assert not any(check.is_broken for check in check_folder(nf4))


def test_command_packs_and_verifies(llama: Path, nf4: Path, tmp_path: Path) -> None:
    output = tmp_path / "packed"
    told = CliRunner().invoke(
        app, ["pack", str(llama), "--quantization", "nf4", "--output", str(output), "--on", "cpu"]
    )
    assert (told.exit_code, told.stdout) == (0, f"{output}\n")
    assert digest(output) == digest(nf4)
    assert CliRunner().invoke(app, ["pack", str(output), "--verify"]).exit_code == 0
    assert isinstance(CliRunner().invoke(app, ["pack", str(llama)]).exception, ValueError)
    told = CliRunner().invoke(app, ["pack", str(llama), "--verify", "--quantization", "nf4", "--output", str(output)])
    assert str(told.exception).startswith("lowmem pack --verify reads a folder and takes no --quantization or --output")


@pytest.mark.parametrize("damage", ["cut", "gone", "extra", "manifest"])
def test_damaged_packed_folder_is_refused(damage: str, llama: Path, nf4: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(nf4, tmp_path / "copy")
    shard, manifest = copy / "model-00002-of-00004.safetensors", copy / MANIFEST
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "gone":
        shard.unlink()
    elif damage == "manifest":
        manifest.write_text("{}")
    else:
        values = json.loads(manifest.read_text())
        values["tensors"].popitem()
        manifest.write_text(json.dumps(values))
    with pytest.raises(SourceError, match="remove the folder and pack the model again"):
        streamed(copy)
    # Nor is it taken for what was packed before.
    with pytest.raises(SourceError, match="remove the folder and pack the model again"):
        lowmem.pack(llama, quantization="nf4", output=copy, device="cpu")
    with pytest.raises(SourceError, match="remove the folder and pack the model again"):
        verify_pack(copy)


@pytest.mark.parametrize("there", [False, True])
def test_packed_folder_may_be_read_by_whom_a_new_folder_may(there: bool, llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "packed"
    before = os.umask(0o027)
    try:
        if there:
            output.mkdir(0o705)
        lowmem.pack(llama, quantization="nf4", output=output, device="cpu")
    finally:
        os.umask(before)
    assert stat.S_IMODE(output.stat().st_mode) == (0o700 if there else 0o750)
    assert {stat.S_IMODE(file.stat().st_mode) for file in output.glob("*.safetensors")} == {0o640}


def test_what_cannot_be_packed_is_refused_before_anything_is_written(llama: Path, nf4: Path, tmp_path: Path) -> None:
    def refused(match: str, kind: type[Exception] = UnsupportedError, model: Path = llama, **options: Any) -> None:
        given = {"quantization": "nf4", "output": tmp_path / "out", "device": "cpu"} | options
        with pytest.raises(kind, match=match):
            lowmem.pack(model, **given)
        assert not (tmp_path / "out").exists()

    refused(r"quantization='nf3' is not supported: .*Instead: 'nf4'", quantization="nf3")
    refused(r"quantization= of type int is not supported: .*Instead: 'nf4'", quantization=4)
    refused(r"quantization= of type list is not supported", quantization=["nf4"])
    with pytest.raises(UnsupportedError, match=r"quantization= of type BitsAndBytesConfig is not supported"):
        lowmem.from_pretrained(llama, quantization=BitsAndBytesConfig(load_in_4bit=True), device="cpu")  # type: ignore[arg-type]
    refused(r"packing a checkpoint that is stored as nf4", model=nf4)
    refused(r"is inside the model's folder", ValueError, output=llama / "inner")
    refused(r"is not this model packed in this way", FileExistsError, output=llama.parent / "nf4", quantization="fp4")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    refused(r"full exists and is not this model", FileExistsError, output=tmp_path / "full")
    with pytest.raises(UnsupportedError, match=r"quantization='nf4' with tuning='full'"):
        lowmem.from_pretrained(llama, quantization="nf4", tuning="full", packed_dir=tmp_path / "out")
    with pytest.raises(ValueError, match=r"packed_dir=.* without quantization="):
        lowmem.from_pretrained(llama, packed_dir=tmp_path / "out", device="cpu")
    with pytest.raises(UnsupportedError, match=r"packing a checkpoint that is stored as nf4"):
        lowmem.from_pretrained(nf4, quantization="nf4", packed_dir=tmp_path / "out", device="cpu")


def test_bounded_runs_give_the_codes_of_a_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowmem.quantization import packing

    monkeypatch.setattr(packing, "_RUN_ELEMENTS", 192)
    weight = torch.randn(50, 37, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    parts = packing.packer_for("nf4").pack("p", (weight[:20], weight[20:]), (50, 37))
    made: dict[str, Tensor] = {}
    for name, part in parts:
        made[name] = torch.cat([made[name], part]) if name in made else part
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(made["p"], packed.view(-1))
    assert torch.equal(made["p.absmax"], state.absmax)
    assert torch.equal(made["p.nested_absmax"], state.state2.absmax)
