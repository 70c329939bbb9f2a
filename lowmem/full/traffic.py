"""What full tuning moves to and from disk in one optimizer step. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowmem.costs import Choice
    from lowmem.job import Job
    from lowmem.shapes import ModelShapes

UPDATE_S_PER_PARAM = 1.5e-9
"""torch's fused AdamW on a processor: it is limited by memory, 28 bytes for each parameter."""


@dataclass(frozen=True, kw_only=True)
class StateTraffic:
    """Bytes of one optimizer step, the weights that visits read left out."""

    update_read_bytes: int = 0
    """Moments and gradients, read for the update."""
    update_written_bytes: int = 0
    """Weights and moments, written by the update."""
    gradient_read_bytes: int = 0
    """Gradients of earlier micro-steps, read to be added to."""
    gradient_written_bytes: int = 0
    """Gradients, written by the backwards."""

    @property
    def read_bytes(self) -> int:
        """All that is read."""
        return self.update_read_bytes + self.gradient_read_bytes

    @property
    def written_bytes(self) -> int:
        """All that is written."""
        return self.update_written_bytes + self.gradient_written_bytes

    @property
    def update_bytes(self) -> int:
        """What moves within the forward that follows the step."""
        return self.update_read_bytes + self.update_written_bytes

    @property
    def gradient_bytes(self) -> int:
        """What moves within the backwards."""
        return self.gradient_read_bytes + self.gradient_written_bytes


def state_traffic(shapes: ModelShapes, job: Job, choice: Choice) -> StateTraffic:
    """What moves where state is on disk; nothing where it is in memory, or where adapters are trained.

    A block's weight is read with its visits; gradients outside the blocks stay in memory.
    """
    if job.tuning != "full" or choice.state_tier != "disk":
        return StateTraffic()
    blocks = shapes.stored_bytes
    outer = shapes.embedding_bytes + shapes.head_bytes + shapes.other_bytes
    return StateTraffic(
        update_read_bytes=3 * blocks + 2 * outer,
        update_written_bytes=3 * (blocks + outer),
        gradient_read_bytes=(job.num_backwards - 1) * blocks,
        gradient_written_bytes=job.num_backwards * blocks,
    )


__all__ = ["UPDATE_S_PER_PARAM", "StateTraffic", "state_traffic"]
