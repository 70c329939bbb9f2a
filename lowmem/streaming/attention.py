"""Our attention among transformers' implementations: masks stay rules, and a chunk sees its prefix through a carrier.

transformers looks both its attention and its mask function up by one name in the model's configuration. Two names are
registered here, one for each implementation that they stand in for: short sequences and everything that is no training
pass (generation with a cache, dense masks of a user's own) go to that implementation unchanged.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowmem.streaming.attention_joined import joined_attention
from lowmem.streaming.attention_mask import CausalMask, MaskRule, is_causal
from lowmem.streaming.attention_parts import AttentionJob, PartwiseAttention
from lowmem.streaming.kv_carrier import KVCarrier, Prefix

IMPLEMENTATIONS = {"sdpa": "lowmem_sdpa", "eager": "lowmem_eager"}
"""Our names, by the implementation of transformers that each stands in for."""

# Bytes of the largest mask that is built whole, to give the very results of the implementation stood in for.
_DENSE_BYTES = 4 * 1024**2

AttentionOutput = tuple[Tensor, Tensor | None]
AttentionFunction = Callable[..., AttentionOutput]


class ChunkMask:
    """What a block in chunks gets as its mask: the rule, and the carrier that knows the chunk and its prefix."""

    def __init__(self, mask: CausalMask, carrier: KVCarrier) -> None:
        self.mask = mask
        self.carrier = carrier


class ChunkedAttentionError(RuntimeError):
    """A block's attention does something between its keys and its kernel that chunks cannot follow."""


def register() -> None:
    """Make our names known to transformers; doing it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATIONS["sdpa"], _sdpa_attention)
    AttentionInterface.register(IMPLEMENTATIONS["eager"], _eager_attention)
    AttentionMaskInterface.register(IMPLEMENTATIONS["sdpa"], _sdpa_mask)
    AttentionMaskInterface.register(IMPLEMENTATIONS["eager"], _eager_mask)


def _sdpa_mask(*args: object, **kwargs: object) -> CausalMask | Tensor | None:
    from transformers.masking_utils import sdpa_mask

    rule = _causal_rule(kwargs)
    dense: Tensor | None = sdpa_mask(*args, **kwargs) if rule is None else None
    return dense if rule is None else rule


def _eager_mask(*args: object, **kwargs: object) -> CausalMask | Tensor | None:
    from transformers.masking_utils import eager_mask

    rule = _causal_rule(kwargs)
    dense: Tensor | None = eager_mask(*args, **kwargs) if rule is None else None
    return dense if rule is None else rule


def _causal_rule(kwargs: dict[str, object]) -> CausalMask | None:
    """The rule of a training pass's causal mask; None for every other mask, which is then built as usual."""
    tokens, batch = kwargs["q_length"], kwargs["batch_size"]
    offsets = (kwargs.get("q_offset", 0), kwargs.get("kv_offset", 0))
    whole = kwargs["kv_length"] == tokens and offsets == (0, 0)
    if not whole or kwargs.get("use_vmap", False) or not isinstance(tokens, int) or not isinstance(batch, int):
        # use_vmap says that the caller added a mask function of its own.
        return None
    function, padding, window = kwargs["mask_function"], kwargs.get("attention_mask"), kwargs.get("local_size")
    assert callable(function)
    if isinstance(padding, Tensor) and bool(padding.all()):
        padding = None
    window = window if isinstance(window, int) and window <= tokens else None
    plain = bool(kwargs.get("allow_is_causal_skip", True)) and padding is None and window is None
    device = torch.device(kwargs["device"]) if isinstance(kwargs["device"], str) else kwargs["device"]
    assert isinstance(device, torch.device)
    rule = MaskRule(
        allowed=function,
        padding=padding if isinstance(padding, Tensor) else None,
        window=window,
        num_tokens=tokens,
        plain=plain,
        device=device,
    )
    mask = CausalMask(rule, torch.arange(batch).unsqueeze(-1))
    return mask if plain or is_causal(mask) else None


def _sdpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ChunkMask | CausalMask | Tensor | None,
    **kwargs: object,
) -> AttentionOutput:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return _attend(module, query, key, value, attention_mask, sdpa_attention_forward, kwargs)


def _eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ChunkMask | CausalMask | Tensor | None,
    **kwargs: object,
) -> AttentionOutput:
    # Each family has an eager function of its own, beside its attention, and passes it only as a default.
    eager: AttentionFunction = sys.modules[_attention_class(module).__module__].eager_attention_forward
    return _attend(module, query, key, value, attention_mask, eager, kwargs)


def _attention_class(module: nn.Module) -> type[nn.Module]:
    for owner in type(module).__mro__:
        if hasattr(sys.modules[owner.__module__], "eager_attention_forward"):
            return owner
    raise ChunkedAttentionError(f"{type(module).__name__} has no eager_attention_forward beside it")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ChunkMask | CausalMask | Tensor | None,
    stands_in_for: AttentionFunction,
    kwargs: dict[str, object],
) -> AttentionOutput:
    if isinstance(attention_mask, ChunkMask):
        prefix = attention_mask.carrier.take(key, value)
        return _by_parts(query, key, value, attention_mask.mask, attention_mask.carrier.start, prefix, kwargs), None
    if not isinstance(attention_mask, CausalMask):
        return stands_in_for(module, query, key, value, attention_mask, **kwargs)
    mask = attention_mask
    sdpa = "sdpa" in stands_in_for.__name__
    if sdpa and mask.rule.plain:
        return stands_in_for(module, query, key, value, None, **kwargs)
    if mask.rows.shape[0] * mask.num_tokens**2 <= _DENSE_BYTES:
        dense = mask.dense() if sdpa else _additive_mask(mask, query.dtype)
        return stands_in_for(module, query, key, value, dense, **kwargs)
    return _by_parts(query, key, value, mask, 0, None, kwargs), None


def _additive_mask(mask: CausalMask, dtype: torch.dtype) -> Tensor:
    """As eager_mask of transformers makes it of a boolean one."""
    return torch.where(mask.dense(), torch.zeros((), dtype=dtype, device=mask.rule.device), torch.finfo(dtype).min)


def _by_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: CausalMask,
    start: int,
    prefix: Prefix | None,
    kwargs: dict[str, object],
) -> Tensor:
    """Attention of the tokens from `start` on, a chunk or all: (sequences, tokens, heads, head)."""
    if kwargs.get("position_bias") is not None:
        raise ChunkedAttentionError("attention with a position bias cannot be computed by parts")
    dropout, scaling, softcap = kwargs.get("dropout"), kwargs.get("scaling"), kwargs.get("softcap")
    sinks = kwargs.get("s_aux")
    dropout = dropout if isinstance(dropout, float) else 0.0
    job = AttentionJob(
        mask=mask,
        start=start,
        prefix=prefix,
        scale=scaling if isinstance(scaling, float) else query.shape[-1] ** -0.5,
        softcap=float(softcap) if isinstance(softcap, int | float) else None,
        dropout=dropout,
        seed=int(torch.randint(2**62, ())) if dropout else 0,
    )
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if kind != "cpu" and job.softcap is None and not isinstance(sinks, Tensor):
        return joined_attention(query, key, value, job)
    with torch.autocast(kind, enabled=False):
        out: Tensor = PartwiseAttention.apply(  # type: ignore[no-untyped-call]
            query, key, value, sinks if isinstance(sinks, Tensor) else None, job
        )
    return out
