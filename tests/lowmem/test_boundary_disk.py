"""Boundary activations on disk: exact in any order, in bounded memory, and every failure a clear error."""

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowmem.streaming.boundary import Boundary, DeviceBoundaries, DiskBoundaries
from lowmem.streaming.boundary_tiers import tier_for
from offload import Closed, ReadError, Scratch, TierFull, Trace, WriteError
from tests.offload.small_disk import fill, small_disk
from tests.offload.stored_blocks import until

CPU = torch.device("cpu")
Move = Callable[[int, list[memoryview], int], int]


def tier_in(
    folder: Path, *, num_buffers: int = 2, pwrite: Move = os.pwritev, pread: Move = os.preadv
) -> DiskBoundaries:
    scratch = Scratch(folder, pwrite=pwrite, pread=pread)
    return DiskBoundaries(CPU, scratch, num_buffers=num_buffers)


def slow(move: Move) -> Move:
    def moved(fd: int, buffers: list[memoryview], offset: int) -> int:
        time.sleep(random.random() * 2e-3)
        return move(fd, buffers, offset)

    return moved


def failing(move: Move, code: int, *, fails: Callable[[], bool]) -> Move:
    def moved(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fails():
            raise OSError(code, os.strerror(code))
        return move(fd, buffers, offset)

    return moved


def finish(boundary: Boundary, expected: Tensor) -> None:
    """A block's backward: take, look for a while, release."""
    value = boundary.take()
    assert value.dtype == expected.dtype
    assert torch.equal(value, expected)
    time.sleep(1e-3)
    assert torch.equal(value, expected), "the buffer was used for something else"
    boundary.release()


@pytest.mark.parametrize("num_buffers", [1, 2, 3])
def test_boundaries_come_back_in_reverse_step_after_step_through_a_fixed_number_of_buffers(
    tmp_path: Path, num_buffers: int
) -> None:
    tier = tier_in(tmp_path, num_buffers=num_buffers, pwrite=slow(os.pwritev), pread=slow(os.preadv))
    for _ in range(3):
        values = [torch.randn(3, 5, 700) for _ in range(6)]
        kept = [tier.keep(value) for value in values]
        for boundary, value in zip(reversed(kept), reversed(values), strict=True):
            finish(boundary, value)
        assert tier.held_bytes == num_buffers * 45_056, "42,000 bytes in whole pages"
        # What is still being written when its block has gone by keeps its place for that long.
        assert 6 * 45_056 <= tier.scratch.file_bytes <= (6 + num_buffers) * 45_056
    until(lambda: tier.scratch.written_bytes == 3 * 6 * 45_056)
    tier.close()
    assert tier.held_bytes == 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("seed", range(6))
def test_any_order_any_types_and_several_passes_at_once(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    tier = tier_in(tmp_path, num_buffers=rng.randrange(1, 4), pwrite=slow(os.pwritev), pread=slow(os.preadv))
    kept: list[tuple[Boundary, Tensor]] = []
    for _ in range(60):
        if len(kept) < 12 and rng.random() < 0.6:
            shape = [rng.randrange(0, 40) for _ in range(rng.randrange(0, 4))]
            dtype = rng.choice([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
            value = torch.randn(shape).to(dtype)
            kept.append((tier.keep(value if rng.random() < 0.5 or value.ndim < 2 else value.mT.contiguous().mT), value))
        elif kept:
            boundary, value = kept.pop(rng.randrange(len(kept)))
            if rng.random() < 0.3:
                del boundary
            else:
                finish(boundary, value)
    for boundary, value in reversed(kept):
        finish(boundary, value)
    tier.close()


def test_two_passes_whose_backwards_come_in_either_order(tmp_path: Path) -> None:
    for order in ((0, 1), (1, 0)):
        tier = tier_in(tmp_path)
        values = [[torch.randn(100) for _ in range(5)] for _ in range(2)]
        kept = [[tier.keep(value) for value in row] for row in values]
        for which in order:
            for boundary, value in zip(reversed(kept[which]), reversed(values[which]), strict=True):
                finish(boundary, value)
        assert tier.held_bytes == 2 * 4096
        tier.close()


def test_a_block_with_more_activations_than_buffers_gets_more_while_it_holds_them(tmp_path: Path) -> None:
    tier = tier_in(tmp_path, num_buffers=2)
    blocks = [[torch.randn(64 * (i + 1)) for i in range(4)] for _ in range(3)]
    kept = [[tier.keep(value) for value in block] for block in blocks]
    for boundaries, values in zip(reversed(kept), reversed(blocks), strict=True):
        taken = [boundary.take() for boundary in boundaries]
        for value, expected in zip(taken, values, strict=True):
            assert torch.equal(value, expected)
        for boundary in boundaries:
            boundary.release()
        assert tier.held_bytes <= 2 * 4096
    tier.close()


def test_what_is_still_in_a_buffer_is_not_read_and_the_next_ones_are_read_ahead(tmp_path: Path) -> None:
    trace = Trace()
    tier = tier_for(CPU, planned="disk", disk=tmp_path, num_buffers=2, trace=trace)
    assert isinstance(tier, DiskBoundaries)
    kept = [tier.keep(torch.full((1000,), float(i))) for i in range(6)]
    # A buffer that is still being written from is not free for what is read ahead, however long the disk takes.
    until(lambda: not any(stored.under_way for stored in tier._kept.values()))
    finish(kept[5], torch.full((1000,), 5.0))
    finish(kept[4], torch.full((1000,), 4.0))
    # Before it is asked for.
    until(lambda: any(span.name == "boundary 4" for span in trace.spans() if span.lane == "disk"))
    for i in reversed(range(4)):
        finish(kept[i], torch.full((1000,), float(i)))
    # Two may be under way at a time, and end in either order.
    read = [span.name for span in trace.spans() if span.lane == "disk"]
    assert sorted(read) == [f"boundary {number}" for number in (1, 2, 3, 4)]
    until(lambda: [span.nbytes for span in trace.spans() if span.lane == "disk write"] == [4096] * 6)
    tier.close()


def test_dropped_graphs_give_their_room_back_also_in_the_middle_of_a_write(tmp_path: Path) -> None:
    tier = tier_in(tmp_path, pwrite=slow(os.pwritev))
    for _ in range(20):
        kept = [tier.keep(torch.randn(1000)) for _ in range(3)]
        del kept
    assert tier.scratch.file_bytes <= 6 * 4096
    assert tier.held_bytes <= 2 * 4096
    finish(tier.keep(torch.ones(5)), torch.ones(5))
    tier.close()


def test_a_released_boundary_that_is_still_being_written_spoils_nothing(tmp_path: Path) -> None:
    gate = threading.Event()
    gate.set()

    def gated(fd: int, buffers: list[memoryview], offset: int) -> int:
        gate.wait(60)
        return os.pwritev(fd, buffers, offset)

    tier = tier_in(tmp_path, num_buffers=3, pwrite=gated)
    for _ in range(5):
        gate.clear()
        first = tier.keep(torch.zeros(1000))
        taken = first.take()
        taken.fill_(-1)
        first.release()
        second, third = tier.keep(torch.ones(1000)), tier.keep(torch.full((1000,), 2.0))
        gate.set()
        # Has the buffers used again, so that the others come from disk.
        others = [tier.keep(torch.full((1000,), 3.0 + i)) for i in range(4)]
        for i in reversed(range(4)):
            finish(others[i], torch.full((1000,), 3.0 + i))
        finish(third, torch.full((1000,), 2.0))
        finish(second, torch.ones(1000))
    tier.close()


def test_longer_and_shorter_sequences_do_not_add_up(tmp_path: Path) -> None:
    tier = tier_in(tmp_path)
    for num in (1024, 65536, 64, 64):
        kept = [tier.keep(torch.full((num,), float(i))) for i in range(4)]
        for i in reversed(range(4)):
            finish(kept[i], torch.full((num,), float(i)))
    assert tier.held_bytes == 2 * 4096
    tier.close()


def test_a_second_backward_is_refused(tmp_path: Path) -> None:
    tier = tier_in(tmp_path)
    boundary = tier.keep(torch.randn(3))
    boundary.take()
    boundary.release()
    boundary.release()
    with pytest.raises(RuntimeError, match="backward ran twice"):
        boundary.take()
    tier.close()


# ---- errors


def test_a_full_disk_stops_the_forward_and_the_next_step_runs_once_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as folder:
        tier = tier_in(folder)
        filler = fill(folder, leave_bytes=1 << 20)

        def step() -> None:
            values = [torch.randn(128, 1024) for _ in range(6)]
            kept = [tier.keep(value) for value in values]
            for boundary, value in zip(reversed(kept), reversed(values), strict=True):
                finish(boundary, value)

        for _ in range(2):
            with pytest.raises(TierFull, match=rf"{folder}.*no room for .* free; free space there.*Budget\.disk"):
                step()
        filler.unlink()
        for _ in range(2):
            step()
        tier.close()


@pytest.mark.parametrize("num_buffers", [1, 2, 4])
def test_failed_writes_surface_in_the_thread_that_trains(tmp_path: Path, num_buffers: int) -> None:
    broken = threading.Event()
    tier = tier_in(tmp_path, num_buffers=num_buffers, pwrite=failing(os.pwritev, errno.EIO, fails=broken.is_set))

    def step() -> None:
        kept = [tier.keep(torch.full((1000,), float(i))) for i in range(8)]
        for i in reversed(range(8)):
            finish(kept[i], torch.full((1000,), float(i)))

    step()
    broken.set()
    for _ in range(2):
        with pytest.raises(WriteError, match=r"writing 4096 bytes at offset .* failed: Input/output error"):
            step()
    broken.clear()
    step()
    tier.close()


@pytest.mark.parametrize("num_buffers", [1, 2])
def test_failed_reads_surface_in_the_thread_that_trains(tmp_path: Path, num_buffers: int) -> None:
    broken = threading.Event()
    tier = tier_in(tmp_path, num_buffers=num_buffers, pread=failing(os.preadv, errno.EIO, fails=broken.is_set))

    def backward(kept: list[Boundary]) -> None:
        for i in reversed(range(len(kept))):
            finish(kept[i], torch.full((1000,), float(i)))

    kept = [tier.keep(torch.full((1000,), float(i))) for i in range(8)]
    broken.set()
    with pytest.raises(ReadError, match=r"reading 4096 bytes at offset .* failed: Input/output error"):
        backward(kept)
    broken.clear()
    del kept
    backward([tier.keep(torch.full((1000,), float(i))) for i in range(8)])
    tier.close()


def test_a_file_that_lost_its_end_is_a_read_error(tmp_path: Path) -> None:
    tier = tier_in(tmp_path, num_buffers=1)
    kept = [tier.keep(torch.full((1000,), float(i))) for i in range(3)]
    finish(kept[2], torch.full((1000,), 2.0))
    os.ftruncate(tier.scratch._file.fd, 100)
    with pytest.raises(ReadError, match="the system reported the end of the file, which has 100 bytes"):
        kept[1].take()
    tier.close()


def test_a_tier_that_was_closed_says_so(tmp_path: Path) -> None:
    tier = tier_in(tmp_path, num_buffers=1)
    kept = [tier.keep(torch.ones(10)) for _ in range(2)]
    tier.close()
    tier.close()
    with pytest.raises(Closed):
        tier.keep(torch.ones(10))
    with pytest.raises(Closed):
        kept[0].take()


def test_plans_name_the_tier(tmp_path: Path) -> None:
    tier = tier_for(CPU, planned="disk", disk=tmp_path)
    assert isinstance(tier, DiskBoundaries)
    tier.close()
    assert isinstance(tier_for(torch.device("cuda"), planned="device"), DeviceBoundaries)
    with pytest.raises(ValueError, match=r"boundary activations on disk need a folder: give Budget\.disk"):
        tier_for(CPU, planned="disk")
    with pytest.raises(ValueError, match="""expected "device", "host" or "disk", got 'tape'"""):
        tier_for(CPU, planned="tape")
    with pytest.raises(ValueError, match="num_buffers must be at least 1, got 0"):
        tier_for(CPU, planned="disk", disk=tmp_path, num_buffers=0)


@pytest.mark.gpu
def test_boundaries_on_disk_come_back_to_the_gpu(tmp_path: Path) -> None:
    tier = tier_for(torch.device("cuda"), planned="disk", disk=tmp_path)
    values = [torch.randn(3, 5, device="cuda") for _ in range(5)]
    kept = [tier.keep(value) for value in values]
    for boundary, value in zip(reversed(kept), reversed(values), strict=True):
        back = boundary.take()
        assert back.device == value.device
        assert torch.equal(back, value)
        boundary.release()
    tier.close()
