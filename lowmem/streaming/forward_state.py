"""How a forward runs, its inputs aside: with gradients or not, with which adapters, training or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lowmem.streaming.adapter_flags import BlockFlags, read_flags


@dataclass(frozen=True)
class ForwardState:
    """All that decides a forward's values besides its inputs and weights, and whether a backward will follow."""

    grad: bool
    """Whether gradients will be asked for."""
    flags: tuple[BlockFlags, ...]
    """Of the adapters, by block."""
    training: tuple[bool, ...]
    """Train or eval mode of every module of the blocks."""
    autocast: tuple[bool, torch.dtype]
    """Whether operations are cast, and to what."""

    @staticmethod
    def now(blocks: Sequence[torch.nn.Module], device: torch.device) -> ForwardState:
        """The state that a forward would run in now.

        Args:
            blocks: The model's decoder blocks.
            device: Compute device.
        """
        return ForwardState(
            grad=torch.is_grad_enabled(),
            flags=tuple(read_flags(block) for block in blocks),
            training=tuple(module.training for block in blocks for module in block.modules()),
            autocast=(torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)),
        )

    def can_run_beside(self, first: ForwardState) -> bool:
        """Whether a forward in this state can run in the visits of one in the state `first`."""
        return self != first and self.sets_as(first) and not (self.grad and first.grad)

    def sets_as(self, other: ForwardState) -> bool:
        """Whether everything but gradients and adapters is the same."""
        return (self.training, self.autocast) == (other.training, other.autocast)

    @property
    def reference(self) -> ForwardState:
        """The state of TRL's reference forward: no gradients, all adapters disabled."""
        disabled = tuple(tuple((True, active) for _, active in block) for block in self.flags)
        return replace(self, grad=False, flags=disabled)


__all__ = ["ForwardState"]
