"""The same checkpoints opened by lowmem, with as little memory as works, so that blocks really come and go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

import lowmem
from offload import Budget, BudgetError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def streamed(
    folder: Path,
    *,
    micro_batch: int | None = None,
    chunk_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Open a checkpoint with the smallest device budget that works and nothing cached in RAM.

    Args:
        folder: What `tests.zoo.architectures.build` wrote.
        micro_batch: Sequences that go through a block at a time; None for the planner's choice.
        chunk_tokens: Tokens of a sequence that go through a block at a time; None for the planner's choice.
        dtype: Compute dtype.

    Raises:
        UnsupportedError: The architecture is refused.
    """

    def opened(device_bytes: int) -> PreTrainedModel:
        return lowmem.from_pretrained(
            folder,
            budget=Budget(device=device_bytes, host=0),
            micro_batch=micro_batch,
            chunk_tokens=chunk_tokens,
            device="cpu",
            dtype=dtype,
        )

    try:
        return opened(1)
    except BudgetError as error:
        return opened(error.needed_bytes)
