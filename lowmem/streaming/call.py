"""One call of a decoder block: its arguments, which of them need gradients, and how much goes through at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence, MutableSet, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.internals.torch import tree_flatten, tree_unflatten
from lowmem.planning.step_memory import FREED_HEAP, KEPT_PRODUCTS, PRODUCT_BUFFERS

if TYPE_CHECKING:
    from lowmem.planning.plan import Plan


CallArguments = tuple[tuple[object, ...], dict[str, object]]
"""Positional and keyword arguments of a block's forward."""

CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past")
"""Names under which transformers' blocks take a K/V cache."""


def has_cache(kwargs: Mapping[str, object]) -> bool:
    """Whether a block is called with a cache, filled or not."""
    return any(kwargs.get(name) is not None for name in CACHE_NAMES)


def without_cache(kwargs: Mapping[str, object]) -> dict[str, object]:
    """A training forward keeps no K/V cache, as with transformers' own checkpointing.

    Raises:
        RuntimeError: The cache already holds something that the block would attend to.
    """
    cleaned = dict(kwargs)
    for name in CACHE_NAMES:
        cache = cleaned.get(name)
        if cache is None:
            continue
        length = getattr(cache, "get_seq_length", lambda: 1)()
        if length:
            raise RuntimeError(
                f"{name} holds {length} tokens in a forward with gradients; streamed blocks train "
                "without a prefix (prefix tuning is not supported: use LoRA)"
            )
        cleaned[name] = None
    if cleaned.get("use_cache"):
        cleaned["use_cache"] = False
    return cleaned


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a call goes through its block."""

    micro_batch: int | None = None
    """Sequences at a time; None for all."""
    chunk_tokens: int | None = None
    """Tokens of each sequence at a time; None for all."""
    keeps_keys_values: bool = False
    """Whether keys and values wait for the backward as its inputs do, instead of being computed again."""


class BlockCall:
    """The arguments of one call, flattened.

    `inputs` are the tensors that need gradients (the hidden states first where they do); everything else is kept by
    reference and is shared by all blocks of the pass.
    """

    def __init__(self, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        leaves, self._spec = tree_flatten((tuple(args), dict(kwargs)))
        for leaf in leaves:
            # Loading has seen to it that no block takes what an earlier one leaves in a KVSharingDict.
            shared = isinstance(leaf, MutableMapping | MutableSequence | MutableSet)
            if shared and type(leaf).__name__ != "KVSharingDict":
                raise UnsupportedError(
                    f"a decoder block that is handed a {type(leaf).__name__}",
                    reason="what blocks write into it for one another would have no gradient",
                    instead="a model whose blocks take and return tensors only",
                )
        # Per head, not per sequence, whatever their numbers are.
        self._has_head_bias = isinstance(kwargs.get("position_bias"), Tensor)
        self._hidden = next((index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), -1)
        if self._hidden < 0:
            raise ValueError("a decoder block was called without a tensor")
        self._leaves: list[object] = leaves
        self.batch_size: int = leaves[self._hidden].shape[0]
        self.num_tokens: int = leaves[self._hidden].shape[:2].numel()
        self._input_positions = [
            index
            for index, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and (leaf.requires_grad or index == self._hidden)
        ]

    def take_inputs(self) -> list[Tensor]:
        """The tensors that autograd must see, removed from the call so that it does not keep them alive."""
        inputs = [self._leaves[index] for index in self._input_positions]
        for index in self._input_positions:
            self._leaves[index] = None
        return inputs  # type: ignore[return-value]

    @property
    def can_split(self) -> bool:
        """Whether every tensor is either one for all sequences or has one row per sequence."""
        if self.batch_size == 1 or self._has_head_bias:
            return False
        return all(_splits(leaf, self.batch_size) for leaf in self._leaves if leaf is not None)

    def arguments(self, inputs: Sequence[Tensor], rows: slice | Tensor | None) -> CallArguments:
        """Positional and keyword arguments for some sequences of the batch.

        Args:
            inputs: What `take_inputs` returned, or leaves that stand for them, already cut to `rows`.
            rows: Which sequences, as a slice or by their numbers; None for the whole batch.
        """
        leaves = [_cut(leaf, rows, self.batch_size) for leaf in self._leaves]
        for index, value in zip(self._input_positions, inputs, strict=True):
            leaves[index] = value
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs

    def cut_inputs(self, inputs: Sequence[Tensor], rows: slice | Tensor | None) -> list[Tensor]:
        """Some sequences of each input; an input that is one for all sequences stays whole."""
        return [self.cut(value, rows) for value in inputs]

    def cut(self, value: Tensor, rows: slice | Tensor | None) -> Tensor:
        """Some sequences of a tensor; one that is for all sequences stays whole."""
        cut = _cut(value, rows, self.batch_size)
        assert isinstance(cut, Tensor)
        return cut


def _splits(leaf: object, batch_size: int) -> bool:
    if not isinstance(leaf, Tensor):
        return leaf is None or isinstance(leaf, (bool, int, float, str))
    if leaf.ndim == 1:
        # A number for each sequence, or for each token or head of as many: nothing tells.
        return leaf.shape[0] != batch_size
    return leaf.ndim == 0 or leaf.shape[0] in (1, batch_size)


def _cut(leaf: object, rows: slice | Tensor | None, batch_size: int) -> object:
    if rows is None or not isinstance(leaf, Tensor) or leaf.ndim < 2 or leaf.shape[0] != batch_size:
        return leaf
    return leaf[rows]


def micro_batches(batch_size: int, size: int | None) -> Iterator[slice]:
    """Consecutive slices of at most `size` sequences."""
    step = size or batch_size
    for start in range(0, batch_size, step):
        yield slice(start, min(start + step, batch_size))


_FEWEST_TOKENS = 64
"""Shorter chunks than this cost more time than they save memory."""


class SplitChoice:
    """Chooses micro-batch and chunk length of a call.

    What was asked for is kept to. Otherwise the plan's own micro-batch, scaled to the room that the budget leaves: what
    one block's recomputation holds grows with the tokens in it, and the boundary activations with those of the batch.
    Dropout draws its numbers micro-batch by micro-batch and chunk by chunk, so fewer of them come closest to an
    undivided run. Sequences that are longer than planned are cut into chunks where they would not fit whole.

    Args:
        plan: What was planned.
        can_chunk: Whether the model's blocks can be walked along the sequence.
    """

    def __init__(self, plan: Plan, *, can_chunk: bool) -> None:
        self._asked_for = plan.job.micro_batch
        self._keeps_keys_values = plan.choice.keeps_keys_values
        self._planned_chunk = plan.chunk_tokens if can_chunk else None
        self._can_chunk = can_chunk
        self._num_tokens = plan.micro_batch * (plan.chunk_tokens or plan.seq_len)
        self._planned = plan.micro_batch
        # With what the C library keeps between its temporaries.
        recomputed = ("block recomputation", FREED_HEAP, PRODUCT_BUFFERS)
        in_backward = (role.nbytes for role in plan.roles if role.phase == "block" and role.role in recomputed)
        self._recompute_bytes = max(1, sum(in_backward))
        boundary_bytes = sum(plan.bytes_of(role, tier="device") for role in ("boundary activations", KEPT_PRODUCTS))
        self._boundary_bytes_per_token = boundary_bytes / plan.job.num_tokens
        spare_bytes = max(0, plan.device_budget_bytes - plan.device_bytes)
        self._room_bytes = self._recompute_bytes + boundary_bytes + spare_bytes

    def __call__(self, call: BlockCall) -> Split:
        """How this call is split."""
        tokens_each = max(1, call.num_tokens // call.batch_size)
        chunk_tokens = self.chunk_for(tokens_each, num_tokens=call.num_tokens)
        keeps = self._keeps_keys_values and chunk_tokens is not None
        if not call.can_split:
            return Split(chunk_tokens=chunk_tokens, keeps_keys_values=keeps)
        fitting = max(1, self._fitting_tokens(call.num_tokens) // tokens_each)
        size = self._asked_for or (self._planned if chunk_tokens else fitting)
        micro_batch = None if size >= call.batch_size else size
        return Split(micro_batch=micro_batch, chunk_tokens=chunk_tokens, keeps_keys_values=keeps)

    def chunk_for(self, tokens_each: int, *, num_tokens: int) -> int | None:
        """Tokens of a sequence at a time, or None for whole sequences.

        Args:
            tokens_each: Tokens of each sequence.
            num_tokens: Tokens of all sequences.
        """
        if self._planned_chunk is not None:
            return self._planned_chunk if tokens_each > self._planned_chunk else None
        # Half of the room is for keys, values and their gradients.
        fitting = self._fitting_tokens(num_tokens)
        if not self._can_chunk or tokens_each <= fitting or tokens_each <= _FEWEST_TOKENS:
            return None
        return max(_FEWEST_TOKENS, fitting // 2)

    def _fitting_tokens(self, num_tokens: int) -> int:
        """Tokens that a block may recompute at a time, the boundaries of `num_tokens` being kept."""
        free_bytes = self._room_bytes - self._boundary_bytes_per_token * num_tokens
        return max(self._num_tokens, int(self._num_tokens * free_bytes / self._recompute_bytes))
