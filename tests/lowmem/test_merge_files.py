"""What a merge reads and writes of people's files: damaged adapters, links, code, kills, and the output's place."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowmem.adapters.merge import merge
from lowmem.errors import UnsupportedError
from offload import SourceError
from tests.zoo.architectures import build
from tests.zoo.reference import adapt, resident

ROOT = Path(__file__).resolve().parents[2]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("saved")
    base = build("llama", folder / "base")
    adapt(resident(base), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).save_pretrained(folder / "adapter")
    return base, folder / "adapter"


@pytest.fixture
def lora(saved: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A model and its adapter, which the test may change."""
    for folder in saved:
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / "base", tmp_path / "adapter"


def refused(lora: tuple[Path, Path], error: type[Exception], match: str, **options: object) -> None:
    """The merge is refused in one sentence, before a weight of the base is read, and leaves nothing."""
    base, adapter = lora
    before = {path.name for path in base.parent.iterdir()}
    with pytest.raises(error, match=match) as caught:
        merge(base, adapter=adapter, output=base.parent / "out", **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert {path.name for path in base.parent.iterdir()} == before


BAD_CONFIGS = {
    "not JSON": ("{", "not valid JSON"),
    "empty": ("", "not valid JSON"),
    "too deep": ("[" * 100_000, "not valid JSON"),
    "a list": ("[]", "expected a JSON object, got list"),
    "no type": ({"peft_type": None}, "peft_type: expected text"),
    "unknown type": ({"peft_type": "NOVEL"}, "peft_type: 'NOVEL'"),
    "a type that is no text": ({"peft_type": ["LORA"]}, "peft_type: expected text"),
    "rank as text": ({"r": "8"}, "r: '8'"),
    "rank of nothing": ({"r": 0}, "r"),
    "rank below zero": ({"r": -1}, "r: "),
    "rank without end": ({"r": 2**40}, "r: rank 1099511627776"),
    "rank that is no number": ('{"peft_type": "LORA", "r": NaN}', "r: nan"),
    "frequencies without end": (
        '{"peft_type": "FOURIERFT", "target_modules": ["q_proj"], "n_frequency": 1099511627776}',
        "n_frequency: 1099511627776",
    ),
    "rank pattern": ({"rank_pattern": {"q_proj": 2**40}}, "q_proj: rank"),
    "rank pattern as a list": ({"rank_pattern": [1]}, "rank_pattern: "),
    "scale as text": ({"lora_alpha": "16"}, "lora_alpha: '16'"),
    "targets as numbers": ({"target_modules": [1, 2]}, "target_modules: "),
    "targets that match nothing": ({"target_modules": "nothing"}, CONFIG),
    "targets that are no pattern": ({"target_modules": "(q_proj"}, CONFIG),
    "switch as text": ({"use_dora": "yes"}, "use_dora: 'yes'"),
    "nested configuration as a number": ({"runtime_config": 3}, "runtime_config: 3"),
    "layers as text": ({"layers_to_transform": ["0"], "layers_pattern": None}, "layers_to_transform: "),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_damaged_configuration_is_one_sentence_that_names_file_and_field(case: str, lora: tuple[Path, Path]) -> None:
    content, match = BAD_CONFIGS[case]
    file = lora[1] / CONFIG
    file.write_text(content if isinstance(content, str) else json.dumps(json.loads(file.read_text()) | content))
    refused(lora, ValueError, rf"{CONFIG}.*{match}" if match != CONFIG else CONFIG)


def test_numbers_that_peft_takes_are_taken(lora: tuple[Path, Path]) -> None:
    base, adapter = lora
    values = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(values | {"lora_alpha": float(values["lora_alpha"]), "lora_dropout": 0}))
    merge(base, adapter=adapter, output=base.parent / "out")


@pytest.mark.parametrize("damage", ["cut", "empty", "no safetensors"])
def test_damaged_weights_are_one_sentence_that_names_the_file(damage: str, lora: tuple[Path, Path]) -> None:
    file = lora[1] / WEIGHTS
    content = file.read_bytes()
    file.write_bytes({"cut": content[:-8], "empty": b"", "no safetensors": b"\xff" * len(content)}[damage])
    refused(lora, SourceError, WEIGHTS)


def test_values_that_are_no_numbers_are_named(lora: tuple[Path, Path]) -> None:
    tensors = load_file(lora[1] / WEIGHTS)
    name = sorted(tensors)[1]
    tensors[name][0, 1] = torch.nan
    save_file(tensors, lora[1] / WEIGHTS)
    refused(lora, ValueError, rf"{WEIGHTS}: {name}: .*not finite")


def test_pickled_weights_are_refused(lora: tuple[Path, Path]) -> None:
    torch.save(load_file(lora[1] / WEIGHTS), lora[1] / "adapter_model.bin")
    (lora[1] / WEIGHTS).unlink()
    refused(lora, UnsupportedError, "adapter_model.bin is not supported: a pickle runs code")
    (lora[1] / "adapter_model.bin").unlink()
    refused(lora, FileNotFoundError, WEIGHTS)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(kind: str, name: str, lora: tuple[Path, Path]) -> None:
    (lora[1] / name).unlink()
    if kind == "pipe":
        os.mkfifo(lora[1] / name)
    elif kind == "device":
        (lora[1] / name).symlink_to("/dev/zero")
    else:
        (lora[1] / name).mkdir()
    refused(lora, ValueError, rf"{name}: .*not a regular file")


def test_an_adapter_of_another_size_gets_one_sentence(lora: tuple[Path, Path]) -> None:
    tensors = {name: tensor.repeat(1, 2) for name, tensor in load_file(lora[1] / WEIGHTS).items()}
    save_file(tensors, lora[1] / WEIGHTS)
    refused(lora, ValueError, r"does not fit the model \(.*size mismatch.*; give the model it was trained on$")


def test_a_link_that_leads_out_of_the_folder_is_refused(lora: tuple[Path, Path]) -> None:
    secret = lora[0].parent / "secret"
    secret.write_text("private")
    (lora[0] / "LICENSE").symlink_to(secret)
    refused(lora, UnsupportedError, r"LICENSE -> .*secret")
    (lora[0] / "LICENSE").unlink()
    (lora[1] / "tokenizer_config.json").write_text("{}")
    (lora[1] / "tokenizer.json").symlink_to("../secret")
    refused(lora, UnsupportedError, r"tokenizer.json -> .*secret")


def test_a_link_within_the_folder_and_the_hubs_cache_are_followed(lora: tuple[Path, Path]) -> None:
    base, adapter = lora
    snapshot = base.parent / "models--owner--name" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(base.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "LICENSE").write_text("free")
    (snapshot / "LICENSE.txt").symlink_to("LICENSE")
    out = merge(snapshot, adapter=adapter, output=base.parent / "out")
    assert not any(file.is_symlink() for file in out.iterdir())
    assert (out / "LICENSE.txt").read_text() == "free"
    AutoModelForCausalLM.from_pretrained(out)
    # A blob of another repository is no part of this one.
    (snapshot / "NOTICE").symlink_to(base.parent / "adapter" / CONFIG)
    with pytest.raises(UnsupportedError, match="NOTICE"):
        merge(snapshot, adapter=adapter, output=base.parent / "other")


@pytest.mark.parametrize("trust", [False, True])
def test_code_comes_along_only_where_it_is_trusted(trust: bool, lora: tuple[Path, Path]) -> None:
    base, adapter = lora
    code = {"auto_map": {"AutoTokenizer": ["tokenization.Own", None]}, "kept": 1}
    (base / "tokenizer_config.json").write_text(json.dumps(code))
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | code))
    (base / "tokenization.py").write_text("raise SystemExit")
    out = merge(base, adapter=adapter, output=base.parent / "out", trust_remote_code=trust)
    assert (out / "tokenization.py").exists() == trust
    for name in ("tokenizer_config.json", "config.json"):
        written = json.loads((out / name).read_text())
        assert written["kept"] == 1
        assert ("auto_map" in written) == trust


def test_places_that_no_folder_can_take_are_refused_first(lora: tuple[Path, Path]) -> None:
    base, adapter = lora
    target = base.parent / "out"
    (base.parent / "empty").mkdir()
    for points_to in ("empty", "nowhere"):
        target.symlink_to(points_to)
        refused(lora, FileExistsError, r"out is a link")
        target.unlink()
    with pytest.raises(FileExistsError, match="where a file system is mounted"):
        merge(base, adapter=adapter, output="/proc")
    merge(base, adapter=adapter, output=base.parent / "empty")


def test_what_somebody_else_makes_meanwhile_is_kept(lora: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    target = lora[0].parent / "out"

    def write_index(folder: Path, shards: object) -> None:
        target.mkdir()
        (target / "theirs").write_text("kept")

    monkeypatch.setattr("lowmem.adapters.merge.write_index", write_index)
    with pytest.raises(FileExistsError, match="made by somebody else"):
        merge(lora[0], adapter=lora[1], output=target)
    assert [file.name for file in target.iterdir()] == ["theirs"]
    assert {path.name for path in target.parent.iterdir()} == {"base", "adapter", "out"}


KILLED = """
    import os, signal, sys
    import lowmem.adapters.merge as merging
    base, adapter, out = sys.argv[1:]
    def write_index(folder, shards):
        print("reached", flush=True)
        os.kill(os.getpid(), signal.SIGKILL if out.endswith("out") else signal.SIGSTOP)
    merging.write_index = write_index
    merging.merge(base, adapter=adapter, output=out)
"""


def start(lora: tuple[Path, Path], name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), *map(str, lora), str(lora[0].parent / name)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_merge_leaves_no_output_and_the_next_one_clears_up(lora: tuple[Path, Path]) -> None:
    base, adapter = lora
    with start(lora, "out") as started:
        assert started.wait(120) == -signal.SIGKILL
    left = [path for path in base.parent.iterdir() if path.name.startswith(".out.unfinished-")]
    assert len(left) == 1
    assert left[0].stat().st_mode & 0o777 == 0o700
    theirs = base.parent / ".out.unfinished-link"
    theirs.symlink_to(base)
    merge(base, adapter=adapter, output=base.parent / "out")
    assert {path.name for path in base.parent.iterdir()} == {"base", "adapter", "out", theirs.name}
    assert (base / "config.json").exists()


@pytest.mark.slow
def test_a_merge_that_is_at_work_keeps_its_folder(lora: tuple[Path, Path]) -> None:
    base, adapter = lora
    with start(lora, "same") as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "reached\n"
        try:
            merge(base, adapter=adapter, output=base.parent / "same")
            assert any(path.name.startswith(".same.unfinished-") for path in base.parent.iterdir())
        finally:
            started.kill()
