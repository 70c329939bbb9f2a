"""The device path broken on purpose, one fault at a time: the simulated GPU reports each. Tests of the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.streaming.boundary import DiskBoundaries, StoredBoundary
from lowmem.streaming.boundary_tiers import GpuDiskBoundaries, GpuHostBoundaries, _Retired
from offload.device import CopyStream, CudaDevice
from offload.pipeline import Pipeline
from offload.transfer import Transfer
from tests.fakecuda.steps import Step, run
from tests.zoo.architectures import build

pytestmark = [pytest.mark.gpu, pytest.mark.racy, pytest.mark.usefixtures("late_copies")]
Break = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("faults") / "llama")


def visits_do_not_wait_for_their_copy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CudaDevice, "wait_for", lambda self, copy: None)


def visits_wait_on_the_copies_own_stream(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CudaDevice, "wait_for", lambda self, copy: self._copies.wait_event(copy.end))


def copies_do_not_wait_for_the_slots_last_visit(patch: pytest.MonkeyPatch) -> None:
    copy = CudaDevice.copy
    patch.setattr(CudaDevice, "copy", lambda self, source, **how: copy(self, source, **(how | {"after": None})))


def a_freed_slot_is_not_marked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Pipeline, "free", lambda self, slot: slot.block not in self._kept)


def a_freed_slot_is_marked_on_the_copy_stream(patch: pytest.MonkeyPatch) -> None:
    def mark(self: CudaDevice) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._copies)
        return event

    patch.setattr(CudaDevice, "mark", mark)


class _SaidToBeDone:
    """A copy that is over as soon as it was begun."""

    def __init__(self, copy: Any) -> None:
        self.end = copy.end

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return

    def times_ns(self) -> tuple[int, int]:
        return 0, 0


def staging_memory_is_read_into_while_it_is_copied(patch: pytest.MonkeyPatch) -> None:
    copy = CudaDevice.copy
    patch.setattr(
        CudaDevice,
        "copy",
        lambda self, source, **how: _SaidToBeDone(copy(self, source, **how)),
    )
    patch.setattr(CudaDevice, "wait_for", lambda self, copy: torch.cuda.current_stream().wait_event(copy.end))


FAULTS: list[Break] = [
    visits_do_not_wait_for_their_copy,
    visits_wait_on_the_copies_own_stream,
    copies_do_not_wait_for_the_slots_last_visit,
    a_freed_slot_is_not_marked,
    a_freed_slot_is_marked_on_the_copy_stream,
    staging_memory_is_read_into_while_it_is_copied,
]


def seen_races(folder: Path, step: Step, output: Path) -> list[str]:
    from tests.fakecuda import simulated_gpu

    run(folder, step, output, device="cuda:0")
    races: list[str] = simulated_gpu.simulator.races()
    return races


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("placement", ["streamed", "cached"])
def test_a_fault_is_reported(
    fault: Break, placement: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if placement == "cached" and fault is staging_memory_is_read_into_while_it_is_copied:
        pytest.skip("nothing is read again into the memory of a cached block")
    fault(monkeypatch)
    assert seen_races(folder, Step(placement=placement), tmp_path)


def values_are_copied_down_before_they_are_computed(patch: pytest.MonkeyPatch) -> None:
    def down(self: CopyStream, value: torch.Tensor, into: torch.Tensor) -> torch.cuda.Event:
        event = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            into.copy_(value, non_blocking=True)
            event.record(self._stream)
        value.record_stream(self._stream)
        return event

    patch.setattr(CopyStream, "down", down)


def memory_is_given_out_while_it_is_copied_down(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)


def values_come_back_into_memory_in_use(patch: pytest.MonkeyPatch) -> None:
    def up(self: CopyStream, kept: torch.Tensor, *, into: torch.Tensor | None = None) -> Any:
        value = torch.empty(kept.shape, dtype=kept.dtype, device=self._device) if into is None else into
        event = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            value.copy_(kept, non_blocking=True)
            event.record(self._stream)
        torch.cuda.current_stream().wait_event(event)
        return value, event

    patch.setattr(CopyStream, "up", up)


def blocks_compute_from_values_that_have_not_come(patch: pytest.MonkeyPatch) -> None:
    def up(self: CopyStream, kept: torch.Tensor, *, into: torch.Tensor | None = None) -> Any:
        value = torch.empty(kept.shape, dtype=kept.dtype, device=self._device) if into is None else into
        self._stream.wait_stream(torch.cuda.current_stream())
        event = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            value.copy_(kept, non_blocking=True)
            event.record(self._stream)
        return value, event

    patch.setattr(CopyStream, "up", up)


COPY_FAULTS: list[Break] = [
    values_are_copied_down_before_they_are_computed,
    memory_is_given_out_while_it_is_copied_down,
    values_come_back_into_memory_in_use,
    blocks_compute_from_values_that_have_not_come,
]


@pytest.mark.parametrize("fault", COPY_FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("boundary", ["host", "disk"])
def test_a_fault_of_boundaries_off_the_device_is_reported(
    fault: Break, boundary: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    assert seen_races(folder, Step(boundary=boundary), tmp_path)


def the_disk_writes_what_has_not_come_from_the_device(patch: pytest.MonkeyPatch) -> None:
    def send(self: GpuDiskBoundaries, stored: StoredBoundary, value: torch.Tensor) -> Transfer:
        assert stored.buffer is not None
        self._copied[stored.buffer] = self._copies.down(value.detach().contiguous(), stored.view())
        return self.write(stored)

    patch.setattr(GpuDiskBoundaries, "send", send)


def the_disk_reads_into_what_is_being_copied(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GpuDiskBoundaries, "fetch", DiskBoundaries.fetch)


DISK_FAULTS: list[Break] = [
    the_disk_writes_what_has_not_come_from_the_device,
    the_disk_reads_into_what_is_being_copied,
]


@pytest.mark.parametrize("fault", DISK_FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_between_disk_and_device_is_reported(
    fault: Break, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    assert seen_races(folder, Step(boundary="disk"), tmp_path)


def test_page_locked_memory_that_goes_while_it_is_copied_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.fakecuda import simulated_gpu

    monkeypatch.setattr(_Retired, "add", lambda self, buffer, copied: buffer.close())
    tier = GpuHostBoundaries(torch.device("cuda"))
    tier.keep(torch.ones(64, device="cuda")).release()
    # So that the late copy, which goes on, writes to memory that is there.
    held = [buffer.tensor for buffer in tier._free]
    tier.keep(torch.ones(4096, device="cuda"))
    assert simulated_gpu.simulator.races()
    torch.cuda.synchronize()
    del held


def test_nothing_is_reported_of_what_is_right(folder: Path, tmp_path: Path) -> None:
    assert not seen_races(folder, Step(), tmp_path)


@pytest.mark.parametrize("boundary", ["host", "disk"])
def test_boundaries_off_the_device_make_the_host_wait_for_no_copy(boundary: str, folder: Path, tmp_path: Path) -> None:
    from tests.fakecuda import simulated_gpu

    assert not seen_races(folder, Step(boundary=boundary), tmp_path)
    waits = [place for kind, _, place in simulated_gpu.places if kind.startswith("wait") and "boundary" in place]
    # Where buffers go at the end, page-locked memory may be in use; on disk, a thread waits before it writes.
    allowed = ("close", "_begin_after", "synchronize")
    assert all(place.split()[-1] in allowed for place in waits), waits
