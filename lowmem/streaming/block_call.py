"""One call of a decoder block: its arguments, which of them need gradients, and how they split into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence, MutableSet, Sequence

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lowmem.errors import UnsupportedError


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

    @property
    def hidden(self) -> Tensor:
        """The hidden states, of shape (batch, tokens, hidden)."""
        hidden = self._leaves[self._hidden]
        assert isinstance(hidden, Tensor)
        return hidden

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

    def arguments(
        self, inputs: Sequence[Tensor], rows: slice | Tensor | None
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """Positional and keyword arguments for some sequences of the batch.

        Args:
            inputs: What `take_inputs` answered, or leaves that stand for them, already cut to `rows`.
            rows: Which sequences, as a slice or by their numbers; None for the whole batch.
        """
        leaves = [_cut(leaf, rows, self.batch_size) for leaf in self._leaves]
        for index, value in zip(self._input_positions, inputs, strict=True):
            leaves[index] = value
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs

    def cut_inputs(self, inputs: Sequence[Tensor], rows: slice | Tensor | None) -> list[Tensor]:
        """Some sequences of each input; an input that is one for all sequences stays whole."""
        return [cut for cut in (_cut(value, rows, self.batch_size) for value in inputs) if isinstance(cut, Tensor)]


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


def flatten_output(output: object) -> tuple[list[object], TreeSpec]:
    """A block's output as leaves: tensors, and what else it returned."""
    return tree_flatten(output)


__all__ = ["BlockCall", "flatten_output", "micro_batches", "tree_unflatten"]
