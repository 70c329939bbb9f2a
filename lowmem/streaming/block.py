"""One decoder block of a training forward: run without a graph, and repeated exactly, with one, for its backward.

Sequences go through a block in micro-batches, and each micro-batch by one of two strategies: all tokens at once
(`WholeRows`), or in chunks along the sequence (`ChunkedRows`). Hidden states are (sequences, tokens, hidden).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import count

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lowmem import host_memory
from lowmem.errors import UnsupportedError
from lowmem.host_memory import products_for
from lowmem.internals.hooks import BlockHooks
from lowmem.internals.peft import Settings, changed_module, inputs_cast_once, settings_in
from lowmem.internals.torch import (
    TreeSpec,
    is_sole_owner,
    parameters_in,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)
from lowmem.internals.transformers import CollectedOutputs
from lowmem.internals.unread import Keeping, PuttingOff, is_ever_kept, is_worth_putting_off
from lowmem.planning.read_model import features_of, is_linear
from lowmem.planning.shapes import itemsize
from lowmem.streaming.boundary import Boundary, DeviceBoundaries
from lowmem.streaming.call import BlockCall, CallArguments, Split, has_cache, micro_batches, without_cache
from lowmem.streaming.chunking.attention import find_mask_tiles
from lowmem.streaming.chunking.carrier import KVCarrier, Workspace
from lowmem.streaming.chunking.chunks import (
    ChunkedCall,
    ChunkRecord,
    NotChunkable,
    RunBlock,
    backward_chunks,
    forward_chunks,
)
from lowmem.streaming.chunking.mask import CausalMask
from lowmem.streaming.recompute import (
    Gradients,
    GradientSums,
    KeptProducts,
    RandomState,
    RandomTape,
    Sought,
    TakeGradient,
    differentiate,
    restore,
    restored,
)
from lowmem.streaming.runtime import Phase, Runtime, TrainingPass

_MOST_KEPT = 1 << 24
"""More products than one call of a block keeps."""


class WholeRows:
    """Some sequences of a call, all tokens at once."""

    def __init__(self, tape: RandomTape) -> None:
        self._tape = tape
        self._random: RandomState | None = None

    def forward(self, run: RunBlock, arguments: CallArguments) -> object:
        """Run them without a graph; returns the block's output."""
        self._random = self._tape.note()
        return run(arguments)

    def backward(self, run: RunBlock, arguments: CallArguments, sought: Sought) -> Gradients:
        """Run them again, with a graph, and differentiate them.

        Args:
            run: Runs the block.
            arguments: As in the forward; the inputs are among them.
            sought: What they are differentiated for.
        """
        assert self._random is not None
        inputs, wanted, params = sought.inputs, sought.wanted, sought.params
        for value, want in zip(inputs, wanted, strict=True):
            value.requires_grad_(want)
        with torch.enable_grad(), restored(self._random, self._tape.device):
            output = run(arguments)
        del arguments
        outputs = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
        del output
        pairs = [
            (value, grad)
            for value, grad in zip(outputs, sought.grads, strict=True)
            if grad is not None and value.requires_grad
        ]
        del outputs
        if not pairs:
            return [None] * len(inputs), [None] * len(params)
        leaves = [value for value, want in zip(inputs, wanted, strict=True) if want]
        values, arrived = [value for value, _ in pairs], [grad for _, grad in pairs]
        del pairs
        found, param_grads = differentiate(values, arrived, inputs=leaves, params=params, take=sought.take)
        gradients = iter(found)
        return [next(gradients) if want else None for want in wanted], param_grads


class ChunkedRows:
    """Some sequences of a call, chunk by chunk along the sequence; whole where the call turns out not to allow that.

    Args:
        tape: Notes the generators' states.
        raw_forward: The block's forward without wrappers, for its parameters' names.
        chunk_tokens: Tokens of a chunk.
        workspace: Where keys and values go for the time of a visit.
        keep: Keeps a copy of keys and values for the backward; computed again there if not given.
    """

    def __init__(
        self,
        tape: RandomTape,
        *,
        raw_forward: Callable[..., object],
        chunk_tokens: int,
        workspace: Workspace,
        keep: Callable[[Tensor], Boundary] | None = None,
    ) -> None:
        self._tape, self._raw_forward, self._workspace, self._keep = tape, raw_forward, workspace, keep
        self._chunk_tokens = chunk_tokens
        self._keys_values: list[tuple[Boundary, Boundary]] = []
        self._record: ChunkRecord | None = None
        self._whole: WholeRows | None = None

    def forward(self, run: RunBlock, arguments: CallArguments) -> object:
        """Run them without a graph; returns the block's output for the whole sequences."""
        random = self._tape.note()
        try:
            forward = forward_chunks(
                run,
                ChunkedCall(self._raw_forward, *arguments),
                chunk_tokens=self._chunk_tokens,
                device=self._tape.device,
                workspace=self._workspace,
                tape=self._tape,
            )
        except NotChunkable:
            restore(random, self._tape.device)
            self._whole = WholeRows(self._tape)
            return self._whole.forward(run, arguments)
        self._record = forward.record
        if self._keep is not None:
            self._keys_values = [(self._keep(key), self._keep(value)) for key, value in forward.keys_values]
        return forward.output

    def backward(self, run: RunBlock, arguments: CallArguments, sought: Sought) -> Gradients:
        """Run them again, with a graph, and differentiate them: as `WholeRows.backward`."""
        if self._whole is not None:
            return self._whole.backward(run, arguments, sought)
        assert self._record is not None
        return backward_chunks(
            run,
            ChunkedCall(self._raw_forward, *arguments),
            sought,
            record=self._record,
            device=self._tape.device,
            workspace=self._workspace,
            give_keys_values=self._give_keys_values if self._keys_values else None,
        )

    def _give_keys_values(self, carrier: KVCarrier) -> None:
        for number, kept in enumerate(self._keys_values):
            carrier.put(number, *(boundary.take() for boundary in kept))
            for boundary in kept:
                boundary.release()


class RecordedCall:
    """One call of one block, and what it takes to repeat it exactly.

    Owned by the graph that the call is a node of; holds the call's inputs, in their tier, until the backward has run.

    Args:
        runtime: Lends the block its weights.
        index: Number of the block.
        call: Its arguments, the inputs taken out.
        follow: What to run after it in the same visit.
        keeps: Whether a backward will follow.
    """

    def __init__(
        self,
        runtime: Runtime,
        index: int,
        call: BlockCall,
        *,
        follow: Callable[[], None] | None = None,
        keeps: bool = True,
    ) -> None:
        self._runtime, self._index, self._call = runtime, index, call
        self.trains_absent = runtime.full is not None
        self._follow, self._keeps = follow, keeps
        self._block = runtime.blocks[index].block
        self._split = runtime.choose_split(call)
        self._rows = list(micro_batches(call.batch_size, self._split.micro_batch))
        self._records: list[tuple[WholeRows | ChunkedRows, KeptProducts | None]] = []
        self._boundaries: list[Boundary] = []
        self._turns: Iterator[int] = count()
        self._pass: TrainingPass | None = None
        self._ready: tuple[Tensor, ...] | None = None
        kind = runtime.device.type
        self._autocast = kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self._settings = settings_in(self._block.module)
        self._hooks = BlockHooks(self._block.module, name=self._block.name)
        if keeps:
            _mention_hooks(runtime, self._hooks)
        self._collected = CollectedOutputs()
        _refuse_collecting_in_chunks(self._collected, self._split)
        self._output_spec: TreeSpec | None = None
        self._tensor_leaves: list[int] = []
        self._other_leaves: list[object] = []

    def give_outputs(self, outputs: tuple[Tensor, ...]) -> None:
        """Let `run_forward` return these, of a forward that has run already."""
        self._ready = outputs

    def run_forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Visit the block and run the forward, and what follows it."""
        if self._ready is not None:
            outputs, self._ready = self._ready, None
            return outputs
        with self._runtime.visit(self._index, "forward", num_tokens=self._call.num_tokens):
            outputs = self.forward(inputs)
            if self._follow is not None:
                self._follow()
        self._follow = None
        if self._index == self._runtime.num_blocks - 1:
            self._runtime.make_room_for_head(sum(output.nbytes for output in outputs))
        return outputs

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the block over the micro-batches in the visit under way, without a graph; only its inputs are kept.

        Args:
            inputs: The call's differentiable inputs, the hidden states (batch, tokens, hidden) first.

        Returns:
            The tensors of its output; `rebuild` puts them back into the output's structure.
        """
        if self._keeps:
            self._pass = self._runtime.record(self._index)
            # Calls come back in the reverse order, and what is kept of one in the order in which it was made.
            self._turns = count(next(self._runtime.num_calls) * _MOST_KEPT, -1)
        parts: list[list[object]] = []
        for rows in self._rows:
            record, kept = self._new_record(), self._new_products(rows)
            cut = self._call.cut_inputs(inputs, self._cut(rows))
            run = partial(self._run, rows=self._cut(rows), again=False, kept=kept)
            leaves, self._output_spec = tree_flatten(record.forward(run, self._call.arguments(cut, self._cut(rows))))
            self._records.append((record, kept))
            parts.append(leaves)
        if self._keeps:
            # Only after the whole call ran: a failing forward leaves nothing behind.
            self._boundaries = [self._runtime.boundaries.keep(value) for value in inputs]
        leaves = [_join([part[index] for part in parts]) for index in range(len(parts[0]))]
        self._tensor_leaves = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._other_leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def rebuild(self, tensors: Sequence[Tensor]) -> object:
        """The block's output from its tensors."""
        leaves = list(self._other_leaves)
        for index, tensor in zip(self._tensor_leaves, tensors, strict=True):
            leaves[index] = tensor
        assert self._output_spec is not None
        return self._collected.give(tree_unflatten(leaves, self._output_spec))

    def run_backward(
        self, grads: Sequence[Tensor | None], params: Sequence[Tensor], wanted: Sequence[bool]
    ) -> Gradients:
        """Visit the block and run the backward: arguments and result as `backward`."""
        runtime, full = self._runtime, self._runtime.full
        if self._index == runtime.num_blocks - 1 and grads[0] is not None:
            runtime.trim_after_head(grads[0].nbytes)
        with runtime.visit(self._index, "backward", num_tokens=self._call.num_tokens):
            if full is None:
                return self.backward(grads, params, wanted)
            # Autograd holds the absent weights; what is differentiated are those that this visit has bound.
            bound = runtime.trained_weights(self._index)
            keys = list(bound)
            in_parts = len(self._rows) > 1 or self._split.chunk_tokens is not None
            with full.taking_gradients(self._index, in_parts=in_parts) as take:
                inputs, _ = self.backward(
                    grads, list(bound.values()), wanted, take=lambda number, grad: take(keys[number], grad)
                )
            if runtime.device.type == "cpu":
                # Stand-ins of gradients live on between temporaries as large as weights, which the heap would keep.
                host_memory.give_back_freed()
            return inputs, [None] * len(params)

    def backward(
        self,
        grads: Sequence[Tensor | None],
        params: Sequence[Tensor],
        wanted: Sequence[bool],
        *,
        take: TakeGradient | None = None,
    ) -> Gradients:
        """Recompute the block micro-batch by micro-batch in the visit under way, and differentiate it.

        Args:
            grads: Gradient of each output tensor, or None; that of the hidden states is (batch, tokens, hidden).
            params: The block's trainable parameters.
            wanted: For each input, whether its gradient is needed.
            take: Gets the parameters' gradients, part by part; they are not returned then.

        Returns:
            Gradients of the inputs and of the parameters. Those that several micro-batches share are summed in fp32.
        """
        _refuse_changed(self._block.name, self._block.module, self._settings)
        inputs = [boundary.take() for boundary in self._boundaries]
        whole = len(self._rows) == 1
        sums = _RowGradients(inputs, params)
        # What arrived for the output may become what leaves for the input, where nobody else looks at it.
        into = grads[0] if whole and grads[0] is not None and is_sole_owner(grads[0], like=inputs[0]) else None
        for rows, (record, kept) in zip(self._rows, self._records, strict=True):
            cut = [value.detach() for value in self._call.cut_inputs(inputs, self._cut(rows))]
            own_grads = [None if grad is None else self._call.cut(grad, self._cut(rows)) for grad in grads]
            found = record.backward(
                partial(self._run, rows=self._cut(rows), again=True, kept=kept),
                self._call.arguments(cut, self._cut(rows)),
                Sought(inputs=cut, wanted=wanted, params=params, grads=own_grads, into=into, take=take),
            )
            if kept is not None:
                kept.release()
            sums.add(self._cut(rows), *found)
            del cut, own_grads, found
        del inputs
        result = sums.result()
        for boundary in self._boundaries:
            boundary.release()
        return result

    def _new_record(self) -> WholeRows | ChunkedRows:
        runtime, split = self._runtime, self._split
        if split.chunk_tokens is None:
            return WholeRows(runtime.tape)
        return ChunkedRows(
            runtime.tape,
            raw_forward=self._block.raw_forward,
            chunk_tokens=split.chunk_tokens,
            workspace=runtime.chunk_workspace,
            keep=partial(_keep_copy, runtime) if self._keeps and split.keeps_keys_values else None,
        )

    def _new_products(self, rows: slice) -> KeptProducts | None:
        """What keeps products of some sequences; None where they are computed again."""
        products = self._runtime.products
        if products is None or not self._keeps or self._split.chunk_tokens is not None:
            return None
        num_tokens = self._call.num_tokens // self._call.batch_size * (rows.stop - rows.start)
        layers = (slot.module for slot in self._runtime.blocks[self._index].slots if slot.attribute == "weight")
        sizes = (features_of(layer) for layer in layers if is_linear(layer))
        widths = sum(num_out for num_in, num_out in sizes if is_ever_kept(num_in, num_out))
        unread = self._runtime.unread_products.setdefault(self._index, set())
        room_bytes = num_tokens * widths * itemsize(self._runtime.plan.compute_dtype)
        return KeptProducts(products.keep, self._turns, room_bytes=room_bytes, unread=unread)

    def _run(
        self, arguments: CallArguments, *, rows: slice | None, again: bool, kept: KeptProducts | None = None
    ) -> object:
        """Run the block's raw forward on some sequences, as the call found the world."""
        args, kwargs = arguments
        hidden = next(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
        hooks = self._hooks.in_recomputation(rows) if again else self._hooks.in_forward(rows, guards=self._keeps)
        kind, enabled, dtype = self._autocast
        # Without its weight cache: a cast made in the forward carries no graph, and the recomputation needs one.
        autocast = torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
        # What a user's hook sees stays as it is.
        is_seen, num_tokens = bool(self._hooks.of_users), hidden.shape[:2].numel()
        casts = inputs_cast_once(self._block.module, hidden.device) if enabled and not is_seen else nullcontext()
        is_worth_it = (again or kept is not None) and not is_seen and self._is_worth_putting_off(num_tokens)
        later = PuttingOff(kept) if again and is_worth_it else None
        keeping = Keeping(kept) if not again and is_worth_it and kept is not None else nullcontext()
        products = products_for(hidden.device, self._weight_shapes(), num_tokens=num_tokens)
        with autocast, casts, later or keeping, products, hooks:
            forward = partial(self._block.raw_forward, self._block.module, *args, **kwargs)
            output = self._collected.run(forward, hidden.shape[0])
        if later is not None:
            later.give_up(output)
        return output

    def _is_worth_putting_off(self, num_tokens: int) -> bool:
        return is_worth_putting_off(self._runtime.device, self._weight_shapes(), num_tokens=num_tokens)

    def _weight_shapes(self) -> Iterator[torch.Size]:
        return (slot.shape for slot in self._runtime.blocks[self._index].slots)

    def _cut(self, rows: slice) -> slice | None:
        return None if len(self._rows) == 1 else rows


def _refuse_changed(name: str, block: torch.nn.Module, before: Settings) -> None:
    now = settings_in(block)
    if now == before:
        return
    changed = changed_module(block, before, now) or "its modules"
    raise RuntimeError(
        f"{name}.{changed}: the active adapters, their settings, or train/eval mode, changed between a block's forward "
        "and its backward; run backward before switching adapters"
    )


def _refuse_collecting_in_chunks(collected: CollectedOutputs, split: Split) -> None:
    inside = [key for key in collected.keys if key != "hidden_states"]
    if inside and split.chunk_tokens is not None:
        without = (
            "router_aux_loss_coef=0.0 in the trainer's configuration (TRL asks for router logits otherwise) or "
            "output_router_logits=False in the model's: training without the auxiliary loss"
        )
        raise UnsupportedError(
            f"output_{inside[0]}=True with chunks of {split.chunk_tokens} tokens",
            reason=f"{inside[0].replace('_', ' ')} are collected inside the blocks for whole sequences",
            instead=f"{without if inside[0] == 'router_logits' else f'output_{inside[0]}=False'}; or shorter sequences",
        )


def _mention_hooks(runtime: Runtime, hooks: BlockHooks) -> None:
    """Say once of a model that hooks inside its blocks run where a user may not expect it."""
    if not runtime.has_mentioned_hooks and hooks.of_users:
        runtime.has_mentioned_hooks = True
        warnings.warn(
            f"the hook {hooks.of_users[0]} is inside a streamed block: it runs in the forward and again when the block "
            "is recomputed for its backward, on as many sequences or tokens as go through the block at a time; what it "
            "captures has no gradient",
            stacklevel=2,
        )


def _keep_copy(runtime: Runtime, value: Tensor) -> Boundary:
    """Keep a tensor whose memory will be written again."""
    return runtime.boundaries.keep(value.clone() if isinstance(runtime.boundaries, DeviceBoundaries) else value)


class _RowGradients:
    """Gradients of inputs (by rows, or summed where one tensor serves all rows) and of parameters."""

    def __init__(self, inputs: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        self._inputs, self._params = inputs, params
        self._whole: Gradients | None = None
        self._by_row: dict[int, Tensor] = {}
        self._shared, self._param_sums = GradientSums(len(inputs)), GradientSums(len(params))

    def add(self, rows: slice | None, inputs: list[Tensor | None], params: list[Tensor | None]) -> None:
        """Add what some rows gave; None for all rows, whose gradients are nobody's sum."""
        if rows is None:
            self._whole = (inputs, params)
            return
        for number, (value, grad) in enumerate(zip(self._inputs, inputs, strict=True)):
            if grad is None or grad.shape == value.shape:
                self._shared.add(number, grad)
                continue
            if number not in self._by_row:
                self._by_row[number] = torch.zeros_like(value)
            self._by_row[number][rows] = grad
        self._param_sums.add_all(params)

    def result(self) -> Gradients:
        if self._whole is not None:
            return _typed(self._whole[0], self._inputs), _typed(self._whole[1], self._params)
        shared = self._shared.like(self._inputs)
        inputs = [self._by_row.get(number, grad) for number, grad in enumerate(shared)]
        return inputs, self._param_sums.like(self._params)


def _typed(grads: Sequence[Tensor | None], values: Sequence[Tensor]) -> list[Tensor | None]:
    return [None if grad is None else grad.to(value.dtype) for grad, value in zip(grads, values, strict=True)]


class BlockFunction(torch.autograd.Function):
    """Ties a recorded call into autograd. Inputs: the call's differentiable tensors, then trainable parameters."""

    @staticmethod
    def forward(ctx: FunctionCtx, call: RecordedCall, num_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the call in a visit of its block."""
        ctx.set_materialize_grads(False)
        ctx.call, ctx.num_inputs = call, num_inputs  # type: ignore[attr-defined]
        # Saved, so that autograd notices a write to them before the backward. Absent weights are not in memory.
        params = tensors[num_inputs:]
        ctx.absent = params if call.trains_absent else ()  # type: ignore[attr-defined]
        ctx.save_for_backward(*(() if call.trains_absent else params))
        outputs = call.run_forward(tensors[:num_inputs])
        ctx.mark_non_differentiable(*(value for value in outputs if not value.is_floating_point()))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Visit the block again and differentiate the recomputed call."""
        num_inputs = ctx.num_inputs  # type: ignore[attr-defined]
        wanted = ctx.needs_input_grad[2 : 2 + num_inputs]  # type: ignore[attr-defined]
        held = ctx.absent or ctx.saved_tensors  # type: ignore[attr-defined]
        inputs, params = ctx.call.run_backward(grads, held, wanted)  # type: ignore[attr-defined]
        return (None, None, *inputs, *host_memory.off_the_heap(params))


def _join(parts: list[object]) -> object:
    if len(parts) == 1 or not isinstance(parts[0], Tensor):
        return parts[0]
    return torch.cat(parts)  # type: ignore[arg-type]


def run_block(
    runtime: Runtime,
    index: int,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    *,
    follow: Callable[[], None] | None = None,
    phase: Phase = "no_grad",
) -> object:
    """Visit a block and run it, recorded where gradients will be asked for.

    Args:
        runtime: Lends the block its weights.
        index: Number of the block.
        args: Positional arguments of its forward, the hidden states (batch, tokens, hidden) first.
        kwargs: Keyword arguments.
        follow: What to run in the same visit after it.
        phase: What a visit without gradients is for: "forward" where what follows will have a backward.
    """
    call = None
    if torch.is_grad_enabled():
        kwargs = without_cache(kwargs)
        call = BlockCall(args, kwargs)
        params = [param for param in parameters_in(runtime.modules[index]) if param.requires_grad]
        inputs = call.take_inputs()
        _prepare_masks(runtime, call, (*args, *kwargs.values()))
        if params or any(value.requires_grad for value in inputs):
            recorded = RecordedCall(runtime, index, call, follow=follow)
            outputs = BlockFunction.apply(recorded, len(inputs), *inputs, *params)  # type: ignore[no-untyped-call]
            return recorded.rebuild(outputs)
    elif not has_cache(kwargs):
        _prepare_masks(runtime, BlockCall(args, kwargs), (*args, *kwargs.values()))
    shape = _token_shape(args, kwargs)
    with torch.no_grad(), runtime.visit(index, phase, num_tokens=shape.numel() if shape else 0):
        output = run_here(runtime, index, args, kwargs)
        if follow is not None:
            follow()
        return output


def _prepare_masks(runtime: Runtime, call: BlockCall, values: Sequence[object]) -> None:
    """Find what a device has to be asked about the masks of a call, before the block is visited."""
    masks = [value for value in values if isinstance(value, CausalMask)]
    if runtime.device.type != "cpu" and masks:
        split = runtime.choose_split(call)
        rows = list(micro_batches(call.batch_size, split.micro_batch))
        find_mask_tiles(masks, rows, chunk_tokens=split.chunk_tokens)


def run_here(runtime: Runtime, index: int, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
    """Run a block without gradients in the visit under way."""
    block = runtime.blocks[index].block
    forward = partial(block.raw_forward, block.module)
    if not has_cache(kwargs):
        call = BlockCall(args, kwargs)
        if runtime.choose_split(call) != Split():
            recorded = RecordedCall(runtime, index, call, keeps=False)
            return recorded.rebuild(recorded.forward(call.take_inputs()))
    if runtime.generation is None:
        return forward(*args, **kwargs)
    in_chunks = None
    shape = _token_shape(args, kwargs)
    if has_cache(kwargs) and shape:
        chunk_tokens = runtime.choose_split.chunk_for(shape[-1], num_tokens=shape.numel())
        if chunk_tokens is not None:
            in_chunks = partial(_in_chunks, runtime, block.raw_forward, chunk_tokens)
    return runtime.generation.run(forward, args, kwargs, block=index, rows=runtime.rows, in_chunks=in_chunks)


def _token_shape(args: Sequence[object], kwargs: Mapping[str, object]) -> torch.Size:
    """(batch, tokens) of a call."""
    return next((leaf.shape[:2] for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)), torch.Size())


def _in_chunks(
    runtime: Runtime, raw_forward: Callable[..., object], chunk_tokens: int, run: RunBlock, arguments: CallArguments
) -> object:
    call, workspace = ChunkedCall(raw_forward, *arguments), runtime.chunk_workspace
    return forward_chunks(run, call, chunk_tokens=chunk_tokens, device=runtime.device, workspace=workspace).output
