"""The compute device: where slots live and how bytes get there. The only module that knows what kind it is."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offload.blocks import DeviceCopy
from offload.buffers import StagingBuffer
from offload.trace import Trace

_ANCHOR_NS = 1_000_000_000
"""Age at which the time base of a device's events is renewed: they measure from it in float32 milliseconds."""

_TIED_NS, _MOST_TIES = 100_000, 5
"""What tying an event to the host's clock may take before it is tried again, and how often it is tried."""

_MOST_OPEN_SPANS = 4096
"""Spans of a GPU that wait to be told: those of some steps."""

_SHORTEST_STALL_NS = 20_000
"""Less between two events on a stream with nothing between them is the launching itself."""


class Copy(Protocol):
    """A copy to the device that has been started."""

    def done(self) -> bool:
        """Whether the bytes have arrived, so that the source may be overwritten."""

    def wait(self) -> None:
        """Let the calling thread sleep until the bytes have arrived."""

    def times_ns(self) -> tuple[int, int]:
        """When it began and ended, by `time.perf_counter_ns()`. Only once `done`."""


class Device(Protocol):
    """What the scheduler needs of a compute device."""

    torch_device: torch.device
    """Where yielded tensors are."""
    is_host: bool
    """Whether the device computes from host memory, so that a staging buffer is a slot and nothing is copied."""
    wait_lane: str
    """Lane of the trace for the time that a visit waits for its block: "stall" where the device waits with it."""

    def staging(self, nbytes: int) -> StagingBuffer:
        """A host buffer that reads land in and copies start from."""

    def slot(self, nbytes: int) -> Tensor:
        """Device memory for stored bytes: uint8 of shape (nbytes,). Its first copy must come after a `mark`."""

    def mark(self) -> torch.cuda.Event | None:
        """The point that the calling thread's compute stream has been filled up to; None if nothing runs behind it."""

    def copy(
        self, source: Tensor, *, into: Tensor, after: torch.cuda.Event | None, parts: Sequence[DeviceCopy] | None = None
    ) -> Copy:
        """Start copying host bytes into a slot, once the compute stream has passed `after`.

        Returns at once where `source` is page-locked. Leave it alone until the copy is done.

        Args:
            source: Tensor of shape (n,), uint8, in host memory.
            into: Tensor of shape (m,), uint8, on the device.
            after: What `mark` returned when the slot was used last.
            parts: Which bytes, and where they go; None for all of as many.
        """

    def wait_for(self, copy: Copy) -> None:
        """Let whatever the calling thread computes from now on come after the copy."""

    def synchronize(self) -> None:
        """Wait until nothing on the device touches slots or staging buffers any more."""


class CpuDevice(Device):
    """The processor: a block computes from the staging buffer that it was read into.

    Args:
        separate_slots: Copy into slots all the same, as a device with its own memory has to. For tests of that path.
    """

    def __init__(self, *, separate_slots: bool = False) -> None:
        self.torch_device = torch.device("cpu")
        self.is_host = not separate_slots
        self.wait_lane = "stall"

    def staging(self, nbytes: int) -> StagingBuffer:
        return StagingBuffer(nbytes, in_children=False)

    def slot(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def mark(self) -> None:
        """Return None: an operation on the processor is over when it returns."""

    def copy(
        self, source: Tensor, *, into: Tensor, after: torch.cuda.Event | None, parts: Sequence[DeviceCopy] | None = None
    ) -> Copy:
        """See `Device.copy`. Copies before it returns."""
        start_ns = time.perf_counter_ns()
        for target, part in copied_parts(source, into, parts):
            target.copy_(part)
        return _FinishedCopy(start_ns, time.perf_counter_ns())

    def wait_for(self, copy: Copy) -> None:
        """Do nothing: copies are over when they return."""

    def synchronize(self) -> None:
        """Do nothing: nothing runs behind the caller's back."""


@dataclass(frozen=True, eq=False)
class _FinishedCopy(Copy):
    """A copy that was over when it was returned."""

    start_ns: int
    end_ns: int

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return

    def times_ns(self) -> tuple[int, int]:
        return self.start_ns, self.end_ns


class CudaDevice(Device):
    """An NVIDIA GPU: slots in device memory, filled from pinned staging buffers on a stream of their own.

    Args:
        device: Which GPU, such as ``"cuda"`` or ``"cuda:1"``. Creating this initialises CUDA.

    Raises:
        ValueError: `device` is not a CUDA device.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        chosen = torch.device(device)
        if chosen.type != "cuda":
            raise ValueError(f"device: expected a CUDA device such as 'cuda:0', got {str(chosen)!r}")
        index = torch.cuda.current_device() if chosen.index is None else chosen.index
        self.torch_device = torch.device("cuda", index)
        self.is_host = False
        # The host may wait while the device still works off its queue; `ComputeTimes` knows when that stalls.
        self.wait_lane = "host waits"
        self._copies = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self._clock = _EventClock(self._copies)

    def staging(self, nbytes: int) -> StagingBuffer:
        """See `Device.staging`. Pinned where the system allows it."""
        # Registered in this device's context, whichever is the calling thread's.
        with torch.cuda.device(self.torch_device):
            return StagingBuffer(nbytes, pin=True, in_children=False)

    def slot(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.torch_device))
        return event

    def copy(
        self, source: Tensor, *, into: Tensor, after: torch.cuda.Event | None, parts: Sequence[DeviceCopy] | None = None
    ) -> CudaCopy:
        """See `Device.copy`. From pageable memory the calling thread waits for the bytes, and before for `after`."""
        start, end = timing_event(), timing_event()
        with torch.cuda.stream(self._copies):
            if after is not None:
                # The copy must not overwrite weights that the slot's last visit is still computing with, nor, the first
                # time, what the allocator's previous owner of this memory is still computing with.
                self._copies.wait_event(after)
            start.record(self._copies)
            for target, part in copied_parts(source, into, parts):
                target.copy_(part, non_blocking=True)
            end.record(self._copies)
        return CudaCopy(self._clock, start, end)

    def wait_for(self, copy: Copy) -> None:
        assert isinstance(copy, CudaCopy), copy
        # The visit must not compute with weights that are still arriving.
        torch.cuda.current_stream(self.torch_device).wait_event(copy.end)

    def synchronize(self) -> None:
        # Slots go back to the allocator and staging buffers are unpinned after this: neither a copy nor a kernel of any
        # stream may still be using them.
        torch.cuda.synchronize(self.torch_device)


def timing_event() -> torch.cuda.Event:
    """An event that tells its time."""
    # Blocking: a thread that waits for it sleeps rather than spins.
    return torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]


class _EventClock:
    """Events tell only the time between two of them: one that is waited for ties them to `time.perf_counter_ns()`."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        tries: list[tuple[int, int, torch.cuda.Event]] = []
        while len(tries) < _MOST_TIES and (not tries or tries[-1][0] > _TIED_NS):
            event, before_ns = timing_event(), time.perf_counter_ns()
            event.record(stream)
            event.synchronize()
            after_ns = time.perf_counter_ns()
            tries.append((after_ns - before_ns, after_ns, event))
        # It happened in between: the shorter that was, the less of it was other work, of the stream or the processor.
        _, self._anchor_ns, self._anchor = min(tries, key=lambda tried: tried[0])

    def at_ns(self, event: torch.cuda.Event) -> int:
        elapsed_ms: float = self._anchor.elapsed_time(event)
        at_ns = self._anchor_ns + round(elapsed_ms * 1e6)
        if at_ns - self._anchor_ns > _ANCHOR_NS:
            self._anchor, self._anchor_ns = event, at_ns
        return at_ns


class ComputeTimes:
    """When a GPU computed, and waited for blocks: spans between events of its compute stream, told once they are over.

    The host's clock would show when kernels were launched. Belongs to the training thread.

    Args:
        device: The GPU.
        trace: Gets the spans.
    """

    def __init__(self, device: torch.device, trace: Trace) -> None:
        self._device, self._trace = device, trace
        self._clock = _EventClock(torch.cuda.current_stream(device))
        self._open: deque[tuple[str, str, torch.cuda.Event, torch.cuda.Event]] = deque()

    def now(self) -> torch.cuda.Event:
        """The point that the current stream has been filled up to."""
        event = timing_event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def add(self, lane: str, name: str, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        """Have the time between two points told."""
        self._open.append((lane, name, start, end))
        if len(self._open) > _MOST_OPEN_SPANS:
            # The older half is over by now, or the device is thousands of kernels behind.
            self._settle(_MOST_OPEN_SPANS // 2)

    def settle(self) -> None:
        """Wait for the device, and tell everything."""
        self._settle(len(self._open))

    def forget(self) -> None:
        """Tell nothing of what is open: after an error."""
        self._open.clear()

    def _settle(self, num: int) -> None:
        for _ in range(num):
            lane, name, start, end = self._open.popleft()
            end.synchronize()
            start_ns, end_ns = self._clock.at_ns(start), self._clock.at_ns(end)
            if lane != "stall" or end_ns - start_ns > _SHORTEST_STALL_NS:
                self._trace.add(lane, name, start_ns, max(start_ns, end_ns))


@dataclass(frozen=True, eq=False)
class CudaCopy(Copy):
    """A copy on a CUDA device's copy stream, between two events."""

    clock: _EventClock
    start: torch.cuda.Event
    end: torch.cuda.Event

    def done(self) -> bool:
        return bool(self.end.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self.end.synchronize()

    def times_ns(self) -> tuple[int, int]:
        return self.clock.at_ns(self.start), self.clock.at_ns(self.end)


class CopyStream:
    """A stream of a GPU on which tensors go to host memory and come back, in order, beside the computation.

    The host waits for none of the copies where the host memory is page-locked. Each comes after what the current stream
    was given before, which computes its source or still uses its target; what the current stream is given after `up`
    comes after the copy.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def down(self, value: Tensor, into: Tensor) -> torch.cuda.Event:
        """Start copying to host memory.

        Args:
            value: A contiguous tensor on the device; the caller may drop it at once.
            into: Host memory of the same shape and dtype, contiguous or in rows that are.

        Returns:
            What is over once the bytes are there.
        """
        event = self._copy(value, into)
        # Its memory must not be given out again before it has been copied.
        value.record_stream(self._stream)
        return event

    def up(self, kept: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Start copying to the device.

        Args:
            kept: In host memory, contiguous or in rows that are; it must not change before the copy is over.

        Returns:
            The tensor on the device, for whatever the current stream computes from now on; and what is over once the
            bytes are there.
        """
        value = torch.empty(kept.shape, dtype=kept.dtype, device=self._device)
        event = self._copy(kept, value)
        # Nothing may compute from a value that is still arriving.
        torch.cuda.current_stream(self._device).wait_event(event)
        return value, event

    def _copy(self, source: Tensor, into: Tensor) -> torch.cuda.Event:
        # Whatever computes the source may not have finished; kernels that were launched before may still be using the
        # target's memory for what it held last.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, part in _rows(into, source):
                target.copy_(part, non_blocking=True)
        return self.mark()

    def mark(self) -> torch.cuda.Event:
        """What is over once all copies that have been started are."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def synchronize(self) -> None:
        """Let the calling thread wait until all copies are over."""
        self._stream.synchronize()


def _rows(target: Tensor, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Targets and sources that are contiguous: only such copies need no memory in between, for which the host waits."""
    if target.is_contiguous() and source.is_contiguous():
        yield target, source
    else:
        yield from zip(target.unbind(0), source.unbind(0), strict=True)


def copied_parts(source: Tensor, into: Tensor, parts: Sequence[DeviceCopy] | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Targets and sources of a copy."""
    if parts is None:
        yield into, source
        return
    for part in parts:
        end, source_end = part.offset_bytes + part.nbytes, part.source_offset_bytes + part.nbytes
        yield into[part.offset_bytes : end], source[part.source_offset_bytes : source_end]


def open_device(device: torch.device | str) -> Device:
    """Make the device that goes with a torch device.

    Raises:
        ValueError: Neither a CPU nor a CUDA device.
    """
    chosen = torch.device(device)
    if chosen.type == "cpu":
        return CpuDevice()
    if chosen.type == "cuda":
        return CudaDevice(chosen)
    raise ValueError(f"device: expected a CPU or a CUDA device, got {str(chosen)!r}")
