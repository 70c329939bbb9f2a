"""What a recomputation needs: the random numbers of the forward, and sums of the gradients of its parts.

And what it need not repeat: large products that the forward has kept.

Gradients come all at once, or each weight's is handed on as soon as autograd has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from lowmem.internals.torch import without_gradient_hooks
from lowmem.internals.unread import ProductForm
from lowmem.streaming.boundary import Boundary


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """State of the CPU generator and of the compute device's."""

    cpu: Tensor
    """What torch.get_rng_state returns."""
    cuda: Tensor | None
    """What torch.cuda.get_rng_state returns; None on a CPU."""


def capture(device: torch.device) -> RandomState:
    """Note the generators' state now."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RandomState(cpu=torch.get_rng_state(), cuda=cuda)


def restore(state: RandomState, device: torch.device) -> None:
    """Put the generators back to where they were."""
    torch.set_rng_state(state.cpu)
    if state.cuda is not None:
        torch.cuda.set_rng_state(state.cuda, device)


def same_state(one: RandomState, other: RandomState) -> bool:
    """Whether nothing was drawn between the two."""
    pairs = ((one.cpu, other.cpu), (one.cuda, other.cuda))
    return all(left is None or right is None or torch.equal(left, right) for left, right in pairs)


class RandomTape:
    """Notes states for later; as long as nothing is drawn, all notes are one.

    Notes live until the backward. Each is small, and on a CPU lies in the heap between a block's temporaries: hundreds
    of them would keep that memory from being used again in large pieces.

    Args:
        device: Compute device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last: RandomState | None = None

    def note(self) -> RandomState:
        """The generators' state now."""
        state = capture(self.device)
        if self._last is None or not same_state(self._last, state):
            self._last = state
        return self._last


@contextmanager
def restored(state: RandomState, device: torch.device) -> Iterator[None]:
    """Draw from `state` inside the block; afterwards the generators are where they were before it."""
    outer = capture(device)
    restore(state, device)
    try:
        yield
    finally:
        restore(outer, device)


ProductKey = tuple[tuple[int, ...], int]
"""Which of a block's products one is: what it multiplies with, by shape, and how many of that shape come before it."""

_ATTENTION: tuple[int, ...] = ()
"""In place of a weight's shape."""

_ATTENTION_PARTS = 2
"""What heads give, and sums that its derivative needs."""


class Keep(Protocol):
    """`BoundaryTier.keep`."""

    def __call__(self, value: Tensor, *, turn: int | None = None) -> Boundary: ...


class KeptProducts:
    """Large products that one forward has kept for its recomputation, in the order in which they were made.

    No more than was planned for; and one attention. Should the two not go the same way, what is left from there on is
    computed again.

    Args:
        keep: Keeps one; told its turn.
        turns: Of the products of one call of a block, descending; shared by the parts of its batch.
        room_bytes: What the products may take, attention aside.
        unread: Those that earlier recomputations of the block have not read, whatever their number of tokens: they are
            not kept. Updated when this one is over.
    """

    def __init__(self, keep: Keep, turns: Iterator[int], *, room_bytes: int, unread: set[ProductKey]) -> None:
        self._keep, self._turns, self._unread = keep, turns, unread
        self._room_bytes = room_bytes
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._kept: list[tuple[ProductForm, Boundary | None]] = []
        self._keys: list[ProductKey] = []
        self._orders: dict[int, tuple[int, ...]] = {}
        self._num_asked = 0

    def add(self, form: ProductForm, value: Tensor) -> None:
        """Keep the next one, unless nobody reads it."""
        number, key = len(self._kept), self._key_of(form)
        self._keys.append(key)
        shape, nth = key
        has_room = nth < _ATTENTION_PARTS if shape == _ATTENTION else value.nbytes <= self._room_bytes
        if key in self._unread or not has_room:
            self._kept.append((form, None))
            return
        self._room_bytes -= 0 if shape == _ATTENTION else value.nbytes
        if not value.is_contiguous():
            # As it lies in memory, so that it comes back with its strides.
            self._orders[number] = order = tuple(sorted(range(value.ndim), key=value.stride, reverse=True))
            value = value.permute(order)
        self._kept.append((form, self._keep(value, turn=next(self._turns))))

    def next(self, form: ProductForm) -> Callable[[], Tensor] | None:
        """What gives the next one, once; None for one that was not kept, or where something else was."""
        number, self._num_asked = self._num_asked, self._num_asked + 1
        if number >= len(self._kept) or self._kept[number][0] != form:
            self._num_asked = len(self._kept)
            return None
        return None if self._kept[number][1] is None else partial(self._take, number)

    def release(self) -> None:
        """Let go of what was not read: the recomputation is over."""
        for number, (_, boundary) in enumerate(self._kept):
            if boundary is not None:
                boundary.release()
                self._unread.add(self._keys[number])
        self._kept.clear()

    def _key_of(self, form: ProductForm) -> ProductKey:
        *_, right, _ = form
        shape = tuple(right) if len(right) == 2 else _ATTENTION
        self._seen[shape] += 1
        return shape, self._seen[shape] - 1

    def _take(self, number: int) -> Tensor:
        form, boundary = self._kept[number]
        assert boundary is not None
        # A tier's own buffer serves the next one.
        value = boundary.take().clone()
        boundary.release()
        self._kept[number] = form, None
        order = self._orders.get(number)
        return value if order is None else value.permute([order.index(dim) for dim in range(value.ndim)])


TakeGradient = Callable[[int, Tensor], None]
"""Called with a parameter's number and a gradient of it, once for each part that a block is differentiated in."""


Gradients = tuple[list[Tensor | None], list[Tensor | None]]
"""Of the inputs, and of the parameters."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sought:
    """What some sequences of a block's call are computed again for."""

    inputs: Sequence[Tensor]
    """The tensors that autograd knows, the hidden states (sequences, tokens, hidden) first."""
    wanted: Sequence[bool]
    """For each input, whether its gradient is needed."""
    params: Sequence[Tensor]
    """The block's trainable parameters."""
    grads: Sequence[Tensor | None]
    """Gradient of each tensor of the output, or None."""
    into: Tensor | None = None
    """Where chunks write the first input's gradient; fresh memory if not given. May be the gradient of the output: a
    chunk's is read before that of its input is written."""
    take: TakeGradient | None = None
    """Gets the parameters' gradients, part by part; they are not returned then."""


def differentiate(
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    inputs: Sequence[Tensor],
    params: Sequence[Tensor],
    take: TakeGradient | None = None,
) -> Gradients:
    """Differentiate with respect to leaves; None for one that the outputs do not depend on.

    Args:
        outputs: What was computed, of any shapes.
        grads: Their gradients.
        inputs: Leaves whose gradients are returned.
        params: Parameters whose gradients are returned, unless `take` gets them.
        take: Gets a parameter's gradient while autograd goes on: only one of a block's weights has a gradient at a
            time. The parameters must be nobody else's, and have no gradients of their own.

    Returns:
        Gradients of the inputs and of the parameters.
    """
    if take is None:
        # A parameter's hooks act once, on the sum over all parts, where autograd accumulates it.
        with without_gradient_hooks(params):
            found = torch.autograd.grad(outputs, [*inputs, *params], grads, allow_unused=True)
        return list(found[: len(inputs)]), list(found[len(inputs) :])
    hooks = [
        param.register_post_accumulate_grad_hook(partial(_hand_on, take, number))  # type: ignore[no-untyped-call]
        for number, param in enumerate(params)
    ]
    try:
        torch.autograd.backward(outputs, grads, inputs=[*inputs, *params])
    finally:
        for hook in hooks:
            hook.remove()
    gradients = [value.grad for value in inputs]
    for value in inputs:
        value.grad = None
    return gradients, [None] * len(params)


def _hand_on(take: TakeGradient, number: int, param: Tensor) -> None:
    grad, param.grad = param.grad, None
    assert grad is not None
    take(number, grad)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which gradients (and softmax statistics) of a type are summed: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class GradientSums:
    """Gradients of some tensors, summed over the parts that they come in; None where no part had any.

    Sums are in fp32 (fp64 for fp64). The first part is kept as it is where it has that type already.
    """

    def __init__(self, num: int) -> None:
        self.totals: list[Tensor | None] = [None] * num

    def add(self, number: int, grad: Tensor | None) -> None:
        """Add a part of one gradient, of the tensor's shape; `grad` may be written to afterwards."""
        if grad is None:
            return
        grad, total = grad.to(sum_dtype(grad.dtype)), self.totals[number]
        self.totals[number] = grad if total is None else total.add_(grad)

    def add_all(self, grads: Sequence[Tensor | None]) -> None:
        """Add a part of each."""
        for number, grad in enumerate(grads):
            self.add(number, grad)

    def like(self, values: Sequence[Tensor]) -> list[Tensor | None]:
        """The sums in the types of the tensors that they belong to."""
        pairs = zip(self.totals, values, strict=True)
        return [None if total is None else total.to(value.dtype) for total, value in pairs]
