"""What a recomputation needs: the random numbers of the forward, and sums of the gradients of its parts.

Gradients come all at once, or each weight's is handed on as soon as autograd has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowmem.internals.torch import without_gradient_hooks


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
