"""Trainer options that cannot be honoured are refused by name; the others pass."""

from pathlib import Path

import pytest
from trl import GRPOConfig, SFTConfig

import lowmem
from lowmem.monitoring.monitor import refuse_training_options
from tests.lowmem.tiny_training import resident, streamed, trainer
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


def test_the_monitor_refuses_when_the_trainer_is_made(tmp_path: Path) -> None:
    folder = Path(build("llama", tmp_path / "model"))
    options = {"activation_checkpointing_kwargs": {"every_n_layers": 2}, "callbacks": [lowmem.Monitor(progress=False)]}
    with pytest.raises(lowmem.UnsupportedError, match="every_n_layers"):
        trainer(streamed(folder), tmp_path / "out", **options)  # type: ignore[arg-type]
    trainer(resident(folder), tmp_path / "out", **options)  # type: ignore[arg-type]


def test_bf16_autocast_on_a_cpu_without_its_instructions_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem.loading.has_fast_bf16", lambda: False)
    run = trainer(streamed(Path(build("llama", tmp_path / "model"))), tmp_path / "out", bf16=True, max_steps=1)
    with pytest.warns(UserWarning, match=r"bf16=False"):
        run.train()
