"""Router logits of mixtures of experts as outputs of their block, so that the auxiliary loss has a gradient.

transformers collects them through hooks on the routers, into a list that is there for the time of the model's forward
(`transformers.utils.output_capturing`). A block that is recomputed would leave logits without a graph there, and
compute those with one when the list is gone. So a recorded call takes what the hooks collect, both times, as part of
the block's output, and puts the first ones into the list when autograd knows them.

The list of callbacks that every Trainer starts with: `lowmem.from_pretrained` returns a model, not a trainer, and a
Trainer asks its model nothing before the first forward. What has to be said before that, or in front of the reporters,
is said by a callback that no script has to pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from torch import Tensor

from lowmem.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import TrainerCallback


_KEY = "router_logits"


Collected = dict[str, list[Tensor]]


def collected_keys() -> frozenset[str]:
    """What the forward under way collects from inside the model: "router_logits", "hidden_states" and the like."""
    module = sys.modules.get("transformers.utils.output_capturing")
    found = None if module is None else module._active_collector.get()
    return frozenset(found or ())


@contextmanager
def collecting(into: Collected | None) -> Iterator[None]:
    """Have hooks collect into a list of ours, or nothing at all."""
    module = sys.modules.get("transformers.utils.output_capturing")
    if module is None:
        yield
        return
    token = module._active_collector.set(into)
    try:
        yield
    finally:
        module._active_collector.reset(token)


class RouterLogits:
    """Those of one call of one block, if the forward it belongs to collects them."""

    def __init__(self) -> None:
        """Note whether they are collected: the recomputation happens when nothing tells any more."""
        self.wanted = _KEY in collected_keys()
        self._flat: list[bool] = []

    def run(self, forward: Callable[[], object], num_sequences: int) -> object:
        """Run a block; answers its output, together with the logits if they are wanted.

        Args:
            forward: Runs it.
            num_sequences: Sequences in this run. Logits of tokens in a row become logits by sequence, so that the
                batch can be cut and joined like every other output.

        Raises:
            UnsupportedError: The model's routers answer something that has no row for each token.
        """
        if not self.wanted:
            return forward()
        found: Collected = {_KEY: []}
        with collecting(found):
            output = forward()
        self._flat = [logits.shape[0] != num_sequences or logits.ndim < 3 for logits in found[_KEY]]
        by_sequence = [
            _by_sequence(logits, num_sequences) if flat else logits
            for logits, flat in zip(found[_KEY], self._flat, strict=True)
        ]
        return output, by_sequence

    def give(self, output: object) -> object:
        """Put the logits into the forward's list; answers the block's own output."""
        if not self.wanted:
            return output
        own: object
        by_sequence: list[Tensor]
        own, by_sequence = output  # type: ignore[misc]
        collected = sys.modules["transformers.utils.output_capturing"]._active_collector.get()
        for logits, flat in zip(by_sequence, self._flat, strict=True):
            collected[_KEY].append(logits.flatten(0, 1) if flat else logits)
        return own


def _by_sequence(logits: Tensor, num_sequences: int) -> Tensor:
    if logits.shape[0] % num_sequences:
        raise UnsupportedError(
            "output_router_logits=True",
            reason=f"this model's router logits have {logits.shape[0]} rows for {num_sequences} sequences",
            instead="router_aux_loss_coef=0.0 in the trainer's configuration: training without the auxiliary loss",
        )
    return logits.view(num_sequences, -1, *logits.shape[1:])


_CALLBACKS = "DEFAULT_CALLBACKS"


def add_default_callback(callback: type[TrainerCallback]) -> None:
    """Have every Trainer that is made from now on start with a callback, in front of reporters and of the user's own.

    Each Trainer makes an object of its own. May be called again with the same class.

    Args:
        callback: The class; its objects do nothing for trainers that do not concern them.

    Raises:
        UnsupportedError: This Trainer has no such list, or does not read it.
    """
    from transformers import trainer

    callbacks = getattr(trainer, _CALLBACKS, None)
    if not isinstance(callbacks, list) or _CALLBACKS not in trainer.Trainer.__init__.__code__.co_names:
        raise UnsupportedError(
            f"transformers {version('transformers')}",
            reason=f"its Trainer does not begin with transformers.trainer.{_CALLBACKS}, so options that a streamed model "
            "cannot honour would pass",
            instead="a version of transformers that this one of lowmem names in its metadata",
        )
    if callback not in callbacks:
        callbacks.append(callback)


__all__ = ["RouterLogits", "add_default_callback", "collected_keys", "collecting"]
