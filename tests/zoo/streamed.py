"""The same checkpoints opened by lowmem, with as little memory as works, so that blocks really come and go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

import lowmem
from offload import Budget, BudgetError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def streamed(folder: Path, *, micro_batch: int | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Open a checkpoint with the smallest device budget that works and nothing cached in RAM.

    Args:
        folder: What `tests.zoo.architectures.build` wrote.
        micro_batch: Sequences that go through a block at a time; None for the planner's choice.
        dtype: Compute dtype.

    Raises:
        UnsupportedError: The architecture is refused.
    """
    try:
        model = lowmem.from_pretrained(
            folder, budget=Budget(device=1, host=0), micro_batch=micro_batch, device="cpu", dtype=dtype
        )
    except BudgetError as error:
        smallest = Budget(device=error.needed_bytes, host=0)
        model = lowmem.from_pretrained(folder, budget=smallest, micro_batch=micro_batch, device="cpu", dtype=dtype)
    return model
