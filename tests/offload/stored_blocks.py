"""Blocks of random bytes in real files, the reads that bring them, slowed or failing, and devices to bring them to."""

import errno
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from offload.blocks import BlockSpec, DeviceCopy, TensorSpec, lay_out
from offload.buffers import StagingBuffer
from offload.device import Copy, Device, copied_parts
from offload.files.file_io import FileIO
from offload.placement import PlacementPlan, place_blocks
from offload.scheduler import Scheduler
from offload.trace import Trace


class StoredBlocks:
    """Blocks of different sizes over two files, at odd offsets, and what their bytes are."""

    def __init__(
        self,
        folder: Path,
        num_blocks: int = 6,
        *,
        block_bytes: int = 30_000,
        most_gap: int = 3,
        are_there: bool = False,
    ) -> None:
        chance = random.Random(num_blocks)
        files = [folder / "one.bin", folder / "two.bin"]
        contents = [bytearray(), bytearray()]
        self.blocks: list[BlockSpec] = []
        self.truth: dict[str, bytes] = {}
        for block in range(num_blocks):
            tensors = []
            for number, which in enumerate((block % 2, block % 2, 1 - block % 2)):
                rows = max(1, block_bytes // 3 // 40 - block)
                data = chance.randbytes(rows * 5 * 4)
                contents[which] += bytes(chance.randint(0, most_gap))
                name = f"{block}.{number}"
                tensors.append(
                    TensorSpec(
                        name=name,
                        dtype=(torch.float32, torch.uint8, torch.bfloat16)[number],
                        shape=((rows, 5), (rows * 20,), (rows, 10))[number],
                        file=files[which],
                        offset_bytes=len(contents[which]),
                        nbytes=len(data),
                    )
                )
                contents[which] += data
                self.truth[name] = data
            self.blocks.append(BlockSpec(name=f"block {block}", tensors=tuple(tensors)))
        if not are_there:
            for file, content in zip(files, contents, strict=True):
                file.write_bytes(content)
        self.files = files

    @property
    def buffer_bytes(self) -> list[int]:
        return [lay_out(block).buffer_bytes for block in self.blocks]

    def check(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Compare what a visit sees with what was stored, bit by bit."""
        specs = self.blocks[block].tensors
        assert list(tensors) == [spec.name for spec in specs]
        for spec in specs:
            tensor = tensors[spec.name]
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape)
            stored = tensor.contiguous().view(-1).view(torch.uint8).cpu()
            assert stored.numpy().tobytes() == self.truth[spec.name], f"{spec.name} has wrong bytes"

    def has_started(self, block: int, reads: "SlowReads") -> bool:
        """Whether a read of the block's first extent has come in."""
        extent = lay_out(self.blocks[block]).extents[0]
        return (extent.file.stat().st_ino, extent.file_offset_bytes) in reads.started

    def plan(self, *, ring: int, resident: int = 0, cached: int = 0, is_host: bool = True) -> PlacementPlan:
        """Room for a ring, and for about that many blocks to stay."""
        largest = max(self.buffer_bytes)
        return place_blocks(
            self.buffer_bytes,
            device_bytes=(ring + resident) * largest,
            host_bytes=cached * largest,
            device_is_host=is_host,
            max_ring=ring,
        )

    def schedule(
        self,
        plan: PlacementPlan,
        device: Device,
        *,
        reader: FileIO,
        trace: Trace | None = None,
        poison: bool = False,
    ) -> Scheduler:
        return Scheduler(
            self.blocks,
            plan=plan,
            read=reader.read,
            device=device,
            trace=Trace() if trace is None else trace,
            poison=poison,
        )


PATIENCE_S = 60.0
"""How long a test waits for what has to happen; a busy machine may keep a thread from running for seconds."""


def until(condition: Callable[[], bool]) -> None:
    """Wait for something to become true."""
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, f"did not happen in {PATIENCE_S:.0f} s"
        time.sleep(0.001)


def waits_in(thread: threading.Thread, file: str) -> bool:
    """Whether a thread waits for another one, in a function of a file of this name."""
    assert thread.ident is not None
    frame = sys._current_frames().get(thread.ident)
    if frame is None or frame.f_code.co_filename != threading.__file__ or frame.f_code.co_name != "wait":
        return False
    while frame is not None and Path(frame.f_code.co_filename).name != file:
        frame = frame.f_back
    return frame is not None


class SlowReads:
    """Stands in for `os.preadv`: sleeps before every read, holds reads back, or fails them."""

    def __init__(self, *, max_s: float = 0.0) -> None:
        self._max_s = max_s
        self._chance = random.Random(0)
        self.gate = threading.Event()
        """Reads wait for it. Open at first."""
        self.gate.set()
        self.num_failures = 0
        """Reads still to fail."""
        self.started: set[tuple[int, int]] = set()
        """Inode and offset of the reads that have come in."""

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.started.add((os.fstat(fd).st_ino, offset))
        if self._max_s:
            time.sleep(self._chance.random() * self._max_s)
        assert self.gate.wait(timeout=PATIENCE_S)
        if self.num_failures > 0:
            self.num_failures -= 1
            raise OSError(errno.EIO, "Input/output error")
        return os.preadv(fd, buffers, offset)


class Mark:
    """A point in the visiting thread's program."""

    def __init__(self, number: int) -> None:
        self.number = number


class DelayedDevice:
    """A device with memory of its own, whose copies run late, in order, on a thread: a stream without a GPU.

    A slot is NaN from the start of a copy until it has arrived, and may be overwritten only with a mark that was made
    after its last visit had begun.
    """

    def __init__(self, *, delay_s: float) -> None:
        self.torch_device = torch.device("cpu")
        self.is_host = False
        self.wait_lane = "stall"
        self._delay_s = delay_s
        self._stream = ThreadPoolExecutor(max_workers=1)
        self._num_marks = 0
        self._visited: dict[int, int] = {}
        self.num_copies = 0
        self.fail: Callable[[], None] | None = None

    def staging(self, nbytes: int) -> StagingBuffer:
        return StagingBuffer(nbytes)

    def slot(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def mark(self) -> torch.cuda.Event:
        self._num_marks += 1
        return Mark(self._num_marks)  # type: ignore[return-value]

    def copy(
        self, source: Tensor, *, into: Tensor, after: torch.cuda.Event | None, parts: Sequence[DeviceCopy] | None = None
    ) -> Copy:
        if self.fail is not None:
            self.fail()
        self.num_copies += 1
        assert isinstance(after, Mark), "the slot's last use was not marked"
        visited = self._visited.get(into.data_ptr(), 0)
        assert after.number > visited, "a slot is overwritten without a mark that was made after its last visit began"
        into.fill_(0xFF)
        copy = self._stream.submit(self._copy, source, into, parts)
        return DelayedCopy(copy, into)

    def wait_for(self, copy: Copy) -> None:
        assert isinstance(copy, DelayedCopy)
        self._visited[copy.into.data_ptr()] = self._num_marks
        copy.future.result(timeout=PATIENCE_S)

    def synchronize(self) -> None:
        self._stream.submit(int).result(timeout=PATIENCE_S)

    def _copy(self, source: Tensor, into: Tensor, parts: Sequence[DeviceCopy] | None) -> tuple[int, int]:
        start_ns = time.perf_counter_ns()
        time.sleep(self._delay_s)
        for target, part in copied_parts(source, into, parts):
            target.copy_(part)
        return start_ns, time.perf_counter_ns()


class DelayedCopy:
    def __init__(self, future: "Future[tuple[int, int]]", into: Tensor) -> None:
        self.future, self.into = future, into

    def done(self) -> bool:
        return self.future.done()

    def wait(self) -> None:
        self.future.result(timeout=PATIENCE_S)

    def times_ns(self) -> tuple[int, int]:
        return self.future.result()
