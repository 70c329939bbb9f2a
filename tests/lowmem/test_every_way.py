"""What trains and is saved in every way through a block: whole batches, micro-batches of one, chunks of four tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import lowmem
from lowmem.internals.stand_in import StandIn
from lowmem.streaming.runtime import runtime_of
from tests.lowmem.full_training import resident, weights
from tests.lowmem.tiny_training import lora
from tests.zoo.architectures import build

# Ten tokens: chunks of four leave two.
BATCHES = [(torch.arange(40).view(4, 10) * factor) % 80 for factor in (7, 3, 11)]
SPLITS: dict[str, dict[str, Any]] = {"whole": {"micro_batch": 4}, "micro": {"micro_batch": 1}}
SPLITS["chunks"] = {"micro_batch": 4, "chunk_tokens": 4}
TIERS = ("memory", "disk")
QUICK = (("whole", "memory"), ("micro", "disk"), ("chunks", "disk"))
EVERYWHERE = [
    pytest.param(split, tier, id=f"{split}-{tier}", marks=() if (split, tier) in QUICK else pytest.mark.slow)
    for split in SPLITS
    for tier in TIERS
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama")))


def opened(
    folder: Path, split: str, tier: str, *, state: Path | None = None, table_on_disk: bool = False
) -> PreTrainedModel:
    """The model in one of the ways; with a folder for state, every weight of it is trained."""
    tuning = "adapter" if state is None else "full"
    disk = state if tier == "disk" else None

    def planned(device: int | str) -> lowmem.Plan:
        budget = lowmem.Budget(device=device, host="0", disk=disk)
        return lowmem.plan(
            folder, seq_len=10, batch_size=4, tuning=tuning, budget=budget, device="cpu", **SPLITS[split]
        )

    smallest = planned(0).smallest_device_bytes
    plan = planned("64MiB" if tier == "memory" else smallest if state is not None else smallest + (64 << 10))
    if state is not None:
        # Room for optimizers that keep their state in RAM wherever the weights are.
        plan = replace(plan, device_budget_bytes=plan.device_budget_bytes + (64 << 20))
    if table_on_disk:
        plan = replace(plan, choice=replace(plan.choice, embedding_on_disk=True))
    assert (plan.micro_batch, plan.chunk_tokens) == (SPLITS[split]["micro_batch"], SPLITS[split].get("chunk_tokens"))
    model = lowmem.from_pretrained(folder, tuning=tuning, plan=plan, device="cpu").train()
    if state is not None:
        assert plan.choice.state_tier == ("device" if tier == "memory" else "disk")
    elif table_on_disk:
        assert isinstance(model.get_input_embeddings().weight, StandIn)
    return model


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Losses of three clipped steps."""
    losses = []
    for ids in BATCHES:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], *, before: dict[str, Tensor] | None) -> None:
    """Equal to 1e-6, and changed."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    if before is not None:
        assert [name for name, value in expected.items() if torch.equal(value, before[name])] == []


# Splits sum gradients in another order. An eps above the gradients that are nearly zero keeps Adam from dividing that
# by itself (docs/optimizers.md).
EVERY_WEIGHT: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "fused AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3, fused=True),
    "foreach AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3, foreach=True),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "RMSprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-3, eps=1e-3, foreach=True),
    "ours": lambda model: lowmem.optim.AdamW(model, lr=1e-3, eps=1e-3),
}


@pytest.mark.parametrize(("split", "tier"), EVERYWHERE)
@pytest.mark.parametrize(
    "name",
    [name if name == "fused AdamW" else pytest.param(name, marks=pytest.mark.slow) for name in EVERY_WEIGHT],
)
def test_every_weight_trains_as_in_the_plain_model(
    name: str, split: str, tier: str, folder: Path, tmp_path: Path
) -> None:
    plain, tuned = resident(folder), opened(folder, split, tier, state=tmp_path)
    losses = [trained(model, EVERY_WEIGHT[name](model)) for model in (plain, tuned)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    assert_close(weights(tuned), weights(plain), before=weights(resident(folder)))
    runtime_of(tuned).close()


BLOCKWISE: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "BAdam": lambda model: lowmem.optim.BAdam(model, lr=1e-3, eps=1e-3, switch_block_every=1),
    "LISA": lambda model: lowmem.optim.LISA(model, lr=1e-3, eps=1e-3, activated_layers=1, interval_steps=1),
}


@pytest.mark.parametrize(("split", "tier"), EVERYWHERE)
@pytest.mark.parametrize("name", ["BAdam", pytest.param("LISA", marks=pytest.mark.slow)])
def test_methods_by_blocks_train_as_on_the_plain_model(
    name: str, split: str, tier: str, folder: Path, tmp_path: Path
) -> None:
    plain, tuned = resident(folder), opened(folder, split, tier, state=tmp_path)
    losses = [trained(model, BLOCKWISE[name](model)) for model in (plain, tuned)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    assert_close(weights(tuned), weights(plain), before=None)
    runtime_of(tuned).close()


@pytest.mark.parametrize(("split", "tier"), EVERYWHERE)
def test_adalomo_trains_adapters_whose_first_gradients_are_zero(split: str, tier: str, folder: Path) -> None:
    found = []
    for model in (resident(folder), opened(folder, split, tier)):
        torch.manual_seed(0)
        made = get_peft_model(model, lora(lora_dropout=0.0))
        before = trainable(made)
        losses = trained(made, lowmem.optim.AdaLomo(made, lr=1e-3))
        found.append((losses, trainable(made)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=1e-6)
    assert_close(found[1][1], found[0][1], before=before)


SAVED: dict[str, dict[str, Any]] = {
    "an adapter on the table": {"target_modules": ["embed_tokens", "q_proj"]},
    "a trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "added tokens": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:.*the embedding layer has been resized")
@pytest.mark.parametrize(("split", "tier"), EVERYWHERE)
@pytest.mark.parametrize("case", SAVED)
def test_what_lies_outside_the_blocks_trains_and_is_saved_as_by_the_plain_model(
    case: str, split: str, tier: str, folder: Path, tmp_path: Path
) -> None:
    plain, ours = resident(folder), opened(folder, split, tier, table_on_disk=tier == "disk")
    stored, losses = [], []
    for name, model in (("plain", plain), ("ours", ours)):
        torch.manual_seed(0)
        if case == "added tokens":
            model.resize_token_embeddings(model.config.vocab_size + 2, mean_resizing=False)
        made = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **SAVED[case]))
        losses.append(trained(made, torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)))
        made.save_pretrained(tmp_path / name)
        stored.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    assert_close(stored[1], stored[0], before=None)
    if case != "added tokens" or tier == "memory":
        return
    lowmem.merge(folder, adapter=tmp_path / "ours", output=tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = BATCHES[0].clone()
    ids[:, 3] = merged.config.vocab_size - 1
    with torch.no_grad():
        made = made.eval()
        torch.testing.assert_close(
            merged(input_ids=ids).logits, made(input_ids=ids, use_cache=False).logits, rtol=1e-5, atol=1e-5
        )
