"""The same checkpoints opened by lowmem, with no more of their blocks in memory than it takes: they come and go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import lowmem
from offload import Budget
from tests.zoo.sizes import SEQUENCE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def streamed(
    folder: Path,
    *,
    micro_batch: int | None = None,
    chunk_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Open a checkpoint with all blocks on disk, and room for whatever else a test does with it.

    Args:
        folder: What `tests.zoo.architectures.build` wrote.
        micro_batch: Sequences that go through a block at a time; None for the planner's choice.
        chunk_tokens: Tokens of a sequence that go through a block at a time; None for the planner's choice.
        dtype: Compute dtype.

    Raises:
        UnsupportedError: The architecture is refused.
    """
    plan = lowmem.plan(
        folder,
        batch_size=2,
        seq_len=SEQUENCE,
        budget=Budget(device=0, host=0),
        micro_batch=micro_batch,
        chunk_tokens=chunk_tokens,
        device="cpu",
        dtype=dtype,
    )
    return lowmem.from_pretrained(folder, plan=replace(plan, device_budget_bytes=1 << 30), device="cpu", dtype=dtype)
