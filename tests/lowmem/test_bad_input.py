"""Bad checkpoints, budgets and disks: one clear error, and the checkpoint and the model stay as they were."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowmem
import lowmem.loading
from offload import BudgetError, FileIO, ReadError, SourceChanged, SourceError
from tests.lowmem.tiny_training import streamed, trainer
from tests.zoo.architectures import build


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(build("llama", tmp_path / "model"))


def _first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def _edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _drop_tensor(folder: Path, ending: str) -> None:
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        kept = {name: value for name, value in tensors.items() if not name.endswith(ending)}
        save_file(kept, shard)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


BROKEN: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "missing shard": (lambda f: _first_shard(f).unlink(), SourceError, r"model-00001-of.*download"),
    "truncated shard": (
        lambda f: os.truncate(_first_shard(f), _first_shard(f).stat().st_size - 100),
        SourceError,
        r"model-00001-of.*bytes",
    ),
    "header length that lies": (
        lambda f: _first_shard(f).write_bytes((1 << 60).to_bytes(8, "little") + b"{}"),
        SourceError,
        r"header",
    ),
    "config of another size": (lambda f: _edit_json(f / "config.json", intermediate_size=80), SourceError, r"shape"),
    "config with more layers": (
        lambda f: _edit_json(f / "config.json", num_hidden_layers=9),
        SourceError,
        r"layers\.\d.*no shard holds",
    ),
    "missing weight": (lambda f: _drop_tensor(f, "1.mlp.up_proj.weight"), SourceError, r"layers\.1\.mlp\.up_proj"),
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"config\.json"),
    "a quantised checkpoint": (
        lambda f: _edit_json(f / "config.json", quantization_config={"quant_method": "hqq"}),
        lowmem.UnsupportedError,
        r"quantised with hqq is not supported",
    ),
    "pickled weights": (
        lambda f: (
            [shard.rename(shard.with_suffix(".bin")) for shard in f.glob("*.safetensors")]
            + [(f / "model.safetensors.index.json").unlink(missing_ok=True)]
        ),
        SourceError,
        r"\.bin.*convert",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_one_clear_error(case: str, folder: Path) -> None:
    breaks, error, message = BROKEN[case]
    breaks(folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(error, match=message):
        streamed(folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_an_index_cannot_lead_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    shutil.copy(_first_shard(folder), outside)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../outside.safetensors")
    index.write_text(json.dumps(content))
    with pytest.raises(SourceError, match=r"outside"):
        streamed(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tuning": "half"}, r"tuning='half'.*Instead"),
        ({"quantization": "nf3"}, r"quantization='nf3'.*Instead"),
        ({"dtype": "int8"}, r"dtype='int8'|dtype=torch.int8"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused_by_name(
    options: dict[str, object], message: str, folder: Path
) -> None:
    with pytest.raises(lowmem.UnsupportedError, match=message):
        streamed(folder, **options)


def test_a_budget_that_is_too_small_names_the_smallest_that_works(folder: Path) -> None:
    with pytest.raises(BudgetError, match="at least") as refusal:
        streamed(folder, budget=lowmem.Budget(device="1KiB", host="0"))
    needed = refusal.value.needed_bytes
    streamed(folder, budget=lowmem.Budget(device=needed, host="0"))
    with pytest.raises(BudgetError):
        streamed(folder, budget=lowmem.Budget(device=needed - 1, host="0"))


@pytest.mark.parametrize("change", ["shortened", "replaced", "rewritten"])
def test_a_file_that_changes_during_training_stops_the_run(change: str, folder: Path, tmp_path: Path) -> None:
    def planned(device_bytes: int) -> lowmem.Plan:
        budget = lowmem.Budget(device=device_bytes, host=0)
        return lowmem.plan(folder, batch_size=4, seq_len=24, budget=budget, device="cpu")

    # So little that every block is read anew in each pass.
    model = lowmem.from_pretrained(folder, plan=planned(planned(0).smallest_device_bytes), device="cpu")
    done = trainer(model, tmp_path / "out", max_steps=1)
    done.train()
    for shard in sorted(folder.glob("*.safetensors")):
        content = shard.read_bytes()
        if change == "replaced":
            shard.unlink()
            shard.write_bytes(content)
        elif change == "shortened":
            os.truncate(shard, len(content) // 2)
        else:
            shard.write_bytes(content[:-8] + bytes(8))
    with pytest.raises(SourceChanged, match=r"safetensors changed while it was in use"):
        done.train()


def test_a_read_error_during_training_names_the_place_and_can_be_retried(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = False

    def pread(fd: int, buffers: list[memoryview], offset: int) -> int:
        if failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(fd, buffers, offset)

    monkeypatch.setattr(lowmem.loading, "FileIO", partial(FileIO, pread=pread))
    model = streamed(folder, budget=_smallest(folder))
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        expected = model(ids).logits
        failing = True
        with pytest.raises(ReadError, match=r"safetensors: reading \d+ bytes at offset \d+ failed: .*Input/output"):
            model(ids)
        failing = False
        assert torch.equal(model(ids).logits, expected)


def _smallest(folder: Path) -> lowmem.Budget:
    """The budget that streams every block."""
    with pytest.raises(BudgetError) as refusal:
        streamed(folder, budget=lowmem.Budget(device="1KiB", host="0"))
    return lowmem.Budget(device=refusal.value.needed_bytes, host="0")
