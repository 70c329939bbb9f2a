"""What a plan counts of an optimizer is what it keeps; one that keeps more is planned for anew, or refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lowmem
from lowmem.optim import APOLLO, FRUGAL, LISA, AdaLomo, AdamW, BAdam, Fira, GaLore
from offload import BudgetError
from tests.lowmem.block_peak import peak_bytes
from tests.lowmem.full_training import plain_trainer
from tests.zoo.architectures import build

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
OWN = {
    "galore": GaLore,
    "fira": Fira,
    "frugal": FRUGAL,
    "apollo": APOLLO,
    "apollo_mini": lowmem.optim.APOLLOMini,
    "BAdam": BAdam,
    "lisa": LISA,
    "adalomo": AdaLomo,
    "adamw": AdamW,
}
OPTIONS: list[Any] = [
    partial(GaLore, rank=2, inner="adamw8bit"),
    partial(AdamW, state_dtype="8bit"),
    partial(AdamW, state_dtype="bf16"),
    partial(FRUGAL, density=0.5),
    torch.optim.AdamW,
    torch.optim.RMSprop,
    partial(torch.optim.SGD, momentum=0.9),
    partial(torch.optim.Adam, amsgrad=True),
]


class _OneMatrix(nn.Module):
    """A block with one weight."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ParameterDict({"weight": torch.randn(shape).to(dtype)})])


TYPES = [
    *product(OWN, (torch.float32, torch.bfloat16), (None,)),
    *product(["adamw"], (torch.float32, torch.bfloat16), ("fp32", "bf16", "8bit")),
]


@pytest.mark.parametrize("shape", [(128, 512), (512, 128)], ids=str)
@pytest.mark.parametrize(("name", "dtype", "state_dtype"), TYPES)
def test_an_update_takes_besides_what_its_rule_says(
    name: str, dtype: torch.dtype, state_dtype: str | None, shape: tuple[int, int]
) -> None:
    model = _OneMatrix(shape, dtype)
    optimizer = OWN[name](model, lr=1e-3, **({} if state_dtype is None else {"state_dtype": state_dtype}))
    (param,), gradient = model.parameters(), torch.randn(shape).to(dtype)
    rule, hyper, state = optimizer.rule_of(param), optimizer.hyper({**optimizer.param_groups[0], "clock": 0}), {}
    state |= rule.init(param.data)
    said = rule.temporary_values(torch.empty_like(param, device="meta")) / param.numel()
    # The first takes a new basis; `peak_bytes` runs one before it measures.
    state_of_first = {key: value.clone() for key, value in state.items()}

    def first() -> None:
        state.update({key: value.clone() for key, value in state_of_first.items()})
        rule.update(param.data, gradient, state, hyper)

    kept = sum(value.nbytes for value in state.values())
    taken = max(peak_bytes(lambda: rule.update(param.data, gradient, state, hyper)), peak_bytes(first) - kept)
    copies = taken / (4 * param.numel())
    assert copies <= 1.01 * said + 0.02
    assert said <= copies + 1.6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Wide enough for state in 8 bits, and of so many blocks that what one takes on its way from disk is little.
    changes = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Path(
        build("llama", tmp_path_factory.mktemp("llama"), changes={**changes, "head_dim": 24, "num_hidden_layers": 6})
    )


def planned(folder: Path, **given: Any) -> lowmem.Plan:
    budget = given.pop("budget", lowmem.Budget(device="1GiB", host=0))
    return lowmem.plan(folder, seq_len=24, batch_size=4, budget=budget, device="cpu", **given)


def kept_bytes(optimizer: torch.optim.Optimizer, model: nn.Module) -> int:
    """What it keeps after a step on random gradients; counters of one element are nothing."""
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.randn_like(param)
    optimizer.step()
    tensors = {
        value.data_ptr(): value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        # bitsandbytes shares its tables of codes among all parameters.
        if isinstance(value, Tensor) and value.dim() and not name.startswith("qmap")
    }
    return sum(tensors.values())


def plain(folder: Path, tuning: str) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model if tuning == "full" else get_peft_model(model, LORA)


@pytest.mark.parametrize(
    ("optimizer", "tuning"),
    [
        *((made, "full") for made in [*OWN, *OPTIONS]),
        *((made, "adapter") for made in ["galore", "adamw", *OPTIONS[-2:]]),
    ],
    ids=str,
)
def test_a_plan_counts_what_an_optimizer_keeps(folder: Path, optimizer: Any, tuning: str) -> None:
    model = plain(folder, tuning)
    make = OWN.get(optimizer, optimizer)
    params = model if isinstance(optimizer, str) or "lowmem" in str(make) else model.parameters()
    kept = kept_bytes(make(params, lr=1e-3), model)
    plan = planned(folder, tuning=tuning, optimizer=optimizer, peft_config=LORA if tuning == "adapter" else None)
    assert plan.optimizer is not None
    assert plan.optimizer.state_bytes == kept
    if not plan.optimizer.is_flat:
        assert plan.bytes_of("optimizer state") == kept
    assert lowmem.Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    "name",
    [
        "adamw_torch",
        "adamw_torch_fused",
        "sgd",
        "adafactor",
        "adagrad",
        "rmsprop",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw_bnb_8bit", "adamw_8bit", "lion_8bit")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("ademamix", "ademamix_8bit", "rmsprop_bnb_8bit")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("paged_adamw_32bit", "lion_32bit", "rmsprop_bnb")),
    ],
)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
def test_names_of_the_trainer_stand_for_what_it_makes_of_them(folder: Path, tmp_path: Path, name: str) -> None:
    model = plain(folder, "full")
    options = TrainingArguments(str(tmp_path), optim=name, use_cpu=True)
    optimizer = Trainer(model=model, args=options).create_optimizer()
    # bitsandbytes' has parameters that do not decay in a group of their own: as many, in another order.
    assert planned(folder, tuning="full", optimizer=name).optimizer.state_bytes == kept_bytes(optimizer, model)  # type: ignore[union-attr]


def test_a_smaller_state_makes_room(folder: Path) -> None:
    given: dict[str, Any] = {"galore": partial(GaLore, rank=8), "adamw": "adamw", "sgd": "sgd"}
    devices = {name: planned(folder, tuning="full", optimizer=made).device_bytes for name, made in given.items()}
    assert devices["sgd"] < devices["galore"] < devices["adamw"]
    assert planned(folder, tuning="full").device_bytes == devices["adamw"]


@pytest.mark.parametrize(
    ("optimizer", "error", "words"),
    [
        ("galore_adamw", lowmem.UnsupportedError, "optimizer='galore_adamw'.*one of adafactor, adagrad.*galore"),
        ("", lowmem.UnsupportedError, "optimizer=''"),
        (torch.optim.LBFGS, lowmem.UnsupportedError, "optimizer=LBFGS"),
        (dict, TypeError, "expected a name"),
        (3, TypeError, "expected a name"),
        (partial(GaLore, rank=0), ValueError, "rank=0"),
    ],
)
def test_what_is_not_known_is_refused(folder: Path, optimizer: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        planned(folder, tuning="full", optimizer=optimizer)


def test_from_pretrained_plans_for_an_optimizer(folder: Path) -> None:
    given: dict[str, Any] = {"tuning": "full", "budget": lowmem.Budget(device="1GiB", host=0), "device": "cpu"}
    model = lowmem.from_pretrained(folder, optimizer="badam", **given)
    assert model.lowmem_plan.optimizer.name == "BAdam"
    assert all(param.requires_grad for param in model.parameters())
    with pytest.raises(ValueError, match="not both: the plan has them"):
        lowmem.from_pretrained(folder, plan=model.lowmem_plan, tuning="full", optimizer="badam")


def on_disk(folder: Path, scratch: Path, *, more_bytes: int) -> Any:
    """A model with state on disk, and so much more of a budget than AdamW takes, whose moments are on disk too."""
    needed = planned(folder, tuning="full", budget=lowmem.Budget(device=0, host=0, disk=scratch)).smallest_device_bytes
    plan = planned(folder, tuning="full", budget=lowmem.Budget(device=needed, host=0, disk=scratch))
    assert plan.choice.state_tier == "disk"
    # With so much more, this model's weights would not go to disk.
    return lowmem.from_pretrained(folder, plan=replace(plan, device_budget_bytes=needed + more_bytes), tuning="full")


@pytest.mark.parametrize("optim", ["adamw_torch_fused", pytest.param("rmsprop", marks=pytest.mark.slow)])
def test_state_of_the_trainers_own_optimizer_is_counted_or_refused(folder: Path, tmp_path: Path, optim: str) -> None:
    trainer = plain_trainer(on_disk(folder, tmp_path / "disk", more_bytes=0), tmp_path / "out", optim=optim)
    with pytest.raises(BudgetError, match=r"of state in RAM: lowmem\.optim\.AdamW"):
        trainer.train()
    room = planned(folder, tuning="full", optimizer=optim).optimizer.state_bytes  # type: ignore[union-attr]
    model = on_disk(folder, tmp_path / "other", more_bytes=room)
    plain_trainer(model, tmp_path / "out", optim=optim).train()
    assert model.lowmem_plan.bytes_of("optimizer state") == room


def test_state_that_a_rule_keeps_in_ram_is_counted_unless_it_goes_to_disk(folder: Path, tmp_path: Path) -> None:
    model = on_disk(folder, tmp_path / "disk", more_bytes=0)
    optimizer = GaLore(model, lr=1e-3)
    with pytest.raises(BudgetError, match=r"lowmem\.full\.state_on_disk\(optimizer\)"):
        model(input_ids=torch.zeros(4, 24, dtype=torch.int64), labels=torch.zeros(4, 24, dtype=torch.int64))
    lowmem.full.state_on_disk(optimizer)
    model(input_ids=torch.zeros(4, 24, dtype=torch.int64), labels=torch.zeros(4, 24, dtype=torch.int64)).loss.backward()
    optimizer.step()
