"""TRL's fused head, computed in our tiles for models of ours and as shipped for all others; and what TRL hashes.

TRL reaches its head through a module attribute, `trl.trainer.utils._ChunkedLogProbFunction.apply(...)`, from a closure
that `add_fused_lm_head` puts on each model; there is no argument and no registry to choose another. So that attribute
is replaced, once, by a `HeadDispatch`, which looks at the weight of each call. It asks the registered models for their
output embeddings at that moment, as TRL does, because PEFT may have replaced them (`modules_to_save`) since.

`precompute_ref_log_probs` keeps what it computed under a key made by `trl.trainer.utils.hash_module`, which hashes
every value of `state_dict()`. Absent weights would be read for it, one after the other, and turned into bytes: the
whole checkpoint, in fp32, and the largest tensor three times in memory. In that call, and in no other, a state dict has
for each absent weight a digest of its name, its dtype and the fingerprint of the files instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lowmem.errors import untested
from lowmem.internals.stand_in import StandIn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_ATTRIBUTE = "_ChunkedLogProbFunction"
_HASH = "hash_module"
HeadOutputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class HeadDispatch:
    """Stands in TRL's module for its Function and hands each call to the head that the weight's model has.

    Args:
        shipped: TRL's own Function, for every weight that no registered model has.
        head: Takes the arguments of its `apply`, by position, for the registered ones.
    """

    def __init__(self, shipped: Any, *, head: Callable[..., HeadOutputs]) -> None:
        self.shipped, self.head = shipped, head
        # Held weakly: a model that its user drops must not live on here.
        self._models: WeakSet[nn.Module] = WeakSet()

    def register(self, model: nn.Module) -> None:
        """Compute the head of this model with ours from now on; `model` has `get_output_embeddings()`."""
        self._models.add(model)

    def is_registered(self, weight: Tensor) -> bool:
        """Whether a registered model has this very tensor as the weight of its head now."""
        return any(_head_weight(model) is weight for model in self._models)

    def apply(self, hidden: Tensor, weight: Tensor, *others: object) -> HeadOutputs:
        """TRL's `_ChunkedLogProbFunction.apply`: hidden [N, H], weight [V, H], and the rest; outputs [N] each."""
        compute = self.head if self.is_registered(weight) else self.shipped.apply
        return compute(hidden, weight, *others)


def _head_weight(model: nn.Module) -> Tensor | None:
    get_head = getattr(model, "get_output_embeddings")  # noqa: B009 - nn.Module does not declare it
    head = get_head()
    return None if head is None else head.weight


def trainers_are_imported() -> bool:
    """Whether anybody has imported TRL's trainers: a model that is used without them must not."""
    return "trl.trainer.utils" in sys.modules


def install(head: Callable[..., HeadOutputs]) -> HeadDispatch:
    """Put the dispatch into TRL's module, or find the one that is there. Models are registered with its `register`.

    Args:
        head: Computes the head of registered models; the one that is there before stays.

    Raises:
        UnsupportedError: This TRL computes its head otherwise, so that its trainers would not reach ours, or finds
            cached reference log-probabilities otherwise, so that it would read all weights for a key.
    """
    import trl.trainer.utils as trl_utils

    for name in (_ATTRIBUTE, _HASH):
        if not hasattr(trl_utils, name):
            raise untested("trl", f"trl.trainer.utils has no {name}")
    current = getattr(trl_utils, _ATTRIBUTE)
    if isinstance(current, HeadDispatch):
        return current
    dispatch = HeadDispatch(current, head=head)
    setattr(trl_utils, _ATTRIBUTE, dispatch)
    return dispatch


def hash_by_fingerprint(model: PreTrainedModel, fingerprint: str) -> None:
    """Let TRL hash a model's absent weights by their checkpoint's fingerprint.

    Args:
        model: A streamed model whose weights never change.
        fingerprint: Differs between checkpoints of different contents.
    """

    def replace(
        module: torch.nn.Module, state: MutableMapping[str, object], prefix: str, local_metadata: object
    ) -> None:
        if not _is_for_hashing():
            return
        for key, value in state.items():
            if key.startswith(prefix) and isinstance(value, StandIn):
                state[key] = _digest(f"{key.removeprefix(prefix)} {value.dtype} {fingerprint}")

    model.register_state_dict_post_hook(replace)


def _digest(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(sha256(text.encode()).digest()), dtype=torch.uint8)


def _is_for_hashing() -> bool:
    """Whether TRL's `hash_module` is what asked for the state dict: a caller that gives no other sign of itself.

    It is imported by name into each trainer's module, maybe before a streamed model is made and maybe after, so there
    is no one place to put a function of ours.
    """
    utils = sys.modules.get("trl.trainer.utils")
    code = getattr(getattr(utils, _HASH, None), "__code__", None)
    frame = sys._getframe() if code is not None else None
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None
