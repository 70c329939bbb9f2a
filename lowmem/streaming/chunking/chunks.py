"""One decoder block's call along the sequence in chunks: exact, at the cost of one chunk's activations and the K/V.

Forward runs chunk after chunk without a graph and keeps keys and values while it lasts. Backward takes the keys and
values of all chunks again (leaving each forward as soon as they are known), then walks the chunks in reverse: a chunk
is run again with a graph over the kept prefix, and differentiated from its output's gradient together with the gradient
that later chunks left for its keys and values (Luo et al., "StreamBP", arXiv 2506.03077; gradients of keys and values
are summed in fp32 here).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem import host_memory
from lowmem.internals.torch import TreeSpec, tree_flatten, tree_unflatten
from lowmem.streaming.call import CACHE_NAMES, CallArguments
from lowmem.streaming.chunking.attention import ChunkMask
from lowmem.streaming.chunking.carrier import KeysTaken, KVCarrier, Workspace
from lowmem.streaming.chunking.mask import CausalMask
from lowmem.streaming.recompute import (
    Gradients,
    GradientSums,
    RandomState,
    RandomTape,
    Sought,
    differentiate,
    restored,
)

RunBlock = Callable[[CallArguments], object]
"""Runs a block's raw forward; its weights are bound."""

InChunks = Callable[[RunBlock, CallArguments], object]
"""Runs a block on whole sequences chunk by chunk, handing it a carrier in the cache's place."""

# Arguments with one entry per token.
_PER_TOKEN = frozenset({"position_ids", "position_embeddings", "cache_position", "attention_scaling"})


class NotChunkable(ValueError):
    """A call that cannot be cut along the sequence; the message says why."""


def chunk_spans(num_tokens: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """The chunks of a sequence: (first token, token after the last) each."""
    return [(start, min(start + chunk_tokens, num_tokens)) for start in range(0, num_tokens, chunk_tokens)]


@dataclass(frozen=True)
class _Leaf:
    """One leaf of the arguments: what it is in a chunk."""

    value: object
    time_dim: int | None


class ChunkedCall:
    """The arguments of one call of one block, ready to be cut along the sequence.

    Args:
        raw_forward: The block class's forward without wrappers, for its parameter names; `self` first.
        args: Positional arguments of the call, without the block.
        kwargs: Keyword arguments of the call.

    Raises:
        NotChunkable: An argument cannot be cut, or there is no mask of ours among them.
    """

    def __init__(self, raw_forward: Callable[..., object], args: Sequence[object], kwargs: dict[str, object]) -> None:
        bound = inspect.signature(raw_forward).bind(None, *args, **kwargs)
        names = list(bound.signature.parameters)
        taken = [name for name in CACHE_NAMES if name in names]
        if not taken:
            raise NotChunkable("its forward takes no cache")
        self._carrier_name = taken[0]
        arguments = dict(bound.arguments)
        arguments.pop(names[0])
        # What a **parameter of the forward caught is passed on by its own names.
        for name in names:
            if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(name, {}))
        arguments.pop(self._carrier_name, None)
        first = next(iter(arguments))
        hidden = arguments[first]
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            raise NotChunkable(f"its first argument {first} is not (sequences, tokens, hidden)")
        self.batch_size, self.num_tokens = hidden.shape[:2]
        self.hidden = hidden
        self._leaves: list[_Leaf] = []
        self._specs: dict[str, TreeSpec] = {}
        self._masked = False
        for name, value in arguments.items():
            if isinstance(value, dict):
                # What a block writes into it would go into a copy.
                raise NotChunkable(f"its argument {name} is a dict")
            leaves, self._specs[name] = tree_flatten(value, is_leaf=lambda leaf: isinstance(leaf, CausalMask))
            self._leaves += [self._leaf(name, leaf, is_hidden=leaf is hidden) for leaf in leaves]
        if not self._masked:
            raise NotChunkable("none of its arguments is a mask of lowmem's")

    def _leaf(self, name: str, value: object, *, is_hidden: bool) -> _Leaf:
        if isinstance(value, CausalMask):
            if value.num_tokens != self.num_tokens:
                raise NotChunkable(f"its mask has {value.num_tokens} tokens, its input {self.num_tokens}")
            self._masked = True
            return _Leaf(value, None)
        if not isinstance(value, Tensor):
            if value is None or isinstance(value, bool | int | float | str):
                return _Leaf(value, None)
            raise NotChunkable(f"its argument {name} is a {type(value).__name__}")
        if is_hidden:
            return _Leaf(value, 1)
        if name not in _PER_TOKEN and self.num_tokens not in value.shape:
            return _Leaf(value, None)
        if name in _PER_TOKEN:
            if value.ndim > 1 and value.shape[1] == self.num_tokens and value.shape[0] in (1, self.batch_size):
                return _Leaf(value, 1)
            if list(value.shape).count(self.num_tokens) == 1:
                return _Leaf(value, list(value.shape).index(self.num_tokens))
        raise NotChunkable(
            f"its argument {name} of shape {tuple(value.shape)} has no known dimension of {self.num_tokens} tokens"
        )

    def index_of(self, tensor: Tensor) -> int:
        """Number of the leaf that is this very tensor."""
        return next(index for index, leaf in enumerate(self._leaves) if leaf.value is tensor)

    def cut(self, index: int, start: int, end: int) -> Tensor:
        """A tensor leaf's part in the chunk of tokens [start, end): a view, or the leaf itself if it is per call."""
        leaf = self._leaves[index]
        assert isinstance(leaf.value, Tensor)
        return leaf.value if leaf.time_dim is None else leaf.value.narrow(leaf.time_dim, start, end - start)

    def is_per_token(self, index: int) -> bool:
        """Whether a leaf is cut."""
        return self._leaves[index].time_dim is not None

    def arguments(self, carrier: KVCarrier, replaced: dict[int, Tensor] | None = None) -> CallArguments:
        """Keyword arguments for the carrier's chunk; `replaced` has tensors in the place of leaves, already cut."""
        values: list[object] = []
        for index, leaf in enumerate(self._leaves):
            if replaced is not None and index in replaced:
                values.append(replaced[index])
            elif isinstance(leaf.value, CausalMask):
                values.append(ChunkMask(leaf.value, carrier))
            elif isinstance(leaf.value, Tensor):
                values.append(self.cut(index, carrier.start, carrier.end))
            else:
                values.append(leaf.value)
        kwargs: dict[str, object] = {}
        position = 0
        for name, spec in self._specs.items():
            kwargs[name] = tree_unflatten(values[position : position + spec.num_leaves], spec)
            position += spec.num_leaves
        kwargs[self._carrier_name] = carrier
        return (), kwargs


@dataclass(frozen=True, kw_only=True)
class ForwardChunks:
    """What a forward in chunks leaves."""

    output: object
    """As the block would have returned it for the whole sequence."""

    record: ChunkRecord
    """What backward needs of it."""

    keys_values: Sequence[tuple[Tensor, Tensor]]
    """Of all tokens, of each attention: in the workspace, valid until its next use."""


@dataclass(frozen=True, kw_only=True)
class ChunkRecord:
    """How a forward in chunks went."""

    spans: tuple[tuple[int, int], ...]
    """First token, and token after the last, of each chunk."""

    random: tuple[RandomState, ...]
    """The generators' state before each chunk."""

    num_attentions: int
    """Attentions of the block."""


def forward_chunks(
    run: RunBlock,
    call: ChunkedCall,
    *,
    chunk_tokens: int,
    device: torch.device,
    workspace: Workspace | None = None,
    tape: RandomTape | None = None,
) -> ForwardChunks:
    """Run a block chunk by chunk, without a graph.

    Args:
        run: Runs the block's raw forward with given arguments; its weights are there.
        call: The arguments for the whole sequence.
        chunk_tokens: Tokens of a chunk; the last may have fewer.
        device: Compute device.
        workspace: Where keys and values go; fresh memory if not given.
        tape: Notes the generators' states; one of its own if not given.

    Raises:
        NotChunkable: The block has no attention that goes through lowmem's. Random numbers may have been drawn.
    """
    carrier = KVCarrier(num_tokens=call.num_tokens, workspace=workspace or Workspace())
    spans = tuple(chunk_spans(call.num_tokens, chunk_tokens))
    tape = tape or RandomTape(device)
    random: list[RandomState] = []
    joined: _JoinedOutput | None = None
    with torch.no_grad():
        for start, end in spans:
            random.append(tape.note())
            carrier.begin(start, end, keep=True)
            output = run(call.arguments(carrier))
            if not carrier.num_attentions:
                raise NotChunkable("it computes no attention of lowmem's")
            joined = joined or _JoinedOutput(output, num_tokens=call.num_tokens)
            joined.put(output, start, end)
    assert joined is not None
    record = ChunkRecord(spans=spans, random=tuple(random), num_attentions=carrier.num_attentions)
    return ForwardChunks(output=joined.result(), record=record, keys_values=carrier.keys_values())


class _JoinedOutput:
    """A block's output for the whole sequence, filled chunk by chunk."""

    def __init__(self, first: object, *, num_tokens: int) -> None:
        leaves, self._spec = tree_flatten(first)
        self._leaves: list[object] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                shape = (leaf.shape[0], num_tokens, *leaf.shape[2:])
                leaf = host_memory.empty(shape, dtype=leaf.dtype, device=leaf.device)
            self._leaves.append(leaf)

    def put(self, output: object, start: int, end: int) -> None:
        for whole, part in zip(self._leaves, tree_flatten(output)[0], strict=True):
            if isinstance(whole, Tensor):
                if part.shape[1] != end - start:
                    raise NotChunkable(
                        f"it returned a tensor of shape {tuple(part.shape)} for a chunk of {end - start} tokens"
                    )
                whole[:, start:end] = part

    def result(self) -> object:
        return tree_unflatten(self._leaves, self._spec)


def backward_chunks(
    run: RunBlock,
    call: ChunkedCall,
    sought: Sought,
    *,
    record: ChunkRecord,
    device: torch.device,
    workspace: Workspace | None = None,
    give_keys_values: Callable[[KVCarrier], None] | None = None,
) -> Gradients:
    """Run a block again chunk by chunk, in reverse, and differentiate it.

    Args:
        run: As in `forward_chunks`.
        call: The same arguments as in the forward.
        sought: What it is differentiated for.
        record: What the forward returned.
        device: Compute device.
        workspace: Where keys, values and their gradients go.
        give_keys_values: Puts what the forward left as keys and values into the carrier; they are computed again if
            not given.

    Returns:
        Gradients of the inputs and of the parameters, None where there is none. Sums over chunks are fp32 (fp64 in
        fp64): those of parameters, and of inputs that all chunks share, are of that type, the others of their input's.
    """
    carrier = KVCarrier(num_tokens=call.num_tokens, workspace=workspace or Workspace())
    chunks = list(zip(record.spans, record.random, strict=True))
    if give_keys_values is not None:
        give_keys_values(carrier)
    for (start, end), state in chunks[:-1] if give_keys_values is None else ():
        # Keys and values only: the last attention and what follows it are not computed. The random numbers up to there
        # are those that the forward drew: adapters have dropout on their inputs.
        carrier.begin(start, end, keep=True, leave_at=record.num_attentions - 1)
        with torch.no_grad(), restored(state, device), suppress(KeysTaken):
            run(call.arguments(carrier))
    sums = _Sums(call, sought)
    for (start, end), state in reversed(chunks):
        carrier.begin(start, end, keep=False)
        leaves = sums.leaves(start, end)
        with torch.enable_grad(), restored(state, device):
            output = run(call.arguments(carrier, leaves))
        _differentiate(output, sought, carrier, leaves=leaves, sums=sums)
        del output, leaves
    return sums.input_grads(), sums.param_grads.totals


def _differentiate(
    output: object, sought: Sought, carrier: KVCarrier, *, leaves: dict[int, Tensor], sums: _Sums
) -> None:
    """Differentiate one chunk; its keys and values have a gradient from later chunks besides the output's own."""
    start, end = carrier.start, carrier.end
    tensors = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
    pairs = [
        (value, grad[:, start:end])
        for value, grad in zip(tensors, sought.grads, strict=True)
        if grad is not None and value.requires_grad
    ]
    pairs += carrier.own_with_gradients()
    if not pairs:
        return
    found = differentiate(
        [value for value, _ in pairs],
        [grad for _, grad in pairs],
        inputs=[leaf for leaf in leaves.values() if leaf.requires_grad],
        params=sought.params,
        take=sought.take,
    )
    sums.add(*found, leaves, start=start, end=end)


class _Sums:
    """Gradients of inputs, part by part or summed, and of parameters, summed over the chunks."""

    def __init__(self, call: ChunkedCall, sought: Sought) -> None:
        self.param_grads = GradientSums(len(sought.params))
        self._call = call
        self._indices = [call.index_of(value) for value in sought.inputs]
        self._wanted = sought.wanted
        self._shared_grads = GradientSums(len(self._indices))
        self._input_grads: dict[int, Tensor] = {}
        for index, value, want in zip(self._indices, sought.inputs, sought.wanted, strict=True):
            if want and call.is_per_token(index):
                given = sought.into if index == self._indices[0] else None
                self._input_grads[index] = host_memory.empty_like(value) if given is None else given

    def leaves(self, start: int, end: int) -> dict[int, Tensor]:
        """The chunk's inputs as leaves of a graph, by their number in the call."""
        return {
            index: self._call.cut(index, start, end).detach().requires_grad_(want)
            for index, want in zip(self._indices, self._wanted, strict=True)
        }

    def add(
        self,
        found: Sequence[Tensor | None],
        params: Sequence[Tensor | None],
        leaves: dict[int, Tensor],
        *,
        start: int,
        end: int,
    ) -> None:
        """Take what autograd found for the leaves that need gradients, and for the parameters."""
        gradients = iter(found)
        for number, (index, leaf) in enumerate(leaves.items()):
            if not leaf.requires_grad:
                continue
            grad = next(gradients)
            if index not in self._input_grads:
                self._shared_grads.add(number, grad)
            elif grad is None:
                self._input_grads[index][:, start:end].zero_()
            else:
                self._input_grads[index][:, start:end] = grad
        self.param_grads.add_all(params)

    def input_grads(self) -> list[Tensor | None]:
        """One per input, None where not wanted."""
        pairs = zip(self._indices, self._shared_grads.totals, strict=True)
        return [self._input_grads.get(index, shared) for index, shared in pairs]
