"""Full tuning with optimizers that know nothing of lowmem, of torch, transformers and bitsandbytes: as in memory."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import prune
from transformers.training_args import OptimizerNames

import lowmem
from tests.lowmem.full_training import backward, batches, full, plain_trainer, resident, sft_trainer, weights
from tests.zoo.architectures import build

# docs/optimizers.md has the same table.
IN_TORCH = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
NEEDS_SPARSE_GRADIENTS = {"SparseAdam"}
# Optimizers of packages that this environment has not; transformers says which, before anything trains.
NOT_INSTALLED = {
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
    "adamw_anyprecision",
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_adafactor",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "lomo",
    "adalomo",
    "grokadamw",
    "schedule_free_radam",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "apollo_adamw",
    "apollo_adamw_layerwise",
    "stable_adamw",
}
NAMES = [name.value for name in OptimizerNames]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama")))


def train(model: torch.nn.Module, kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    """Three clipped steps."""
    params = [param for param in model.parameters() if kind.__name__ != "Muon" or param.ndim == 2]
    optimizer = kind(params, **options)  # type: ignore[call-arg]
    for ids in batches(3):

        def closure(ids: torch.Tensor = ids) -> float:
            optimizer.zero_grad()
            loss = backward(model, ids)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            return loss

        optimizer.step(closure)


def assert_equal(tuned: torch.nn.Module, plain: torch.nn.Module, *, before: torch.nn.Module) -> None:
    """The same weights, and all of them changed."""
    now, start = weights(tuned), weights(before)
    for name, weight in weights(plain).items():
        assert torch.equal(now[name], weight), name
        assert not torch.equal(weight, start[name]), f"{name} did not move at all"


QUICK = [("AdamW", {"fused": True}, "disk"), ("RMSprop", {"foreach": True, "momentum": 0.9}, "disk")]
CASES = [
    *((name, {}, "device") for name in sorted(set(IN_TORCH) - NEEDS_SPARSE_GRADIENTS - {"LBFGS", "Muon"})),
    *QUICK,
    pytest.param("LBFGS", {"max_iter": 4}, "device", marks=pytest.mark.slow),
    *(
        pytest.param(name, options, tier, marks=pytest.mark.slow)
        for name, kind in IN_TORCH.items()
        for option in ("foreach", "fused", "maximize", "amsgrad", "weight_decay")
        if option in inspect.signature(kind).parameters and name not in NEEDS_SPARSE_GRADIENTS | {"Muon"}
        for options in [{option: 0.1 if option == "weight_decay" else True}]
        for tier in ("device", "host", "disk")
    ),
]


@pytest.mark.parametrize(("name", "options", "tier"), CASES)
def test_optimizers_of_torch_train_every_weight(
    folder: Path, tmp_path: Path, name: str, options: dict[str, Any], tier: str
) -> None:
    plain, tuned = resident(folder), full(folder, tier, tmp_path).train()
    for model in (plain, tuned):
        train(model, IN_TORCH[name], options)
    assert_equal(tuned, plain, before=resident(folder))


def test_muon_trains_every_matrix(folder: Path, tmp_path: Path) -> None:
    plain, tuned = resident(folder), full(folder, "disk", tmp_path).train()
    for model in (plain, tuned):
        train(model, torch.optim.Muon, {})
    now = weights(tuned)
    assert all(torch.equal(now[name], weight) for name, weight in weights(plain).items())


def test_sparse_adam_refuses_dense_gradients_as_ever(folder: Path, tmp_path: Path) -> None:
    for model in (resident(folder), full(folder, "device", tmp_path).train()):
        with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
            train(model, torch.optim.SparseAdam, {})


QUICK_NAMES = {"adafactor", "adamw_bnb_8bit"}
NAMED = [
    name if name in QUICK_NAMES else pytest.param(name, marks=pytest.mark.slow)
    for name in NAMES
    if name not in NOT_INSTALLED
]


# Of bitsandbytes, on plain models too; the arithmetic is the same.
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", NAMED)
def test_optimizers_by_name_train_every_weight(folder: Path, tmp_path: Path, name: str) -> None:
    plain = plain_trainer(resident(folder), tmp_path / "plain", optim=name)
    tuned = plain_trainer(full(folder, "disk", tmp_path / "disk"), tmp_path / "tuned", optim=name)
    for trainer in (plain, tuned):
        trainer.train()
    assert_equal(tuned.model, plain.model, before=resident(folder))


@pytest.mark.parametrize(
    "name",
    [
        name if name in {"lomo", "galore_adamw"} else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(NOT_INSTALLED)
    ],
)
def test_optimizers_of_missing_packages_are_refused_by_name_before_anything_trains(
    folder: Path, tmp_path: Path, name: str
) -> None:
    model = full(folder, "device", tmp_path)
    before = weights(model)
    options = {"optim_target_modules": ["attn", "mlp"]} if name.startswith(("galore", "apollo")) else {}
    trainer = plain_trainer(model, tmp_path / "tuned", optim=name, **options)
    with pytest.raises((ImportError, ValueError), match=r"(?i)install|import"):
        trainer.train()
    assert all(torch.equal(weight, before[key]) for key, weight in weights(model).items())


# TRL's head and ours sum in another order. What that does to a weight depends on the optimizer: Adam divides a gradient
# by its own size, so that rounding of one that is nearly zero moves its weight by a part of the learning rate. Seen:
# 6e-8 with SGD, 1.2e-7 with an eps above such gradients; with the default of 1e-8, one of 31,456 weights by 4e-6 and
# the others below 1e-6. docs/optimizers.md says so.
SFT_CASES: dict[str, tuple[dict[str, object], int]] = {
    # Options, and how many weights may differ by more than 1e-6.
    "defaults": ({}, 3),
    "sgd": ({"optim": "sgd", "learning_rate": 0.1}, 0),
    "a large eps": ({"adam_epsilon": 1e-3}, 0),
}


@pytest.mark.parametrize("case", SFT_CASES)
def test_sft_trains_every_weight_as_in_memory(folder: Path, tmp_path: Path, case: str) -> None:
    options, most_beyond = SFT_CASES[case]
    plain = sft_trainer(resident(folder), tmp_path / "plain", **options)
    tuned = sft_trainer(lowmem.from_pretrained(folder, tuning="full", device="cpu"), tmp_path / "tuned", **options)
    assert case == "sgd" or plain.args.optim == "adamw_torch_fused"
    logs = []
    for trainer in (plain, tuned):
        trainer.train()
        logs.append([(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log])
    torch.testing.assert_close(torch.tensor(logs[1]), torch.tensor(logs[0]), rtol=1e-6, atol=1e-6)
    now, start = weights(tuned.model), weights(resident(folder))
    num_weights = num_beyond = 0
    for name, weight in weights(plain.model).items():
        assert not torch.equal(now[name], start[name]), f"{name} did not move at all"
        torch.testing.assert_close(now[name], weight, rtol=0, atol=1e-5, msg=name)
        num_weights += weight.numel()
        num_beyond += int(((now[name] - weight).abs() > 1e-6).sum())
    assert num_weights == 31_456
    assert num_beyond <= most_beyond


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w[5].zero_(),
        lambda w: w.T.mul_(2),
        lambda w: torch._foreach_zero_([w]),
        lambda w: w.data.mul_(2),
        lambda w: w.detach()[:, 1].fill_(3),
        lambda w: torch.nn.init.ones_(w),
    ],
)
def test_writes_of_all_kinds_reach_the_master_weight(
    folder: Path, tmp_path: Path, write: Callable[[torch.Tensor], object]
) -> None:
    plain, tuned = resident(folder).eval(), full(folder, "disk", tmp_path).eval()
    ids = batches(1)[0]
    with torch.no_grad():
        for model in (plain, tuned):
            write(model.model.layers[1].mlp.up_proj.weight)
        assert torch.equal(tuned(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize(
    "replace",
    [
        lambda layer: setattr(layer, "weight", torch.nn.Parameter(torch.zeros(layer.weight.shape))),
        lambda layer: layer.load_state_dict({"weight": torch.zeros(layer.weight.shape)}, assign=True),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
def test_replacing_a_trained_weight_is_refused_by_name(
    folder: Path, tmp_path: Path, replace: Callable[[torch.nn.Module], object]
) -> None:
    layer = full(folder, "device", tmp_path).model.layers[1].mlp.up_proj
    with pytest.raises((lowmem.UnsupportedError, RuntimeError), match=r"model\.layers\.1\.mlp\.up_proj\.weight.*copy_"):
        replace(layer)


def test_a_loss_of_the_weights_themselves_is_trained_on(folder: Path, tmp_path: Path) -> None:
    plain, tuned = resident(folder), full(folder, "device", tmp_path).train()
    for model in (plain, tuned):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for ids in batches(2):
            penalty = sum((param**2).sum() for name, param in model.named_parameters() if "proj" in name)
            (model(input_ids=ids, labels=ids).loss + 0.01 * penalty).backward()
            optimizer.step()
            optimizer.zero_grad()
    now = weights(tuned)
    for name, weight in weights(plain).items():
        torch.testing.assert_close(now[name], weight, rtol=1e-6, atol=1e-6, msg=name)
