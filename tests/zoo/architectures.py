"""Tiny random checkpoints of every decoder-only causal language model that transformers ships.

`sizes.py` and `overrides.py` have the numbers, `skipped.py` the entries that are left out and why. A checkpoint
written here is an ordinary folder: `config.json` and safetensors shards in the published (not yet fused) layout.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from tests.zoo.overrides import OVERRIDES
from tests.zoo.sizes import COMMON

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ARCHITECTURES: tuple[str, ...] = tuple(OVERRIDES)
"""The names, as in a config's `model_type` and in transformers' MODEL_FOR_CAUSAL_LM_MAPPING, in alphabetical order."""

COMPOSITES: dict[str, str] = dict.fromkeys(
    ("llama4", "mllama", "qwen3_5", "qwen3_5_moe", "qwen4_exp"), "image_text"
) | {"dots3_note": "multimodal"}
"""Those whose checkpoints hold a multimodal model of another class than the causal one, and its kind."""


def tiny_config(name: str, changes: Mapping[str, object] | None = None) -> PreTrainedConfig:
    """Build the configuration of the tiny model of an architecture.

    Args:
        name: One of `ARCHITECTURES`.
        changes: Fields that differ from the zoo's values, such as `{"attn_pdrop": 0.1}`.

    Returns:
        A configuration of 3 or 4 layers with a hidden size of at most 64.

    Raises:
        KeyError: `name` is not in the zoo.
    """
    from transformers import CONFIG_MAPPING

    return _fill(CONFIG_MAPPING[name], OVERRIDES[name] | dict(changes or {}))


def _fill(config_class: type[PreTrainedConfig], overrides: Mapping[str, object]) -> PreTrainedConfig:
    """Make a configuration of the shared sizes, then `overrides`; a mapping for a sub-configuration is filled alike."""
    from transformers import CONFIG_MAPPING

    known = {field.name for field in dataclasses.fields(config_class)}
    arguments = {key: value for key, value in COMMON.items() if key in known} | dict(overrides)
    for key, sub_class in config_class.sub_configs.items():
        value = arguments.get(key)
        if isinstance(value, dict):
            known_class = CONFIG_MAPPING[value["model_type"]] if "model_type" in value else sub_class
            arguments[key] = _fill(known_class, value)
    return cast("PreTrainedConfig", config_class(**arguments))


def tiny_model(
    name: str, changes: Mapping[str, object] | None = None, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """Build the tiny model of an architecture on the CPU, with seeded non-degenerate weights, in training mode.

    Args:
        name: One of `ARCHITECTURES`.
        changes: Fields of the configuration that differ from the zoo's values.
        dtype: Type of all floating-point parameters.
        seed: Of the weights.

    Returns:
        The class whose checkpoint is published, fp32 values rounded to `dtype`: the one `AutoModelForCausalLM` picks,
        but for `COMPOSITES` the multimodal one, of which `AutoModelForCausalLM` loads the text part.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    published = {"multimodal": AutoModelForMultimodalLM, "image_text": AutoModelForImageTextToText}
    auto_class = published[COMPOSITES[name]] if name in COMPOSITES else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto_class.from_config(tiny_config(name, changes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    persistent = set(model.state_dict(keep_vars=True))
    with torch.no_grad():
        for parameter in model.parameters():
            _randomise(parameter, generator)
        for key, buffer in model.named_buffers():
            if key in persistent and buffer.is_floating_point() and _is_constant(buffer):
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
    # Not `model.to`, which would drop the imaginary part of Llama 4's rotary table.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return cast("PreTrainedModel", model)


def build(
    name: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shard_bytes: int = 100_000,
    changes: Mapping[str, object] | None = None,
) -> Path:
    """Write the checkpoint of a tiny model.

    Args:
        name: One of `ARCHITECTURES`.
        folder: Where it goes; created if absent.
        dtype: Type the weights are stored in.
        seed: Of the weights.
        shard_bytes: Largest shard; the default spreads most models over several files.
        changes: Fields of the configuration that differ from the zoo's values.

    Returns:
        `folder`.
    """
    model = tiny_model(name, changes, dtype=dtype, seed=seed)
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    return folder


def _is_constant(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is all zeros or all ones: the initial value of norms, biases, routers' corrections."""
    return bool((tensor == 0).all()) or bool((tensor == 1).all())


def _randomise(parameter: torch.nn.Parameter, generator: torch.Generator) -> None:
    """Give a parameter values that an error would change: matrices of unit gain, vectors off their initial value."""
    if not parameter.is_floating_point():
        return
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() < 2 or (_is_constant(parameter) and parameter.shape[0] == 1):
        # A_log, dt_bias and the like keep the range in which the recurrence is stable.
        parameter.nan_to_num_().add_(0.1 * noise)
    else:
        parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
