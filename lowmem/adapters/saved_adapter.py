"""A saved PEFT adapter, read by PEFT itself into a model without weights, as updates of the model's parameters.

PEFT decides what the file's keys mean (its conversions between versions, patterns of ranks, tied adapters); here its
files are checked first, and then its layers are asked for their factors. Imports PEFT: import this module where it is
used.
"""

from __future__ import annotations

import math
import re
import stat
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import Embedding, Linear, LoraLayer, ParamWrapper
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant, MiCAEmbeddingVariant, MiCALinearVariant
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from lowmem.adapters.support import CHANGED_BASE_INITS, words
from lowmem.adapters.updates import LowRank, Replacement, RowReplacement, Update
from lowmem.errors import UnsupportedError, some_of
from lowmem.models.absent import AbsentParameter
from offload import SafetensorsSource, SourceError, TensorReader, read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_ADAPTER = "default"
_TILED_TYPES = frozenset({"LORA", "LN_TUNING", "TRAINABLE_TOKENS"})

# PEFT's own merge of one whole layer is used for these. Each is compared with merge_and_unload in the tests.
_WHOLE_LAYER_TYPES = words(
    """ADALORA BOFT C3A DEFT DELORA FOURIERFT GLORA GRALORA HIRA HRA IA3 LOHA LOKR MISS OFT PEANUT PVERA RANDLORA ROAD
    SHIRA SUPERTUNING UNILORA VBLORA VERA WAVEFT"""
)

_RESIDENT = "PEFT's merge_and_unload on a model that is in memory"
_CONFIG_NAME, _WEIGHTS_NAME, _PICKLE_NAME = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_MAX_CONFIG_BYTES = 16 << 20
_PART_ELEMENTS = 1 << 20

# Words in the names of numbers that are no sizes, and a size that no adapter's file needs to vouch for.
_NO_SIZES = ("seed", "prng", "step", "tinit", "tfinal", "alpha")
_ANY_SIZE = 1 << 16
_SAVE_AGAIN = "save the adapter again, or download it again"

# What PEFT raises for values of a configuration that it did not expect, and for tensors that do not fit.
_RAW_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    re.error,
)


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """An adapter's configuration and tensors, checked, before any model is there."""

    folder: Path
    """Where they lie."""
    config: PeftConfig
    """What PEFT makes of adapter_config.json."""
    tensors: Mapping[str, Tensor]
    """By stored name."""

    @property
    def kind(self) -> str:
        """PEFT's name of the type."""
        return _kind(self.config)


def _kind(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def read_files(folder: Path) -> AdapterFiles:
    """Read and check the files of an adapter.

    Args:
        folder: As PEFT's `save_pretrained` and the Trainer write it.

    Raises:
        FileNotFoundError: A file is missing.
        UnsupportedError: The adapter cannot be merged, or its weights are pickled.
        SourceError: A file is damaged; names file and field.
    """
    config = _read_config(folder / _CONFIG_NAME)
    _refuse(config)
    if not _is_regular(folder / _WEIGHTS_NAME):
        if _is_regular(folder / _PICKLE_NAME):
            raise UnsupportedError(
                f"{folder / _PICKLE_NAME}",
                reason="a pickle runs code when it is read",
                instead="adapter_model.safetensors, which PEFT's save_pretrained writes",
            )
        raise FileNotFoundError(f"{folder}: no {_WEIGHTS_NAME}; give the folder of a saved PEFT adapter")
    tensors = _read_tensors(folder / _WEIGHTS_NAME)
    _check_sizes(folder / _CONFIG_NAME, config, tensors)
    return AdapterFiles(folder=folder, config=config, tensors=tensors)


def _is_regular(file: Path) -> bool:
    """Whether a file can be read: one that is none, a pipe or a device, would be waited on for ever."""
    if not file.exists():
        return False
    if not stat.S_ISREG(file.stat().st_mode):
        raise SourceError(file, field="file", problem="not a regular file", remedy=_SAVE_AGAIN)
    return True


def _read_config(file: Path) -> PeftConfig:
    if not _is_regular(file):
        # A run that was interrupted has its adapter in its checkpoints alone.
        saved = sorted(file.parent.glob(f"checkpoint-*/{_CONFIG_NAME}"), key=lambda found: found.stat().st_mtime_ns)
        newest = f", such as {saved[-1].parent}" if saved else ""
        raise FileNotFoundError(f"{file.parent}: no {_CONFIG_NAME}; give the folder of a saved PEFT adapter{newest}")
    values = read_json_object(file, field="file", remedy=_SAVE_AGAIN, max_bytes=_MAX_CONFIG_BYTES)
    kind = values.text("peft_type")
    made = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if made is None:
        values.refuse("peft_type", f"{_short(kind)} is no adapter type that this PEFT knows")
    for name, hint in typing.get_type_hints(made).items():
        value = values.members.get(name)
        # PEFT annotates numbers as int that are None by default.
        if name in values.members and value != getattr(made, name, ...) and not _fits(value, hint):
            values.refuse(name, f"{_short(value)} is no value that {made.__name__} takes")
    try:
        return PeftConfig.from_pretrained(str(file.parent))
    except _RAW_ERRORS as error:
        problem = f"{made.__name__} cannot be made of it ({_first_line(error)})"
        raise SourceError(file, field="file", problem=problem, remedy=_SAVE_AGAIN) from error


def _fits(value: object, hint: object) -> bool:
    """Whether a value of a JSON file is of an annotated type, as loosely as PEFT takes it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is typing.Literal:
        # Not the values: PEFT's own lists of them have patterns ("pissa_niter_[number of iters]").
        return any(_fits(value, type(arg)) for arg in args)
    if origin in (list, set, tuple) or hint in (list, set, tuple):
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value if args)
    if origin is dict or hint is dict or is_dataclass(hint):
        return isinstance(value, dict) and all(_fits(item, args[1]) for item in value.values() if args)
    if hint in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return math.isfinite(value) and abs(value) < 2**63
    if hint in (str, bool, types.NoneType):
        return isinstance(value, hint)
    return True


def _check_sizes(file: Path, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
    """What a configuration makes PEFT allocate is in the file too; more would only take memory.

    A rank is a side of some tensor. Other numbers of types whose layers get values before the file is read are no
    larger than the file has values, but for seeds and steps.
    """
    num_values = sum(tensor.numel() for tensor in tensors.values())
    for name, value in () if _kind(config) in _TILED_TYPES else vars(config).items():
        is_size = type(value) is int and not any(word in name for word in _NO_SIZES)
        if is_size and value > max(num_values, _ANY_SIZE):
            problem = f"{value}, and {_WEIGHTS_NAME} has {num_values} values"
            raise SourceError(file, field=name, problem=problem, remedy=_SAVE_AGAIN)
    largest = max((side for tensor in tensors.values() for side in tensor.shape), default=0)
    ranks = {"r": getattr(config, "r", 0)} | (getattr(config, "rank_pattern", None) or {})
    for name, rank in ranks.items():
        if isinstance(rank, (int, float)) and not 0 <= rank <= largest:
            problem = f"rank {rank}, and no tensor of {_WEIGHTS_NAME} has a side of that size"
            raise SourceError(file, field=name, problem=problem, remedy=_SAVE_AGAIN)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    tensors = {}
    with closing(TensorReader()) as reader, SafetensorsSource([file]) as source:
        for name, spec in source.tensors.items():
            tensors[name] = values = torch.empty(spec.shape, dtype=spec.dtype)
            start_bytes = 0
            # In parts: an adapter may hold a whole embedding.
            for part in torch.split(values.view(-1), _PART_ELEMENTS):
                part.copy_(reader.read(spec, start_bytes, nbytes=part.nbytes))
                start_bytes += part.nbytes
                if part.is_floating_point() and not bool(part.float().isfinite().all()):
                    problem = "some of its values are not finite"
                    raise SourceError(file, field=name, problem=problem, remedy=_SAVE_AGAIN)
    return tensors


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch's list of problems has a title.
    line = lines[1] if len(lines) > 1 and lines[0].startswith("Error(s) in loading") else (lines or [""])[0]
    return f"{type(error).__name__}: {line[:300].rstrip('.')}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


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
        absent = dict(base.named_parameters(recurse=False))
        try:
            for name in absent:
                setattr(base, name, nn.Parameter(read(f"{self.prefix}.{name}"), requires_grad=False))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module=r"peft(\.|$)")
                self.layer.merge(adapter_names=[_ADAPTER])
            merged: Tensor = getattr(base, attribute).detach()
            return merged
        finally:
            for name, param in absent.items():
                setattr(base, name, param)
            self.layer.merged_adapters.clear()


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """What an adapter does to a model."""

    updates: Mapping[str, tuple[Update, ...]]
    """By the parameter's name in the model, in the order they apply."""
    whole_layers: Mapping[str, WholeLayer]
    """By the parameter's name in the model: those that PEFT merges."""


def read_adapter(model: PreTrainedModel, files: AdapterFiles) -> SavedAdapter:
    """Find out what an adapter does to a model.

    Args:
        model: The model on the meta device; its parameters become placeholders and PEFT's layers are put into it.
        files: The adapter.

    Raises:
        UnsupportedError: An adapter that cannot be merged into an ordinary checkpoint.
        ValueError: The adapter does not fit the model, or is incomplete.
    """
    _place(model)
    with warnings.catch_warnings():
        # Of tied embeddings, missing biases, unusual layers: what matters of it for a merge is checked here.
        warnings.filterwarnings("ignore", module=r"peft(\.|$)")
        files.config.inference_mode = True
        try:
            wrapped = PeftModel(
                model,
                files.config,
                adapter_name=_ADAPTER,
                autocast_adapter_dtype=False,
                # Other types make projections from a seed, which are not in the file and must have values.
                low_cpu_mem_usage=files.kind in _TILED_TYPES,
            )
        except UnsupportedError:
            raise
        except _RAW_ERRORS as error:
            raise ValueError(
                f"{files.folder / _CONFIG_NAME}: PEFT cannot put this adapter into the model ({_first_line(error)}); "
                "give the model it was trained on"
            ) from error
        _load(wrapped, files)
    missing = [name for name, param in wrapped.named_parameters() if param.is_meta]
    if missing:
        raise ValueError(f"{files.folder}: the adapter's file lacks {some_of(missing)}; save the adapter again")
    collected = _Collected()
    for name, module in _outermost(model):
        collected.take(name, module)
    collected.check_complete(wrapped, files.folder)
    return SavedAdapter(
        updates={name: tuple(updates) for name, updates in collected.updates.items()},
        whole_layers=collected.whole_layers,
    )


def _refuse(config: PeftConfig) -> None:
    kind = _kind(config)
    if kind not in _TILED_TYPES | _WHOLE_LAYER_TYPES:
        raise UnsupportedError(
            f"merging {type(config).__name__} ({kind})",
            reason="it has no merged form, or none that has been compared with PEFT's",
            instead=f"LoRA, or {_RESIDENT}",
        )
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.startswith(CHANGED_BASE_INITS):
        raise UnsupportedError(
            f"merging an adapter with init_lora_weights={init!r}",
            reason="it belongs to base weights from which its initial value was taken away",
            instead="the adapter as plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    for option in ("alora_invocation_tokens", "arrow_config", "layer_replication", "kasa_config"):
        if getattr(config, option, None):
            raise UnsupportedError(
                f"merging an adapter with {option}", reason="it has no form as changed weights", instead=_RESIDENT
            )


def _place(model: PreTrainedModel) -> None:
    """Make all parameters absent, tied where the model ties them.

    Each reads as NaN: values that PEFT computes from one and that the adapter's file does not replace are seen then.
    """
    placed: dict[int, AbsentParameter] = {}
    for name, param in list(model.named_parameters(remove_duplicate=False)):
        path, _, attribute = name.rpartition(".")
        if id(param) not in placed:
            placed[id(param)] = AbsentParameter.of(
                param.shape,
                dtype=torch.float32,
                device=torch.device("cpu"),
                key=name,
                load=partial(torch.full((), torch.nan).expand, param.shape),
            )
        setattr(model.get_submodule(path), attribute, placed[id(param)])


def _load(wrapped: PeftModel, files: AdapterFiles) -> None:
    try:
        result = set_peft_model_state_dict(wrapped, dict(files.tensors), _ADAPTER, low_cpu_mem_usage=True)
    except _RAW_ERRORS as error:
        raise ValueError(
            f"{files.folder}: the adapter does not fit the model ({_first_line(error)}); "
            "give the model it was trained on"
        ) from error
    unknown = [name for name in result.unexpected_keys if not _is_saved_twice(name, files.tensors)]
    if unknown:
        raise ValueError(
            f"{files.folder}: the model has no place for the adapter's {some_of(unknown)}; "
            "give the model it was trained on"
        )


def _is_saved_twice(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether PEFT saved a module of `modules_to_save` under two names, as it does once the vocabulary was resized."""
    other = name.replace(f".modules_to_save.{_ADAPTER}.", ".").replace(".modules_to_save.", ".")
    return other != name and other in tensors and name in tensors and torch.equal(tensors[name], tensors[other])


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by their name without PEFT's layers; does not descend into what an auxiliary wrapper holds."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(inside):
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
            self._consume(module)
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
            self._take_base(name, module)

    def _take_base(self, name: str, module: nn.Module) -> None:
        """Base weights that the adapter brought with it: resized embeddings, biases."""
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
                instead=_RESIDENT,
            )
        for attribute, value in module.state_dict(keep_vars=True).items():
            self._add(f"{name}.{attribute}", Replacement(_real(value, f"{name}.{attribute}")))
        self._consume(module)

    def _tokens(self, name: str, layer: TrainableTokensLayer) -> None:
        values = _real(layer.trainable_tokens_delta[_ADAPTER], f"{name}.trainable_tokens_delta")
        self._take_base(name, layer.get_base_layer())
        rows = torch.tensor(layer.token_indices[_ADAPTER], dtype=torch.long)
        self._add(f"{name}.weight", RowReplacement(rows, values))
        self._consume(layer, *(() if layer.tied_adapter is None else (layer.tied_adapter,)))

    def _lora(self, name: str, layer: LoraLayer) -> None:
        variant = layer.lora_variant.get(_ADAPTER)
        dora = isinstance(variant, (DoraLinearVariant, DoraEmbeddingVariant))
        if variant is not None and not dora and not isinstance(variant, (MiCALinearVariant, MiCAEmbeddingVariant)):
            self._whole(name, layer)
            return
        self._take_base(name, layer.get_base_layer())
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
        base_params = dict(layer.get_base_layer().named_parameters(recurse=False))
        reason = ""
        own = [value for value in (*layer.parameters(), *layer.buffers()) if not isinstance(value, AbsentParameter)]
        if any(bool(value.isnan().any()) for value in own):
            reason = "its file lacks values that were computed from the base weights"
        elif not all(isinstance(param, AbsentParameter) for param in base_params.values()):
            reason = "its file holds base weights, of resized embeddings"
        if reason:
            raise UnsupportedError(f"merging the adapter of {name}", reason=reason, instead=_RESIDENT)
        for attribute in base_params:
            self.whole_layers[f"{name}.{attribute}"] = WholeLayer(layer=layer, prefix=name)

    def _consume(self, *modules: nn.Module) -> None:
        for module in modules:
            self.known.update(id(param) for param in module.parameters())

    def check_complete(self, wrapped: PeftModel, folder: Path) -> None:
        params = dict(wrapped.named_parameters())
        left = [n for n, p in params.items() if not isinstance(p, AbsentParameter) and id(p) not in self.known]
        if left:
            raise UnsupportedError(
                f"merging an adapter with {some_of(left)}",
                reason="there is no rule for it",
                instead=_RESIDENT,
            )


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
