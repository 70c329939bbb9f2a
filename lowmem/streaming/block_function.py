"""The autograd Function of one decoder block: forward without a graph, backward by exact recomputation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lowmem.streaming.block_call import BlockCall, micro_batches
from lowmem.streaming.boundary import Boundary
from lowmem.streaming.random_state import RandomState, capture, restored
from offload import StagingBuffer

_ALIGN_BYTES = 64


class VisitedBlock(Protocol):
    """What a recorded call needs of the runtime."""

    device: torch.device

    def forward_in_visit(self, arguments: tuple[tuple[object, ...], dict[str, object]]) -> object:
        """Run the block's raw forward; its weights are bound."""

    def adapter_state(self) -> tuple[object, ...]:
        """Which adapters are active and which modules train: what a recomputation must find unchanged."""

    def keep(self, value: Tensor) -> Boundary:
        """Put a boundary activation into its tier."""


class RecordedCall:
    """One call of one block in a training forward: what its backward needs to repeat it exactly."""

    def __init__(self, block: VisitedBlock, call: BlockCall, *, micro_batch: int | None) -> None:
        self._block, self._call = block, call
        self._rows = list(micro_batches(call.batch_size, micro_batch))
        self._random: list[RandomState] = []
        self._boundaries: list[Boundary] = []
        self._autocast = _autocast_state(block.device.type)
        self._adapters = block.adapter_state()
        self._output_spec: TreeSpec | None = None
        self._tensor_leaves: list[int] = []
        self._other_leaves: list[object] = []

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the block over the micro-batches without a graph; keeps only its inputs.

        Args:
            inputs: The call's differentiable inputs, hidden states of shape (batch, tokens, hidden) first.

        Returns:
            The tensors of its output; `rebuild` puts them back into the output's structure.
        """
        parts: list[list[object]] = []
        for rows in self._rows:
            self._random.append(capture(self._block.device))
            cut = self._call.cut_inputs(inputs, self._cut(rows))
            with self._in_autocast():
                output = self._block.forward_in_visit(self._call.arguments(cut, self._cut(rows)))
            leaves, self._output_spec = tree_flatten(output)
            parts.append(leaves)
        # Each boundary is kept only after the whole call ran: a failing forward leaves nothing behind.
        self._boundaries = [self._block.keep(value) for value in inputs]
        leaves = [_join([part[index] for part in parts]) for index in range(len(parts[0]))]
        self._tensor_leaves = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._other_leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return tuple(leaves[index] for index in self._tensor_leaves)

    def rebuild(self, tensors: Sequence[Tensor]) -> object:
        """The block's output from its tensors."""
        leaves = list(self._other_leaves)
        for index, tensor in zip(self._tensor_leaves, tensors, strict=True):
            leaves[index] = tensor
        assert self._output_spec is not None
        return tree_unflatten(leaves, self._output_spec)

    def backward(
        self, grads: Sequence[Tensor | None], params: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Recompute the block micro-batch by micro-batch and differentiate it.

        Args:
            grads: Gradient of each output tensor, or None.
            params: The block's trainable parameters.
            wanted: For each input, whether its gradient is needed.

        Returns:
            Gradients of the inputs and of the parameters. Those that several micro-batches share are summed in fp32.
        """
        if self._block.adapter_state() != self._adapters:
            raise RuntimeError(
                "the active adapters, or train/eval mode, changed between a block's forward and its "
                "backward; run backward before switching adapters"
            )
        inputs = [boundary.take() for boundary in self._boundaries]
        sums = _GradientSums(inputs, params, wanted, whole=len(self._rows) == 1)
        for rows, random in zip(self._rows, self._random, strict=True):
            cut = [
                value.detach().requires_grad_(want)
                for value, want in zip(self._call.cut_inputs(inputs, self._cut(rows)), wanted, strict=True)
            ]
            with torch.enable_grad(), restored(random, self._block.device), self._in_autocast():
                output = self._block.forward_in_visit(self._call.arguments(cut, self._cut(rows)))
            outputs = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
            del output
            pairs = [
                (value, self._call.cut_inputs([grad], self._cut(rows))[0])
                for value, grad in zip(outputs, grads, strict=True)
                if grad is not None and value.requires_grad
            ]
            del outputs
            if pairs:
                sums.add(rows, cut, [value for value, _ in pairs], [grad for _, grad in pairs])
            del pairs, cut
        del inputs
        result = sums.result()
        for boundary in self._boundaries:
            boundary.release()
        return result

    def _cut(self, rows: slice) -> slice | None:
        return None if len(self._rows) == 1 else rows

    @contextmanager
    def _in_autocast(self) -> Iterator[None]:
        device_type, enabled, dtype = self._autocast
        # Without its weight cache: a cast made in the forward carries no graph, and the recomputation needs one.
        with torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False):
            yield


class _GradientSums:
    """Gradients of inputs (by rows, or summed where one tensor serves all rows) and of parameters."""

    def __init__(
        self, inputs: Sequence[Tensor], params: Sequence[Tensor], wanted: Sequence[bool], *, whole: bool
    ) -> None:
        self._inputs, self._params, self._wanted, self._whole = inputs, params, wanted, whole
        self._input_grads: list[Tensor | None] = [None] * len(inputs)
        self._param_grads: list[Tensor | None] = [None] * len(params)

    def add(self, rows: slice, cut: Sequence[Tensor], outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        sought = [value for value, want in zip(cut, self._wanted, strict=True) if want]
        # autograd.grad, not backward: a parameter's hooks must fire once per step, after the sum.
        found = iter(torch.autograd.grad(outputs, [*sought, *self._params], grads, allow_unused=True))
        for index, want in enumerate(self._wanted):
            if want:
                self._add_input(index, rows, next(found))
        for index, grad in enumerate(found):
            self._param_grads[index] = self._sum(self._param_grads[index], grad)

    def _add_input(self, index: int, rows: slice, grad: Tensor | None) -> None:
        value = self._inputs[index]
        if grad is None or self._whole or grad.shape == value.shape:
            self._input_grads[index] = self._sum(self._input_grads[index], grad)
            return
        if self._input_grads[index] is None:
            self._input_grads[index] = torch.zeros_like(value)
        self._input_grads[index][rows] = grad  # type: ignore[index]

    def _sum(self, total: Tensor | None, grad: Tensor | None) -> Tensor | None:
        if grad is None or self._whole:
            return total if grad is None else grad
        grad = grad if grad.dtype == torch.float64 else grad.float()
        return grad if total is None else total.add_(grad)

    def result(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        def typed(grads: list[Tensor | None], values: Sequence[Tensor]) -> list[Tensor | None]:
            return [None if grad is None else grad.to(value.dtype) for grad, value in zip(grads, values, strict=True)]

        return typed(self._input_grads, self._inputs), _off_the_heap(typed(self._param_grads, self._params))


class BlockFunction(torch.autograd.Function):
    """Ties a recorded call into autograd. Inputs: the call's differentiable tensors, then trainable parameters."""

    @staticmethod
    def forward(ctx: FunctionCtx, enter: BlockEntry, num_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the call in a visit of its block."""
        ctx.set_materialize_grads(False)
        ctx.enter, ctx.num_inputs = enter, num_inputs  # type: ignore[attr-defined]
        ctx.params = tensors[num_inputs:]  # type: ignore[attr-defined]
        outputs = enter.run_forward(tensors[:num_inputs])
        ctx.mark_non_differentiable(*(value for value in outputs if not value.is_floating_point()))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Visit the block again and differentiate the recomputed call."""
        num_inputs = ctx.num_inputs  # type: ignore[attr-defined]
        wanted = ctx.needs_input_grad[2 : 2 + num_inputs]  # type: ignore[attr-defined]
        inputs, params = ctx.enter.run_backward(grads, ctx.params, wanted)  # type: ignore[attr-defined]
        return (None, None, *inputs, *params)


class BlockEntry(Protocol):
    """Visits a block and runs a recorded call in it."""

    def run_forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Visit the block and run the call's forward."""

    def run_backward(
        self, grads: Sequence[Tensor | None], params: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Visit the block and run the call's backward."""


def _off_the_heap(grads: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients of one block's parameters in one piece of memory of their own, on a CPU.

    They live until the optimizer step. Small and left on the heap between a block's temporaries, they would keep its
    pages from being used again, and each further block would cost as much memory as the first.
    """
    on_cpu = [grad for grad in grads if grad is not None and grad.device.type == "cpu"]
    if not on_cpu:
        return grads
    memory = StagingBuffer(sum(_aligned(grad) for grad in on_cpu)).tensor
    moved: list[Tensor | None] = []
    start = 0
    for grad in grads:
        if grad is None:
            moved.append(None)
            continue
        place = memory[start : start + grad.numel() * grad.element_size()].view(grad.dtype).view(grad.shape)
        moved.append(place.copy_(grad))
        start += _aligned(grad)
    return moved


def _aligned(grad: Tensor) -> int:
    return -(-grad.numel() * grad.element_size() // _ALIGN_BYTES) * _ALIGN_BYTES


def _join(parts: list[object]) -> object:
    if len(parts) == 1 or not isinstance(parts[0], Tensor):
        return parts[0]
    return torch.cat(parts)  # type: ignore[arg-type]


def _autocast_state(device_type: str) -> tuple[str, bool, torch.dtype]:
    return device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)


__all__ = ["BlockEntry", "BlockFunction", "RecordedCall", "VisitedBlock"]
