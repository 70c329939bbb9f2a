"""How sequences go through a block, and are differentiated later: whole, or in chunks along the sequence.

The autograd Function of one decoder block: forward without a graph, backward by exact recomputation.

One call of one block of one runtime, visited for its forward and again for its backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lowmem import host_memory
from lowmem.host_memory import products_for
from lowmem.internals.torch import TreeSpec, is_sole_owner, tree_flatten, tree_leaves, tree_unflatten
from lowmem.internals.transformers import RouterLogits
from lowmem.models.blocks import refuse_router_logits_in_chunks
from lowmem.streaming.boundary import Boundary, BoundaryTier, DeviceTier, NoTier
from lowmem.streaming.call import BlockCall, Split, micro_batches
from lowmem.streaming.chunking.carrier import KVCarrier, Workspace
from lowmem.streaming.chunking.chunks import (
    CallArguments,
    ChunkedCall,
    ChunkRecord,
    NotChunkable,
    RunBlock,
    backward_chunks,
    forward_chunks,
)
from lowmem.streaming.recompute import RandomState, RandomTape, TakeGradient, differentiate, restore, restored
from offload import StagingBuffer

if TYPE_CHECKING:
    from lowmem.streaming.runtime import Runtime
    from lowmem.streaming.visits import TrainingPass


Gradients = tuple[list[Tensor | None], list[Tensor | None]]
"""Of the inputs, and of the parameters."""


class RowsRecord(Protocol):
    """What a forward of some sequences left for their backward."""

    def forward(self, arguments: CallArguments) -> object:
        """Run them without a graph; answers the block's output."""

    def backward(
        self,
        arguments: CallArguments,
        *,
        inputs: Sequence[Tensor],
        wanted: Sequence[bool],
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        into: Tensor | None = None,
        take: TakeGradient | None = None,
    ) -> Gradients:
        """Run them again, with a graph, and differentiate them.

        Args:
            arguments: As in the forward; `inputs` are among them.
            inputs: The tensors that autograd knows, the hidden states first.
            wanted: For each input, whether its gradient is needed.
            params: The block's trainable parameters.
            grads: Gradient of each tensor of the output, or None.
            into: Where the first input's gradient may be written, to save memory.
            take: Gets the parameters' gradients, which are not answered then.
        """


class WholeRows:
    """All tokens at once."""

    def __init__(self, run: RunBlock, *, tape: RandomTape) -> None:
        self._run, self._tape = run, tape
        self._random: RandomState | None = None

    def forward(self, arguments: CallArguments) -> object:
        """As in `RowsRecord`."""
        self._random = self._tape.note()
        return self._run(arguments)

    def backward(
        self,
        arguments: CallArguments,
        *,
        inputs: Sequence[Tensor],
        wanted: Sequence[bool],
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        into: Tensor | None = None,
        take: TakeGradient | None = None,
    ) -> Gradients:
        """As in `RowsRecord`; `into` is not used."""
        del into
        assert self._random is not None
        for value, want in zip(inputs, wanted, strict=True):
            value.requires_grad_(want)
        with torch.enable_grad(), restored(self._random, self._tape.device):
            output = self._run(arguments)
        del arguments
        outputs = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
        del output
        pairs = [
            (value, grad)
            for value, grad in zip(outputs, grads, strict=True)
            if grad is not None and value.requires_grad
        ]
        del outputs
        if not pairs:
            return [None] * len(inputs), [None] * len(params)
        sought = [value for value, want in zip(inputs, wanted, strict=True) if want]
        values, arrived = [value for value, _ in pairs], [grad for _, grad in pairs]
        del pairs
        found, param_grads = differentiate(values, arrived, inputs=sought, params=params, take=take)
        gradients = iter(found)
        return [next(gradients) if want else None for want in wanted], param_grads


class ChunkedRows:
    """Chunk by chunk along the sequence; whole where the call turns out not to allow that."""

    def __init__(
        self,
        run: RunBlock,
        *,
        raw_forward: Callable[..., object],
        chunk_tokens: int,
        workspace: Workspace,
        tape: RandomTape,
        keep: Callable[[Tensor], Boundary] | None = None,
    ) -> None:
        """Prepare a forward.

        Args:
            run: Runs the block.
            raw_forward: Its forward without wrappers, for its parameters' names.
            chunk_tokens: Tokens of a chunk.
            workspace: Where keys and values go for the time of a visit.
            tape: Notes the generators' states.
            keep: Keeps a copy of keys and values for the backward; computed again there if not given.
        """
        self._run, self._tape = run, tape
        self._raw_forward, self._workspace, self._keep = raw_forward, workspace, keep
        self._keys_values: list[tuple[Boundary, Boundary]] = []
        self._chunk_tokens = chunk_tokens
        self._record: ChunkRecord | None = None
        self._whole: WholeRows | None = None

    def forward(self, arguments: CallArguments) -> object:
        """As in `RowsRecord`."""
        random = self._tape.note()
        try:
            forward = forward_chunks(
                self._run,
                ChunkedCall(self._raw_forward, *arguments),
                chunk_tokens=self._chunk_tokens,
                device=self._tape.device,
                workspace=self._workspace,
                tape=self._tape,
            )
        except NotChunkable:
            restore(random, self._tape.device)
            self._whole = WholeRows(self._run, tape=self._tape)
            return self._whole.forward(arguments)
        self._record = forward.record
        if self._keep is not None:
            self._keys_values = [(self._keep(key), self._keep(value)) for key, value in forward.keys_values]
        return forward.output

    def _give_keys_values(self, carrier: KVCarrier) -> None:
        for number, kept in enumerate(self._keys_values):
            carrier.put(number, *(boundary.take() for boundary in kept))
            for boundary in kept:
                boundary.release()

    def backward(
        self,
        arguments: CallArguments,
        *,
        inputs: Sequence[Tensor],
        wanted: Sequence[bool],
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        into: Tensor | None = None,
        take: TakeGradient | None = None,
    ) -> Gradients:
        """As in `RowsRecord`."""
        if self._whole is not None:
            return self._whole.backward(arguments, inputs=inputs, wanted=wanted, params=params, grads=grads, take=take)
        assert self._record is not None
        return backward_chunks(
            self._run,
            ChunkedCall(self._raw_forward, *arguments),
            inputs=inputs,
            wanted=wanted,
            params=params,
            grads=grads,
            record=self._record,
            device=self._tape.device,
            workspace=self._workspace,
            into=into,
            take=take,
            give_keys_values=self._give_keys_values if self._keys_values else None,
        )


_ALIGN_BYTES = 64


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


class VisitedCall:
    """One recorded call of one block of one runtime."""

    def __init__(
        self,
        runtime: Runtime,
        index: int,
        call: BlockCall,
        split: Split,
        *,
        beside: Callable[[], None] | None = None,
        keeps: bool = True,
    ) -> None:
        """Prepare a call; nothing is run.

        Args:
            runtime: Lends the block its weights.
            index: Number of the block.
            call: Its arguments.
            split: How it goes through the block.
            beside: What to run in the forward's visit after it.
            keeps: Whether a backward will follow.
        """
        self.device, self.tape, self.workspace = runtime.device, runtime.tape, runtime.chunk_workspace
        self._runtime, self._index = runtime, index
        self._num_tokens = call.num_tokens
        self._block = runtime.blocks[index].block
        self.raw_forward = self._block.raw_forward
        self._recorded, self._beside = RecordedCall(self, call, split=split), beside
        self._tier: BoundaryTier = runtime.boundaries if keeps else NoTier()
        self._pass: TrainingPass | None = None

    def run_forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Visit the block and run the forward, and what is to run beside it."""
        with self._runtime.visit(self._index, "forward", num_tokens=self._num_tokens):
            outputs = self.forward_here(inputs)
            if self._beside is not None:
                self._beside()
        self._beside = None
        if self._index == self._runtime.num_blocks - 1:
            self._runtime.rest()
        return outputs

    def forward_here(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the forward in the visit that is under way."""
        if not isinstance(self._tier, NoTier):
            self._pass = self._runtime.record(self._index)
        return self._recorded.forward(inputs)

    def run_backward(
        self, grads: Sequence[Tensor | None], params: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Visit the block and run the backward."""
        if self._index == self._runtime.num_blocks - 1:
            self._runtime.resume(grads[0])
        with self._runtime.visit(self._index, "backward", num_tokens=self._num_tokens):
            if self._runtime.full is None:
                return self._recorded.backward(grads, params, wanted)
            # Autograd holds the absent weights; what is differentiated are those that this visit has bound.
            bound = self._runtime.trained_weights(self._index)
            keys = list(bound)
            with self._runtime.full.taking_gradients(self._index) as take:
                inputs, _ = self._recorded.backward(
                    grads, list(bound.values()), wanted, take=lambda number, grad: take(keys[number], grad)
                )
            if self.device.type == "cpu":
                # Stand-ins of gradients live on between temporaries as large as weights, which the heap would keep.
                host_memory.give_back_freed()
            return inputs, [None] * len(params)

    def rebuild(self, tensors: Sequence[Tensor]) -> object:
        """The block's output from its tensors."""
        return self._recorded.rebuild(tensors)

    def forward_in_visit(self, arguments: tuple[tuple[object, ...], dict[str, object]]) -> object:
        """Run the block's raw forward; its weights are bound."""
        args, kwargs = arguments
        return self._block.raw_forward(self._block.module, *args, **kwargs)

    def adapter_state(self) -> tuple[object, ...]:
        """Which adapters are active and which modules train: what a recomputation must find unchanged."""
        return tuple(
            (module.training, getattr(module, "_disable_adapters", None), str(getattr(module, "_active_adapter", None)))
            for module in self._block.module.modules()
        )

    def keep(self, value: Tensor) -> Boundary:
        """Put a boundary activation into its tier."""
        return self._tier.keep(value)

    def keep_copy(self, value: Tensor) -> Boundary:
        """The same of a tensor whose memory will be written again."""
        return self._tier.keep(value.clone() if isinstance(self._tier, DeviceTier) else value)
