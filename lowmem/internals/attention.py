"""transformers' attention: which implementation a model names, what each calls, and how a mask is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from lowmem.errors import UnsupportedError, untested

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
"""(module, query, key, value, mask, **options) -> output (sequences, tokens, heads, head), and weights or None."""

_ALWAYS_GIVEN = frozenset({"batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "use_vmap"})

_MASK_ARGUMENTS = _ALWAYS_GIVEN | {
    "attention_mask",
    "local_size",
    "allow_is_causal_skip",
    "allow_is_bidirectional_skip",
    "device",
    "dtype",
    "config",
}
"""What transformers asks for a mask with. Another name may mean a window or an offset by a new name."""


def check_mask_arguments(arguments: Mapping[str, object]) -> None:
    """Refuse a mask whose description has names that are not known, or lacks some that are needed.

    Raises:
        UnsupportedError: This transformers describes its masks otherwise. Guessing would let tokens see what they must
            not, in silence.
    """
    unknown, missing = set(arguments) - _MASK_ARGUMENTS, _ALWAYS_GIVEN - set(arguments)
    if unknown or missing:
        raise untested(
            "transformers",
            f"it describes attention masks by other arguments: {sorted(unknown)} are unknown and "
            f"{sorted(missing)} are missing",
        )


def attention_implementation(model: nn.Module) -> str:
    """Name of the attention implementation of a model's decoder, "sdpa" or "eager" among others."""
    config = getattr(model, "config", None)
    if config is None:
        raise TypeError(f"{type(model).__name__} has no config: give the transformers model itself")
    name: str = config.get_text_config()._attn_implementation
    return name


def set_attention_implementation(model: nn.Module, name: str) -> None:
    """Let a model look its attention and its masks up by another name from its next forward on."""
    config = getattr(model, "config")  # noqa: B009 - nn.Module does not declare it
    config._attn_implementation = name


def shipped_mask(implementation: str, arguments: Mapping[str, object]) -> Tensor | None:
    """The dense mask that transformers makes for an implementation, "sdpa" or "eager"."""
    from transformers import masking_utils

    make = masking_utils.sdpa_mask if implementation == "sdpa" else masking_utils.eager_mask
    mask: Tensor | None = make(**arguments)
    return mask


def shipped_attention(implementation: str, module: nn.Module) -> AttentionFunction:
    """What transformers computes attention with.

    Args:
        implementation: "sdpa" or "eager".
        module: The attention. Each family has an eager function of its own, next to its attention's class, and passes
            it only as a default.

    Raises:
        UnsupportedError: There is no such function.
    """
    if implementation == "sdpa":
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        sdpa: AttentionFunction = sdpa_attention_forward
        return sdpa
    for owner in type(module).__mro__:
        function: AttentionFunction | None = getattr(sys.modules[owner.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise UnsupportedError(
        f"attn_implementation='eager' of {type(module).__name__}",
        reason="its module has no eager_attention_forward",
        instead="attn_implementation='sdpa'",
    )
