"""Every weight of models whose checkpoints are converted when they are read: trained as stacks, stored as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import lowmem
from lowmem.models.checkpoint import open_checkpoint
from lowmem.streaming.runtime import runtime_of
from tests.lowmem.full_training import backward, batches, full, plain_trainer, resident, weights
from tests.zoo.architectures import build

ARCHITECTURES = ["mixtral", "qwen3_moe", "gpt_oss"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("converted")


def checkpoint(arch: str, root: Path) -> Path:
    return root / arch if (root / arch).exists() else Path(build(arch, root / arch))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def train(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for ids in batches(5):
        losses.append(backward(model, ids))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(("arch", "tier"), [("mixtral", "host"), ("mixtral", "disk"), ("gpt_oss", "host")])
def test_stacks_are_trained_as_those_of_a_resident_model_and_stored_as_they_were(
    arch: str, tier: str, root: Path, tmp_path: Path
) -> None:
    folder = checkpoint(arch, root)
    plain, tuned = resident(folder), full(folder, tier, tmp_path / "state").train()
    expected = train(plain, torch.optim.AdamW(plain.parameters(), lr=3e-3, fused=True))
    assert train(tuned, lowmem.optim.AdamW(tuned.parameters(), lr=3e-3)) == expected
    found = weights(tuned)
    for name, weight in weights(plain).items():
        # The model in memory sums gpt_oss's gradients in another order.
        within = {"rtol": 1e-6, "atol": 1e-6} if arch == "gpt_oss" else {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(found[name], weight, **within, msg=name)
    for target, max_shard_size in ((tmp_path / "one", "1GB"), (tmp_path / "many", "20KB")):
        tuned.save_pretrained(target, max_shard_size=max_shard_size)
        was, now = stored(folder), stored(target)
        assert {name: value.shape for name, value in now.items()} == {name: value.shape for name, value in was.items()}
        loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        for name, weight in found.items():
            assert torch.equal(weights(loaded)[name], weight), name
    loaded.save_pretrained(tmp_path / "theirs")
    for name, value in stored(tmp_path / "theirs").items():
        assert torch.equal(value, now[name]), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_was_only_read_is_stored_bit_by_bit_as_it_was(arch: str, root: Path, tmp_path: Path) -> None:
    folder = checkpoint(arch, root)
    model = full(folder, "host", tmp_path)
    model.save_pretrained(tmp_path / "saved")
    was, now = stored(folder), stored(tmp_path / "saved")
    assert was.keys() == now.keys()
    for name, value in was.items():
        assert torch.equal(value.float(), now[name]), name


def test_a_trainer_goes_on_from_its_checkpoint(root: Path, tmp_path: Path) -> None:
    folder = checkpoint("mixtral", root)

    def trained(resume: str | None) -> dict[str, torch.Tensor]:
        model = full(folder, "host", tmp_path / "state")
        optimizer = lowmem.optim.AdamW(model, lr=3e-3)
        # The loss of the routers is the trainer's own affair here.
        trainer = plain_trainer(model, tmp_path / "out", optimizer=optimizer, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        found = weights(model)
        runtime_of(model).close()
        return found

    expected = trained(None)
    for name, value in trained(str(tmp_path / "out" / "checkpoint-2")).items():
        assert torch.equal(value, expected[name]), name


def test_an_incomplete_group_of_stored_tensors_is_not_taken_for_a_whole_one(root: Path, tmp_path: Path) -> None:
    folder = checkpoint("mixtral", root)
    model, given = full(folder, "host", tmp_path), stored(folder)
    missing = next(name for name in given if ".experts.1." in name)
    del given[missing]
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*experts.*Unexpected key.*experts"):
        model.load_state_dict(given)
    found = stored(folder)
    model.load_state_dict({name: value.float() + 1 for name, value in found.items()})
    model.save_pretrained(tmp_path / "saved")
    for name, value in stored(tmp_path / "saved").items():
        assert torch.equal(value, found[name].float() + 1), name


def test_a_conversion_that_computes_is_refused_before_anything_is_loaded(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowmem.models import mapping

    folder = checkpoint("mixtral", root)
    monkeypatch.setattr(mapping, "_MOVING_OPERATIONS", frozenset[str]())
    with pytest.raises(lowmem.UnsupportedError, match=r"made of \d+ stored tensors by arithmetic"):
        lowmem.from_pretrained(folder, tuning="full", device="cpu")


def test_a_conversion_that_is_undone_to_other_names_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = open_checkpoint(checkpoint("mixtral", root), name="mixtral", device=torch.device("cpu"), dtype=None).built
    recipe = next(recipe for recipe in built.mapping.recipes.values() if recipe.convert is not None)
    assert recipe.why_not_undone() is None
    monkeypatch.setattr(built.model, "_weight_conversions", [])
    assert "other names or shapes" in str(recipe.why_not_undone())
