"""How much of a call goes through a block at a time: as asked for, as planned, or as the budget leaves room for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowmem.streaming.block_function import Split

if TYPE_CHECKING:
    from lowmem.step_plan import Plan
    from lowmem.streaming.block_call import BlockCall

_FEWEST_TOKENS = 64
"""Shorter chunks than this cost more time than they save memory."""


class SplitChoice:
    """Chooses micro-batch and chunk length of a call.

    What was asked for is kept to. Otherwise the plan's own micro-batch, scaled to the room that the budget leaves: what
    one block's recomputation holds grows with the tokens in it, and the boundary activations with those of the batch.
    Dropout draws its numbers micro-batch by micro-batch and chunk by chunk, so fewer of them come closest to an
    undivided run. Sequences that are longer than planned are cut into chunks where they would not fit whole.
    """

    def __init__(self, plan: Plan, *, can_chunk: bool) -> None:
        """Take from the plan what its own micro-batch costs.

        Args:
            plan: What was planned.
            can_chunk: Whether the model's blocks can be walked along the sequence.
        """
        self._asked_for = plan.job.micro_batch
        self._keeps_keys_values = plan.choice.keeps_keys_values
        self._planned_chunk = plan.chunk_tokens if can_chunk else None
        self._can_chunk = can_chunk
        self._num_tokens = plan.micro_batch * (plan.chunk_tokens or plan.seq_len)
        self._planned = plan.micro_batch
        self._recompute_bytes = max(1, plan.bytes_of("block recomputation", tier="device"))
        boundary_bytes = plan.bytes_of("boundary activations", tier="device")
        self._boundary_bytes_per_token = boundary_bytes / plan.job.num_tokens
        spare_bytes = max(0, plan.device_budget_bytes - plan.device_bytes)
        self._room_bytes = self._recompute_bytes + boundary_bytes + spare_bytes

    def __call__(self, call: BlockCall) -> Split:
        """How this call is split."""
        tokens_each = max(1, call.num_tokens // call.batch_size)
        chunk_tokens = self.chunk_for(tokens_each, num_tokens=call.num_tokens)
        keeps = self._keeps_keys_values and chunk_tokens is not None
        if not call.can_split:
            return Split(chunk_tokens=chunk_tokens, keeps_keys_values=keeps)
        size = self._asked_for or (self._planned if chunk_tokens else self._that_fit(call.num_tokens, tokens_each))
        micro_batch = None if size >= call.batch_size else size
        return Split(micro_batch=micro_batch, chunk_tokens=chunk_tokens, keeps_keys_values=keeps)

    def chunk_for(self, tokens_each: int, *, num_tokens: int) -> int | None:
        """Tokens of a sequence at a time, or None for whole sequences.

        Args:
            tokens_each: Tokens of each sequence.
            num_tokens: Tokens of all sequences.
        """
        if self._planned_chunk is not None:
            return self._planned_chunk if tokens_each > self._planned_chunk else None
        # Half of the room is for keys, values and their gradients.
        fitting = self._fitting_tokens(num_tokens)
        if not self._can_chunk or tokens_each <= fitting or tokens_each <= _FEWEST_TOKENS:
            return None
        return max(_FEWEST_TOKENS, fitting // 2)

    def _that_fit(self, num_tokens: int, tokens_each: int) -> int:
        return max(1, self._fitting_tokens(num_tokens) // tokens_each)

    def _fitting_tokens(self, num_tokens: int) -> int:
        """Tokens that a block may recompute at a time, the boundaries of `num_tokens` being kept."""
        free_bytes = self._room_bytes - self._boundary_bytes_per_token * num_tokens
        return max(self._num_tokens, int(self._num_tokens * free_bytes / self._recompute_bytes))


__all__ = ["SplitChoice"]
