"""A saved PEFT adapter, read by PEFT itself into a model without weights, as updates of the model's parameters.

PEFT decides what the file's keys mean (its conversions between versions, patterns of ranks, tied adapters); here its
layers are asked for their factors. Imports PEFT: import this module where it is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import Embedding, Linear, LoraLayer, ParamWrapper
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant, MiCAEmbeddingVariant, MiCALinearVariant
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from lowmem.adapters.updates import LowRank, Replacement, RowReplacement, Update
from lowmem.errors import UnsupportedError
from lowmem.internals.torch import parameter_table
from lowmem.models.absent import AbsentParameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ADAPTER = "default"


_TILED_TYPES = frozenset({"LORA", "LN_TUNING", "TRAINABLE_TOKENS"})


# PEFT's own merge of one whole layer is used for these. Each is compared with merge_and_unload in the tests.
_WHOLE_LAYER_TYPES = _words(
    """ADALORA BOFT C3A DEFT DELORA FOURIERFT GLORA GRALORA HIRA HRA IA3 LOHA LOKR MISS OFT PEANUT PVERA RANDLORA ROAD
    SHIRA SUPERTUNING UNILORA VBLORA VERA WAVEFT"""
)


_RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class WholeLayer:
    """One layer of an adapter type that PEFT merges for us: needs all of the layer's parameters at once."""

    layer: BaseTunerLayer
    """PEFT's layer, with the adapter's values in it."""
    prefix: str
    """The layer's name in the model."""

    def merged(self, attribute: str, read: Callable[[str], Tensor]) -> Tensor:
        """Merge one of the layer's parameters.

        Args:
            attribute: Which one, "weight" or "bias".
            read: Reads a whole parameter by its name in the model, in the dtype to compute in.
        """
        base = self.layer.get_base_layer()
        absent = {name: param for name, param in parameter_table(base).items() if param is not None}
        try:
            for name in absent:
                parameter_table(base)[name] = nn.Parameter(read(f"{self.prefix}.{name}"), requires_grad=False)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module=r"peft(\.|$)")
                self.layer.merge(adapter_names=[_ADAPTER])
            merged: Tensor = parameter_table(base)[attribute].detach()
            return merged
        finally:
            parameter_table(base).update(absent)
            self.layer.merged_adapters.clear()


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """What an adapter does to a model."""

    updates: Mapping[str, tuple[Update, ...]]
    """By the parameter's name in the model, in the order they apply."""
    whole_layers: Mapping[str, WholeLayer]
    """By the parameter's name in the model: those that PEFT merges."""


def read_adapter(model: PreTrainedModel, folder: Path) -> SavedAdapter:
    """Read an adapter.

    Args:
        model: The model on the meta device; its parameters become placeholders and PEFT's layers are put into it.
        folder: The adapter's folder.

    Raises:
        UnsupportedError: An adapter that cannot be merged into an ordinary checkpoint.
        ValueError: The adapter does not fit the model, or is incomplete.
    """
    config = PeftConfig.from_pretrained(str(folder))
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    _refuse(config, kind)
    _place(model)
    with warnings.catch_warnings():
        # Of tied embeddings, missing biases, unusual layers: what matters of it for a merge is checked here.
        warnings.filterwarnings("ignore", module=r"peft(\.|$)")
        config.inference_mode = True
        wrapped = PeftModel(
            model,
            config,
            adapter_name=_ADAPTER,
            autocast_adapter_dtype=False,
            # Other types make projections from a seed, which are not in the file and must have values.
            low_cpu_mem_usage=kind in _TILED_TYPES,
        )
        _load(wrapped, folder)
    collected = _Collected()
    for name, module in _outermost(model):
        collected.take(name, module)
    collected.check_complete(wrapped, folder)
    return SavedAdapter(
        updates={name: tuple(updates) for name, updates in collected.updates.items()},
        whole_layers=collected.whole_layers,
    )


def _refuse(config: PeftConfig, kind: str) -> None:
    resident = "PEFT's merge_and_unload on a model that is in memory"
    if kind not in _TILED_TYPES | _WHOLE_LAYER_TYPES:
        raise UnsupportedError(
            f"merging {type(config).__name__} ({kind})",
            reason="it has no merged form, or none that has been compared with PEFT's",
            instead=f"LoRA, or {resident}",
        )
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.startswith(_RESIDUAL_INITS):
        raise UnsupportedError(
            f"merging an adapter with init_lora_weights={init!r}",
            reason="it belongs to base weights from which its initial value was taken away",
            instead="the adapter as plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    for option in ("alora_invocation_tokens", "arrow_config", "layer_replication", "kasa_config"):
        if getattr(config, option, None):
            raise UnsupportedError(
                f"merging an adapter with {option}", reason="it has no form as changed weights", instead=resident
            )


def _place(model: PreTrainedModel) -> None:
    """Make all parameters absent, tied where the model ties them.

    Each reads as NaN: values that PEFT computes from one and that the adapter's file does not replace are seen then.
    """
    params = list(model.named_parameters(remove_duplicate=False))
    placed: dict[int, AbsentParameter] = {}
    for name, param in params:
        path, _, attribute = name.rpartition(".")
        if id(param) not in placed:
            placed[id(param)] = AbsentParameter.of(
                param.shape,
                dtype=torch.float32,
                device=torch.device("cpu"),
                key=name,
                load=partial(torch.full((), torch.nan).expand, param.shape),
            )
        parameter_table(model.get_submodule(path))[attribute] = placed[id(param)]


def _load(wrapped: PeftModel, folder: Path) -> None:
    weights = load_peft_weights(str(folder), device="cpu")
    try:
        result = set_peft_model_state_dict(wrapped, weights, _ADAPTER, low_cpu_mem_usage=True)
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"{folder}: the adapter does not fit the model: {error}; give the model it was trained on (if the "
            "vocabulary was resized, a checkpoint of the resized model)"
        ) from error
    if result.unexpected_keys:
        raise ValueError(
            f"{folder}: the model has no place for the adapter's {_shown(result.unexpected_keys)}; "
            "give the model it was trained on"
        )


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by their name without PEFT's layers; does not descend into what an auxiliary wrapper holds."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(inside) if inside else False:
            continue
        if isinstance(module, (AuxiliaryTrainingWrapper, TrainableTokensLayer, LNTuningLayer)):
            inside = (*inside, f"{path}.")
        yield ".".join(part for part in path.split(".") if part != "base_layer"), module


@dataclass(kw_only=True)
class _Collected:
    known: set[int] = field(default_factory=set)
    """Ids of the parameters that an update was made of; their modules keep them alive."""
    updates: dict[str, list[Update]] = field(default_factory=dict)
    whole_layers: dict[str, WholeLayer] = field(default_factory=dict)

    def take(self, name: str, module: nn.Module) -> None:
        if isinstance(module, ModulesToSaveWrapper):
            self._copy(name, module.modules_to_save[_ADAPTER])
        elif isinstance(module, TrainableTokensWrapper):
            self._tokens(name, module.token_adapter)
        elif isinstance(module, TrainableTokensLayer):
            self._tokens(name, module)
        elif isinstance(module, LNTuningLayer):
            self._copy(name, module.ln_tuning_layers[_ADAPTER])
        elif isinstance(module, LoraLayer) and type(module) in (Linear, Embedding, ParamWrapper):
            self._lora(name, module)
        elif isinstance(module, BaseTunerLayer):
            self._whole(name, module)
        else:
            # Base weights that the adapter brought with it: resized embeddings, biases.
            for attribute, param in module.named_parameters(recurse=False):
                if not isinstance(param, AbsentParameter) and id(param) not in self.known:
                    self._add(f"{name}.{attribute}", Replacement(_real(param, f"{name}.{attribute}")))
                    self.known.add(id(param))

    def _add(self, name: str, update: Update) -> None:
        # A replaced base weight comes first: an adapter on top of it adds to the new value.
        updates = self.updates.setdefault(name, [])
        updates.insert(0, update) if isinstance(update, Replacement) else updates.append(update)

    def _copy(self, name: str, module: nn.Module) -> None:
        if any(isinstance(inner, BaseTunerLayer) for inner in module.modules()):
            raise UnsupportedError(
                f"merging modules_to_save with {name}",
                reason="it holds layers that are adapted as well",
                instead="PEFT's merge_and_unload on a model that is in memory",
            )
        for attribute, value in module.state_dict(keep_vars=True).items():
            self._add(f"{name}.{attribute}", Replacement(_real(value, f"{name}.{attribute}")))
        self._consume(module)

    def _tokens(self, name: str, layer: TrainableTokensLayer) -> None:
        values = _real(layer.trainable_tokens_delta[_ADAPTER], f"{name}.trainable_tokens_delta")
        rows = torch.tensor(layer.token_indices[_ADAPTER], dtype=torch.long)
        self._add(f"{name}.weight", RowReplacement(rows, values))
        self._consume(layer, *(() if layer.tied_adapter is None else (layer.tied_adapter,)))

    def _lora(self, name: str, layer: LoraLayer) -> None:
        variant = layer.lora_variant.get(_ADAPTER)
        dora = isinstance(variant, (DoraLinearVariant, DoraEmbeddingVariant))
        if variant is not None and not dora and not isinstance(variant, (MiCALinearVariant, MiCAEmbeddingVariant)):
            self._whole(name, layer)
            return
        self._consume(layer)
        if _ADAPTER not in layer.scaling:
            return
        if isinstance(layer, ParamWrapper):
            self._add(f"{name}.{layer.parameter_name}", _expert_update(layer, name))
            return
        self._add(f"{name}.weight", _layer_update(layer, name, dora=dora))
        if layer.lora_bias[_ADAPTER]:
            self._add(f"{name}.bias", self._bias_update(layer, name))

    def _bias_update(self, layer: LoraLayer, name: str) -> LowRank:
        if getattr(layer.get_base_layer(), "bias", None) is None:
            raise UnsupportedError(
                f"merging lora_bias=True into {name}",
                reason="the layer has no bias to add it to",
                instead="the adapter without merging",
            )
        bias = _real(layer.lora_B[_ADAPTER].bias, f"{name}.lora_B.bias").reshape(1, -1, 1)
        return LowRank(bias, torch.ones(1, 1, 1), scaling=layer.scaling[_ADAPTER])

    def _whole(self, name: str, layer: BaseTunerLayer) -> None:
        self._consume(layer)
        if any(bool(value.isnan().any()) for value in (*_adapter_params(layer), *layer.buffers())):
            raise UnsupportedError(
                f"merging the adapter of {name}",
                reason="its file lacks values that were computed from the base weights",
                instead="PEFT's merge_and_unload on a model that is in memory",
            )
        base = layer.get_base_layer()
        for attribute, _ in base.named_parameters(recurse=False):
            self.whole_layers[f"{name}.{attribute}"] = WholeLayer(layer=layer, prefix=name)

    def _consume(self, *modules: nn.Module) -> None:
        for module in modules:
            self.known.update(id(param) for param in module.parameters())

    def check_complete(self, wrapped: PeftModel, folder: Path) -> None:
        params = dict(wrapped.named_parameters())
        missing = [name for name, param in params.items() if param.is_meta]
        if missing:
            raise ValueError(f"{folder}: the adapter's file lacks {_shown(missing)}; save the adapter again")
        left = [n for n, p in params.items() if not isinstance(p, AbsentParameter) and id(p) not in self.known]
        if left:
            raise UnsupportedError(
                f"merging an adapter with {_shown(left)}",
                reason="there is no rule for it",
                instead="PEFT's merge_and_unload on a model that is in memory",
            )


def _adapter_params(layer: nn.Module) -> Iterator[Tensor]:
    return (param for param in layer.parameters() if not isinstance(param, AbsentParameter))


def _layer_update(layer: LoraLayer, name: str, *, dora: bool) -> LowRank:
    embedding = isinstance(layer, Embedding)
    if embedding:
        lora_A, lora_B = layer.lora_embedding_A[_ADAPTER], layer.lora_embedding_B[_ADAPTER]
    else:
        lora_A, lora_B = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    lora_A, lora_B = _real(lora_A, f"{name}.lora_A"), _real(lora_B, f"{name}.lora_B")
    # Embeddings and Conv1D store W transposed: rows are inputs, and DoRA's outputs are columns.
    transposed = embedding or layer.fan_in_fan_out
    left, right = (lora_A.T, lora_B.T) if transposed else (lora_B, lora_A)
    magnitude = None
    if dora:
        magnitude = _real(layer.lora_magnitude_vector[_ADAPTER].weight, f"{name}.lora_magnitude_vector")
    return LowRank(
        _precise(left).unsqueeze(0),
        _precise(right).unsqueeze(0),
        scaling=layer.scaling[_ADAPTER],
        row_magnitude=None if transposed else magnitude,
        column_magnitude=magnitude if transposed else None,
    )


def _expert_update(layer: ParamWrapper, name: str) -> LowRank:
    lora_A = _real(layer.lora_A[_ADAPTER].weight, f"{name}.lora_A")
    lora_B = _real(layer.lora_B[_ADAPTER].weight, f"{name}.lora_B")
    if layer.num_experts == 1:
        return LowRank(_precise(lora_B).unsqueeze(0), _precise(lora_A).unsqueeze(0), scaling=layer.scaling[_ADAPTER])
    left, right, scaling = layer.get_delta_factors(_ADAPTER)
    return LowRank(_precise(left.detach()), _precise(right.detach()), scaling=scaling)


def _precise(factor: Tensor) -> Tensor:
    """A factor in fp32 at least: a half precision product would be rounded before it is added."""
    return factor.float() if factor.dtype.itemsize < 4 else factor


def _real(value: Tensor, name: str) -> Tensor:
    if value.is_meta:
        raise ValueError(f"the adapter's file lacks {name}; save the adapter again")
    return value.detach()


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


__all__ = ["SavedAdapter", "WholeLayer", "read_adapter"]
