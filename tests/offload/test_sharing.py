"""Processes of a machine read blocks once and keep them once; whoever fails or is killed takes nothing with it."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from offload.blocks import BlockLayout, lay_out
from offload.buffers import StagingBuffer
from offload.device import CpuDevice, CudaDevice, Device
from offload.errors import Closed, OffloadError, PeerLost, ReadError
from offload.files.file_io import FileIO
from offload.placement import PlacementPlan
from offload.scheduler import Scheduler
from offload.sharing.arena import ArenaLayout, SharedArena
from offload.sharing.reader import SharedReader
from offload.sharing.server import NUM_SLOTS, BlockServer
from offload.trace import Trace
from tests.offload.own_threads import own_threads
from tests.offload.stored_blocks import DelayedDevice, SlowReads, StoredBlocks

NUM_BLOCKS = 9
FORWARD = tuple(range(NUM_BLOCKS))
STEP = (*FORWARD, *reversed(FORWARD))
DEVICES: dict[str, Callable[[], Device]] = {
    "in place": CpuDevice,
    "separate slots": lambda: CpuDevice(separate_slots=True),
    "delayed copies": lambda: DelayedDevice(delay_s=0.0005),
}


@pytest.fixture
def stored(tmp_path: Path) -> StoredBlocks:
    return StoredBlocks(tmp_path, NUM_BLOCKS)


@pytest.fixture
def reads() -> SlowReads:
    return SlowReads()


class Node:
    """Some processes of a machine, here in one: a server, and a reader for each."""

    def __init__(
        self,
        stored: StoredBlocks,
        reads: SlowReads,
        num_ranks: int,
        *,
        pin: bool = False,
        # Longer than a busy machine keeps a thread from running: who is waited for is decided by what each has done.
        patience_s: tuple[float, float] = (30.0, 60.0),
    ) -> None:
        self.stored = stored
        self.layouts = [lay_out(block) for block in stored.blocks]
        self.stack = ExitStack()
        self.reader = self.stack.enter_context(FileIO(pread=reads, request_bytes=8192))
        self.server = self.stack.enter_context(BlockServer(self.layouts, reader=self.reader, patience_s=patience_s))
        self.own = [self.stack.enter_context(FileIO(request_bytes=8192)) for _ in range(num_ranks)]
        self.readers = [
            self.stack.enter_context(SharedReader(self.server.address, self.layouts, reader=own, pin=pin))
            for own in self.own
        ]

    def schedule(self, rank: int, plan: PlacementPlan, device: Device | None = None, **options: bool) -> Scheduler:
        return self.stack.enter_context(
            Scheduler(
                self.stored.blocks,
                plan=plan,
                read=self.readers[rank].read,
                device=device or CpuDevice(),
                trace=Trace(),
                keep=self.readers[rank].keep,
                visited=self.readers[rank].visited,
                **options,
            )
        )


@pytest.fixture
def node(stored: StoredBlocks, reads: SlowReads) -> Iterator[Node]:
    made = Node(stored, reads, 2)
    with made.stack:
        yield made
    assert not own_threads("offload-share")


@pytest.fixture
def hasty(stored: StoredBlocks, reads: SlowReads) -> Iterator[Node]:
    """A node where one that says nothing is soon not waited for any more."""
    made = Node(stored, reads, 2, patience_s=(0.5, 0.5))
    with made.stack:
        yield made


def step(scheduler: Scheduler, stored: StoredBlocks, *, pause: Callable[[], float] = lambda: 0.0) -> None:
    """One forward and backward, every byte compared."""
    scheduler.expect((*STEP, 0, 1))
    for block in STEP:
        with scheduler.resident(block) as tensors:
            time.sleep(pause())
            stored.check(block, tensors)


def together(schedulers: list[Scheduler], stored: StoredBlocks, *, num_steps: int, most_s: float) -> None:
    """Steps of all, which wait for each other at the end of each, as DDP makes them."""
    end = threading.Barrier(len(schedulers))

    def work(rank: int) -> None:
        chance = random.Random(rank)
        for _ in range(num_steps):
            step(schedulers[rank], stored, pause=lambda: chance.random() * most_s)
            end.wait(timeout=60)

    with ThreadPoolExecutor(len(schedulers)) as threads:
        list(threads.map(work, range(len(schedulers))))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("resident", "cached"), [(0, 0), (2, 3), (9, 0)], ids=["streamed", "mixed", "kept"])
def test_two_ranks_see_the_stored_bytes_and_read_them_once(
    node: Node, stored: StoredBlocks, device: str, resident: int, cached: int
) -> None:
    made = [DEVICES[device]() for _ in range(2)]
    plan = stored.plan(ring=2, resident=resident, cached=cached, is_host=made[0].is_host)
    both = [node.schedule(rank, plan, made[rank]) for rank in range(2)]
    together(both, stored, num_steps=4, most_s=0.004)
    with stored.schedule(plan, DEVICES[device](), reader=node.own[0]) as alone:
        for _ in range(4):
            step(alone, stored)
        one = alone.counters.bytes_read
    read = sum(scheduler.counters.bytes_read for scheduler in both)
    # Less than one alone, where a block is in a slot still at a turn; more by what is on its way at the end.
    assert read <= 1.05 * one + 3 * max(stored.buffer_bytes)


def test_what_one_loads_before_its_first_visit_is_read_once_for_one_that_comes_later(
    node: Node, stored: StoredBlocks
) -> None:
    def load(reader: SharedReader) -> int:
        into = StagingBuffer(max(stored.buffer_bytes)).tensor
        nbytes = 0
        for layout in node.layouts:
            transfer = reader.read(layout, into)
            transfer.wait()
            nbytes += transfer.nbytes
        return nbytes

    with ThreadPoolExecutor(1) as thread:
        sooner = thread.submit(load, node.readers[0])
        time.sleep(0.3)
        later = load(node.readers[1])
        assert sooner.result(timeout=60) + later == sum(layout.read_bytes for layout in node.layouts)


@pytest.mark.gpu
@pytest.mark.parametrize("cached", [0, 4, NUM_BLOCKS])
def test_each_rank_copies_to_its_gpu_out_of_the_shared_memory(
    stored: StoredBlocks, reads: SlowReads, cached: int
) -> None:
    node = Node(stored, reads, 2, pin=True)
    with node.stack:
        plan = stored.plan(ring=2, cached=cached, is_host=False)
        both = [node.schedule(rank, plan, CudaDevice()) for rank in range(2)]
        together(both, stored, num_steps=3, most_s=0.002)
        read = sum(scheduler.counters.bytes_read for scheduler in both)
        assert read <= (3 * len(STEP) if cached < NUM_BLOCKS else NUM_BLOCKS) * max(stored.buffer_bytes)
        for scheduler in both:
            scheduler.close()


@pytest.mark.parametrize("poison", [False, True], ids=["kept at turns", "fetched anew"])
@pytest.mark.parametrize("ring", [2, 3])
def test_four_ranks_of_which_some_are_always_behind_read_no_more_than_one(
    stored: StoredBlocks, reads: SlowReads, ring: int, poison: bool
) -> None:
    num_ranks, num_steps = 4, 4
    node = Node(stored, reads, num_ranks)
    with node.stack:
        plan = stored.plan(ring=ring)
        schedulers = [node.schedule(rank, plan, poison=poison) for rank in range(num_ranks)]
        end = threading.Barrier(num_ranks)

        def work(rank: int) -> None:
            for _ in range(num_steps):
                step(schedulers[rank], stored, pause=lambda: 0.001 * (1 + 2 * rank))
                end.wait(timeout=60)

        start_s = time.monotonic()
        with ThreadPoolExecutor(num_ranks) as threads:
            list(threads.map(work, range(num_ranks)))
        took_s = time.monotonic() - start_s
        read = sum(scheduler.counters.bytes_read for scheduler in schedulers)
        with stored.schedule(plan, CpuDevice(), reader=node.own[0], poison=poison) as alone:
            for _ in range(num_steps):
                step(alone, stored)
            one = alone.counters.bytes_read
    assert read <= 1.05 * one + 2 * max(stored.buffer_bytes)
    assert took_s < 10, "the slowest waits for nobody"


def test_kept_blocks_are_one_memory(node: Node, stored: StoredBlocks) -> None:
    plan = stored.plan(ring=2, resident=NUM_BLOCKS - 2)
    both = [node.schedule(rank, plan) for rank in range(2)]
    together(both, stored, num_steps=1, most_s=0.0)
    with both[0].resident(0) as mine, both[1].resident(0) as theirs:
        name = next(name for name, tensor in mine.items() if tensor.dtype == torch.uint8)
        assert mine[name].data_ptr() != theirs[name].data_ptr(), "each has a mapping of its own"
        before = theirs[name][0].item()
        mine[name][0] = before ^ 1
        assert theirs[name][0].item() == before ^ 1
        mine[name][0] = before


def committed_bytes(arena: SharedArena) -> int:
    return os.fstat(arena.fd).st_blocks * 512


def test_memory_of_what_nobody_keeps_any_more_is_given_back(node: Node, stored: StoredBlocks) -> None:
    plan = stored.plan(ring=2, resident=NUM_BLOCKS - 2)
    both = [node.schedule(rank, plan) for rank in range(2)]
    together(both, stored, num_steps=1, most_s=0.0)
    arena = node.readers[0]._connection.arena
    full = committed_bytes(arena)
    both[0].close()
    with both[1].resident(2) as tensors:
        stored.check(2, tensors)
    assert committed_bytes(arena) == full
    both[1].close()
    passing = NUM_SLOTS * ArenaLayout.of(node.layouts, num_slots=NUM_SLOTS).slot_bytes
    deadline = time.monotonic() + 10
    while committed_bytes(arena) > passing and time.monotonic() < deadline:
        time.sleep(0.01)
    assert committed_bytes(arena) <= passing


def test_ranks_may_keep_different_blocks(node: Node, stored: StoredBlocks) -> None:
    keeps, streams = node.schedule(0, stored.plan(ring=2, resident=6)), node.schedule(1, stored.plan(ring=2))
    together([keeps, streams], stored, num_steps=3, most_s=0.001)


def test_one_that_visits_other_blocks_more_often_is_served(hasty: Node, stored: StoredBlocks) -> None:
    plan = stored.plan(ring=2)
    both = [hasty.schedule(rank, plan) for rank in range(2)]
    together([both[0]], stored, num_steps=1, most_s=0.0)
    chance = random.Random(5)

    def wander(rank: int) -> None:
        for _ in range(60):
            block = chance.randrange(NUM_BLOCKS)
            with both[rank].resident(block) as tensors:
                stored.check(block, tensors)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(wander, range(2)))


def test_one_that_has_stopped_visiting_is_waited_for_once(hasty: Node, stored: StoredBlocks) -> None:
    plan = stored.plan(ring=2)
    both = [hasty.schedule(rank, plan) for rank in range(2)]
    together(both, stored, num_steps=1, most_s=0.0)
    start_s = time.monotonic()
    for _ in range(10):
        step(both[0], stored)
    assert time.monotonic() - start_s < 5, "it waits at each block for one that does not come"


def test_after_one_has_done_more_they_read_once_again(hasty: Node, stored: StoredBlocks) -> None:
    plan = stored.plan(ring=2)
    both = [hasty.schedule(rank, plan) for rank in range(2)]
    together(both, stored, num_steps=1, most_s=0.0)
    for _ in range(5):
        step(both[1], stored)
    time.sleep(1)  # longer than one that says nothing is waited for here
    before = sum(scheduler.counters.bytes_read for scheduler in both)
    end = threading.Barrier(2)

    def work(rank: int) -> None:
        for _ in range(8):
            step(both[rank], stored, pause=lambda: (0.001, 0.003)[rank])
            end.wait(timeout=60)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(work, range(2)))
    read = sum(scheduler.counters.bytes_read for scheduler in both) - before
    with stored.schedule(plan, CpuDevice(), reader=hasty.own[0]) as alone:
        for _ in range(8):
            step(alone, stored)
        # Where exactly each stands is found out over some visits.
        assert read <= 1.2 * alone.counters.bytes_read


def test_what_the_server_cannot_read_each_reads_for_itself(node: Node, stored: StoredBlocks, reads: SlowReads) -> None:
    for resident in (0, NUM_BLOCKS):
        plan = stored.plan(ring=2, resident=resident)
        reads.num_failures = 4
        both = [node.schedule(rank, plan) for rank in range(2)]
        together(both, stored, num_steps=2, most_s=0.001)
        for scheduler in both:
            scheduler.close()


def test_an_error_of_the_file_is_the_visitors(node: Node, stored: StoredBlocks) -> None:
    scheduler = node.schedule(1, stored.plan(ring=2))
    stored.files[0].unlink()
    with pytest.raises(OffloadError, match=r"one\.bin"), scheduler.resident(0):
        pass


@pytest.mark.parametrize("resident", [0, 4])
def test_when_the_server_closes_the_others_read_on(node: Node, stored: StoredBlocks, resident: int) -> None:
    plan = stored.plan(ring=2, resident=resident)
    both = [node.schedule(rank, plan) for rank in range(2)]
    together(both, stored, num_steps=1, most_s=0.0)
    both[0].close()
    node.readers[0].close()
    node.server.close()
    for _ in range(2):
        step(both[1], stored)
    assert node.readers[1].read(node.layouts[0], StagingBuffer(node.layouts[0].buffer_bytes).tensor).outcome() is None


def test_a_reader_that_was_closed_says_so(node: Node) -> None:
    into = StagingBuffer(node.layouts[0].buffer_bytes).tensor
    node.readers[0].close()
    with pytest.raises(Closed):
        node.readers[0].read(node.layouts[0], into)
    with pytest.raises(OSError, match="cannot be used"):
        SharedReader("nobody", node.layouts, reader=node.own[0], pin=False)


def test_blocks_that_the_server_does_not_know_are_read(node: Node, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = StoredBlocks(tmp_path / "other", 3, block_bytes=9000)
    with Scheduler(
        other.blocks,
        plan=other.plan(ring=2, resident=1),
        read=node.readers[0].read,
        device=CpuDevice(),
        trace=Trace(),
        keep=node.readers[0].keep,
        visited=node.readers[0].visited,
    ) as scheduler:
        for block in range(3):
            with scheduler.resident(block) as tensors:
                other.check(block, tensors)


_CHILD = """
import sys, time
from pathlib import Path
from offload import BlockServer, FileIO, SharedReader, StagingBuffer, lay_out
from tests.offload.stored_blocks import StoredBlocks

stored = StoredBlocks(Path(sys.argv[1]), 9)
layouts = [lay_out(block) for block in stored.blocks]
with FileIO() as reader:
    server = BlockServer(layouts, reader=reader) if sys.argv[2] == "serve" else None
    address = server.address if server else sys.argv[2]
    shared = SharedReader(address, layouts, reader=reader, pin=False)
    place = shared.keep(layouts[0])
    shared.read(layouts[0], place.tensor).wait()
    print(address, flush=True)
    time.sleep(600)
"""


def start_child(folder: Path, what: str) -> tuple[subprocess.Popen[str], str]:
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(folder), what], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    return child, child.stdout.readline().strip()


def kill(child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    child.stdout.close()
    child.send_signal(signal.SIGKILL)
    child.wait()


def read_until_lost(shared: SharedReader, layouts: list[BlockLayout]) -> float:
    """Seconds until a read says that somebody is lost."""
    into = StagingBuffer(max(layout.buffer_bytes for layout in layouts)).tensor
    start_s = time.monotonic()
    with pytest.raises(PeerLost, match=r"process \d+.*ended without a word.*checkpoint"):  # noqa: PT012
        while time.monotonic() - start_s < 20:
            for layout in layouts:
                shared.read(layout, into).wait()
    return time.monotonic() - start_s


def test_a_killed_process_is_told_of_and_leaves_nothing(hasty: Node, stored: StoredBlocks, tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    child, _ = start_child(tmp_path, hasty.server.address)
    kill(child)
    assert read_until_lost(hasty.readers[0], hasty.layouts) < 5
    assert set(os.listdir("/dev/shm")) <= before


def test_a_killed_server_is_told_of_and_leaves_nothing(stored: StoredBlocks, tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    child, address = start_child(tmp_path, "serve")
    layouts = [lay_out(block) for block in stored.blocks]
    with FileIO() as reader, SharedReader(address, layouts, reader=reader, pin=False) as shared:
        kill(child)
        assert read_until_lost(shared, layouts) < 5
    assert set(os.listdir("/dev/shm")) <= before


def test_a_failed_read_is_not_taken_for_a_lost_process(node: Node, reads: SlowReads, stored: StoredBlocks) -> None:
    for file in stored.files:
        file.write_bytes(b"")
    into = StagingBuffer(node.layouts[0].buffer_bytes).tensor
    with pytest.raises(OffloadError) as raised:
        node.readers[0].read(node.layouts[0], into).wait()
    assert not isinstance(raised.value, PeerLost)
    assert isinstance(raised.value, ReadError | OffloadError)
