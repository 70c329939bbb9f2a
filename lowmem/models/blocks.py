"""Finding the decoder blocks of a causal language model, and refusing what cannot be streamed or cut in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lowmem.errors import UnsupportedError
from lowmem.internals.attention import attention_implementation

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class DecoderBlock:
    """One decoder block of a model."""

    name: str
    """Its module path, "model.layers.3"."""
    module: torch.nn.Module
    raw_forward: Callable[..., object]
    """The class's forward without the checkpointing that transformers wraps around it; takes the module first."""


def find_blocks(model: PreTrainedModel) -> tuple[DecoderBlock, ...]:
    """Find the one list of decoder blocks that the model visits in order.

    Args:
        model: The model, on any device (meta included).

    Raises:
        UnsupportedError: The architecture has no such list, several, or blocks that share parameters.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) > 0
        and all(isinstance(child, GradientCheckpointingLayer) for child in module)
    }
    architecture = type(model).__name__
    if len(lists) != 1:
        found = ", ".join(lists) if lists else "none"
        raise UnsupportedError(
            f"architecture {architecture}",
            reason=f"it must have one list of decoder blocks; found: {found}",
            instead="a decoder-only causal language model whose blocks are GradientCheckpointingLayer modules",
        )
    ((path, layers),) = lists.items()
    blocks = tuple(
        DecoderBlock(name=f"{path}.{index}", module=layer, raw_forward=_raw_forward(architecture, layer))
        for index, layer in enumerate(layers)
    )
    _refuse_shared_parameters(model, blocks)
    _refuse_shared_state(architecture, blocks)
    return blocks


_NUMBERED = ("idx", "index", "layer_id", "layer_number")
"""Parts of names of attributes that say which block it is, and nothing of what it is."""


def first_alike(blocks: Sequence[DecoderBlock]) -> tuple[int, ...]:
    """For each block the first one that is like it: the same modules, with the same settings and parameters' shapes."""
    seen: dict[object, int] = {}
    return tuple(seen.setdefault(_kind(block.module), index) for index, block in enumerate(blocks))


def _kind(module: torch.nn.Module) -> object:
    settings = tuple(
        (path, type(child), tuple((name, value) for name, value in vars(child).items() if _is_setting(name, value)))
        for path, child in module.named_modules()
    )
    shapes = tuple((name, param.shape, param.dtype) for name, param in module.named_parameters())
    return settings, shapes


def _is_setting(name: str, value: object) -> bool:
    return isinstance(value, bool | int | float | str) and not any(part in name for part in _NUMBERED)


def _raw_forward(architecture: str, layer: torch.nn.Module) -> Callable[..., object]:
    raw = getattr(type(layer).forward, "__wrapped__", None)
    if raw is None:
        raise UnsupportedError(
            f"architecture {architecture}",
            reason=f"the forward of {type(layer).__name__} is not transformers' checkpointed one",
            instead="a model class that transformers ships",
        )
    return raw  # type: ignore[no-any-return]


def _refuse_shared_parameters(model: PreTrainedModel, blocks: tuple[DecoderBlock, ...]) -> None:
    owner: dict[int, str] = {}
    inside = {id(module) for block in blocks for module in block.module.modules()}
    for name, module in model.named_modules():
        if id(module) not in inside:
            owner.update((id(param), name) for param in module.parameters(recurse=False))
    for block in blocks:
        for param in block.module.parameters():
            other = owner.setdefault(id(param), block.name)
            if other != block.name:
                raise UnsupportedError(
                    f"architecture {type(model).__name__}",
                    reason=f"{block.name} shares parameters with {other or 'the model'}",
                    instead="a model whose decoder blocks have parameters of their own",
                )
    tied = [key for key in getattr(model, "all_tied_weights_keys", {}) if key.startswith(blocks[0].name[:-1])]
    if tied:
        raise UnsupportedError(
            f"architecture {type(model).__name__}",
            reason=f"{tied[0]} is tied across modules",
            instead="a model whose decoder blocks have parameters of their own",
        )


def _refuse_shared_state(architecture: str, blocks: tuple[DecoderBlock, ...]) -> None:
    """Refuse blocks that leave tensors for later blocks without returning them: their gradient would be lost."""
    for block in blocks:
        if any(getattr(module, "is_kv_shared_layer", False) for module in block.module.modules()):
            raise UnsupportedError(
                f"architecture {architecture}",
                reason=f"{block.name} takes keys and values of an earlier block, past autograd",
                instead="a model whose blocks share no keys and values (num_kv_shared_layers=0)",
            )


_NOT_DECODER_BLOCKS = {"rwkv": "its blocks hand a recurrent state to one another that they change in place"}


def refuse_config(config: PretrainedConfig) -> None:
    """Refuse what the configuration alone shows to be unsupported, before anything loads.

    Raises:
        UnsupportedError: An architecture that is not a causal language model.
    """
    if config.model_type in _NOT_DECODER_BLOCKS:
        raise UnsupportedError(
            f"architecture {config.model_type}",
            reason=_NOT_DECODER_BLOCKS[config.model_type],
            instead="a decoder-only causal language model with attention",
        )
    if config.is_encoder_decoder:
        raise UnsupportedError(
            f"architecture {config.model_type}",
            reason="it is an encoder-decoder",
            instead="a decoder-only causal language model",
        )


_MOST_LABELS = 1_000_000
"""transformers makes a name for each."""


def refuse_labels(config: PretrainedConfig, num_labels: int) -> None:
    """Refuse a number of labels, or an architecture that has no sequence classification model.

    Raises:
        ValueError: `num_labels` is out of range.
        UnsupportedError: transformers has no such class.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    if not 1 <= num_labels <= _MOST_LABELS:
        raise ValueError(f"num_labels={num_labels}: expected 1 to {_MOST_LABELS}; 1 makes a reward model")
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UnsupportedError(
            f"num_labels={num_labels} with architecture {config.model_type}",
            reason="transformers has no sequence classification model of it",
            instead="a reward model on another architecture, or DPO, which needs none",
        )


ARCHITECTURES: frozenset[str] = frozenset(
    # Names in alphabetical order.
    """
    afmoe apertus arcee aria_text axk1 bailing_hybrid bamba beam biogpt bitnet cohere cohere2 cohere2_moe
    cohere_compass_text cwm dbrx deepseek_v2 deepseek_v3 diffllama dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe
    flex_olmo flint gemma gemma2 gemma3_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox gpt_oss granite
    granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense
    hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lfm2 lfm2_moe
    lfm3 llama llama4_text longcat_flash mellum mimo_v2_flash minicpm3 minimax minimax_m2 ministral ministral3 mistral
    mixtral modernbert-decoder moshi nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe opt persimmon phi
    phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next recurrent_gemma
    seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma youtu
    """.split()  # noqa: SIM905
)
"""Values of `model_type` whose blocks the tests found equal in chunks and as they are. Taken by name: code that looks
alike can mix tokens where a chunk does not see it (a convolution, a shared cache, a mask it changes itself). Where only
some blocks have attention, only those are chunked."""

IMPLEMENTATIONS = {"sdpa": "lowmem_sdpa", "eager": "lowmem_eager"}
"""Names of our attention among transformers' implementations, by the one that each stands in for."""


def can_chunk(model: torch.nn.Module) -> str | None:
    """Why a model's blocks cannot be walked along the sequence in chunks; None if they can.

    Reads the configuration only: nothing runs, and no weight is needed.

    Args:
        model: A transformers model for causal language modelling, without PEFT's wrapper.
    """
    implementation = attention_implementation(model)
    config = getattr(model, "config").get_text_config()  # noqa: B009 - nn.Module does not declare it
    if config.model_type not in ARCHITECTURES:
        return f"{config.model_type} is not among the architectures that were found exact in chunks"
    if not getattr(config, "is_causal", True):
        return "its attention is bidirectional"
    if implementation not in (*IMPLEMENTATIONS, *IMPLEMENTATIONS.values()):
        return f"attn_implementation={implementation!r} has kernels of its own; use 'sdpa' or 'eager'"
    if getattr(config, "output_router_logits", False):
        return "output_router_logits=True collects routers' logits inside the blocks"
    return None
