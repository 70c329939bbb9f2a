"""Boundary activations: each block's input, kept in its tier from the forward until the block's backward."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lowmem.streaming.boundary_disk import TAKEN_TWICE, DiskTier
from offload import Scratch, StagingBuffer

if TYPE_CHECKING:
    from offload import Trace


class Boundary(Protocol):
    """One kept activation."""

    def take(self) -> Tensor:
        """Give it back on the compute device, once."""

    def release(self) -> None:
        """Let go of it: its tier's memory is free afterwards. May be called repeatedly."""


class BoundaryTier(Protocol):
    """Where boundary activations wait for the backward."""

    def keep(self, value: Tensor) -> Boundary:
        """Keep an activation of any shape; the caller may drop its own reference afterwards."""

    @property
    def held_bytes(self) -> int:
        """Bytes of memory the tier has taken for kept activations."""

    def rest(self) -> None:
        """Give back memory that kept activations can do without until they are taken."""

    def close(self) -> None:
        """Let go of everything; nothing can be kept or taken afterwards."""


class NoTier:
    """Keeps nothing: for a forward that no backward follows."""

    held_bytes = 0

    def keep(self, value: Tensor) -> Boundary:
        """Forget an activation."""
        return _Forgotten()

    def rest(self) -> None:
        """Nothing can be given back."""

    def close(self) -> None:
        """Nothing to release."""


class DeviceTier:
    """Kept by reference, in the device's memory."""

    held_bytes = 0

    def keep(self, value: Tensor) -> Boundary:
        """Keep an activation where it is."""
        return _Referenced(value)

    def rest(self) -> None:
        """Nothing can be given back."""

    def close(self) -> None:
        """Nothing of its own to let go of."""


class HostTier:
    """Copied into page-aligned buffers of host RAM that one step after another uses.

    Copies from and to a GPU wait for it: exact, and slower than they could be. On a CPU this is where all boundaries
    go. They outlive the temporaries of many blocks: left on the heap, they would pin the pages around them, and the
    process would grow by a block's temporaries for each few blocks.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin with no buffers.

        Args:
            device: Compute device, where activations come from and go back to.
        """
        self._device = device
        self._free: list[StagingBuffer] = []
        self.held_bytes = 0

    def keep(self, value: Tensor) -> Boundary:
        """Copy an activation into a buffer of this tier."""
        nbytes = value.numel() * value.element_size()
        buffer = self._take_buffer(nbytes)
        kept = buffer.tensor[:nbytes].view(value.dtype).view(value.shape)
        kept.copy_(value)
        return _Buffered(kept, buffer, self)

    def on_device(self, kept: Tensor) -> Tensor:
        """A kept activation where blocks compute: the buffer itself on a CPU, a copy elsewhere."""
        return kept.to(self._device)

    def give_back(self, buffer: StagingBuffer) -> None:
        """Have a buffer for the next activation."""
        self._free.append(buffer)

    def rest(self) -> None:
        """Nothing can be given back."""

    def close(self) -> None:
        """Let go of the buffers that no activation is in."""
        self.held_bytes -= sum(buffer.nbytes for buffer in self._free)
        self._free.clear()

    def _take_buffer(self, nbytes: int) -> StagingBuffer:
        """The smallest free buffer that is large enough, unless it would waste half; else a new one."""
        fitting = [buffer for buffer in self._free if nbytes <= buffer.nbytes <= 2 * nbytes]
        if fitting:
            best = min(fitting, key=lambda buffer: buffer.nbytes)
            self._free.remove(best)
            return best
        # Lengths have changed: what is too small or too large now would only add up.
        self.held_bytes -= sum(buffer.nbytes for buffer in self._free)
        self._free.clear()
        self.held_bytes += nbytes
        return StagingBuffer(nbytes)


class _Forgotten:
    """An activation that nobody will ask for."""

    def take(self) -> Tensor:
        """Nothing can be given back.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("a forward without gradients keeps no activations")

    def release(self) -> None:
        """Nothing is held."""


class _Referenced:
    """An activation that stays where it is."""

    def __init__(self, value: Tensor) -> None:
        self._value: Tensor | None = value.detach()
        self._version = value._version

    def take(self) -> Tensor:
        """Give the activation back.

        Raises:
            RuntimeError: It was changed in place since the forward, or was released before.
        """
        if self._value is None:
            raise RuntimeError(TAKEN_TWICE)
        if self._value._version != self._version:
            raise RuntimeError(
                "a boundary activation was changed in place after its block's forward; clone it before changing it"
            )
        return self._value

    def release(self) -> None:
        """Drop the reference."""
        self._value = None


class _Buffered:
    """An activation in a buffer of a tier; a graph that is dropped without a backward gives the buffer back too."""

    def __init__(self, value: Tensor, buffer: StagingBuffer, tier: HostTier) -> None:
        self._value: Tensor | None = value
        self._buffer, self._tier = buffer, tier

    def take(self) -> Tensor:
        """Give the activation back, on a CPU as a view of the tier's buffer; valid until `release`.

        Raises:
            RuntimeError: It was released before.
        """
        if self._value is None:
            raise RuntimeError(TAKEN_TWICE)
        return self._tier.on_device(self._value)

    def release(self) -> None:
        """Let the next activation have the buffer."""
        if self._value is not None:
            self._value = None
            self._tier.give_back(self._buffer)

    def __del__(self) -> None:
        self.release()


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
        return DiskTier(device, Scratch(disk, trace=trace), num_buffers=num_buffers)
    if planned not in ("device", "host"):
        raise ValueError(f'planned: expected "device", "host" or "disk", got {planned!r}')
    on_host = planned == "host" or device.type == "cpu"
    return HostTier(device) if on_host else DeviceTier()
