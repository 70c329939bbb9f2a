"""How many sequences go through a block at a time: as planned, or as many as the planned room holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowmem.streaming.block_call import BlockCall

if TYPE_CHECKING:
    from lowmem.step_plan import Plan


class MicroBatchChoice:
    """Chooses the micro-batch of a call from the plan.

    A batch of the planned length is split as planned. Longer or shorter sequences go through in as many as hold the
    planned number of tokens, at least one.
    """

    def __init__(self, plan: Plan) -> None:
        """Take the plan's micro-batch (sequences) and sequence length (tokens)."""
        self._num_tokens = plan.micro_batch * plan.seq_len

    def __call__(self, call: BlockCall) -> int | None:
        """Sequences of this call per micro-batch; None for all."""
        tokens_each = max(1, call.num_tokens // call.batch_size)
        size = max(1, self._num_tokens // tokens_each)
        return None if size >= call.batch_size else size


__all__ = ["MicroBatchChoice"]
