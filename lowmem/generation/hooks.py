"""What a streamed model adds to transformers' `generate`: a cache that drops rows, its bytes counted, and progress.

A generation while it goes on: which rows are finished, how far it is, how long it will take.

Beam search, assisted decoding and caches that the caller gives run as transformers runs them.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationConfig, GenerationMode, StoppingCriteriaList

from lowmem.generation.cache import KvRoom, StreamedCache
from lowmem.generation.decoding import CACHE, CachedBlock, draws_numbers
from lowmem.host_memory import products_for
from lowmem.internals.generation import extend_generate
from lowmem.streaming.chunking.chunks import InChunks
from lowmem.streaming.runtime import ActiveRows

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from lowmem.streaming.runtime import Runtime


_ONE_TOKEN_AT_A_TIME = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_RECENT_TOKENS = 20


@dataclass(frozen=True, kw_only=True)
class TokenProgress:
    """Where a generation is, told after every token."""

    num_tokens: int
    """Tokens generated for each row that is not finished."""
    max_tokens: int
    """Most that will be."""
    num_rows: int
    """Rows of the batch."""
    num_unfinished: int
    """Rows that have not ended."""
    left_s: float | None
    """Seconds that the remaining tokens take at the present rate: what is left at most, as all rows may end sooner."""
    tokens_per_s: float
    """Tokens of all unfinished rows per second, of late."""

    @property
    def finished(self) -> bool:
        """Whether no row goes on."""
        return self.num_unfinished == 0


class Generation:
    """One call of `generate`.

    Args:
        num_rows: Rows of the batch.
        num_prompt_tokens: Tokens of the prompts, padding included.
        max_tokens: Most tokens that will be generated for a row.
        listeners: Told after every token.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        num_prompt_tokens: int,
        max_tokens: int,
        listeners: list[Callable[[TokenProgress], None]],
    ) -> None:
        self.num_rows, self.max_tokens = num_rows, max_tokens
        self._num_prompt_tokens = num_prompt_tokens
        self._listeners = listeners
        self._start_s = time.perf_counter()
        # The first token pays for the whole prompt: it says nothing about those that follow.
        self._times_s: deque[float] = deque(maxlen=_RECENT_TOKENS)
        self.unfinished: list[int] = list(range(num_rows))
        """Numbers of the rows that go on."""

    def note(self, num_all_tokens: int, unfinished: list[int]) -> bool:
        """Count a token.

        Args:
            num_all_tokens: Tokens of a row so far, prompt included.
            unfinished: Rows that go on.

        Returns:
            Whether rows have finished with it.
        """
        changed = len(unfinished) < len(self.unfinished)
        self.unfinished = unfinished
        self._times_s.append(time.perf_counter())
        if self._listeners:
            progress = self._progress(num_all_tokens - self._num_prompt_tokens)
            for listener in list(self._listeners):
                listener(progress)
        return changed

    def _progress(self, num_tokens: int) -> TokenProgress:
        now_s = self._times_s[-1]
        token_s = None
        if len(self._times_s) > 1:
            token_s = (now_s - self._times_s[0]) / (len(self._times_s) - 1)
        left = max(0, self.max_tokens - num_tokens) if self.unfinished else 0
        rate_s = token_s or (now_s - self._start_s)
        return TokenProgress(
            num_tokens=num_tokens,
            max_tokens=self.max_tokens,
            num_rows=self.num_rows,
            num_unfinished=len(self.unfinished),
            left_s=None if token_s is None else left * token_s,
            tokens_per_s=len(self.unfinished) / rate_s if rate_s > 0 else 0.0,
        )


class GenerationHooks:
    """Extends one model's `generate`.

    Args:
        model: The streamed model; held weakly.
        room: What keys and values may take.
    """

    def __init__(self, model: PreTrainedModel, *, room: KvRoom) -> None:
        self._model = weakref.ref(model)
        self._room = room
        self._listeners: list[Callable[[TokenProgress], None]] = []
        self._cache: weakref.ref[StreamedCache] | None = None
        self._num_rows = 0
        extend_generate(model, cache_made=self._replace_cache, criteria_made=self._note_criteria)

    def listen(self, callback: Callable[[TokenProgress], None]) -> Callable[[], None]:
        """Call `callback` after every generated token; returns what removes it again."""
        self._listeners.append(callback)
        return lambda: self._listeners.remove(callback) if callback in self._listeners else None

    def run(
        self,
        forward: Callable[..., object],
        args: Sequence[object],
        kwargs: Mapping[str, object],
        *,
        block: int,
        rows: ActiveRows,
        in_chunks: InChunks | None = None,
    ) -> object:
        """Run a block's raw forward, its weights being there: on unfinished rows where the cache knows which those are.

        Args:
            forward: Takes the block's arguments.
            args: Positional arguments.
            kwargs: Keyword arguments; with a `StreamedCache` among them the call belongs to a generation.
            block: Number of the block.
            rows: Is told which rows are run.
            in_chunks: How to run a prompt whose sequences are too long to be run whole.
        """
        cache = kwargs.get(CACHE)
        if not isinstance(cache, StreamedCache):
            return forward(*args, **kwargs)
        hidden = next(leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor))
        with products_for(hidden.device, None, num_tokens=hidden.shape[:2].numel()):
            cached = CachedBlock(
                forward, cache, layer=block, rows=rows, max_tokens=self._room.prefill_tokens, in_chunks=in_chunks
            )
            return cached.run(args, kwargs)

    def memory(self) -> dict[str, int]:
        """Bytes of keys and values that are allocated now, by tier."""
        cache = self._cache() if self._cache is not None else None
        held = {"device": 0, "host": 0} if cache is None else cache.allocated_bytes()
        return {"kv_device_bytes": held["device"], "kv_host_bytes": held["host"]}

    def _replace_cache(
        self,
        is_given: bool,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, object],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        cache = model_kwargs.get(CACHE)
        self._cache = None
        self._num_rows = batch_size * max(1, generation_config.num_return_sequences or 1)
        ours = generation_config.cache_implementation in (None, "dynamic") and not generation_config.is_assistant
        if not is_given and ours and type(cache) is DynamicCache and generation_mode in _ONE_TOKEN_AT_A_TIME:
            made = self._make(max_cache_length + 1)
            model_kwargs[CACHE] = made
            self._cache = weakref.ref(made)

    def _make(self, max_tokens: int) -> StreamedCache:
        model = self._model()
        assert model is not None
        config = model.config.get_text_config(decoder=True)
        made = StreamedCache(config, max_tokens=max_tokens)
        layer_bytes = _layer_bytes(model, num_rows=self._num_rows, num_tokens=max_tokens)
        what = f"{self._num_rows} sequences of up to {max_tokens} tokens"
        num_on_device = self._room.num_on_device(layer_bytes, num_layers=len(made.layers), what=what)
        return StreamedCache(config, max_tokens=max_tokens, num_on_device=num_on_device)

    def _note_criteria(
        self, generation_config: GenerationConfig, criteria: StoppingCriteriaList
    ) -> StoppingCriteriaList:
        model = self._model()
        assert model is not None
        cache = self._cache() if self._cache is not None else None
        # What else the caller gets back would show that finished rows are no longer computed.
        drops = cache is not None and not generation_config.return_dict_in_generate
        # Without such a criterion `generate` goes on with the tokens of finished rows instead of padding them.
        drops = drops and any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        # Fewer rows would draw fewer numbers, and each other ones than in a whole batch.
        drops = drops and not draws_numbers(model)
        return _NotedCriteria(criteria, cache if drops else None, listeners=self._listeners)


class _NotedCriteria(StoppingCriteriaList):
    """The criteria of one generation, which passes on what they return and changes none of it."""

    def __init__(
        self,
        criteria: StoppingCriteriaList,
        cache: StreamedCache | None,
        *,
        listeners: list[Callable[[TokenProgress], None]],
    ) -> None:
        super().__init__(criteria)
        self._cache_to_cut, self._listeners = cache, listeners
        self._generation: Generation | None = None

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        is_done: Tensor = super().__call__(input_ids, scores, **kwargs)
        if self._cache_to_cut is None and not self._listeners:
            return is_done
        num_tokens = input_ids.shape[1]
        if self._generation is None:
            longest = self.max_length
            self._generation = Generation(
                num_rows=input_ids.shape[0],
                num_prompt_tokens=num_tokens - 1,
                max_tokens=1 if longest is None else longest - num_tokens + 1,
                listeners=self._listeners,
            )
        done = is_done.tolist()
        unfinished = [row for row in self._generation.unfinished if not done[row]]
        changed = self._generation.note(num_tokens, unfinished)
        cache = self._cache_to_cut
        if changed and unfinished and cache is not None and cache.can_drop_rows:
            cache.keep(unfinished, device=is_done.device)
        return is_done


def _layer_bytes(model: PreTrainedModel, *, num_rows: int, num_tokens: int) -> int:
    """Bytes of the largest layer's keys and values, from what its projections put out."""
    widest = 0
    for module in model.modules():
        weights = [getattr(getattr(module, name, None), "weight", None) for name in ("k_proj", "v_proj")]
        widest = max(widest, sum(weight.shape[0] for weight in weights if isinstance(weight, Tensor)))
    itemsize = torch.empty(0, dtype=model.dtype).itemsize
    return num_rows * num_tokens * (widest or _width_by_config(model)) * itemsize


def _width_by_config(model: PreTrainedModel) -> int:
    config = model.config.get_text_config(decoder=True)
    # Where layers differ, transformers refuses to name one number for all, and has a configuration for each.
    each = getattr(config, "per_layer_config", None)
    return max(map(_width_of_layer, each if isinstance(each, Sequence) and each else (config,)))


def _width_of_layer(config: PretrainedConfig) -> int:
    num_heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // num_heads
    return 2 * int(getattr(config, "num_key_value_heads", None) or num_heads) * int(width)


def generation_of(runtime: Runtime) -> GenerationHooks | None:
    """What extends `generate` of a runtime's model; None if nothing does."""
    hooks = runtime.generation
    return hooks if isinstance(hooks, GenerationHooks) else None
