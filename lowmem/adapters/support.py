"""Which PEFT adapters can be trained exactly on a streamed model; the rest is refused by name.

The rule behind each decision: base weights are read from the checkpoint at every visit and never written back, a block
runs once without and once with a graph (the second time outside of the model's forward), and a batch passes it in
micro-batches. What changes base weights, what reaches a block by hooks that live only during the forward, and what
depends on which sequences are computed together cannot be exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from lowmem.errors import UnsupportedError
from lowmem.internals.peft import ask_first, those_that_apply_adapters
from lowmem.internals.torch import modules_in, parameter_table
from lowmem.models.absent import AbsentParameter

if TYPE_CHECKING:
    from peft import PeftConfig


def words(text: str) -> frozenset[str]:
    """The words of a text: a list of names that reads as one."""
    return frozenset(text.split())


# Types whose adapters act on single layers (or on the input embeddings) and never write to them. Each is compared with
# a resident model in the tests.
_EXACT_TYPES = words(
    """LORA ADALORA BEFT BOFT C3A DEFT DELORA FOURIERFT GLORA GRALORA HIRA HRA IA3 LILY LN_TUNING LOHA LOKR MISS OFT
    P_TUNING PEANUT PROMPT_TUNING PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA
    VERA WAVEFT"""
)

_LORA = "LoraConfig, with use_dora or use_rslora if wanted"


@dataclass(frozen=True, kw_only=True)
class _Refusal:
    reason: str
    instead: str


_CHANGES_BASE = "it replaces the base weights by what is left of them, and streamed base weights are never written"
_LOST_HOOKS = "it reaches the layers through hooks that are gone when backward computes a block again"
_PREFIX = "it puts trained keys and values before the sequence, whose gradient would be lost between blocks"

_REFUSED_TYPES: Mapping[str, _Refusal] = {
    "PREFIX_TUNING": _Refusal(reason=_PREFIX, instead=f"PromptTuningConfig, or {_LORA}"),
    "CARTRIDGE": _Refusal(reason=_PREFIX, instead=f"PromptTuningConfig, or {_LORA}"),
    "OSF": _Refusal(reason="it keeps the decomposition of every base weight in memory", instead=_LORA),
    "FROD": _Refusal(reason="it keeps a decomposition of all base weights in memory", instead=_LORA),
    "XLORA": _Refusal(reason="it runs the model twice and " + _LOST_HOOKS[3:], instead=_LORA),
    "POLY": _Refusal(reason=_LOST_HOOKS, instead=_LORA),
}

# Every value of these is exact.
_FREE_LORA_FIELDS = words(
    """peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules
    exclude_modules lora_alpha lora_dropout fan_in_fan_out use_rslora modules_to_save layers_to_transform layers_pattern
    rank_pattern alpha_pattern megatron_core trainable_token_indices eva_config corda_config lora_ga_config loftq_config
    qalora_group_size use_dora lora_bias target_parameters use_bdlora ensure_weight_tying"""
)

# These must keep their default.
_REFUSED_LORA_FIELDS: Mapping[str, _Refusal] = {
    "bias": _Refusal(
        reason="it trains the base model's biases, which are read from the checkpoint at each visit",
        instead="bias='none', or lora_bias=True for a trained bias in the adapter",
    ),
    "velora_config": _Refusal(
        reason="its compressed backward depends on which sequences are computed together, and saves nothing here: "
        "activations are recomputed",
        instead="plain LoRA",
    ),
    "alora_invocation_tokens": _Refusal(reason=_LOST_HOOKS, instead="plain LoRA"),
    "use_qalora": _Refusal(reason="PEFT has it for GPTQ layers only and ignores it elsewhere", instead="plain LoRA"),
    "monteclora_config": _Refusal(
        reason="its sampler keeps a state that computing a block again would advance twice", instead="plain LoRA"
    ),
    "layer_replication": _Refusal(
        reason="it changes the list of blocks that the checkpoint was planned for",
        instead="a checkpoint that holds the replicated layers",
    ),
    "arrow_config": _Refusal(
        reason="it routes between adapters that are trained already", instead="plain LoRA, one adapter at a time"
    ),
    "kasa_config": _Refusal(reason=_CHANGES_BASE, instead="plain LoRA, or use_dora=True"),
    "megatron_config": _Refusal(reason="it is for Megatron's parallel layers", instead="leave it out"),
}

# Initialisations that take the adapter's first value away from the base weights.
CHANGED_BASE_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_EXACT_INITS = frozenset({"gaussian", "orthogonal", "eva", "mica"})

_INIT_INSTEAD = (
    "init_lora_weights=True, 'orthogonal', 'eva' or 'mica', which leave the base weights alone; or start from a "
    "checkpoint of the residual base weights and an adapter saved as plain LoRA"
)


def check_peft_config(config: PeftConfig) -> None:
    """Refuse an adapter configuration that cannot be trained exactly on a streamed model.

    Reads only the configuration. Call it before anything loads where the configuration is known by then.

    Args:
        config: Any PEFT configuration.

    Raises:
        UnsupportedError: Names the option, the reason and what to use instead.
    """
    name = str(getattr(config.peft_type, "value", config.peft_type))
    if name not in _EXACT_TYPES:
        refusal = _REFUSED_TYPES.get(
            name, _Refusal(reason="it has not been shown to be exact on streamed blocks", instead=_LORA)
        )
        raise UnsupportedError(f"{type(config).__name__} ({name})", reason=refusal.reason, instead=refusal.instead)
    # AdaLoraConfig and others derive from LoraConfig; its options mean the same there.
    if hasattr(config, "init_lora_weights") and hasattr(config, "lora_alpha"):
        _check_lora(config)
    elif getattr(config, "bias", "none") != "none":
        _refuse("bias", config.bias, _REFUSED_LORA_FIELDS["bias"])


def refuse_before_changes() -> None:
    """Make PEFT refuse what cannot be done to a streamed model before it changes anything of it."""
    ask_first(adding=_check_added, merging=_refuse_merging)


def _check_added(model: nn.Module, config: PeftConfig) -> None:
    if _has_absent_weights(modules_in(model)):
        check_peft_config(config)


def _refuse_merging(model: nn.Module) -> None:
    if _has_absent_weights(modules_in(model)):
        raise UnsupportedError(
            "merging an adapter into a streamed model (merge_and_unload, merge_adapter)",
            reason="its base weights are read from the checkpoint at each visit and never written",
            instead="save_pretrained(folder) or trainer.save_model(folder), then lowmem.merge(model, adapter=folder, "
            "output=...)",
        )


def check_peft_model(model: nn.Module) -> None:
    """Refuse what was done to a streamed model with PEFT that cannot be trained exactly.

    Cheap enough for the start of every forward. Looks at every adapter's configuration, at the modules that hold
    copies, and at base weights that were replaced behind the checkpoint's back. Does nothing without PEFT.

    Args:
        model: The streamed model, or whatever wraps it.

    Raises:
        UnsupportedError: Names the option or module, the reason and what to use instead.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        return
    for config in configs.values():
        check_peft_config(config)
    _check_modules(model)


def _check_lora(config: PeftConfig) -> None:
    init = config.init_lora_weights
    if not isinstance(init, bool) and str(init).lower() not in _EXACT_INITS:
        unknown = "this version of lowmem does not know the initialisation"
        reason = _CHANGES_BASE if str(init).startswith(CHANGED_BASE_INITS) else unknown
        _refuse("init_lora_weights", init, _Refusal(reason=reason, instead=_INIT_INSTEAD))
    if getattr(getattr(config, "runtime_config", None), "ephemeral_gpu_offload", False):
        reason = "adapters are on the compute device already, and so is every weight while it is used"
        _refuse("runtime_config.ephemeral_gpu_offload", True, _Refusal(reason=reason, instead="leave it out"))
    known = _FREE_LORA_FIELDS | {"init_lora_weights", "runtime_config"} | _own_fields(config)
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in known or not value or value == _default(field):
            continue
        new = _Refusal(reason="this version of lowmem does not know the option", instead="leave it out")
        _refuse(field.name, value, _REFUSED_LORA_FIELDS.get(field.name, new))


def _own_fields(config: PeftConfig) -> frozenset[str]:
    """Options that a configuration adds to LoraConfig: they belong to a type that was allowed as a whole."""
    from peft import LoraConfig

    lora = {field.name for field in fields(LoraConfig)}
    return frozenset() if type(config) is LoraConfig else frozenset(f.name for f in fields(config)) - lora


def _default(field: Field[object]) -> object:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def _refuse(option: str, value: object, refusal: _Refusal) -> None:
    raise UnsupportedError(f"{option}={value!r}", reason=refusal.reason, instead=refusal.instead)


def _check_modules(model: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper
    from transformers.modeling_layers import GradientCheckpointingLayer

    modules = modules_in(model)
    # Each class is asked about once: a large model has tens of thousands of modules of a dozen.
    kinds = set(map(type, modules))
    wrappers = {kind for kind in kinds if issubclass(kind, AuxiliaryTrainingWrapper)}
    blocks = {kind for kind in kinds if issubclass(kind, GradientCheckpointingLayer)} - wrappers
    for module in modules:
        if type(module) in wrappers:
            inside = next((m for m in modules_in(module) if isinstance(m, GradientCheckpointingLayer)), None)
            if inside is not None:
                what = f"{_path(model, module)} is a whole decoder block ({type(inside).__name__})"
                reason = f"{what}, whose copy would not be streamed"
                instead = "name modules inside the blocks (for example 'mlp'), or train with tuning='full'"
                raise UnsupportedError("modules_to_save", reason=reason, instead=instead)
        elif type(module) in blocks:
            inner = modules_in(module)
            for layer in those_that_apply_adapters(inner) if _has_absent_weights(inner) else ():
                if isinstance(layer, BaseTunerLayer):
                    _check_base_weights(partial(_path, model, layer), layer.get_base_layer())


def _path(model: nn.Module, sought: nn.Module) -> str:
    paths: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return paths[sought]


def _has_absent_weights(modules: Iterable[nn.Module]) -> bool:
    own = (parameter_table(module).values() for module in modules)
    return any(isinstance(param, AbsentParameter) for params in own for param in params)


def _check_base_weights(path: Callable[[], str], base_layer: nn.Module) -> None:
    for attribute, param in parameter_table(base_layer).items():
        if param is not None and not isinstance(param, AbsentParameter):
            raise UnsupportedError(
                f"a new value for {path()}.{attribute}",
                reason=_CHANGES_BASE,
                instead="an adapter type or initialisation that leaves the base weights alone",
            )
