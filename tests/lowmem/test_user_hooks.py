"""Hooks and state of a user's own inside streamed blocks: as in the plain model, or refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import lowmem
from tests.lowmem.tiny_training import lora, resident, streamed
from tests.zoo.architectures import build

IDS = (torch.arange(40).view(4, 10) * 7) % 80
SPLITS: dict[str, dict[str, object]] = {"whole": {}, "micro": {"micro_batch": 1}, "chunks": {"chunk_tokens": 4}}
TIERS = {"memory": "64MiB", "disk": "0"}
QUICK = (("whole", "memory"), ("micro", "disk"), ("chunks", "memory"))
EVERYWHERE = [
    pytest.param(split, tier, id=f"{split}-{tier}", marks=() if (split, tier) in QUICK else pytest.mark.slow)
    for split in SPLITS
    for tier in TIERS
]
WHOLE = [pytest.param("whole", "memory", id="whole-memory")]

Load = Callable[..., PeftModel]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture
def load(folder: Path) -> Load:
    """The adapted model: plain, or streamed in one of the ways."""

    def make(split: str | None = None, tier: str = "memory", **options: object) -> PeftModel:
        if split is None:
            model = resident(folder).double()
        else:
            budget = lowmem.Budget(device="64MiB", host=TIERS[tier])
            model = streamed(folder, budget=budget, dtype=torch.float64, **SPLITS[split])
        made = get_peft_model(model, lora(lora_dropout=0.0))
        made.add_adapter("other", lora(lora_dropout=0.0))
        made.set_adapter("default")
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, param in made.named_parameters():
                if "lora_" in name:
                    param.data = 0.2 * torch.randn(param.shape, generator=generator, dtype=torch.float64)
        return made.train(bool(options.pop("train", True)))

    return make


@pytest.fixture(autouse=True)
def _hooks_are_mentioned() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the hook .* is inside a streamed block")
        yield


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if "lora_" in name}


def layer(model: PeftModel, index: int) -> Any:
    return model.get_base_model().model.layers[index]


def gradients(model: PeftModel, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name: param.grad for name, param in adapters(model).items() if param.grad is not None}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].shape == value.shape
        # In fp64: what splits change by rounding is far below what a wrong gradient would be.
        assert float((got[name] - value).norm()) <= 1e-10 * max(1e-3, float(value.norm())), name


def loss_of(model: PeftModel, **options: object) -> Tensor:
    loss: Tensor = model(input_ids=IDS, use_cache=False, **options).logits.square().mean()
    return loss


@pytest.mark.parametrize(("split", "tier"), EVERYWHERE)
def test_gradient_hooks_of_adapters_act_once_on_the_whole_gradient(load: Load, split: str, tier: str) -> None:
    def run(model: PeftModel) -> tuple[dict[str, Tensor], list[str]]:
        seen: list[str] = []

        def square(name: str, grad: Tensor) -> Tensor:
            seen.append(name)
            # Not linear: of parts it would be another function.
            return grad.square() + grad

        for name, param in adapters(model).items():
            if param.requires_grad:
                param.register_hook(lambda grad, name=name: square(name, grad))
        return gradients(model, loss_of(model)), sorted(seen)

    (expected, once), (got, seen) = run(load()), run(load(split, tier))
    assert seen == once
    assert_equal(got, expected)


@pytest.mark.parametrize(("split", "tier"), EVERYWHERE)
def test_a_steering_hook_that_is_removed_before_backward_steers_the_gradients_too(
    load: Load, split: str, tier: str
) -> None:
    def run(model: PeftModel) -> dict[str, Tensor]:
        block = layer(model, 1)
        handles = [
            block.mlp.register_forward_hook(lambda module, args, output: output * 1.5 + 0.3),
            block.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs: (args, kwargs | {"hidden_states": kwargs["hidden_states"] * 0.7}),
                with_kwargs=True,
            ),
        ]
        loss = loss_of(model)
        for handle in handles:
            handle.remove()
        # Not there in the forward: it does not run in the recomputation either.
        added = block.mlp.register_forward_hook(lambda module, args, output: output * 100)
        found = gradients(model, loss)
        added.remove()
        return found | {"loss": loss.detach()}

    assert_equal(run(load(split, tier)), run(load()))


def test_a_hook_that_writes_in_place_is_followed(load: Load) -> None:
    def run(model: PeftModel) -> dict[str, Tensor]:
        def write(module: nn.Module, args: object, output: Tensor) -> None:
            output.mul_(1.5)

        layer(model, 1).mlp.register_forward_hook(write)
        return gradients(model, loss_of(model))

    assert_equal(run(load("micro", "disk")), run(load()))


@pytest.mark.parametrize(("split", "tier"), EVERYWHERE)
@pytest.mark.parametrize("derived", [False, True])
def test_a_loss_on_a_captured_activation_is_refused_by_name(
    load: Load, split: str, tier: str, *, derived: bool
) -> None:
    captured: list[Tensor] = []

    def capture(module: nn.Module, args: object, output: Tensor) -> None:
        captured.append(output.float().mean() if derived else output)

    model = load(split, tier)
    layer(model, 1).mlp.act_fn.register_forward_hook(capture)
    loss = loss_of(model) + captured[0].square().mean()
    with pytest.raises(lowmem.UnsupportedError, match=r"capture on model\.layers\.1\.mlp\.act_fn"):
        loss.backward()


def test_a_captured_activation_can_be_looked_at(load: Load) -> None:
    def run(model: PeftModel) -> dict[str, Tensor]:
        captured: list[Tensor] = []
        handle = layer(model, 1).mlp.register_forward_hook(lambda module, args, output: captured.append(output))
        loss = loss_of(model)
        handle.remove()
        return gradients(model, loss) | {"captured": torch.cat([part.detach() for part in captured[:1]])}

    assert_equal(run(load("whole", "disk")), run(load()))


def test_hooks_inside_blocks_are_mentioned_once(load: Load) -> None:
    model = load("whole")
    layer(model, 2).mlp.register_forward_hook(lambda module, args, output: None)
    with pytest.warns(UserWarning, match=r"on model\.layers\.2\.mlp is inside a streamed block"):
        loss_of(model).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model).backward()


CHANGES: dict[str, Callable[[PeftModel], object]] = {
    "scale": lambda model: layer(model, 1).self_attn.q_proj.scale_layer(2.0),
    "switch": lambda model: model.set_adapter("other"),
    "mode": lambda model: model.eval(),
}


@pytest.mark.parametrize(("split", "tier"), EVERYWHERE)
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_forward_and_backward_is_refused_by_name(
    load: Load, split: str, tier: str, change: str
) -> None:
    model = load(split, tier)
    loss = loss_of(model)
    CHANGES[change](model)
    with pytest.raises(RuntimeError, match=r"model\.layers\..* changed between a block's forward and its backward"):
        loss.backward()


@pytest.mark.parametrize("split", SPLITS)
def test_adapter_weights_written_between_forward_and_backward_are_refused_as_in_the_plain_model(
    load: Load, split: str
) -> None:
    for model in (load(), load(split)):
        loss = loss_of(model)
        with torch.no_grad():
            next(param for name, param in adapters(model).items() if "lora_B" in name).add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize(("split", "tier"), EVERYWHERE)
def test_one_adapter_for_each_sequence_gives_the_gradients_of_the_plain_model(
    load: Load, split: str, tier: str
) -> None:
    names = ["default", "other", "__base__", "other"]

    def run(model: PeftModel) -> dict[str, Tensor]:
        for param in adapters(model).values():
            param.requires_grad_()
        loss = loss_of(model, adapter_names=names)
        with torch.no_grad():
            logits = model(input_ids=IDS, use_cache=False, adapter_names=names).logits
        return gradients(model, loss) | {"loss": loss.detach(), "logits": logits}

    assert_equal(run(load(split, tier, train=False)), run(load(train=False)))


@pytest.mark.parametrize(("split", "tier"), EVERYWHERE)
@pytest.mark.parametrize("grad", [True, False])
def test_attention_weights_are_one_tensor_for_each_layer(load: Load, split: str, tier: str, *, grad: bool) -> None:
    def run(model: PeftModel) -> dict[str, Tensor]:
        model.get_base_model().set_attn_implementation("eager")
        with torch.set_grad_enabled(grad):
            found = model(input_ids=IDS, use_cache=False, output_attentions=True)
        maps = {f"map {index}": weights.detach() for index, weights in enumerate(found.attentions)}
        if not grad:
            return maps
        loss = found.logits.square().mean() + sum(weights.square().mean() for weights in found.attentions)
        return maps | gradients(model, loss)

    expected, model = run(load()), load(split, tier)
    if split == "chunks":
        with pytest.raises(lowmem.UnsupportedError, match="output_attentions=True with chunks of 4 tokens"):
            run(model)
    else:
        assert_equal(run(model), expected)


@pytest.mark.parametrize(("split", "tier"), WHOLE)
def test_attention_weights_that_the_implementation_does_not_give_are_missing_as_in_the_plain_model(
    load: Load, split: str, tier: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = [
            len(model(input_ids=IDS, use_cache=False, output_attentions=True).attentions or ())
            for model in (load(), load(split, tier))
        ]
    assert counts[0] == counts[1]
