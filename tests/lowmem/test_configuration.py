"""Odd configurations: one sentence that names file and field, before anything is built or read, and never a wait."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

import lowmem
from lowmem.models import build as build_module
from lowmem.models.configuration import check_counts, read_config
from offload import SourceError
from tests.lowmem.tiny_training import streamed
from tests.zoo.architectures import build


def nested(depth: int) -> object:
    return [nested(depth - 1)] if depth else 1


VALUES: dict[str, object] = {
    "text_config": "x",
    "hidden_act": "no_such_activation",
    "num_attention_heads": 0,
    "num_key_value_heads": 0,
    "head_dim": 0,
    "hidden_size": -4,
    "hidden_size ": "64",
    "hidden_size  ": 2**40,
    "vocab_size": 0,
    "vocab_size ": 2**62,
    "num_hidden_layers": 2**32,
    "num_hidden_layers ": 50_000,
    "num_hidden_layers  ": None,
    "num_labels": 2**32,
    "num_labels ": "x",
    "intermediate_size": 2**50,
    "rope_parameters": "x",
    "rms_norm_eps": "x",
    "layer_types": ["no_such_type"] * 3,
    "dtype": "no_such_dtype",
    "id2label": [1],
    "pad_token_id": 2**40,
    "quantization_config": "x",
    "attn_implementation": "no_such_attention",
    "get_text_config": 1,
    "to_dict": 1,
    "sub_configs": 1,
    "auto_map": "x",
    "per_layer_config": 1,
}
TEXTS = ["", "[]", "5", "null", "{", '{"a": 1', "\xff", json.dumps({"model_type": "llama", "deep": nested(90)})]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def edit(folder: Path, **fields: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return file


@pytest.fixture(autouse=True)
def nothing_takes_long() -> object:
    start_s = time.process_time()
    yield
    assert time.process_time() - start_s < 5


@pytest.mark.parametrize("case", VALUES)
def test_an_odd_value_is_one_sentence_with_file_and_field(case: str, folder: Path) -> None:
    field = case.strip()
    file = edit(folder, **{field: VALUES[case]})
    with pytest.raises(SourceError, match=field) as refusal:
        streamed(folder)
    assert str(refusal.value).startswith(f"{file}: ")
    assert refusal.value.field == field
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_what_is_no_object_is_refused_before_the_weights_are_read(
    name: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / name).write_bytes(text.encode("latin1"))
    monkeypatch.setattr(build_module, "find_blocks", lambda model: pytest.fail("the model was built"))
    with pytest.raises(SourceError, match=name):
        streamed(folder)


def test_a_generation_config_with_an_odd_value_is_named(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"cache_implementation": "no_such_cache"}')
    with pytest.raises(SourceError, match=r"generation_config.json: cache_implementation: "):
        streamed(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_only_a_regular_file_of_a_believable_size_is_read(name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(SourceError, match=rf"{name}: .*regular file"):
        streamed(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(SourceError, match=rf"{name}: .*regular file"):
        streamed(folder)
    (folder / name).unlink()
    with (folder / name).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SourceError, match=rf"{name}: .*at most"):
        streamed(folder)


def test_experts_are_counted_against_the_files(tmp_path: Path) -> None:
    folder = Path(build("mixtral", tmp_path / "model"))
    file = edit(folder, num_local_experts=90_000)
    with pytest.raises(SourceError, match="90000 experts in") as refusal:
        streamed(folder)
    assert refusal.value.field == "num_local_experts"
    assert refusal.value.file == file


def test_blocks_are_counted_against_the_files_and_true_ones_pass(folder: Path) -> None:
    config = read_config(folder)
    with pytest.raises(SourceError, match=r"3 decoder blocks, and the files hold 0 tensors"):
        check_counts(config, {}, file=folder / "config.json")
    edit(folder, num_hidden_layers=4_000)
    with pytest.raises(SourceError, match=r"num_hidden_layers: 4000 decoder blocks"):
        streamed(folder)


@pytest.mark.parametrize(
    ("code", "remedy"), [({}, "a model that it knows"), ({"AutoConfig": "a.B"}, "trust_remote_code=True")]
)
def test_an_architecture_that_transformers_does_not_know_is_named(
    code: dict[str, str], remedy: str, folder: Path
) -> None:
    edit(folder, model_type="no_such_model", auto_map=code)
    with pytest.raises(lowmem.UnsupportedError, match=rf"'no_such_model'.*transformers 5.*{remedy}"):
        streamed(folder)


@pytest.mark.parametrize("num_labels", [0, -1, 2**32])
def test_a_number_of_labels_that_cannot_be_is_refused_at_once(num_labels: int, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"num_labels={num_labels}: expected 1 to 1000000"):
        streamed(folder, num_labels=num_labels)
