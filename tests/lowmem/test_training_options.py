"""Trainer options that cannot be honoured are refused by name; the others pass."""

from pathlib import Path

import pytest
from transformers import TrainerCallback
from trl import GRPOConfig, SFTConfig, SFTTrainer

import lowmem
from lowmem.monitoring.training_checks import refuse_training_options
from tests.lowmem.tiny_training import resident, streamed, texts, trainer, word_tokenizer
from tests.zoo.architectures import build


def _config(folder: Path, **options: object) -> SFTConfig:
    return SFTConfig(str(folder), use_cpu=True, bf16=False, report_to="none", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"activation_checkpointing_kwargs": {"every_n_layers": 2}}, "every_n_layers"),
        ({"activation_checkpointing_kwargs": {"offload": True}}, "offload"),
        ({"activation_offloading": True}, "activation_offloading=True"),
        ({"torch_compile": True}, "torch_compile=True"),
    ],
)
def test_an_option_is_refused_by_name(options: dict[str, object], name: str, tmp_path: Path) -> None:
    with pytest.raises(lowmem.UnsupportedError, match=name):
        refuse_training_options(_config(tmp_path, **options))


@pytest.mark.parametrize("option", ["use_vllm", "use_transformers_continuous_batching"])
def test_another_engine_for_generation_is_refused_by_name(option: str, tmp_path: Path) -> None:
    config = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    setattr(config, option, True)
    with pytest.raises(lowmem.UnsupportedError, match=f"{option}=True"):
        refuse_training_options(config)


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": False}, {"gradient_accumulation_steps": 4}])
def test_what_is_exact_passes(options: dict[str, object], tmp_path: Path) -> None:
    refuse_training_options(_config(tmp_path, **options))


@pytest.mark.parametrize("callbacks", [[], [lowmem.Monitor(progress=False)]], ids=["alone", "monitor"])
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"activation_checkpointing_kwargs": {"every_n_layers": 2}}, "every_n_layers"),
        ({"activation_offloading": True}, "activation_offloading=True"),
        ({"torch_compile": True}, "torch_compile=True"),
    ],
)
def test_a_trainer_refuses_when_it_is_made_with_or_without_a_monitor(
    options: dict[str, object], name: str, callbacks: list[TrainerCallback], tmp_path: Path
) -> None:
    folder = Path(build("llama", tmp_path / "model"))
    with pytest.raises(lowmem.UnsupportedError, match=name):
        trainer(streamed(folder), tmp_path / "out", callbacks=callbacks, **options)  # type: ignore[arg-type]


def test_a_model_that_is_not_streamed_takes_every_option(tmp_path: Path) -> None:
    folder = Path(build("llama", tmp_path / "model"))
    streamed(folder)
    options = {"activation_checkpointing_kwargs": {"every_n_layers": 2}}
    trainer(resident(folder), tmp_path / "out", **options)  # type: ignore[arg-type]


def test_an_option_set_since_the_trainer_was_made_is_refused_when_training_begins(tmp_path: Path) -> None:
    run = trainer(streamed(Path(build("llama", tmp_path / "model"))), tmp_path / "out", max_steps=1)
    run.args.activation_offloading = True
    with pytest.raises(lowmem.UnsupportedError, match="activation_offloading=True"):
        run.train()
    assert run.state.global_step == 0


def test_a_model_in_which_nothing_trains_is_named_before_the_first_step(tmp_path: Path) -> None:
    run = SFTTrainer(
        model=streamed(Path(build("llama", tmp_path / "model"))),
        args=_config(tmp_path / "out", max_steps=1),
        train_dataset=texts(),
        processing_class=word_tokenizer(),
    )
    with pytest.raises(ValueError, match=r"nothing in this model is to be trained.*peft_config.*tuning=.full"):
        run.train()


def test_bf16_autocast_on_a_cpu_without_its_instructions_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem.loading.has_fast_bf16", lambda: False)
    run = trainer(streamed(Path(build("llama", tmp_path / "model"))), tmp_path / "out", bf16=True, max_steps=1)
    with pytest.warns(UserWarning, match=r"bf16=False"):
        run.train()
