"""One block of one pass of a generation: unfinished rows only, a long prompt in parts.

And whether a model draws random numbers in its forward, as it does where a trainer generates in train mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lowmem.generation.cache import GrowingLayer, StreamedCache
from lowmem.internals.torch import tree_flatten, tree_unflatten
from lowmem.streaming.call import BlockCall, CallArguments, micro_batches
from lowmem.streaming.chunking.carrier import KVCarrier
from lowmem.streaming.chunking.chunks import InChunks, NotChunkable
from lowmem.streaming.runtime import ActiveRows

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_FUNCTIONAL = ("attention_dropout", "attn_dropout", "hidden_dropout", "activation_dropout", "layerdrop")


def draws_numbers(model: nn.Module) -> bool:
    """Whether any dropout is on: a module's, or a rate that a module applies by function."""
    return any(module.training and _rate(module) > 0 for module in model.modules())


def _rate(module: nn.Module) -> float:
    if isinstance(module, _DROPOUTS):
        return module.p
    rates = (getattr(module, name, 0.0) for name in _FUNCTIONAL)
    return max((rate for rate in rates if isinstance(rate, float)), default=0.0)


CACHE = "past_key_values"
"""The keyword under which blocks get the cache."""


class _Storing:
    """Stands for the cache in the chunks of a prompt: hands keys and values on to it, and is a carrier to attention."""

    def __init__(self, carrier: KVCarrier, layer: DynamicLayer) -> None:
        self._carrier, self._layer = carrier, layer

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int | None = None, cache_kwargs: object = None
    ) -> tuple[Tensor, Tensor]:
        self._layer.update(key_states, value_states)
        return self._carrier.update(key_states, value_states, layer_idx, cache_kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._carrier.get_seq_length(layer_idx)


class CachedBlock:
    """One block in one pass of a generation: unfinished rows only, a long prompt in parts.

    Args:
        forward: The block's raw forward; its weights are there.
        cache: The generation's cache.
        layer: Number of the block.
        rows: Is told which rows are run.
        max_tokens: Tokens that may go through at a time; one row's share of a part at least.
        in_chunks: How to run rows that are too long even one by one; None where they are not.
    """

    def __init__(
        self,
        forward: Callable[..., object],
        cache: StreamedCache,
        *,
        layer: int,
        rows: ActiveRows,
        max_tokens: int,
        in_chunks: InChunks | None = None,
    ) -> None:
        self._forward, self._cache, self._layer = forward, cache, layer
        self._rows, self._max_tokens, self._in_chunks = rows, max_tokens, in_chunks
        self._held = cache.layers[layer] if layer < len(cache.layers) else None

    def run(self, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """Run the forward with arguments for the whole batch, the cache among `kwargs`.

        Returns:
            What the block returns for the whole batch; rows that are finished are zeros.
        """
        call = BlockCall(args, {**kwargs, CACHE: None})
        alive, growing = self._cache.rows, self._held if isinstance(self._held, GrowingLayer) else None
        is_long = growing is not None and call.num_tokens > self._max_tokens
        if call.can_split:
            self._cache.splittable.add(self._layer)
        if not call.can_split or (alive is None and not is_long):
            return self._run_part(args, kwargs)
        batch_size, num_tokens = call.batch_size, call.num_tokens // call.batch_size
        inputs = call.take_inputs()
        index = torch.arange(batch_size, device=inputs[0].device) if alive is None else alive
        size = max(1, self._max_tokens // num_tokens) if is_long else None
        outputs = []
        for window in micro_batches(len(index), size):
            chosen = index[window]
            part_args, part_kwargs = call.arguments(call.cut_inputs(inputs, chosen), chosen)
            updated: AbstractContextManager[None] = nullcontext()
            if is_long and growing is not None:
                updated = growing.rows(window, num_rows=len(index))
            with self._rows.set(chosen), updated:
                outputs.append(self._run_part(part_args, part_kwargs))
        if is_long and growing is not None:
            growing.advance()
        return _whole(outputs, index, batch_size)

    def _run_part(self, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        held = self._held
        stores = isinstance(held, GrowingLayer) or type(held) is DynamicSlidingWindowLayer
        if self._in_chunks is None or not stores or self._cache.get_seq_length(self._layer):
            return self._forward(*args, **{**kwargs, CACHE: self._cache})
        assert isinstance(held, DynamicLayer)
        has_begun = False

        def run_chunk(arguments: CallArguments) -> object:
            nonlocal has_begun
            has_begun = True
            chunk_args, chunk_kwargs = arguments
            carrier = chunk_kwargs[CACHE]
            assert isinstance(carrier, KVCarrier)
            return self._forward(*chunk_args, **{**chunk_kwargs, CACHE: _Storing(carrier, held)})

        try:
            return self._in_chunks(run_chunk, (tuple(args), dict(kwargs)))
        except NotChunkable:
            if has_begun:
                raise
            return self._forward(*args, **{**kwargs, CACHE: self._cache})


def _whole(outputs: Sequence[object], index: Tensor, batch_size: int) -> object:
    """Outputs of some rows, put where they belong in outputs of all rows."""
    flat = [tree_flatten(output) for output in outputs]
    spec = flat[0][1]
    leaves = []
    for parts in zip(*(leaves for leaves, _ in flat), strict=True):
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if len(tensors) < len(parts) or tensors[0].ndim < 2:
            leaves.append(parts[0])
            continue
        joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if joined.shape[0] == batch_size:
            leaves.append(joined)
            continue
        whole = joined.new_zeros(batch_size, *joined.shape[1:])
        whole[index.to(whole.device)] = joined
        leaves.append(whole)
    return tree_unflatten(leaves, spec)
