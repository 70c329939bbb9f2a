"""Letting a runtime run a model's blocks: what a call of a streamed block does before its weights are brought."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence

import torch

from lowmem.errors import UnsupportedError
from lowmem.streaming.block import run_block
from lowmem.streaming.reference import ReferencePass
from lowmem.streaming.runtime import Runtime, give_runtime, refuse_second_thread


class StreamedForward:
    """Runs the blocks of one model in the place of their own forwards.

    The blocks hold it, and it holds the runtime weakly: the runtime holds the blocks, and a model that is dropped must
    be freed without a cyclic collection.
    """

    def __init__(self, runtime: Runtime, *, before_first: Sequence[Callable[[], None]]) -> None:
        self._runtime = weakref.ref(runtime)
        self._before_first = tuple(before_first)
        task = runtime.plan.job
        self._reference = ReferencePass(expects_reference=task.task in ("dpo", "kto") and bool(task.uses_reference))
        runtime.on_reset(self._reference.forget)
        self._thread: int | None = None

    def call(self, index: int, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """Run one block as its module would: recorded where gradients will be asked for, else just run.

        Args:
            index: Number of the block.
            args: Positional arguments of its forward, the hidden states (batch, tokens, hidden) first.
            kwargs: Keyword arguments.

        Raises:
            UnsupportedError: The model is compiled, or another thread has begun a forward since this one did.
            RuntimeError: The model that the block belongs to was freed.
        """
        runtime = self._runtime()
        if runtime is None:
            raise RuntimeError(
                f"block {index} has outlived its streamed model, which brings its weights; keep a reference to it"
            )
        if torch.compiler.is_compiling():
            raise UnsupportedError(
                "torch.compile",
                reason="a compiled graph cannot have its weights exchanged from block to block",
                instead="the model as it is",
            )
        if index == 0:
            for callback in self._before_first:
                callback()
        # Some models skip blocks at random, block 0 too.
        if index == 0 or self._thread is None:
            self._thread = threading.get_ident()
        elif self._thread != threading.get_ident():
            refuse_second_thread()
        if runtime.full is not None:
            # Weights that change between two forwards are not compared; and a full run's reference is another model.
            return run_block(runtime, index, args, kwargs)
        return self._reference.call(runtime, index, args, kwargs)


def attach(model: torch.nn.Module, runtime: Runtime, *, before_first: Sequence[Callable[[], None]] = ()) -> None:
    """Let the runtime run a model's blocks.

    Replaces `forward` on the block instances, which serves training, evaluation and generation alike and does not
    depend on gradient checkpointing being on. The model owns the runtime, and so does the list of its blocks: an inner
    model that outlives its head still runs.

    Trainers make the embeddings' output require gradients, for checkpointing's sake. A streamed block asks its own
    parameters, so that is left out: it would keep the embeddings throughout the step, and their gradient.

    Args:
        model: A transformers model.
        runtime: Has its blocks.
        before_first: Called before block 0 of each forward, to check or prepare what was added to the model.
    """
    path = runtime.blocks[0].block.name.rpartition(".")[0]
    for owner in (model, model.get_submodule(path)):
        give_runtime(owner, runtime)
    object.__setattr__(model, "enable_input_require_grads", _do_nothing)
    streamed = StreamedForward(runtime, before_first=before_first)
    for index, module in enumerate(runtime.modules):
        module.forward = _forward_of(streamed, index)


def _do_nothing() -> None:
    pass


def _forward_of(streamed: StreamedForward, index: int) -> Callable[..., object]:
    def forward(*args: object, **kwargs: object) -> object:
        return streamed.call(index, args, kwargs)

    return forward
