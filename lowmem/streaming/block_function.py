"""The autograd Function of one decoder block: forward without a graph, backward by exact recomputation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from lowmem.models.blocks import refuse_router_logits_in_chunks
from lowmem.streaming.block_call import BlockCall, micro_batches
from lowmem.streaming.boundary import Boundary
from lowmem.streaming.differentiate import TakeGradient
from lowmem.streaming.kv_carrier import Workspace
from lowmem.streaming.ownership import is_sole_owner
from lowmem.streaming.random_state import RandomTape
from lowmem.streaming.router_logits import RouterLogits
from lowmem.streaming.row_records import ChunkedRows, RowsRecord, WholeRows
from lowmem.streaming.skinny import products_for
from offload import StagingBuffer

_ALIGN_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a call goes through its block."""

    micro_batch: int | None = None
    """Sequences at a time; None for all."""
    chunk_tokens: int | None = None
    """Tokens of each sequence at a time; None for all."""
    keeps_keys_values: bool = False
    """Whether keys and values wait for the backward as its inputs do, instead of being computed again."""


class VisitedBlock(Protocol):
    """What a recorded call needs of the runtime."""

    device: torch.device
    tape: RandomTape
    workspace: Workspace
    raw_forward: Callable[..., object]

    def forward_in_visit(self, arguments: tuple[tuple[object, ...], dict[str, object]]) -> object:
        """Run the block's raw forward; its weights are bound."""

    def adapter_state(self) -> tuple[object, ...]:
        """Which adapters are active and which modules train: what a recomputation must find unchanged."""

    def keep(self, value: Tensor) -> Boundary:
        """Put a boundary activation into its tier."""

    def keep_copy(self, value: Tensor) -> Boundary:
        """The same of a tensor whose memory will be written again."""


class RecordedCall:
    """One call of one block in a training forward: what its backward needs to repeat it exactly."""

    def __init__(self, block: VisitedBlock, call: BlockCall, *, split: Split) -> None:
        self._block, self._call, self._split = block, call, split
        self._rows = list(micro_batches(call.batch_size, split.micro_batch))
        self._records: list[RowsRecord] = []
        self._boundaries: list[Boundary] = []
        self._autocast = _autocast_state(block.device.type)
        self._adapters = block.adapter_state()
        self._routers = RouterLogits()
        if self._routers.wanted and split.chunk_tokens is not None:
            refuse_router_logits_in_chunks(split.chunk_tokens)
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
            record = self._new_record()
            cut = self._call.cut_inputs(inputs, self._cut(rows))
            leaves, self._output_spec = tree_flatten(record.forward(self._call.arguments(cut, self._cut(rows))))
            self._records.append(record)
            parts.append(leaves)
        # Each boundary is kept only after the whole call ran: a failing forward leaves nothing behind.
        self._boundaries = [self._block.keep(value) for value in inputs]
        leaves = [_join([part[index] for part in parts]) for index in range(len(parts[0]))]
        self._tensor_leaves = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._other_leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return tuple(leaves[index] for index in self._tensor_leaves)

    def _new_record(self) -> RowsRecord:
        if self._split.chunk_tokens is None:
            return WholeRows(self._run, tape=self._block.tape)
        return ChunkedRows(
            self._run,
            raw_forward=self._block.raw_forward,
            chunk_tokens=self._split.chunk_tokens,
            workspace=self._block.workspace,
            tape=self._block.tape,
            keep=self._block.keep_copy if self._split.keeps_keys_values else None,
        )

    def _run(self, arguments: tuple[tuple[object, ...], dict[str, object]]) -> object:
        hidden = next(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
        with self._in_autocast(), products_for(hidden.device, num_tokens=hidden.shape[:2].numel()):
            return self._routers.run(lambda: self._block.forward_in_visit(arguments), hidden.shape[0])

    def rebuild(self, tensors: Sequence[Tensor]) -> object:
        """The block's output from its tensors."""
        leaves = list(self._other_leaves)
        for index, tensor in zip(self._tensor_leaves, tensors, strict=True):
            leaves[index] = tensor
        assert self._output_spec is not None
        return self._routers.give(tree_unflatten(leaves, self._output_spec))

    def backward(
        self,
        grads: Sequence[Tensor | None],
        params: Sequence[Tensor],
        wanted: Sequence[bool],
        *,
        take: TakeGradient | None = None,
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Recompute the block micro-batch by micro-batch and differentiate it.

        Args:
            grads: Gradient of each output tensor, or None.
            params: The block's trainable parameters.
            wanted: For each input, whether its gradient is needed.
            take: Gets the parameters' gradients, part by part; they are not answered then.

        Returns:
            Gradients of the inputs and of the parameters. Those that several micro-batches share are summed in fp32.
        """
        if self._block.adapter_state() != self._adapters:
            raise RuntimeError(
                "the active adapters, or train/eval mode, changed between a block's forward and its "
                "backward; run backward before switching adapters"
            )
        inputs = [boundary.take() for boundary in self._boundaries]
        whole = len(self._rows) == 1
        sums = _GradientSums(inputs, params, whole=whole)
        # What arrived for the output may become what leaves for the input, where nobody else looks at it.
        into = grads[0] if whole and grads[0] is not None and is_sole_owner(grads[0], like=inputs[0]) else None
        for rows, record in zip(self._rows, self._records, strict=True):
            cut = [value.detach() for value in self._call.cut_inputs(inputs, self._cut(rows))]
            found = record.backward(
                self._call.arguments(cut, self._cut(rows)),
                inputs=cut,
                wanted=wanted,
                params=params,
                grads=[None if grad is None else self._call.cut_inputs([grad], self._cut(rows))[0] for grad in grads],
                into=into,
                take=take,
            )
            sums.add(rows, *found)
            del cut, found
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

    def __init__(self, inputs: Sequence[Tensor], params: Sequence[Tensor], *, whole: bool) -> None:
        self._inputs, self._params, self._whole = inputs, params, whole
        self._input_grads: list[Tensor | None] = [None] * len(inputs)
        self._param_grads: list[Tensor | None] = [None] * len(params)

    def add(self, rows: slice, inputs: Sequence[Tensor | None], params: Sequence[Tensor | None]) -> None:
        for index, grad in enumerate(inputs):
            if grad is not None:
                self._add_input(index, rows, grad)
        for index, grad in enumerate(params):
            self._param_grads[index] = self._sum(self._param_grads[index], grad)

    def _add_input(self, index: int, rows: slice, grad: Tensor) -> None:
        value = self._inputs[index]
        if self._whole or grad.shape == value.shape:
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

        return typed(self._input_grads, self._inputs), typed(self._param_grads, self._params)


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
        return (None, None, *inputs, *_off_the_heap(params))


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


__all__ = ["BlockEntry", "BlockFunction", "RecordedCall", "Split", "VisitedBlock"]
