"""The JSON files beside a checkpoint's weights, checked before anything is built from what they say.

Sizes are bounded before a class sees them: a model is built module by module, so that a damaged number of layers would
take hours, and what a class makes of an odd value is an error of its own insides. Here each is one sentence that names
file and field.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from lowmem.errors import UnsupportedError
from offload import OffloadError, SourceError, TensorSpec, read_json_object

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_CONFIG, _GENERATION = "config.json", "generation_config.json"
_AGAIN = "download the file again"

QUANTIZATION = "quantization_config"
"""The field of config.json that says how weights are packed."""

_MOST_BYTES = 64 << 20
"""The largest file; that of 200,000 labels has 10 MB."""

_MOST_MODULES = 100_000
"""Bounds what is counted out in Python objects before the weights can be looked at."""

_COUNTED_OUT = re.compile(r"(?:num|n)_(?:\w+_)?(?:layers?|blocks|heads|experts|labels)")
_OBJECTS = re.compile(r"(?:\w+_config|id2label|label2id|auto_map|rope_scaling|rope_parameters|per_layer_config)")

_AT_LEAST_ONE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

_TOLD_BY = {"Padding_idx": "pad_token_id", "attn_implementation=": "attn_implementation"}
"""Words of torch and transformers about a value, and the field that it comes from."""


def read_config(
    folder: Path,
    *,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    allows_adapter: bool = False,
) -> PretrainedConfig:
    """A folder's model configuration.

    Args:
        folder: The checkpoint.
        attn_implementation: As in transformers; None for the class's own choice.
        trust_remote_code: As in transformers.
        allows_adapter: Read it although an adapter lies there too.

    Raises:
        FileNotFoundError: The folder has no config.json.
        SourceError: It is damaged, or a value in it cannot be; names the field.
        UnsupportedError: An adapter lies there, or this transformers does not know the architecture.
    """
    from transformers import AutoConfig

    file = folder / _CONFIG
    if not allows_adapter or not file.exists():
        _refuse_adapter(folder, has_model=file.exists())
    if not file.exists():
        names = models_in(folder)
        several = f"; it holds models: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" if names else ""
        raise FileNotFoundError(f"{folder}: no config.json; give the folder of a transformers checkpoint{several}")
    values = read_object(file)
    _check_values(file, values)
    _refuse_unknown(values, trust_remote_code=trust_remote_code)
    if attn_implementation is not None:
        _refuse_attention(attn_implementation)
    given = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with naming_field(file, values):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **given)
    text = config.get_text_config()
    for field in _AT_LEAST_ONE:
        _check_size(file, field, _size(text, field))
    return config


def take_quantization(config: PretrainedConfig) -> object | None:
    """Take what a configuration says about packed weights out of it: to PEFT and Trainer the model is an ordinary one.

    Returns:
        Its `quantization_config`; None where weights are stored plainly.
    """
    found = None
    for part in (config.get_text_config(), config):
        found = vars(part).pop(QUANTIZATION, None) or found
    return found


def check_generation_config(folder: Path) -> None:
    """Look at what a folder says about how its model generates, which is read when its weights are.

    Raises:
        SourceError: The file is damaged, or a value in it cannot be.
    """
    from transformers import GenerationConfig

    file = folder / _GENERATION
    if file.exists():
        with naming_field(file, read_object(file)):
            GenerationConfig.from_pretrained(folder)


def check_counts(config: PretrainedConfig, tensors: Mapping[str, TensorSpec], *, file: Path) -> None:
    """Compare how many modules a configuration asks for with what its files hold, before a module is made.

    Args:
        config: The configuration.
        tensors: The stored tensors by name.
        file: Where the configuration comes from, for errors.

    Raises:
        SourceError: There are too few tensors for so many blocks or experts.
    """
    text = config.get_text_config()
    num_layers = _size(text, "num_hidden_layers")
    if not isinstance(num_layers, int):
        return
    if num_layers > len(tensors):
        _refuse(
            file,
            "num_hidden_layers",
            f"{num_layers} decoder blocks, and the files hold {len(tensors)} tensors, so that no shard holds some",
            "download the missing shards, or use the config.json that belongs to these weights",
        )
    stacked = max((spec.shape[0] for spec in tensors.values() if len(spec.shape) > 2), default=0)
    for field in EXPERT_COUNTS:
        count = _size(text, field)
        # A fourth of the blocks at least has experts, each of three tensors or one of a stack.
        if isinstance(count, int) and count > stacked and count * num_layers > 4 * len(tensors):
            problem = f"{count} experts in {num_layers} blocks, and the files hold {len(tensors)} tensors"
            _refuse(file, field, problem, "use the config.json that belongs to these weights")


def _size(config: PretrainedConfig, field: str) -> object:
    """A field under its usual name; None where the class has none, or one that differs from block to block."""
    # Of a configuration whose blocks differ, transformers raises a RuntimeError where they do.
    with suppress(AttributeError, RuntimeError):
        return getattr(config, field)
    return None


@contextmanager
def naming_field(file: Path, values: Mapping[str, object]) -> Iterator[None]:
    """Turn what a class raises about values from a file into a sentence that names the file and, if it can, the field.

    Args:
        file: Where the values come from.
        values: What the class was given.

    Raises:
        SourceError: Whatever the class raised, but for our own refusals and a package that is not installed.
    """
    try:
        yield
    except (OffloadError, UnsupportedError, ImportError, MemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        if len(said) > 300:
            said = f"{said[:300]}..."
        problem = f"transformers cannot use it ({type(error).__name__}: {said})"
        raise SourceError(
            file, field=_field_of(error, values), problem=problem, remedy="put back the value that the model came with"
        ) from error


def _field_of(error: Exception, values: Mapping[str, object]) -> str:
    said = str(error)
    named = re.search(r"field '([\w.]+)'", said)
    if named is not None:
        return named[1]
    found = next((field for word, field in _TOLD_BY.items() if word in said), None)
    leaves = list(_leaves(values))
    by_value = (
        name
        for name, value in leaves
        if isinstance(value, str) and value and (value in error.args or re.search(rf"[`'\"]{re.escape(value)}\W", said))
    )
    by_name = (name for name, _ in leaves if re.search(rf"[`'\"]{re.escape(name.rpartition('.')[2])}[`'\"]", said))
    return found or next(by_value, None) or next(by_name, None) or "configuration"


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def read_object(file: Path) -> Mapping[str, object]:
    """Read a JSON object from a regular file of a believable size.

    Raises:
        SourceError: It is none, or cannot be read.
    """
    return read_json_object(file, field="JSON", remedy=_AGAIN, max_bytes=_MOST_BYTES).members


def _check_values(file: Path, values: Mapping[str, object], prefix: str = "") -> None:
    """Check what every class takes for granted."""
    from transformers import PretrainedConfig

    if prefix in ("", "text_config."):
        for key in _AT_LEAST_ONE:
            _check_size(file, prefix + key, values.get(key))

    for key, value in values.items():
        field = f"{prefix}{key}"
        if _OBJECTS.fullmatch(key) and not isinstance(value, dict | None):
            _refuse(file, field, f"expected an object, got {ascii(value)[:80]}")
        if _COUNTED_OUT.fullmatch(key) and isinstance(value, int | str | float):
            # Others than whole numbers are left to the class, but for the labels that every class counts out.
            if isinstance(value, int) and abs(value) > _MOST_MODULES:
                _refuse(file, field, f"expected at most {_MOST_MODULES}, got {value}")
            if key == "num_labels" and not isinstance(value, int):
                _refuse(file, field, f"expected a whole number, got {ascii(value)[:80]}")
        if key in ("dtype", "torch_dtype") and isinstance(value, str) and not _is_dtype(value):
            _refuse(file, field, f"expected the name of a torch dtype, got {ascii(value)[:80]}")
        member = inspect.getattr_static(PretrainedConfig, key, None)
        if inspect.isroutine(member) or (isinstance(member, property) and member.fset is None):
            _refuse(file, field, "it has the name of a method of every configuration", "remove the field")
        if isinstance(value, dict) and key.endswith("_config"):
            _check_values(file, value, f"{field}.")


def _is_dtype(name: str) -> bool:
    return name == "auto" or isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)


def _check_size(file: Path, field: str, value: object) -> None:
    """Check a size, or one for each block; what is no number at all is left to the class."""
    for size in value if isinstance(value, list | tuple) else (value,):
        if isinstance(size, int) and not 1 <= size < 2**31:
            _refuse(file, field, f"expected a whole number of at least 1 and below 2**31, got {size}")


def _refuse_unknown(values: Mapping[str, object], *, trust_remote_code: bool) -> None:
    from transformers import CONFIG_MAPPING

    kind, has_code = values.get("model_type"), bool(values.get("auto_map"))
    if (isinstance(kind, str) and kind in CONFIG_MAPPING) or (has_code and trust_remote_code):
        return
    if has_code:
        instead = "trust_remote_code=True, if you trust the code that comes with the checkpoint"
    else:
        instead = "a model that it knows, or the config.json that belongs to these weights"
    raise UnsupportedError(
        f"model_type {ascii(kind)[:80]}",
        reason=f"transformers {version('transformers')} does not know it",
        instead=instead,
    )


def models_in(folder: Path) -> list[str]:
    """Names of the folders in a folder that hold a model; none where it cannot be read."""
    try:
        return sorted(entry.name for entry in folder.iterdir() if (entry / _CONFIG).is_file())
    except OSError:
        return []


def _refuse_attention(implementation: str) -> None:
    from transformers import AttentionInterface

    # Not those that a streamed model registers for itself.
    known = ("eager", *(key for key in AttentionInterface().valid_keys() if not key.startswith("lowmem_")))
    if implementation not in known:
        raise UnsupportedError(
            f"attn_implementation={implementation!r}",
            reason="transformers has no such attention",
            instead='"sdpa" or "eager", which go in chunks too, or another of ' + ", ".join(known),
        )


def _refuse_adapter(folder: Path, *, has_model: bool) -> None:
    """Say which model to open instead of an adapter, or of a model with an adapter beside its weights.

    Raises:
        UnsupportedError: There is an adapter.
    """
    file = folder / "adapter_config.json"
    if not file.exists():
        return
    if has_model:
        raise UnsupportedError(
            f"model={str(folder)!r}",
            reason="an adapter lies beside its weights, which transformers would apply too",
            instead="the adapter in a folder of its own and PeftModel.from_pretrained(model, folder)",
        )
    base = read_object(file).get("base_model_name_or_path")
    raise UnsupportedError(
        f"model={str(folder)!r}",
        reason="it is the folder of an adapter, not of a model",
        instead=f"model = lowmem.from_pretrained({base or 'its base model'!r}), then "
        f"PeftModel.from_pretrained(model, {str(folder)!r}, is_trainable=True); lowmem.merge makes one model of both",
    )


def _refuse(file: Path, field: str, problem: str, remedy: str = _AGAIN) -> NoReturn:
    raise SourceError(file, field=field, problem=problem, remedy=remedy)
