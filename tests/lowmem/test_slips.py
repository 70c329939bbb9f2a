"""What a person gets wrong in the first hour: each slip is one sentence that names it and says what to write."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import AttentionInterface, TrainerControl, TrainerState, TrainingArguments

import lowmem
from lowmem import cli
from lowmem.models.checkpoint import resolve
from tests.zoo.architectures import build


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models and a folder that is none."""
    folder = tmp_path_factory.mktemp("models")
    build("llama", folder / "tiny-llama")
    build("llama", folder / "other")
    (folder / "notes").mkdir()
    return folder


def test_a_folder_that_is_almost_called_so_is_proposed(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    for typed, meant in (("tiny-lama", "tiny-llama"), (str(models / "Tiny-llama"), str(models / "tiny-llama"))):
        with pytest.raises(FileNotFoundError, match=rf"no such folder \(did you mean {re.escape(meant)}\?\); give"):
            resolve(typed)
    for typed in ("note", "another-thing"):  # a folder without a model, and nothing near
        with pytest.raises(FileNotFoundError, match=r"no such folder; give a local folder or a hub id"):
            resolve(typed)


Told = Callable[..., str]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """What the command line says where it fails."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["lowmem", *map(str, arguments)])
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        return capsys.readouterr().err.strip()

    return run


@pytest.mark.parametrize("ask", ["plan", "from_pretrained", "cli"])
def test_a_folder_of_models_names_them(ask: str, models: Path, told: Told) -> None:
    says = r"no config\.json; give the folder of a transformers checkpoint; it holds models: other, tiny-llama$"
    if ask == "cli":
        assert re.search(says, told("plan", models))
        return
    with pytest.raises(FileNotFoundError, match=says):
        lowmem.plan(models, seq_len=8) if ask == "plan" else lowmem.from_pretrained(models)


MISTAKES: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no seq_len": (
        lambda model: lowmem.plan(model, seq_len=None),  # type: ignore[arg-type]
        TypeError,
        r"^seq_len=None: expected a whole number$",
    ),
    "no batch": (
        lambda model: lowmem.plan(model, batch_size=None, seq_len=8),  # type: ignore[arg-type]
        TypeError,
        r"^batch_size=None: expected a whole number$",
    ),
    "disk is a number": (
        lambda _: lowmem.Budget(disk=5),  # type: ignore[arg-type]
        TypeError,
        r"^Budget\.disk: expected a folder, got 5$",
    ),
    "card is a number": (
        lambda _: lowmem.Machine(gpu=4090),  # type: ignore[arg-type]
        TypeError,
        r"^gpu=4090: expected the name of a card, \"RTX 4090\"",
    ),
    "no adapter": (
        lambda model: lowmem.merge(model, adapter=None, output="merged"),  # type: ignore[arg-type]
        TypeError,
        r"^adapter=None: expected a folder$",
    ),
    "no output": (
        lambda model: lowmem.merge(model, adapter="out", output=None),  # type: ignore[arg-type]
        TypeError,
        r"^output=None: expected a folder$",
    ),
    "trace is a number": (
        lambda _: lowmem.Monitor(trace=1),  # type: ignore[arg-type]
        TypeError,
        r"^trace=1: expected a file; None for the output folder, False for none$",
    ),
    "report is True": (
        lambda _: lowmem.Monitor(report=True),  # type: ignore[arg-type]
        TypeError,
        r"^report=True: expected a file",
    ),
    "seconds in words": (
        lambda _: lowmem.Monitor(every_s="5"),  # type: ignore[arg-type]
        TypeError,
        r"^every_s='5': expected seconds$",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_type_is_named_with_what_was_expected(name: str, models: Path) -> None:
    make, kind, says = MISTAKES[name]
    with pytest.raises(kind, match=says):
        make(models / "tiny-llama")


def test_attention_of_our_own_making_is_not_proposed(models: Path) -> None:
    lowmem.from_pretrained(models / "other", device="cpu")  # which registers it
    assert any(name.startswith("lowmem_") for name in AttentionInterface().valid_keys())
    with pytest.raises(lowmem.UnsupportedError, match="eager") as refused:
        lowmem.from_pretrained(models / "other", attn_implementation="flash")
    assert "lowmem_" not in str(refused.value)


@pytest.mark.parametrize("is_there", [True, False])
def test_the_output_folder_given_to_the_monitor_is_refused_before_training(
    is_there: bool, models: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if is_there:
        out.mkdir()
    monitor = lowmem.Monitor(out)
    model = lowmem.from_pretrained(models / "other", device="cpu")
    args = TrainingArguments(str(out), use_cpu=True)
    with pytest.raises(ValueError, match=r"out is a folder; give a file, \S+out/trace\.json for instance, or leave it"):
        monitor.on_train_begin(args, TrainerState(), TrainerControl(), model=model)


@pytest.mark.parametrize("lies_there", ["nothing", "a model"])
def test_a_folder_without_a_run_says_where_traces_are_found(
    lies_there: str, models: Path, tmp_path: Path, told: Told
) -> None:
    folder = models / "other" if lies_there == "a model" else tmp_path / "run"
    says = r"^lowmem: \S+: no such file; give the output folder of a run with lowmem\.Monitor"
    assert re.search(says, told("trace", folder))


def test_a_run_that_was_interrupted_names_the_checkpoint_to_merge(models: Path, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    for step in (2, 10):
        lora.save_pretrained(tmp_path / f"checkpoint-{step}")
    with pytest.raises(
        FileNotFoundError, match=r"no adapter_config\.json; give .* adapter, such as \S+/checkpoint-10$"
    ):
        lowmem.merge(models / "other", adapter=tmp_path, output=tmp_path / "merged")
