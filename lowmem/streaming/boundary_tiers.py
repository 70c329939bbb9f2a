"""Which tier keeps boundary activations; and those of a GPU in RAM and on disk, copied on a stream of their own.

The host waits for none of the copies. They are ordered by the device alone: each copy comes after what computed its
source, and whatever computes from its result comes after the copy. Only what the disk does with a buffer is begun by a
thread, which waits for the copy before it: writing what has come from the device, reading into what has been copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowmem.streaming.boundary import (
    BoundaryTier,
    DeviceBoundaries,
    DiskBoundaries,
    HostBoundaries,
    StoredBoundary,
)
from offload import CopyStream, OffloadError, Scratch, SerialThread, StagingBuffer, Transfer

if TYPE_CHECKING:
    from offload import Trace


class _Retired:
    """Page-locked buffers that go once the copies of them are over, which nobody waits for."""

    def __init__(self) -> None:
        self._waiting: list[tuple[StagingBuffer, torch.cuda.Event]] = []

    def add(self, buffer: StagingBuffer, copied: torch.cuda.Event) -> None:
        self._waiting.append((buffer, copied))
        self.sweep()

    def sweep(self) -> None:
        """Close the buffers whose copies are over."""
        waiting, self._waiting = self._waiting, []
        for buffer, copied in waiting:
            if copied.query():  # type: ignore[no-untyped-call]
                buffer.close()
            else:
                self._waiting.append((buffer, copied))

    def close(self) -> None:
        """Wait for the copies, and close the buffers."""
        for _, copied in self._waiting:
            copied.synchronize()
        self.sweep()


class GpuHostBoundaries(HostBoundaries):
    """`HostBoundaries` for activations of a GPU: page-locked buffers, and copies beside the computation.

    Buffers are as long as the longest activation so far and serve shorter ones too: page-locking one takes longer than
    copying it. Where the system does not page-lock memory, the copies are as exact and make the host wait.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._copies = CopyStream(device)
        self._longest_bytes = 0
        self._retired = _Retired()
        self.most_wasteful = math.inf

    def bring_down(self, value: Tensor, kept: Tensor) -> None:
        # A buffer that was given back before its copy was over is safe: all copies are on this one stream.
        self._copies.down(value.detach().contiguous(), kept)

    def on_device(self, kept: Tensor) -> Tensor:
        """A kept activation on the GPU, for whatever the current stream computes from now on; returns at once."""
        return self._copies.up(kept)[0]

    def close(self) -> None:
        """Release the buffers that no activation is in, once no copy uses them."""
        self._copies.synchronize()
        self._retired.close()
        super().close()

    def _let_go(self, buffers: Sequence[StagingBuffer]) -> None:
        # Page-locked memory must not go while it is being copied.
        for buffer in buffers:
            self._retired.add(buffer, self._copies.mark())

    def _make_buffer(self, nbytes: int) -> StagingBuffer:
        self._retired.sweep()
        self._longest_bytes = max(self._longest_bytes, nbytes)
        return StagingBuffer(self._longest_bytes, pin=True, in_children=False)


class GpuDiskBoundaries(DiskBoundaries):
    """`DiskBoundaries` for activations of a GPU, through page-locked buffers; only the disk is ever waited for."""

    def __init__(self, device: torch.device, scratch: Scratch, *, num_buffers: int = 2) -> None:
        super().__init__(device, scratch, num_buffers=num_buffers)
        self._copies = CopyStream(device)
        self._longest_bytes = 0
        self._copied: dict[StagingBuffer, torch.cuda.Event] = {}
        self._retired = _Retired()
        self._follower = SerialThread("boundary-copies")

    def send(self, stored: StoredBoundary, value: Tensor) -> Transfer:
        """Start copying an activation into its buffer; the write begins once it is there."""
        assert stored.buffer is not None
        self._copied[stored.buffer] = self._copies.down(value.detach().contiguous(), stored.view())
        return self._after_copy(stored, partial(self.write, stored))

    def fetch(self, stored: StoredBoundary) -> Transfer:
        """Start reading into a buffer, once what it held before has been copied to the device."""
        return self._after_copy(stored, partial(super().fetch, stored))

    def arrive(self, stored: StoredBoundary) -> Tensor:
        """Start copying an activation to the device; another one may be read into its buffer behind that."""
        assert stored.buffer is not None
        value, self._copied[stored.buffer] = self._copies.up(stored.view())
        if not stored.writing:
            self.take_buffer_from(stored)
        self.read_ahead(stored.number)
        return value

    def make_buffer(self, nbytes: int) -> StagingBuffer:
        """A page-locked buffer, as long as the longest activation so far: locking takes longer than copying."""
        self._longest_bytes = max(self._longest_bytes, nbytes)
        return StagingBuffer(self._longest_bytes, pin=True, in_children=False)

    def close_buffer(self, buffer: StagingBuffer) -> None:
        """Give a buffer back once no copy uses it."""
        copied = self._copied.pop(buffer, None)
        if copied is None:
            buffer.close()
        else:
            self._retired.add(buffer, copied)

    def shrink(self) -> None:
        """Keep the buffers: longer activations will come again."""

    def close(self) -> None:
        """See `DiskBoundaries.close`."""
        self._follower.close()
        super().close()
        self._retired.close()

    def _after_copy(self, stored: StoredBoundary, start: Callable[[], Transfer]) -> Transfer:
        """What `start` begins, begun once the last copy of an activation's buffer is over."""
        assert stored.buffer is not None
        copied = self._copied.get(stored.buffer)
        if copied is None:
            return start()
        pages = stored.pages()
        whole = Transfer(stored.name, nbytes=pages.numel(), num_pieces=1, memory=pages)
        self._follower.run(partial(_begin_after, copied, start, whole))
        return whole


def _begin_after(copied: torch.cuda.Event, start: Callable[[], Transfer], whole: Transfer) -> None:
    """Wait for a copy, begin something and return; the whole ends with what was begun."""
    try:
        copied.synchronize()
        begun = start()
    # Whoever waits for the whole is told.
    except (OffloadError, OSError, RuntimeError) as error:
        whole.finish_piece(error)
        return
    begun.when_done(lambda: whole.finish_piece(begun.outcome()))


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
        kind = DiskBoundaries if device.type == "cpu" else GpuDiskBoundaries
        return kind(device, Scratch(disk, trace=trace), num_buffers=num_buffers)
    if planned not in ("device", "host"):
        raise ValueError(f'planned: expected "device", "host" or "disk", got {planned!r}')
    if device.type == "cpu":
        return HostBoundaries(device)
    return DeviceBoundaries() if planned == "device" else GpuHostBoundaries(device)
