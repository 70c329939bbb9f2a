"""How many sequences go through a block at a time: as asked for, or as many as the device budget leaves room for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowmem.streaming.block_call import BlockCall

if TYPE_CHECKING:
    from lowmem.step_plan import Plan


class MicroBatchChoice:
    """Chooses the micro-batch of a call.

    A micro-batch that was asked for is kept to. Otherwise the plan's own, scaled to the room that the budget leaves:
    what one block's recomputation holds grows with the tokens in it, and the boundary activations with those of the
    batch. Dropout draws its numbers micro-batch by micro-batch, so fewer of them come closest to an undivided run.
    """

    def __init__(self, plan: Plan) -> None:
        """Take from the plan what its own micro-batch costs."""
        self._asked_for = plan.job.micro_batch
        self._num_tokens = plan.micro_batch * plan.seq_len
        self._recompute_bytes = max(1, plan.bytes_of("block recomputation", tier="device"))
        boundary_bytes = plan.bytes_of("boundary activations", tier="device")
        self._boundary_bytes_per_token = boundary_bytes / plan.job.num_tokens
        spare_bytes = max(0, plan.device_budget_bytes - plan.device_bytes)
        self._room_bytes = self._recompute_bytes + boundary_bytes + spare_bytes

    def __call__(self, call: BlockCall) -> int | None:
        """Sequences of this call per micro-batch; None for all."""
        size = self._asked_for or self._that_fit(call)
        return None if size >= call.batch_size else size

    def _that_fit(self, call: BlockCall) -> int:
        tokens_each = max(1, call.num_tokens // call.batch_size)
        free_bytes = self._room_bytes - self._boundary_bytes_per_token * call.num_tokens
        num_tokens = max(self._num_tokens, int(self._num_tokens * free_bytes / self._recompute_bytes))
        return max(1, num_tokens // tokens_each)


__all__ = ["MicroBatchChoice"]
