"""What TRL hashes to find reference log-probabilities that it computed before: the checkpoint's fingerprint.

`precompute_ref_log_probs` keeps what it computed under a key made by `trl.trainer.utils.hash_module`, which hashes
every value of `state_dict()`. Absent weights would be read for it, one after the other, and turned into bytes: the
whole checkpoint, in fp32, and the largest tensor three times in memory. In that call, and in no other, a state dict has
for each absent weight a digest of its name, its dtype and the fingerprint of the files instead.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from hashlib import sha256
from typing import TYPE_CHECKING

import torch

from lowmem.models.absent import AbsentParameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
            if key.startswith(prefix) and isinstance(value, AbsentParameter):
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


__all__ = ["hash_by_fingerprint"]
