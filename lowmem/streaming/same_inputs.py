"""Whether two forwards are the same: the state they run in, and a block's arguments up to the order of sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import CellType, FunctionType

import torch
from torch import Tensor

from lowmem.internals.peft import BlockFlags, read_flags
from lowmem.internals.torch import modules_in, tree_flatten, tree_unflatten, version_of
from lowmem.streaming.call import CACHE_NAMES, has_cache
from lowmem.streaming.chunking.mask import CausalMask


@dataclass(frozen=True)
class ForwardState:
    """All that decides a forward's values besides its inputs and weights, and whether a backward will follow."""

    grad: bool
    """Whether gradients will be asked for."""
    flags: tuple[BlockFlags, ...]
    """Of the adapters, by block."""
    training: tuple[bool, ...]
    """Train or eval mode of every module of the blocks."""
    autocast: tuple[bool, torch.dtype]
    """Whether operations are cast, and to what."""

    @staticmethod
    def now(blocks: Sequence[torch.nn.Module], device: torch.device) -> ForwardState:
        """The state that a forward would run in now.

        Args:
            blocks: The model's decoder blocks.
            device: Compute device.
        """
        return ForwardState(
            grad=torch.is_grad_enabled(),
            flags=tuple(read_flags(block) for block in blocks),
            training=tuple(module.training for block in blocks for module in modules_in(block)),
            autocast=(torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)),
        )

    def can_follow(self, first: ForwardState) -> bool:
        """Whether a forward in this state can run in the visits of one in the state `first`."""
        return self != first and self.sets_as(first) and not (self.grad and first.grad)

    def sets_as(self, other: ForwardState) -> bool:
        """Whether everything but gradients and adapters is the same."""
        return (self.training, self.autocast) == (other.training, other.autocast)

    @property
    def reference(self) -> ForwardState:
        """The state of TRL's reference forward: no gradients, all adapters disabled."""
        disabled = tuple(tuple((True, active) for _, active in block) for block in self.flags)
        return replace(self, grad=False, flags=disabled)


_PLAIN = (bool, int, float, str, torch.dtype, torch.device)

_WITHOUT_EFFECT = (*CACHE_NAMES, "use_cache", "output_router_logits")
"""Arguments that change nothing in what a block without a cache computes."""

_MAX_DEPTH = 8


class Unsuitable(Exception):
    """A call with arguments that cannot be compared by value."""


class Inputs:
    """One call's arguments, flattened; the hidden states are the first tensor.

    Args:
        args: Positional arguments of the block's forward.
        kwargs: Its keyword arguments; an empty cache counts as none.

    Raises:
        Unsuitable: It has a filled cache, an object of unknown kind, or several tensors that need gradients.
    """

    def __init__(self, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        # A training forward keeps no cache, and a forward without gradients may pass an empty one.
        kept = {name: value for name, value in kwargs.items() if name not in _WITHOUT_EFFECT}
        leaves, self._spec = tree_flatten((tuple(args), kept), is_leaf=lambda leaf: isinstance(leaf, CausalMask))
        known = (Tensor, CausalMask, *_PLAIN)
        index = next((index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), None)
        if index is None or has_cache(kwargs) or not all(leaf is None or isinstance(leaf, known) for leaf in leaves):
            raise Unsuitable
        self._hidden_index = index
        hidden = leaves[index]
        assert isinstance(hidden, Tensor)
        leaves[index] = None
        if hidden.ndim < 2 or any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            raise Unsuitable
        self.hidden: Tensor = hidden
        self.rest: list[object] = leaves
        self._version = version_of(hidden)

    @property
    def unchanged(self) -> bool:
        """Whether nobody has written to the hidden states since."""
        return version_of(self.hidden) == self._version

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[object, ...], dict[str, object]]:
        """The call's arguments with other hidden states."""
        leaves = list(self.rest)
        leaves[self._hidden_index] = hidden
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs

    def drop_hidden(self) -> None:
        """Release the hidden states; the rest stays comparable."""
        self.hidden = torch.empty(0)
        self._version = 0

    def has_form_of(self, other: Inputs) -> bool:
        """Whether structure, and the position of the hidden states, are the same."""
        return self._spec == other._spec and self._hidden_index == other._hidden_index


class Correspondence:
    """For each sequence of one batch, the same sequence in another.

    Args:
        order: For each row of the new batch its row in the old one; None where both have the same order.
        num_rows: Sequences of the batch.
        device: Where the tensors are.
    """

    def __init__(self, order: list[int] | None, num_rows: int, device: torch.device) -> None:
        self._order = None if order is None else torch.tensor(order, device=device)
        self._num_rows = num_rows
        # Arguments are shared by all blocks of a pass: each pair is compared once. Held, so that ids stay theirs.
        self._equal: dict[tuple[int, int], tuple[object, object]] = {}

    def to_old(self, value: Tensor) -> Tensor:
        """A tensor of the new batch, with its rows in the old order; autograd follows."""
        if self._order is None:
            return value
        return value.index_select(0, torch.argsort(self._order))

    def to_new(self, value: Tensor) -> Tensor:
        """A tensor of the old batch, with its rows in the new order; autograd follows."""
        return value if self._order is None else value.index_select(0, self._order)

    def holds(self, new: Inputs, old: Inputs) -> bool:
        """Whether all arguments but the hidden states are the same."""
        return new.has_form_of(old) and all(self._same(*pair) for pair in zip(new.rest, old.rest, strict=True))

    def _same(self, new: object, old: object, *, depth: int = 0) -> bool:
        if new is old and self._order is None:
            return True
        key = (id(new), id(old))
        if key in self._equal:
            return True
        same = depth < _MAX_DEPTH and type(new) is type(old) and self._equal_values(new, old, depth)
        if same:
            self._equal[key] = (new, old)
        return same

    def _equal_values(self, new: object, old: object, depth: int) -> bool:
        if isinstance(new, Tensor) and isinstance(old, Tensor):
            return self._equal_tensors(new, old)
        if isinstance(new, CausalMask) and isinstance(old, CausalMask):
            fields = ("num_tokens", "window", "plain", "padding", "allowed")
            return torch.equal(new.rows, old.rows) and all(
                self._same(getattr(new.rule, name), getattr(old.rule, name), depth=depth + 1) for name in fields
            )
        if isinstance(new, FunctionType) and isinstance(old, FunctionType):
            pairs = ((new.__closure__, old.__closure__), (new.__defaults__, old.__defaults__))
            return new.__code__ is old.__code__ and all(self._same(*pair, depth=depth + 1) for pair in pairs)
        if isinstance(new, CellType) and isinstance(old, CellType):
            return self._same(new.cell_contents, old.cell_contents, depth=depth)
        if isinstance(new, tuple | list) and isinstance(old, tuple | list):
            return len(new) == len(old) and all(
                self._same(*pair, depth=depth + 1) for pair in zip(new, old, strict=True)
            )
        return new is old or (isinstance(new, _PLAIN) and new == old)

    def _equal_tensors(self, new: Tensor, old: Tensor) -> bool:
        if new.shape != old.shape or new.dtype != old.dtype or new.device != old.device:
            return False
        per_row = new.ndim >= 2 and new.shape[0] == self._num_rows
        return torch.equal(new, self.to_new(old) if per_row else old)


def correspond(new: Inputs, old: Inputs) -> Correspondence | None:
    """Find the order in which two calls are the same, hidden states included; None if they are not.

    Args:
        new: A call.
        old: An earlier call of the same block.
    """
    if not new.has_form_of(old) or not old.unchanged:
        return None
    ours, theirs = new.hidden.detach(), old.hidden.detach()
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype or ours.device != theirs.device:
        return None
    order = None if torch.equal(ours, theirs) else _row_order(ours, theirs)
    if order is None and not torch.equal(ours, theirs):
        return None
    found = Correspondence(order, ours.shape[0], ours.device)
    return found if found.holds(new, old) else None


def _row_order(new: Tensor, old: Tensor) -> list[int] | None:
    """For each row of `new` the row of `old` that equals it; each is used once."""
    sums = old.flatten(1).sum(1, dtype=torch.float64).tolist()
    free = list(range(len(sums)))
    order: list[int] = []
    for row, total in zip(new, new.flatten(1).sum(1, dtype=torch.float64).tolist(), strict=True):
        close = [index for index in free if abs(sums[index] - total) <= 1e-9 * (1 + abs(total))]
        found = next((index for index in close if torch.equal(old[index], row)), None)
        if found is None:
            return None
        free.remove(found)
        order.append(found)
    return order
