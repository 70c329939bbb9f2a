"""Visits see the stored bytes, in few reads, in bounded memory; errors and interruptions leave a working scheduler."""

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from offload.blocks import lay_out
from offload.buffers import StagingBuffer, view_tensor
from offload.device import CpuDevice, Device
from offload.errors import Closed, OffloadError, ReadError, SourceChanged
from offload.files.file_io import FileIO
from offload.pipeline import Pipeline
from offload.placement import Placement, PlacementPlan
from offload.scheduler import Scheduler
from offload.trace import Trace
from tests.offload.own_threads import own_threads
from tests.offload.stored_blocks import PATIENCE_S, DelayedDevice, SlowReads, StoredBlocks, until, waits_in

NUM_BLOCKS = 6
FORWARD = tuple(range(NUM_BLOCKS))
STEP = (*FORWARD, *reversed(FORWARD))
NEXT_STEP = (0, 1)
DEVICES: dict[str, Callable[[], Device]] = {
    "in place": CpuDevice,
    "separate slots": lambda: CpuDevice(separate_slots=True),
    "delayed copies": lambda: DelayedDevice(delay_s=0.001),
}


@pytest.fixture
def stored(tmp_path: Path) -> StoredBlocks:
    return StoredBlocks(tmp_path, NUM_BLOCKS)


@pytest.fixture
def reads() -> SlowReads:
    return SlowReads()


@pytest.fixture
def reader(reads: SlowReads) -> Iterator[FileIO]:
    with FileIO(pread=reads, request_bytes=8192) as reader:
        yield reader


@pytest.fixture
def scheduler(stored: StoredBlocks, reader: FileIO) -> Iterator[Scheduler]:
    """Three slots for six blocks, on the processor."""
    with stored.schedule(stored.plan(ring=3), CpuDevice(), reader=reader) as scheduler:
        yield scheduler


class RememberingDevice(CpuDevice):
    """The processor, with a list of the buffers that were made for it."""

    def __init__(self, *, separate_slots: bool = False) -> None:
        super().__init__(separate_slots=separate_slots)
        self.buffers: list[StagingBuffer] = []

    def staging(self, nbytes: int) -> StagingBuffer:
        self.buffers.append(super().staging(nbytes))
        return self.buffers[-1]


def fetch_threads() -> list[threading.Thread]:
    return own_threads("offload-fetch")


def run_step(scheduler: Scheduler, stored: StoredBlocks) -> None:
    scheduler.expect((*STEP, *NEXT_STEP))
    for block in STEP:
        with scheduler.resident(block) as tensors:
            stored.check(block, tensors)


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize(
    ("ring", "resident", "cached"), [(2, 0, 0), (3, 0, 0), (2, 2, 0), (2, 1, 2), (3, 0, 6), (2, 4, 0)]
)
def test_steps_see_the_stored_bytes_and_read_what_was_planned(
    stored: StoredBlocks, reader: FileIO, kind: str, ring: int, resident: int, cached: int
) -> None:
    device = DEVICES[kind]()
    plan = stored.plan(ring=ring, resident=resident, cached=cached, is_host=device.is_host)
    with stored.schedule(plan, device, reader=reader) as scheduler:
        run_step(scheduler, stored)
        run_step(scheduler, stored)
        before = scheduler.counters
        run_step(scheduler, stored)
        after = scheduler.counters
    assert after.num_visits == 3 * len(STEP)
    for block, placement in enumerate(plan.placements):
        if placement != Placement.STREAMED:
            assert after.num_reads[block] == 1
    # Where blocks are read ahead into staging buffers as well, one of them may have to give way to one needed sooner.
    spare_bytes = 0 if device.is_host else plan.slot_bytes
    assert after.bytes_read - before.bytes_read <= plan.step_read_bytes + spare_bytes


def test_nothing_is_read_twice_at_the_turns(scheduler: Scheduler, stored: StoredBlocks) -> None:
    run_step(scheduler, stored)
    assert scheduler.counters.num_reads == (2, 2, 2, 1, 1, 1)
    run_step(scheduler, stored)
    # The ring held 3, 4, 5 at each turn of direction, and 0, 1, 2 from one step to the next.
    assert scheduler.counters.num_reads == (3, 3, 3, 2, 2, 2)


def test_blocks_are_fetched_ahead_up_to_the_size_of_the_ring(scheduler: Scheduler, stored: StoredBlocks) -> None:
    scheduler.expect(FORWARD)
    until(lambda: sum(scheduler.counters.num_reads) == 3)
    time.sleep(0.02)
    assert scheduler.counters.num_reads == (1, 1, 1, 0, 0, 0)
    for block in (0, 1, 2):
        with scheduler.resident(block) as tensors:
            stored.check(block, tensors)
    assert scheduler.counters.num_hits == 3
    until(lambda: sum(scheduler.counters.num_reads) == 6)


def test_two_reads_are_queued_while_a_block_is_visited(
    scheduler: Scheduler, stored: StoredBlocks, reads: SlowReads
) -> None:
    scheduler.expect(FORWARD[:1])
    with scheduler.resident(0):
        reads.gate.clear()
        scheduler.expect(FORWARD)
        until(lambda: stored.has_started(1, reads) and stored.has_started(2, reads))
        assert scheduler.counters.num_reads == (1, 0, 0, 0, 0, 0)
        reads.gate.set()


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("kind", DEVICES)
def test_any_order_of_visits_sees_the_stored_bytes(stored: StoredBlocks, kind: str, poison: bool) -> None:
    chance = random.Random(kind + str(poison))
    for ring, resident, cached in ((2, 0, 0), (3, 1, 0), (2, 1, 2)):
        device = DEVICES[kind]()
        plan = stored.plan(ring=ring, resident=resident, cached=cached, is_host=device.is_host)
        with (
            FileIO(pread=SlowReads(max_s=0.002), request_bytes=8192) as reader,
            stored.schedule(plan, device, reader=reader, poison=poison) as scheduler,
        ):
            for _ in range(4):
                order = [chance.randrange(NUM_BLOCKS) for _ in range(10)]
                scheduler.expect(order)
                # What comes is mostly what was expected: with detours, gaps and early ends.
                for block in order[: chance.randint(5, 10)]:
                    if chance.random() < 0.2:
                        continue
                    visited = chance.randrange(NUM_BLOCKS) if chance.random() < 0.2 else block
                    with scheduler.resident(visited) as tensors:
                        stored.check(visited, tensors)
                        if chance.random() < 0.3:
                            time.sleep(0.002)
                            stored.check(visited, tensors)


def test_a_released_slot_is_poisoned(stored: StoredBlocks, reader: FileIO) -> None:
    with stored.schedule(stored.plan(ring=2), CpuDevice(), reader=reader, poison=True) as scheduler:
        with scheduler.resident(0) as tensors:
            kept = tensors["0.1"]
            with scheduler.resident(0):
                pass
            stored.check(0, tensors)
        assert torch.all(kept == 0xFF)
        with scheduler.resident(0) as tensors:
            stored.check(0, tensors)
        assert scheduler.counters.num_reads[0] == 2


def test_a_staging_buffer_is_poisoned_once_it_has_been_copied(stored: StoredBlocks, reader: FileIO) -> None:
    device = RememberingDevice(separate_slots=True)
    plan = stored.plan(ring=2, is_host=False)
    with stored.schedule(plan, device, reader=reader, poison=True) as scheduler, scheduler.resident(0) as tensors:
        until(lambda: any(bool(torch.all(buffer.tensor == 0xFF)) for buffer in device.buffers))
        stored.check(0, tensors)


def test_on_the_processor_a_visit_sees_the_buffer_itself(stored: StoredBlocks, reader: FileIO) -> None:
    with stored.schedule(stored.plan(ring=2), CpuDevice(), reader=reader) as scheduler:
        with scheduler.resident(0) as tensors:
            first = tensors["0.1"]
            stored.check(0, tensors)
        for block in (1, 2, 3):
            with scheduler.resident(block):
                pass
        assert first.numpy().tobytes() != stored.truth["0.1"]


def test_memory_is_what_was_planned_however_many_blocks_pass(stored: StoredBlocks, reader: FileIO) -> None:
    plan = stored.plan(ring=2, resident=1, cached=1)
    with stored.schedule(plan, CpuDevice(), reader=reader) as scheduler:
        assert scheduler.memory()["ring_bytes"] == 2 * plan.slot_bytes
        for _ in range(2):
            run_step(scheduler, stored)
            assert scheduler.memory() == {
                "resident_bytes": plan.resident_bytes,
                "ring_bytes": 2 * plan.slot_bytes,
                "host_cache_bytes": plan.host_bytes,
                "staging_bytes": 0,
            }


def test_memory_beside_a_device_is_what_was_planned(stored: StoredBlocks, reader: FileIO) -> None:
    plan = stored.plan(ring=2, resident=1, cached=1, is_host=False)
    with stored.schedule(plan, CpuDevice(separate_slots=True), reader=reader) as scheduler:
        run_step(scheduler, stored)
        assert scheduler.memory() == {
            "resident_bytes": plan.resident_bytes,
            "ring_bytes": 2 * plan.slot_bytes,
            "host_cache_bytes": plan.host_bytes,
            "staging_bytes": plan.staging_bytes,
        }
        assert sum(scheduler.memory().values()) == plan.device_bytes + plan.host_bytes + plan.staging_bytes


def test_transfers_and_waits_are_traced(stored: StoredBlocks, reads: SlowReads, reader: FileIO) -> None:
    trace = Trace()
    device = DelayedDevice(delay_s=0.002)
    reads.gate.clear()
    with stored.schedule(stored.plan(ring=2, is_host=False), device, reader=reader, trace=trace) as scheduler:
        main = threading.current_thread()

        def open_gate() -> None:
            until(lambda: waits_in(main, "scheduler.py"))
            time.sleep(0.03)
            reads.gate.set()

        threading.Thread(target=open_gate).start()
        with scheduler.resident(3):
            pass
        until(lambda: len(trace.spans()) == 3)
        counters = scheduler.counters
    spans = {span.lane: span for span in trace.spans()}
    times_s = {lane: (span.end_ns - span.start_ns) / 1e9 for lane, span in spans.items()}
    assert {span.name for span in trace.spans()} == {"block 3"}
    assert spans["disk"].nbytes == counters.bytes_read > 0
    assert spans["copy"].nbytes == lay_out(stored.blocks[3]).copied_bytes
    assert times_s["copy"] >= 0.002
    assert times_s["stall"] == pytest.approx(counters.stall_s)
    assert counters.stall_s >= 0.03
    assert (counters.num_visits, counters.num_hits) == (1, 0)


def test_visits_nest(scheduler: Scheduler, stored: StoredBlocks) -> None:
    scheduler.expect(FORWARD)
    with scheduler.resident(0) as outer, scheduler.resident(1) as inner:
        with scheduler.resident(0) as same, scheduler.resident(5) as off_order:
            stored.check(0, same)
            stored.check(5, off_order)
        stored.check(0, outer)
        stored.check(1, inner)
    with scheduler.resident(2) as tensors:
        stored.check(2, tensors)


def test_a_visit_inside_one_to_the_same_block_is_not_one_of_the_expected(stored: StoredBlocks, reader: FileIO) -> None:
    with stored.schedule(stored.plan(ring=2), CpuDevice(), reader=reader) as scheduler:
        scheduler.expect((0, 0, 1, 2))
        with scheduler.resident(0), scheduler.resident(0):
            pass
        until(lambda: scheduler.counters.num_reads[1] == 1)
        time.sleep(0.02)
        # Still expected once more, and before block 2.
        with scheduler.resident(0):
            pass
        assert scheduler.counters.num_reads[0] == 1


def test_nested_visits_that_leave_no_slot_are_refused(scheduler: Scheduler, stored: StoredBlocks) -> None:
    with scheduler.resident(0) as outer, scheduler.resident(1), scheduler.resident(2):
        with (
            pytest.raises(OffloadError, match="block 3: all 3 slots are held by visits to block 0, block 1, block 2"),
            scheduler.resident(3),
        ):
            raise AssertionError("there is no slot for it")
        stored.check(0, outer)
    with scheduler.resident(3) as tensors:
        stored.check(3, tensors)


@pytest.mark.parametrize("kind", DEVICES)
def test_a_read_error_comes_out_of_the_visit_and_the_next_try_works(
    stored: StoredBlocks, reads: SlowReads, reader: FileIO, kind: str
) -> None:
    device = DEVICES[kind]()
    plan = stored.plan(ring=2, resident=1, cached=1, is_host=device.is_host)
    with stored.schedule(plan, device, reader=reader) as scheduler:
        scheduler.expect(())
        for block in FORWARD:
            reads.num_failures = 1
            with (
                pytest.raises(ReadError, match=r"(one|two)\.bin: reading \d+ bytes at offset \d+ failed: Input/output"),
                scheduler.resident(block),
            ):
                raise AssertionError("its bytes never came")
            with scheduler.resident(block) as tensors:
                stored.check(block, tensors)
        run_step(scheduler, stored)


def test_an_error_on_the_way_is_kept_for_the_visit_that_needs_the_block(
    scheduler: Scheduler, stored: StoredBlocks, reads: SlowReads
) -> None:
    scheduler.expect(FORWARD[:1])
    with scheduler.resident(0) as tensors:
        reads.num_failures = 1
        scheduler.expect((0, 3))
        until(lambda: reads.num_failures == 0)
        time.sleep(0.01)
        stored.check(0, tensors)
    with scheduler.resident(1) as tensors:
        stored.check(1, tensors)
    with pytest.raises(ReadError, match="Input/output error"), scheduler.resident(3):
        raise AssertionError("its bytes never came")
    with scheduler.resident(3) as tensors:
        stored.check(3, tensors)


def test_a_new_order_tries_again_what_had_failed(stored: StoredBlocks, reads: SlowReads, reader: FileIO) -> None:
    trace = Trace()
    with stored.schedule(stored.plan(ring=3), CpuDevice(), reader=reader, trace=trace) as scheduler:
        reads.num_failures = 1
        scheduler.expect((2,))
        until(lambda: len(trace.spans()) == 1)
        scheduler.expect((2,))
        with scheduler.resident(2) as tensors:
            stored.check(2, tensors)


def test_a_read_that_was_under_way_at_a_new_order_may_fail(
    scheduler: Scheduler, stored: StoredBlocks, reads: SlowReads
) -> None:
    reads.gate.clear()
    reads.num_failures = 1
    scheduler.expect((2,))
    until(lambda: bool(reads.started))
    scheduler.expect((2,))
    reads.gate.set()
    with scheduler.resident(2) as tensors:
        stored.check(2, tensors)
    assert reads.num_failures == 0


def test_buffers_of_failed_reads_are_given_back(stored: StoredBlocks, reads: SlowReads, reader: FileIO) -> None:
    device = RememberingDevice()
    with stored.schedule(stored.plan(ring=2, resident=4), device, reader=reader) as scheduler:
        for _ in range(3):
            reads.num_failures = 1
            with pytest.raises(ReadError, match="Input/output error"), scheduler.resident(1):
                raise AssertionError("its bytes never came")
        assert [buffer.nbytes for buffer in device.buffers] == [stored.buffer_bytes[1]] * 3
        for buffer in device.buffers:
            with pytest.raises(Closed, match="the staging buffer was closed"):
                _ = buffer.tensor


def test_a_file_that_changes_is_an_error_of_the_visit(scheduler: Scheduler, stored: StoredBlocks) -> None:
    with scheduler.resident(0):
        pass
    os.truncate(stored.files[0], 5000)
    with pytest.raises(SourceChanged, match=r"one\.bin changed while it was in use"), scheduler.resident(4):
        raise AssertionError("its bytes are gone")


def test_a_closed_reader_is_an_error_of_the_visit(scheduler: Scheduler, reader: FileIO) -> None:
    reader.close()
    with pytest.raises(Closed, match="block 1: the reader or writer was closed"), scheduler.resident(1):
        raise AssertionError("nobody read it")


def test_a_device_that_fails_is_an_error_of_the_visit(stored: StoredBlocks, reader: FileIO) -> None:
    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("no memory for the copy")

    device = DelayedDevice(delay_s=0.0)
    plan = stored.plan(ring=2, resident=2, cached=1, is_host=False)
    with stored.schedule(plan, device, reader=reader) as scheduler:
        for block in FORWARD:
            device.fail = out_of_memory
            with pytest.raises(torch.OutOfMemoryError, match="no memory for the copy"), scheduler.resident(block):
                raise AssertionError("it never came")
            device.fail = None
            with scheduler.resident(block) as tensors:
                stored.check(block, tensors)


def test_a_fetcher_that_dies_is_an_error_and_not_a_hang(stored: StoredBlocks, reader: FileIO) -> None:
    trace = Trace()

    def refuse(span: object) -> None:
        raise KeyError("listener")

    with stored.schedule(stored.plan(ring=2), CpuDevice(), reader=reader, trace=trace) as scheduler:
        stop = trace.listen(refuse)
        scheduler.expect(FORWARD)
        until(lambda: not fetch_threads())
        stop()
        with (
            pytest.raises(OffloadError, match="fetches blocks has stopped: KeyError: 'listener'"),
            scheduler.resident(0),
        ):
            raise AssertionError("nobody fetched it")


def test_an_exception_inside_a_visit_ends_it(scheduler: Scheduler, stored: StoredBlocks) -> None:
    scheduler.expect(STEP)
    for _ in range(5):
        with pytest.raises(torch.OutOfMemoryError, match="too big"), scheduler.resident(0), scheduler.resident(1):
            raise torch.OutOfMemoryError("too big")
    scheduler.reset()
    scheduler.reset()
    run_step(scheduler, stored)


def test_reset_gives_back_the_slots_of_visits_that_never_ended(scheduler: Scheduler, stored: StoredBlocks) -> None:
    abandoned = [scheduler.resident(block) for block in (0, 1, 2)]
    for visit in abandoned:
        visit.__enter__()
    scheduler.reset()
    run_step(scheduler, stored)
    with scheduler.resident(5) as tensors:
        for visit in abandoned:
            visit.__exit__(None, None, None)
        for block in (2, 3, 4):
            with scheduler.resident(block):
                stored.check(5, tensors)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, also where the shell started the tests with it ignored (in the background)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_waiting_leaves_a_working_scheduler(
    scheduler: Scheduler, stored: StoredBlocks, reads: SlowReads
) -> None:
    scheduler.expect(FORWARD)
    reads.gate.clear()
    main = threading.current_thread()

    def interrupt() -> None:
        until(lambda: waits_in(main, "scheduler.py"))
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt), scheduler.resident(4):
        raise AssertionError("its read is being held back")
    interrupter.join()
    reads.gate.set()
    run_step(scheduler, stored)


def test_close_waits_for_reads_and_a_waiting_visit_gets_an_error(
    stored: StoredBlocks, reads: SlowReads, reader: FileIO
) -> None:
    scheduler = stored.schedule(stored.plan(ring=3), CpuDevice(), reader=reader)
    reads.gate.clear()
    scheduler.expect(FORWARD)
    errors: list[Exception] = []

    def visit() -> None:
        try:
            with scheduler.resident(0):
                pass
        except OffloadError as error:
            errors.append(error)

    visitor = threading.Thread(target=visit)
    visitor.start()
    until(lambda: stored.has_started(0, reads))
    closer = threading.Thread(target=scheduler.close)
    closer.start()
    visitor.join(timeout=PATIENCE_S)
    assert isinstance(errors[0], Closed)
    # A read is still writing to a buffer, which therefore must not be freed yet.
    assert closer.is_alive()
    reads.gate.set()
    closer.join(timeout=PATIENCE_S)
    assert not closer.is_alive()
    assert not fetch_threads()
    scheduler.close()


def test_tensors_of_a_visit_outlive_a_close(stored: StoredBlocks, reader: FileIO) -> None:
    scheduler = stored.schedule(stored.plan(ring=3), CpuDevice(), reader=reader)
    with scheduler.resident(0) as tensors:
        scheduler.close()
        stored.check(0, tensors)
    assert scheduler.counters.num_visits == 1


def test_a_closed_scheduler_refuses(scheduler: Scheduler) -> None:
    scheduler.close()
    scheduler.close()
    for call in (lambda: scheduler.expect(()), scheduler.reset, scheduler.memory):
        with pytest.raises(Closed, match="the scheduler was closed"):
            call()
    with pytest.raises(Closed, match="the scheduler was closed"), scheduler.resident(0):
        raise AssertionError("it is closed")


def test_a_scheduler_that_is_dropped_takes_its_thread_along(stored: StoredBlocks, reader: FileIO) -> None:
    scheduler = stored.schedule(stored.plan(ring=3), CpuDevice(), reader=reader)
    scheduler.expect(FORWARD)
    with scheduler.resident(0):
        assert len(fetch_threads()) == 1
    del scheduler
    gc.collect()
    assert not fetch_threads()


def run_program(program: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    root = Path(__file__).resolve().parents[2]
    start = f"""
import os, sys, warnings
from pathlib import Path
from offload.device import CpuDevice
from offload.files.file_io import FileIO
from tests.offload.stored_blocks import StoredBlocks
stored = StoredBlocks(Path({str(folder)!r}), 6)
reader = FileIO()
scheduler = stored.schedule(stored.plan(ring=2), CpuDevice(), reader=reader)
scheduler.expect(range(6))
with scheduler.resident(0) as tensors:
    stored.check(0, tensors)
"""
    return subprocess.run(
        [sys.executable, "-c", start + program], cwd=root, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_forked_child_is_refused_and_a_process_ends_though_nobody_closed_anything(tmp_path: Path) -> None:
    program = """
warnings.simplefilter("ignore")
child = os.fork()
if child == 0:
    try:
        with scheduler.resident(1):
            pass
    except RuntimeError as error:
        print(error, flush=True)
    scheduler.close()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
with scheduler.resident(1) as tensors:
    stored.check(1, tensors)
scheduler.expect(range(6))
print("end of parent")
"""
    done = run_program(program, tmp_path)
    assert "was used in its forked child" in done.stdout
    assert done.stdout.endswith("end of parent\n"), done.stderr
    assert (done.returncode, done.stderr) == (0, "")


def test_numbers_that_are_no_blocks_are_refused(scheduler: Scheduler) -> None:
    assert scheduler.num_blocks == NUM_BLOCKS
    with pytest.raises(IndexError, match="block: expected a number from 0 to 5, got 6"), scheduler.resident(6):
        raise AssertionError("there is no such block")
    with pytest.raises(ValueError, match="order: expected block numbers from 0 to 5, got 6"):
        scheduler.expect((0, 6))


def test_a_plan_for_something_else_is_refused(stored: StoredBlocks, reader: FileIO) -> None:
    def refused(plan: PlacementPlan, message: str, *, device: Device | None = None) -> None:
        with pytest.raises(ValueError, match=message):
            stored.schedule(plan, device or CpuDevice(), reader=reader)

    def hand_made(*, num_staging: int, num_slots: int, is_host: bool, size: int = 1 << 20) -> PlacementPlan:
        return PlacementPlan(
            placements=(Placement.STREAMED,) * NUM_BLOCKS,
            block_bytes=(size,) * NUM_BLOCKS,
            device_is_host=is_host,
            num_staging=num_staging,
            num_slots=num_slots,
            num_passes=2,
        )

    short = PlacementPlan(
        placements=(Placement.HOST,), block_bytes=(1,), device_is_host=True, num_staging=0, num_slots=0, num_passes=2
    )
    refused(short, "plan: expected one for 6 blocks, got one for 1")
    refused(
        hand_made(num_staging=2, num_slots=0, is_host=True, size=100), "plan: block block 0 takes .* planned were 100"
    )
    refused(
        hand_made(num_staging=2, num_slots=2, is_host=False), "plan: made for a device of another kind: one with memory"
    )
    refused(hand_made(num_staging=0, num_slots=0, is_host=True), "6 blocks move through a ring of no slots")
    separate = CpuDevice(separate_slots=True)
    refused(hand_made(num_staging=0, num_slots=2, is_host=False), "read through staging buffers", device=separate)
    assert not fetch_threads()


def test_a_block_copied_again_before_its_copy_has_ended_keeps_its_source(stored: StoredBlocks, reader: FileIO) -> None:
    # As at a turn: visits that run ahead of the device end before the bytes have arrived.
    device = DelayedDevice(delay_s=0.05)
    plan = stored.plan(ring=2, is_host=False)
    pipeline = Pipeline(
        [lay_out(block) for block in stored.blocks],
        plan=plan,
        read=reader.read,
        device=device,
        trace=Trace(),
        poison=True,
    )
    pipeline.order.replace((0, 0))
    assert pipeline.start()
    until(pipeline.collect)
    assert pipeline.start()
    first = pipeline.find(0)
    assert first is not None
    pipeline.order.visit(0)
    pipeline.free(first)
    assert pipeline.start()
    again = pipeline.find(0)
    assert again is not None
    until(pipeline.collect)
    assert again.copy is not None
    device.wait_for(again.copy)
    offsets = lay_out(stored.blocks[0]).device_offsets
    stored.check(
        0, {spec.name: view_tensor(again.tensor, offsets[spec.name], spec=spec) for spec in stored.blocks[0].tensors}
    )
    until(pipeline.collect)
    pipeline.close()
