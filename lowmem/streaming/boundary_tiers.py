"""Which tier keeps boundary activations; and that of a GPU's in host RAM, copied both ways on a stream of its own.

The host waits for none of the copies. They are ordered by the device alone: each copy comes after what computed its
source, and whatever computes from its result comes after the copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowmem.streaming.boundary import BoundaryTier, Buffered, DeviceBoundaries, DiskBoundaries, HostBoundaries
from offload import Scratch, StagingBuffer

if TYPE_CHECKING:
    from offload import Trace


class GpuHostBoundaries(HostBoundaries):
    """`HostBoundaries` for activations of a GPU: page-locked buffers, and copies beside the computation.

    Where the system does not page-lock memory, the copies are as exact and make the host wait.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin with no buffers.

        Args:
            device: The GPU.
        """
        super().__init__(device)
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def keep(self, value: Tensor) -> Buffered:
        """Start copying an activation of any shape into a buffer; returns at once."""
        value = value.detach().contiguous()
        buffer = self._take_buffer(value.nbytes)
        kept = buffer.tensor[: value.nbytes].view(value.dtype).view(value.shape)
        # The block that computes the activation may not have finished.
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            # A buffer that was given back before its copy was over is safe: all copies are on this one stream.
            kept.copy_(value, non_blocking=True)
        # The caller drops the activation; its memory must not be given out before it has been copied.
        value.record_stream(self._copies)
        return Buffered(kept, buffer, self)

    def on_device(self, kept: Tensor) -> Tensor:
        """A kept activation on the GPU, for whatever the current stream computes from now on; returns at once."""
        value = torch.empty(kept.shape, dtype=kept.dtype, device=self._device)
        current = torch.cuda.current_stream(self._device)
        # Kernels that were launched before may still be using this memory for what it held last.
        self._copies.wait_stream(current)
        with torch.cuda.stream(self._copies):
            value.copy_(kept, non_blocking=True)
        # The block must not compute from an activation that is still arriving.
        current.wait_stream(self._copies)
        return value

    def close(self) -> None:
        """Release the buffers that no activation is in, once no copy uses them."""
        self._copies.synchronize()
        super().close()

    def _make_buffer(self, nbytes: int) -> StagingBuffer:
        # Buffers of other lengths have been dropped: page-locked memory must not go while it is being copied.
        self._copies.synchronize()
        return StagingBuffer(nbytes, pin=True)


def tier_for(
    device: torch.device,
    *,
    planned: str,
    disk: Path | None = None,
    num_buffers: int = 2,
    trace: Trace | None = None,
) -> BoundaryTier:
    """The tier that a plan names.

    Args:
        device: Compute device.
        planned: "device", "host" or "disk". On a CPU the first two are RAM, and buffers of the tier's own serve either.
        disk: Folder for "disk"; made if it is not there. Nothing of it is left when the process ends.
        num_buffers: With "disk", buffers of host RAM, each as large as the largest activation.
        trace: With "disk", where transfers are recorded.

    Raises:
        ValueError: "disk" without a folder, or another word.
        WriteError: The folder cannot be written.
    """
    if planned == "disk":
        if disk is None:
            raise ValueError("boundary activations on disk need a folder: give Budget.disk")
        return DiskBoundaries(device, Scratch(disk, trace=trace), num_buffers=num_buffers)
    if planned not in ("device", "host"):
        raise ValueError(f'planned: expected "device", "host" or "disk", got {planned!r}')
    if device.type == "cpu":
        return HostBoundaries(device)
    return DeviceBoundaries() if planned == "device" else GpuHostBoundaries(device)
