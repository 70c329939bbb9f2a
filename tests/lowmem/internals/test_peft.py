"""PEFT's private names mean what they meant; else a run stops instead of taking the policy for its reference."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Embedding
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from lowmem.errors import UnsupportedError
from lowmem.internals.peft import (
    ask_first,
    changed_module,
    embed,
    embed_scale,
    flags_set,
    inputs_cast_once,
    read_flags,
    settings_in,
)

ROWS = torch.arange(6)
FLAG = "cast_input_dtype_enabled"


class Block(nn.Module):
    """An embedding, a linear layer and a norm, each adapted in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear, self.norm = nn.Embedding(8, 4), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.linear(self.embed(ids)))
        return out


@pytest.fixture
def block() -> Any:
    """The block with two adapters, all of whose values are drawn."""
    torch.manual_seed(0)
    made = Block()
    config = LoraConfig(r=2, target_modules=["embed", "linear"], modules_to_save=["norm"], init_lora_weights=False)
    model: Any = get_peft_model(made, config, adapter_name="first")
    model.add_adapter("second", config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "modules_to_save" in name:
                param.normal_()
    model.set_adapter("first")
    return model


def test_flags_set_run_the_adapters_that_they_name(block: Any) -> None:
    first = read_flags(block)
    assert first == ((False, ("first",)), (False, ("first",)), (False, "first"))
    with block.disable_adapter():
        off, off_flags = block(ROWS), read_flags(block)
    block.set_adapter("second")
    second, second_flags = block(ROWS), read_flags(block)
    block.set_adapter("first")
    own = block(ROWS)
    assert len({first, off_flags, second_flags}) == 3
    for flags, expected in ((off_flags, off), (second_flags, second), (first, own)):
        with flags_set(block, flags):
            torch.testing.assert_close(block(ROWS), expected, rtol=0, atol=0)
        assert read_flags(block) == first
    assert not torch.equal(own, off)
    assert not torch.equal(own, second)


@pytest.mark.parametrize("kind", [BaseTunerLayer, AuxiliaryTrainingWrapper])
@pytest.mark.parametrize("name", ["disable_adapters", "active_adapter"])
def test_flags_that_are_kept_elsewhere_stop_the_run(
    kind: type[Any], name: str, block: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    value: object = False if name == "disable_adapters" else ["first"]
    monkeypatch.setattr(kind, name, property(lambda _: value))
    wanted = tuple((True, ("second",)) for _ in read_flags(block))
    with pytest.raises(UnsupportedError, match=rf"peft {version('peft')} .*elsewhere"), flags_set(block, wanted):
        pytest.fail("the block would run with other flags")


@pytest.mark.parametrize("kind", [BaseTunerLayer, AuxiliaryTrainingWrapper])
@pytest.mark.parametrize("name", ["disable_adapters", "active_adapter"])
def test_flags_that_are_not_shown_stop_the_run(
    kind: type[Any], name: str, block: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(kind, name)
    with pytest.raises(UnsupportedError, match=rf"peft {version('peft')} .*does not show"):
        read_flags(block)


@pytest.mark.parametrize("kind", ["tuners.tuners_utils.BaseTunerLayer", "utils.other.AuxiliaryTrainingWrapper"])
def test_layers_under_other_names_stop_the_run(kind: str, block: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(f"peft.{kind}")
    with pytest.raises(UnsupportedError, match=rf"peft {version('peft')} .*other names"):
        read_flags(block)


def test_every_layer_that_can_be_switched_off_is_of_one_of_the_two_kinds() -> None:
    found = set()
    for info in pkgutil.walk_packages(peft.__path__, "peft."):
        try:
            module = importlib.import_module(info.name)
        except ImportError:  # Of packages that are not installed: quantisers, other devices.
            continue
        found |= {value for value in vars(module).values() if isinstance(value, type) and issubclass(value, nn.Module)}
    switched = {kind for kind in found if hasattr(kind, "enable_adapters") and hasattr(kind, "disable_adapters")}
    assert len(switched) > 50
    known = (BaseTunerLayer, AuxiliaryTrainingWrapper, PreTrainedModel)
    assert {kind for kind in switched if not issubclass(kind, known)} == set()


def test_what_peft_switches_is_seen_and_named(block: Any) -> None:
    layers = {path: module for path, module in block.named_modules() if isinstance(module, BaseTunerLayer)}
    path, layer = next((path, layer) for path, layer in layers.items() if path.endswith("linear"))
    before = settings_in(block)
    assert settings_in(block) == before

    def is_seen(change: Callable[[], object], undo: Callable[[], object]) -> bool:
        change()
        now = settings_in(block)
        named = changed_module(block, before, now)
        undo()
        assert settings_in(block) == before
        return now != before and named == path

    assert is_seen(partial(layer.enable_adapters, False), partial(layer.enable_adapters, True))
    scaling = dict(layer.scaling)
    assert is_seen(partial(layer.scale_layer, 2.0), partial(layer.scaling.update, scaling))
    assert is_seen(layer.eval, layer.train)
    assert is_seen(partial(layer.merged_adapters.append, "default"), layer.merged_adapters.clear)
    # Not a switch: what a layer notes for itself once it has run.
    layer.noted = None
    before = settings_in(block)
    layer.noted = object()
    assert settings_in(block) == before


@pytest.mark.parametrize("scale", [None, 3.0])
def test_embedding_is_looked_up_and_scaled_as_peft_does(scale: float | None) -> None:
    torch.manual_seed(0)
    base = nn.Embedding(8, 4, padding_idx=2)
    if scale is not None:
        base.embed_scale = torch.tensor(scale)
    layer = Embedding(base, "default", config=LoraConfig(r=2, init_lora_weights=False), r=2, lora_alpha=2)
    lora_A, lora_B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    update = embed(layer, ROWS, lora_A.T) @ lora_B.T
    times = embed_scale(layer)
    assert (times is None) == (scale is None)
    update = update if times is None else update * times
    torch.testing.assert_close(layer(ROWS), base(ROWS) + update)
    (grad,) = torch.autograd.grad(embed(layer, ROWS, lora_A.T).sum(), lora_A)
    assert not grad[:, 2].any(), "padding has no gradient"


class Widened(TorchDispatchMode):
    """Counts conversions of bf16 to fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "_to_copy" in str(func) and args[0].dtype == torch.bfloat16 and out.dtype == torch.float32:
            self.num += 1
        return out


@pytest.mark.parametrize(
    ("options", "is_converted"),
    [({}, False), ({"use_rslora": True, "lora_bias": True}, False), ({"lora_dropout": 0.1}, True)],
    ids=str,
)
def test_autocast_alone_converts_an_input_that_is_only_multiplied(options: Any, is_converted: bool) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6)).to(torch.bfloat16)
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False, **options)
    model: Any = get_peft_model(base, config)
    factors = [param for param in model.parameters() if param.requires_grad]
    assert {param.dtype for param in factors} == {torch.float32}
    x = torch.randn(5, 8, dtype=torch.bfloat16, requires_grad=True)

    def outcome(*, once: bool, autocast: bool = True) -> tuple[int, list[torch.Tensor]]:
        torch.manual_seed(0)
        casts = inputs_cast_once(model, x.device) if once else inputs_cast_once(nn.Identity(), x.device)
        with Widened() as widened, torch.autocast("cpu", torch.bfloat16, enabled=autocast), casts:
            out = model(x)
        return widened.num, [out, *torch.autograd.grad(out.float().square().sum(), [x, *factors])]

    num_before, expected = outcome(once=False)
    num, found = outcome(once=True)
    assert num_before == 2
    assert num == (2 if is_converted else 0)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    # Where a part of a block leaves autocast, the layer converts as ever; and so it does afterwards.
    assert outcome(once=True, autocast=False)[0] >= 2
    assert outcome(once=False)[0] == num_before
    assert all(value is True for module in model.modules() for value in [getattr(module, FLAG, True)])


METHODS = ("inject_adapter", "merge_adapter", "merge_and_unload")


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT as it came, whatever a test before has put there, and as it was afterwards."""
    for owner, name in (*((BaseTuner, name) for name in METHODS), (peft.PeftModel, "add_adapter")):
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, getattr(method, "__wrapped__", method))


@pytest.mark.usefixtures("shipped")
def test_peft_asks_before_it_changes_anything() -> None:
    asked: list[object] = []

    def adding(model: nn.Module, config: peft.PeftConfig) -> None:
        asked.append(config.peft_type)
        assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
        if config.peft_type == "LOHA":
            raise UnsupportedError("LoHa", reason="of the test", instead="LoRA")

    def merging(model: nn.Module) -> None:
        raise UnsupportedError("merging", reason="of the test", instead="nothing")

    ask_first(adding=adding, merging=merging)
    ask_first(adding=adding, merging=merging)
    plain = Block()
    names = [name for name, _ in plain.named_modules()]
    with pytest.raises(UnsupportedError, match="LoHa"):
        get_peft_model(plain, peft.LoHaConfig(target_modules=["linear"]))
    assert [name for name, _ in plain.named_modules()] == names
    model: Any = get_peft_model(plain, LoraConfig(target_modules=["linear"]))
    assert asked == ["LOHA", "LORA"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(UnsupportedError, match="merging"):
            merge()
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("name", METHODS)
def test_a_peft_that_cannot_be_asked_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BaseTuner, name)
    with pytest.raises(UnsupportedError, match=rf"peft {version('peft')} .*no {name}"):
        ask_first(adding=lambda *_: None, merging=lambda _: None)
