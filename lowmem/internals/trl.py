"""The one hook into TRL: its fused head computes in our tiles for models of ours, and as shipped for all others.

TRL reaches its head through a module attribute, `trl.trainer.utils._ChunkedLogProbFunction.apply(...)`, from a closure
that `add_fused_lm_head` puts on each model; there is no argument and no registry to choose another. So that attribute
is replaced, once, by a `HeadDispatch`, which looks at the weight of each call. It asks the registered models for their
output embeddings at that moment, as TRL does, because PEFT may have replaced them (`modules_to_save`) since.

What TRL hashes to find reference log-probabilities that it computed before: the checkpoint's fingerprint.

`precompute_ref_log_probs` keeps what it computed under a key made by `trl.trainer.utils.hash_module`, which hashes
every value of `state_dict()`. Absent weights would be read for it, one after the other, and turned into bytes: the
whole checkpoint, in fp32, and the largest tensor three times in memory. In that call, and in no other, a state dict has
for each absent weight a digest of its name, its dtype and the fingerprint of the files instead.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from hashlib import sha256
from typing import TYPE_CHECKING, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lowmem.internals.stand_in import StandIn
from lowmem.planning.limits import HeadTiles
from lowmem.streaming.head import TiledLogProbFunction

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_ATTRIBUTE = "_ChunkedLogProbFunction"


HeadOutputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class _Head(Protocol):
    """TRL's Function, as far as it is used."""

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ...,
    ) -> HeadOutputs: ...


class HeadDispatch:
    """Stands in TRL's module for its Function and hands each call to the head that the weight's model has.

    Args:
        shipped: TRL's own Function, for every weight that no registered model has.
        tiles: Tile sizes for the registered ones.
    """

    def __init__(self, shipped: _Head, *, tiles: HeadTiles) -> None:
        self.shipped = shipped
        self.tiles = tiles
        # Held weakly: a model that its user drops must not live on here.
        self._models: WeakSet[nn.Module] = WeakSet()

    def register(self, model: nn.Module) -> None:
        """Compute the head of this model in tiles from now on; `model` has `get_output_embeddings()`."""
        self._models.add(model)

    def is_registered(self, weight: Tensor) -> bool:
        """Whether a registered model has this very tensor as the weight of its head now."""
        return any(_head_weight(model) is weight for model in self._models)

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> HeadOutputs:
        """As `TiledLogProbFunction.apply`, which names the arguments."""
        if not self.is_registered(weight):
            return self.shipped.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )
        result: HeadOutputs = TiledLogProbFunction.apply(  # type: ignore[no-untyped-call]
            hidden,
            weight,
            bias,
            targets,
            temperature,
            chunk_size,
            final_logit_softcapping,
            logit_scale,
            outputs,
            self.tiles,
        )
        return result


def _head_weight(model: nn.Module) -> Tensor | None:
    get_head = getattr(model, "get_output_embeddings")  # noqa: B009 - nn.Module does not declare it
    head = get_head()
    return None if head is None else head.weight


def install(*, tiles: HeadTiles | None = None) -> HeadDispatch:
    """Put the dispatch into TRL's module, or find the one that is there. Models are registered with its `register`.

    Args:
        tiles: Tile sizes; those in force stay if not given.

    Raises:
        RuntimeError: This TRL has no such Function, so that its trainers would not reach ours.
    """
    import trl.trainer.utils as trl_utils

    current = getattr(trl_utils, _ATTRIBUTE, None)
    if current is None:
        raise RuntimeError(
            f"trl.trainer.utils has no {_ATTRIBUTE}: this version of TRL computes its head otherwise; install trl>=1.16"
        )
    if not isinstance(current, HeadDispatch):
        current = HeadDispatch(current, tiles=tiles or HeadTiles())
        setattr(trl_utils, _ATTRIBUTE, current)
    elif tiles is not None:
        current.tiles = tiles
    return current


def hash_by_fingerprint(model: PreTrainedModel, fingerprint: str) -> None:
    """Have TRL hash a model's absent weights by their checkpoint's fingerprint.

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
    """Whether TRL's `hash_module` is what asked for the state dict. It names no other way to tell it what to hash."""
    utils = sys.modules.get("trl.trainer.utils")
    code = getattr(getattr(utils, "hash_module", None), "__code__", None)
    frame = sys._getframe() if code is not None else None
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None
