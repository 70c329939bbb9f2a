"""From a block's stored tensors to its parameters in the compute dtype, in one reused piece of device memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lowmem.models.build import StreamedBlock
from offload import StagingBuffer

_ALIGN_BYTES = 64
"""A cache line: every parameter begins on one, as torch's own allocations do."""


class Unpacker:
    """Makes a block's parameters from its stored tensors.

    A stored tensor that already is the parameter is used where it lies; everything else is written to a workspace of
    the largest block's size, which holds one block at a time and is allocated once.
    """

    def __init__(self, blocks: Sequence[StreamedBlock], *, device: torch.device) -> None:
        """Plan the workspace; allocates nothing.

        Args:
            blocks: The model's blocks.
            device: Compute device.
        """
        self._blocks = blocks
        self._device = device
        self._offsets = [_workspace_offsets(block) for block in blocks]
        self._buffer: Tensor | None = None
        self._holds: int | None = None
        self._views: dict[str, Tensor] = {}

    @property
    def workspace_bytes(self) -> int:
        """Size of the workspace: 0 where every parameter is used where it lies."""
        return max((end for _, end in self._offsets), default=0)

    def unpack(self, index: int, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make the parameters of a block.

        Args:
            index: Number of the block.
            stored: Its stored tensors by stored name, on the compute device.

        Returns:
            Its parameters by model name. They are valid while `stored` is and until another block is unpacked.
        """
        block, (offsets, _) = self._blocks[index], self._offsets[index]
        if self._holds != index:
            self._holds, self._views = None, self._cut(block, offsets)
        values: dict[str, Tensor] = {}
        for recipe in block.recipes:
            if self._holds == index and all(target in offsets for target in recipe.targets):
                continue
            for name, value in recipe.run(stored).items():
                if name in offsets:
                    self._views[name].copy_(value)
                else:
                    values[name] = value
        self._holds = index
        return values | self._views

    def forget(self) -> None:
        """Take the workspace's contents for stale, after an error in the middle of unpacking."""
        self._holds = None

    def close(self) -> None:
        """Release the workspace."""
        self._buffer, self._holds, self._views = None, None, {}

    def _cut(self, block: StreamedBlock, offsets: Mapping[str, int]) -> dict[str, Tensor]:
        if not offsets:
            return {}
        if self._buffer is None:
            self._buffer = _allocate(self.workspace_bytes, self._device)
        shapes = {slot.key: slot for slot in block.slots}
        views = {}
        for name, offset in offsets.items():
            slot = shapes[name]
            nbytes = slot.shape.numel() * slot.dtype.itemsize
            views[name] = self._buffer[offset : offset + nbytes].view(slot.dtype).view(slot.shape)
        return views


def _allocate(nbytes: int, device: torch.device) -> Tensor:
    if device.type == "cpu":
        # Huge pages: fewer faults on first touch, and fewer table walks in every product that reads the weights.
        return StagingBuffer(nbytes).tensor
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _workspace_offsets(block: StreamedBlock) -> tuple[dict[str, int], int]:
    """Where each parameter that is not used in place lies in the workspace, and the bytes they take together."""
    slots = {slot.key: slot for slot in block.slots}
    offsets: dict[str, int] = {}
    end = 0
    for recipe in block.recipes:
        for name in recipe.targets:
            if name not in slots:
                continue
            slot = slots[name]
            if recipe.convert is None and recipe.sources[0].dtype == slot.dtype:
                continue
            offsets[name] = end
            nbytes = slot.shape.numel() * slot.dtype.itemsize
            end += -(-nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
    return offsets, end


__all__ = ["Unpacker"]
