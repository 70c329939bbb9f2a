"""Canaries: the parts of transformers' and accelerate's loading and saving that a streamed model takes are there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, core_model_loading, initialization

from lowmem import from_pretrained
from lowmem.errors import UnsupportedError
from lowmem.internals.torch import call_before_apply
from lowmem.internals.transformers import (
    Conversions,
    finish_loading,
    keep_in_fp32,
    leave_placement_alone,
    mark_initialised,
    may_be_missing,
    stored_layout,
)
from lowmem.models import whole as saving
from offload import Budget
from tests.zoo.architectures import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama")))


def on_meta(folder: Path) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def filled(folder: Path, *, leave: str) -> Any:
    """A model as a streamed one is filled: one parameter has no value."""
    model, stored = on_meta(folder), AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, value in stored.items():
        if name != leave:
            path, _, attribute = name.rpartition(".")
            param = nn.Parameter(value.clone(), requires_grad=False)
            mark_initialised(param)
            model.get_submodule(path).register_parameter(attribute, param)
    return model


def test_finishing_draws_what_is_missing_and_leaves_what_was_read(folder: Path) -> None:
    model = filled(folder, leave="lm_head.weight")
    before = {name: param for name, param in model.named_parameters() if not param.is_meta}
    values = {name: param.clone() for name, param in before.items()}
    finish_loading(model, missing={"lm_head.weight"}, device=torch.device("cpu"))
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model.lm_head.weight.std() > 0
    for name, param in before.items():
        assert model.get_parameter(name) is param
        assert torch.equal(param, values[name])


def test_another_mark_stops_the_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # S4: a version of transformers that looks for another name draws every weight anew.
    model = filled(folder, leave="lm_head.weight")
    for name, draw in initialization.TORCH_INIT_FUNCTIONS.items():
        monkeypatch.setattr(initialization, name, draw)
    with pytest.raises(UnsupportedError, match=r"transformers \d.*initialises anew what was read"):
        finish_loading(model, missing={"lm_head.weight"}, device=torch.device("cpu"))


@pytest.mark.parametrize("name", ["zaya"])
def test_what_a_class_writes_whatever_was_read_it_writes_here_too(tmp_path: Path, name: str) -> None:
    # Its router's last bias is set by hand in _init_weights, past the functions that heed marks.
    folder = build(name, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    model = from_pretrained(folder, budget=Budget(device=1 << 26, host=1 << 26), device="cpu")
    found = {key: value for key, value in model.state_dict().items() if key.endswith("balancing_biases")}
    assert found
    for key, value in found.items():
        assert torch.equal(value, plain[key])


def test_conversions_name_targets_and_are_remembered(tmp_path: Path) -> None:
    folder = Path(build("mixtral", tmp_path))
    model = on_meta(folder)
    state = model.state_dict(keep_vars=True)
    stored = {key for file in folder.glob("*.safetensors") for key in load_file(file)}
    conversions = Conversions(model)
    keys = conversions.in_order([*stored, "model.layers.10.x", "model.layers.9.x"])
    assert keys.index("model.layers.9.x") < keys.index("model.layers.10.x")
    targets = {key: conversions.target_of(key, state) for key in stored}
    assert {target for target, _ in targets.values()} <= set(state)
    experts = {pattern for target, pattern in targets.values() if "experts" in target}
    assert None not in experts
    assert all(conversions.converter(str(pattern)).operations for pattern in experts)
    assert targets["lm_head.weight"] == ("lm_head.weight", None)
    conversions.remember()
    assert isinstance(model._weight_conversions, list)
    assert "_weight_conversions" in core_model_loading.revert_weight_conversion.__code__.co_consts


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "qwen3_moe"])
def test_the_stored_layout_is_what_checkpoints_hold(architecture: str, tmp_path: Path) -> None:
    folder = Path(build(architecture, tmp_path))
    model = on_meta(folder)
    stored = {key: value.shape for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    found = stored_layout(model, model.state_dict(keep_vars=True))
    assert {name: tensor.shape for name, tensor in found.items()} == stored


def test_parameters_kept_in_fp32_are_those_of_a_loaded_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_meta(folder).to(torch.float16)
    monkeypatch.setattr(type(model), "_keep_in_fp32_modules_strict", {"input_layernorm"})
    model._keep_in_fp32_modules_strict = {"input_layernorm"}
    keep_in_fp32(model, torch.float16)
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.float16


def test_what_may_be_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_meta(folder)
    monkeypatch.setattr(model, "_keys_to_ignore_on_load_missing", [r"rotary.*inv_freq"], raising=True)
    assert may_be_missing(model, "model.rotary_emb.inv_freq")
    assert not may_be_missing(model, "lm_head.weight")


def test_a_trainer_leaves_the_placement_alone(folder: Path, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(folder)
    leave_placement_alone(model, torch.device("cpu"))
    moved: list[object] = []
    call_before_apply(model, lambda module, change: moved.append(change))
    Trainer(model=model, args=TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    assert not moved


def test_in_a_launched_process_a_model_is_on_one_device(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    leave_placement_alone(model, torch.device("cpu"), launched=True)
    assert model.hf_device_map == {"": torch.device("cpu")}
    assert not Accelerator.verify_device_map(None, model)  # type: ignore[arg-type]
    leave_placement_alone(model, torch.device("cpu"))
    assert Accelerator.verify_device_map(None, model)  # type: ignore[arg-type]


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to("meta"), lambda m: m.type(torch.float64)])
def test_every_change_of_a_whole_module_is_checked_first(cast: Any) -> None:
    model, seen = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))), []
    inner = model[1]
    call_before_apply(inner, lambda module, change: seen.append((module, change(torch.empty(0)))))
    cast(model)
    ((module, made),) = seen
    assert module is inner
    assert (made.dtype, made.device) == (inner[0].weight.dtype, inner[0].weight.device)
    assert made.dtype != torch.float32 or made.is_meta


def test_accelerate_still_saves_plain_models_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving.install_bounded_saving()
    saving.install_bounded_saving()
    monkeypatch.setattr(saving, "save_in_shards", None)
    model = nn.Linear(2, 2)
    Accelerator(cpu=True).save_model(model, tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["weight"], model.weight)


def test_peft_still_saves_adapters_of_plain_models_itself(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving.install_saving_of_adapters()
    saving.install_saving_of_adapters()
    monkeypatch.setattr(saving, "replacing_checkpoint", None)
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2)).save_pretrained(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_another_save_model_of_accelerate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "save_model", lambda self, model, folder: None)
    with pytest.raises(UnsupportedError, match=r"accelerate \d.*save_model"):
        saving.install_bounded_saving()
