"""What the adapter check lets through, what it refuses and how, and that what it lets through is known to PEFT."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import (
    BOFTConfig,
    CPTConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    EvaConfig,
    KasaConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lowmem.adapters import support
from lowmem.adapters.support import check_peft_config, check_peft_model
from lowmem.errors import UnsupportedError
from lowmem.models.absent import AbsentParameter

CHANGES_BASE = "base weights"
HOOKS = "hooks"

REFUSED = {
    "init_lora_weights='pissa'": ({"init_lora_weights": "pissa"}, CHANGES_BASE),
    "init_lora_weights='pissa_niter_4'": ({"init_lora_weights": "pissa_niter_4"}, CHANGES_BASE),
    "init_lora_weights='olora'": ({"init_lora_weights": "olora"}, CHANGES_BASE),
    "init_lora_weights='lora_ga'": ({"init_lora_weights": "lora_ga"}, CHANGES_BASE),
    "init_lora_weights='fancy'": ({"init_lora_weights": "fancy"}, "does not know"),
    "bias='all'": ({"bias": "all"}, "biases"),
    "bias='lora_only'": ({"bias": "lora_only"}, "biases"),
    "velora_config": ({"velora_config": VeloraConfig()}, "computed together"),
    "monteclora_config": ({"monteclora_config": MontecloraConfig()}, "twice"),
    "kasa_config": ({"kasa_config": KasaConfig()}, CHANGES_BASE),
    "arrow_config": ({"arrow_config": ArrowConfig()}, "routes"),
    "alora_invocation_tokens=[3, 4]": ({"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"}, HOOKS),
    "use_qalora=True": ({"use_qalora": True}, "GPTQ"),
    "layer_replication": ({"layer_replication": [(0, 2), (1, 3)]}, "list of blocks"),
    "megatron_config": ({"megatron_config": {"hidden_size": 8}}, "Megatron"),
    "runtime_config.ephemeral_gpu_offload=True": (
        {"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)},
        "compute device already",
    ),
}

ALLOWED: dict[str, dict[str, object]] = {
    "defaults": {},
    "rank and patterns": {"r": 3, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}, "lora_alpha": 7},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "rslora, dropout, bias": {"use_rslora": True, "lora_dropout": 0.1, "lora_bias": True},
    "dora": {"use_dora": True, "exclude_modules": ["k_proj"]},
    "init False": {"init_lora_weights": False},
    "init gaussian": {"init_lora_weights": "gaussian"},
    "init orthogonal": {"init_lora_weights": "orthogonal"},
    "init mica": {"init_lora_weights": "mica"},
    "init eva": {"init_lora_weights": "eva", "eva_config": EvaConfig()},
    "modules_to_save": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [1, 2]},
    "experts": {"target_parameters": ["experts.down_proj"], "target_modules": ["q_proj"]},
    "block diagonal": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"])},
}


@pytest.mark.parametrize("option", REFUSED)
def test_option_that_cannot_be_exact_is_refused_by_name_with_reason_and_replacement(option: str) -> None:
    arguments, reason = REFUSED[option]
    with pytest.raises(UnsupportedError, match=reason) as refusal:
        check_peft_config(LoraConfig(**arguments))
    assert str(refusal.value).startswith(option)
    assert refusal.value.instead


def test_loftq_and_corda_are_refused_without_their_packages() -> None:
    # PEFT's own constructor wants scipy for LoftQ; a configuration read from a file arrives without it.
    for init in ("loftq", "corda"):
        config = LoraConfig()
        config.init_lora_weights = init
        with pytest.raises(UnsupportedError, match=f"init_lora_weights='{init}'.*{CHANGES_BASE}"):
            check_peft_config(config)


@pytest.mark.parametrize("name", ALLOWED)
def test_exact_option_passes(name: str) -> None:
    check_peft_config(LoraConfig(**ALLOWED[name]))


def test_every_option_of_loraconfig_is_decided() -> None:
    decided = support._FREE_LORA_FIELDS | set(support._REFUSED_LORA_FIELDS) | {"init_lora_weights", "runtime_config"}
    assert decided == {field.name for field in dataclasses.fields(LoraConfig)}


def test_option_that_a_newer_peft_adds_is_refused_when_used() -> None:
    newer = dataclasses.make_dataclass("LoraConfig", [("brand_new", bool, False)], bases=(LoraConfig,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft.LoraConfig", newer)
        check_peft_config(newer())
        with pytest.raises(UnsupportedError, match=r"brand_new=True.*does not know"):
            check_peft_config(newer(brand_new=True))


@pytest.mark.parametrize("peft_type", [str(peft_type.value) for peft_type in PeftType])
def test_every_type_of_peft_is_allowed_or_refused_by_name(peft_type: str) -> None:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type].__new__(PEFT_TYPE_TO_CONFIG_MAPPING[peft_type])
    config.peft_type = PeftType(peft_type)
    if peft_type in support._EXACT_TYPES:
        return
    with pytest.raises(UnsupportedError, match=f"\\({peft_type}\\) is not supported"):
        check_peft_config(config)


def test_lists_name_only_types_that_peft_has() -> None:
    known = {peft_type.value for peft_type in PeftType}
    assert known >= support._EXACT_TYPES
    assert known >= set(support._REFUSED_TYPES)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        LoHaConfig(target_modules=["k_proj"]),
        PromptTuningConfig(num_virtual_tokens=3),
        PEFT_TYPE_TO_CONFIG_MAPPING["ADALORA"](total_step=10, target_modules=["k_proj"]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_types_that_are_exact_pass(config: PeftConfig) -> None:
    check_peft_config(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PrefixTuningConfig(num_virtual_tokens=3), "PrefixTuningConfig.*gradient would be lost.*PromptTuningConfig"),
        (CPTConfig(cpt_token_ids=[1], cpt_mask=[1], cpt_tokens_type_mask=[1], task_type="CAUSAL_LM"), "not been shown"),
        (BOFTConfig(bias="all"), "bias='all'.*biases"),
    ],
    ids=["prefix", "cpt", "boft"],
)
def test_other_types_that_are_not_exact_are_refused(config: PeftConfig, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        check_peft_config(config)


class Block(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8, bias=False)
        self.mlp = nn.Linear(8, 8, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.mlp(self.q_proj(hidden))
        return out


class Streamed(nn.Module):
    """Two decoder blocks whose weights are absent."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                values = module.weight.detach()
                module._parameters["weight"] = AbsentParameter.of(
                    values.shape, dtype=values.dtype, device=values.device, key=f"{name}.weight", load=values.clone
                )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_model_without_adapters_passes() -> None:
    check_peft_model(Streamed())


def test_model_with_exact_adapters_passes_bare_and_wrapped() -> None:
    model = Streamed()
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"], use_dora=True))
    check_peft_model(wrapped)
    check_peft_model(model)


def test_adapter_added_later_is_refused() -> None:
    model = Streamed()
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))

    def add() -> None:
        # Refused here by PEFT itself, once a streamed model has been loaded in this process.
        second = LoraConfig(target_modules=["q_proj"], velora_config=VeloraConfig(num_groups=4))
        wrapped.add_adapter("second", second)
        check_peft_model(model)

    with pytest.raises(UnsupportedError, match="velora_config"):
        add()


def test_copy_of_a_whole_block_is_refused() -> None:
    wrapped = get_peft_model(Streamed(), LoraConfig(target_modules=["layers.0.q_proj"], modules_to_save=["layers.1"]))
    with pytest.raises(UnsupportedError, match=r"modules_to_save is not supported: .*layers\.1 is a whole decoder"):
        check_peft_model(wrapped)


def test_replaced_base_weight_is_refused() -> None:
    wrapped = get_peft_model(Streamed(), LoraConfig(target_modules=["q_proj"]))
    layer = wrapped.get_base_model().layers[1].q_proj.get_base_layer()
    layer.weight = nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(UnsupportedError, match=r"layers\.1\.q_proj\.weight is not supported: it replaces the base"):
        check_peft_model(wrapped)
