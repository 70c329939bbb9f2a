"""How sequences go through a block, and are differentiated later: whole, or in chunks along the sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lowmem.streaming.boundary import Boundary
from lowmem.streaming.chunks import (
    CallArguments,
    ChunkedCall,
    ChunkRecord,
    NotChunkable,
    RunBlock,
    backward_chunks,
    forward_chunks,
)
from lowmem.streaming.differentiate import TakeGradient, differentiate
from lowmem.streaming.kv_carrier import KVCarrier, Workspace
from lowmem.streaming.random_state import RandomState, RandomTape, restore, restored

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


__all__ = ["ChunkedRows", "Gradients", "RowsRecord", "WholeRows"]
