"""Full tuning as users run it: TRL's SFTTrainer, its logs, its checkpoints, and the model that it saves."""

import copy
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import lowmem
from lowmem.streaming.runtime import runtime_of
from tests.lowmem.full_training import (
    backward,
    batches,
    full,
    plain_trainer,
    resident,
    sft_trainer,
    weights,
)
from tests.lowmem.tiny_training import lora
from tests.zoo.architectures import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama")))


def _logged(trainer: object) -> list[tuple[float, float, float]]:
    history = trainer.state.log_history  # type: ignore[attr-defined]
    return [(entry["loss"], entry["grad_norm"], entry["learning_rate"]) for entry in history if "loss" in entry]


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}])
def test_logs_and_weights_equal_training_in_memory_bit_by_bit(
    folder: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    plain = plain_trainer(resident(folder), tmp_path / "plain", optim="adamw_torch_fused", **options)
    plain.train()
    assert len(_logged(plain)) == 4
    for tier in ("host", "disk"):
        model = full(folder, tier, tmp_path / tier)
        optimizer = lowmem.optim.AdamW(model, lr=3e-3, weight_decay=0.1)
        tuned = plain_trainer(model, tmp_path / "tuned", optimizer=optimizer, **options)
        tuned.train()
        assert _logged(tuned) == _logged(plain), tier
        for name, weight in weights(plain.model).items():
            assert torch.equal(weights(model)[name], weight), (tier, name)


def test_trls_trainer_logs_what_it_logs_in_memory(folder: Path, tmp_path: Path) -> None:
    plain = sft_trainer(resident(folder), tmp_path / "plain", optim="adamw_torch_fused")
    plain.train()
    model = full(folder, "disk", tmp_path)
    tuned = sft_trainer(model, tmp_path / "tuned", optimizer=lowmem.optim.AdamW(model, lr=3e-3, weight_decay=0.1))
    tuned.train()
    # Its head and ours sum in another order, and Adam divides by a gradient's size: bits differ.
    torch.testing.assert_close(_logged(tuned), _logged(plain), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_resumed_from_a_trainer_checkpoint_it_ends_with_the_same_bits(folder: Path, tmp_path: Path, tier: str) -> None:
    def run(scratch: str, checkpoint: Path | None) -> dict[str, torch.Tensor]:
        model = full(folder, tier, tmp_path / scratch)
        trainer = sft_trainer(
            model,
            tmp_path / "out",
            optimizer=lowmem.optim.AdamW(model, lr=3e-3),
            save_strategy="steps",
            save_steps=2,
        )
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return weights(model)

    expected = run("first", None)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert (checkpoint / "optimizer.pt").stat().st_size < 100_000
    got = run("second", checkpoint)
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name


class Interrupt(TrainerCallback):
    """Ctrl-C in the third step, once."""

    is_armed = True

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.is_armed and state.global_step == 2:
            self.is_armed = False
            raise KeyboardInterrupt


@pytest.mark.parametrize("is_interrupted", [False, True])
@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_a_second_training_goes_on_with_the_optimizer_of_the_first(
    folder: Path, tmp_path: Path, tier: str, is_interrupted: bool
) -> None:
    def trained_twice(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> list[object]:
        logged: list[object] = []
        for part in ("first", "second"):
            trainer = plain_trainer(model, tmp_path / part, optimizer=optimizer)
            if is_interrupted and part == "first":
                trainer.add_callback(Interrupt())
                with pytest.raises(KeyboardInterrupt):
                    trainer.train()
            else:
                trainer.train()
            logged += _logged(trainer)
        return logged

    plain = resident(folder)
    expected = trained_twice(plain, torch.optim.AdamW(plain.parameters(), lr=3e-3, weight_decay=0.0, fused=True))
    model = full(folder, tier, tmp_path / tier)
    assert trained_twice(model, lowmem.optim.AdamW(model, lr=3e-3, weight_decay=0.0)) == expected
    for name, weight in weights(plain).items():
        assert torch.equal(weights(model)[name], weight), name


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_a_second_training_after_a_checkpoint_writes_its_moments_once(folder: Path, tmp_path: Path, tier: str) -> None:
    def trained_twice(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> list[object]:
        logged: list[object] = []
        for part in ("first", "second"):
            options = {"save_strategy": "steps", "save_steps": 4} if part == "first" else {}
            trainer = plain_trainer(model, tmp_path / tier / part, optimizer=optimizer, **options)
            trainer.train()
            logged += _logged(trainer)
        return logged

    plain = resident(folder)
    expected = trained_twice(plain, torch.optim.AdamW(plain.parameters(), lr=3e-3, weight_decay=0.0, fused=True))
    shutil.rmtree(tmp_path / tier)
    model = full(folder, tier, tmp_path / "state")
    assert trained_twice(model, lowmem.optim.AdamW(model, lr=3e-3, weight_decay=0.0)) == expected
    checkpoint = tmp_path / tier / "first" / "checkpoint-4"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["lowmem_full"]
    kept = [found.name for found in (checkpoint / "optimizer_state").iterdir()]
    assert kept == [state["moments"]["identifier"]]


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "sgd"])
def test_an_interrupted_trainer_is_run_again(folder: Path, tmp_path: Path, tier: str, optim: str) -> None:
    def trained(model: PreTrainedModel) -> dict[str, torch.Tensor]:
        trainer = plain_trainer(model, tmp_path / "out", optim=optim)
        trainer.add_callback(Interrupt())
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.train()
        assert trainer.state.global_step == 4
        return weights(trainer.model)

    expected, got = trained(resident(folder)), trained(full(folder, tier, tmp_path / tier))
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_that_is_resumed_from_takes_the_place_of_the_last_step_on_disk(
    folder: Path, tmp_path: Path
) -> None:
    def run(checkpoint: Path | None) -> dict[str, torch.Tensor]:
        model = full(folder, "disk", tmp_path / "state")
        optimizer = lowmem.optim.AdamW(model, lr=3e-3)
        if checkpoint is not None:
            assert lowmem.full.resume_last_step(optimizer) == 4
        options: dict[str, object] = {"save_strategy": "steps", "save_steps": 2}
        trainer = plain_trainer(model, tmp_path / "out", optimizer=optimizer, **options)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        found = weights(model)
        runtime_of(model).close()
        return found

    expected = run(None)
    got = run(tmp_path / "out" / "checkpoint-2")
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name


def test_a_trainer_goes_on_from_the_last_step_on_disk(folder: Path, tmp_path: Path) -> None:
    model = full(folder, "disk", tmp_path / "state").train()
    optimizer = lowmem.optim.AdamW(model, lr=1e-2)
    plain_trainer(model, tmp_path / "out", optimizer=optimizer).train()
    runtime_of(model).close()
    whole = full(folder, "device", tmp_path)
    own = lowmem.optim.AdamW(whole, lr=1e-2)
    for _ in range(2):
        plain_trainer(whole, tmp_path / "out", optimizer=own).train()
    again = full(folder, "disk", tmp_path / "state")
    resumed = lowmem.optim.AdamW(again, lr=1e-2)
    assert lowmem.full.resume_last_step(resumed) == 4
    plain_trainer(again, tmp_path / "out", optimizer=resumed).train()
    for name, weight in weights(whole).items():
        assert torch.equal(weights(again)[name], weight), name


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_state_dict_that_was_not_saved_stands_for_its_step_alone(folder: Path, tmp_path: Path, tier: str) -> None:
    model = full(folder, tier, tmp_path).train()
    optimizer = lowmem.optim.AdamW(model, lr=1e-2)
    ids = batches(1)[0]
    backward(model, ids)
    optimizer.step()
    state, before = optimizer.state_dict(), weights(model)
    optimizer.load_state_dict(copy.deepcopy(state))
    for name, weight in weights(model).items():
        assert torch.equal(before[name], weight), name
    with pytest.raises(lowmem.UnsupportedError, match=r"writing optimizer\.state_dict"):
        pickle.dumps(state)
    optimizer.zero_grad()
    backward(model, ids)
    optimizer.step()
    with pytest.raises(lowmem.UnsupportedError, match="of an earlier step that was not saved"):
        optimizer.load_state_dict(state)
    latest = optimizer.state_dict()
    other = lowmem.optim.AdamW(model, lr=1e-2)
    with pytest.raises(lowmem.UnsupportedError, match="of an earlier step that was not saved"):
        other.load_state_dict(latest)


@pytest.mark.parametrize("tier", ["device", "disk"])
def test_the_saved_model_loads_in_transformers_with_the_same_logits(folder: Path, tmp_path: Path, tier: str) -> None:
    model = full(folder, tier, tmp_path / "state").train()
    optimizer = lowmem.optim.AdamW(model, lr=1e-2)
    for ids in batches(2):
        backward(model, ids)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
    again = lowmem.from_pretrained(tmp_path / "saved", device="cpu", budget=lowmem.Budget(device="64MiB", host="0"))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, loaded(ids).logits)


def test_a_tied_head_is_trained_and_saved_once(tmp_path: Path) -> None:
    folder = Path(build("llama", tmp_path / "tied", changes={"tie_word_embeddings": True}))
    plain, tuned = resident(folder), full(folder, "disk", tmp_path).train()
    optimizers = [torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0, fused=True)]
    optimizers.append(lowmem.optim.AdamW(tuned, lr=1e-2, weight_decay=0.0))
    for ids in batches(3):
        for model, optimizer in zip((plain, tuned), optimizers, strict=True):
            backward(model, ids)
            optimizer.step()
            optimizer.zero_grad()
    tuned.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, weight in weights(plain).items():
        assert torch.equal(weights(loaded)[name], weight), name


def test_checkpoints_of_another_kind_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    model = full(folder, "host", tmp_path).train()
    optimizer = lowmem.optim.AdamW(model)
    backward(model, batches(1)[0])
    optimizer.step()
    with pytest.raises(lowmem.UnsupportedError, match="whose weights are not saved"):
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    model.save_pretrained(tmp_path / "saved")
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="without 'lowmem_full'"):
        optimizer.load_state_dict({name: value for name, value in state.items() if name != "lowmem_full"})
    state["lowmem_full"]["folder"] = str(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"moments [0-9a-f]{32} .* are not there \(looked in .*elsewhere\)"):
        optimizer.load_state_dict(state)
    with pytest.raises(lowmem.UnsupportedError, match=r"save_pretrained\(variant=...\)"):
        model.save_pretrained(tmp_path / "saved", variant="fp16")


def test_adapters_and_other_compute_types_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(lowmem.UnsupportedError, match="peft_config"):
        lowmem.plan(folder, seq_len=16, tuning="full", peft_config=lora())
    with pytest.raises(lowmem.UnsupportedError, match=r"dtype=torch\.bfloat16"):
        lowmem.from_pretrained(folder, tuning="full", dtype=torch.bfloat16, device="cpu")
    with pytest.raises(lowmem.UnsupportedError, match="tuning='some'"):
        lowmem.from_pretrained(folder, tuning="some", device="cpu")
    model = full(folder, "device", tmp_path)
    trainer = sft_trainer(model, tmp_path / "out", peft_config=lora())
    with pytest.raises(lowmem.UnsupportedError, match="PEFT"):
        trainer.train()
