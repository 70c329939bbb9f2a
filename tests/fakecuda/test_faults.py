"""The device path broken on purpose, one fault at a time: the simulated GPU reports each. Tests of the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.streaming.boundary import Buffered
from lowmem.streaming.boundary_tiers import GpuHostBoundaries
from offload.device import CudaDevice
from offload.pipeline import Pipeline
from tests.fakecuda.steps import Step, run
from tests.zoo.architectures import build

pytestmark = [pytest.mark.gpu, pytest.mark.racy]
Break = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("faults") / "llama")


@pytest.fixture(autouse=True)
def _copies_that_take_long() -> Iterator[None]:
    if torch.cuda.get_device_name() != "Simulated GPU":
        pytest.skip("a real GPU does not report races")
    from tests.fakecuda import simulated_gpu

    # A copy that the host has seen to be over orders what comes after it: it must still be under way at the visit.
    before = simulated_gpu.set_lag(10.0)
    yield
    torch.cuda.synchronize()  # before the memory goes to another test
    simulated_gpu.set_lag(before)


def visits_do_not_wait_for_their_copy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CudaDevice, "wait_for", lambda self, copy: None)


def visits_wait_on_the_copies_own_stream(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CudaDevice, "wait_for", lambda self, copy: self._copies.wait_event(copy.end))


def copies_do_not_wait_for_the_slots_last_visit(patch: pytest.MonkeyPatch) -> None:
    copy = CudaDevice.copy
    patch.setattr(CudaDevice, "copy", lambda self, source, *, into, after: copy(self, source, into=into, after=None))


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

    def times_ns(self) -> tuple[int, int]:
        return 0, 0


def staging_memory_is_read_into_while_it_is_copied(patch: pytest.MonkeyPatch) -> None:
    copy = CudaDevice.copy
    patch.setattr(
        CudaDevice,
        "copy",
        lambda self, source, *, into, after: _SaidToBeDone(copy(self, source, into=into, after=after)),
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


def boundaries_are_copied_before_they_are_computed(patch: pytest.MonkeyPatch) -> None:
    def keep(self: GpuHostBoundaries, value: torch.Tensor) -> Buffered:
        value = value.detach().contiguous()
        buffer = self._take_buffer(value.nbytes)
        kept = buffer.tensor[: value.nbytes].view(value.dtype).view(value.shape)
        with torch.cuda.stream(self._copies):
            kept.copy_(value, non_blocking=True)
        value.record_stream(self._copies)
        return Buffered(kept, buffer, self)

    patch.setattr(GpuHostBoundaries, "keep", keep)


def the_memory_of_boundaries_is_given_out_while_they_are_copied(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)


def boundaries_come_back_into_memory_in_use(patch: pytest.MonkeyPatch) -> None:
    def on_device(self: GpuHostBoundaries, kept: torch.Tensor) -> torch.Tensor:
        value = torch.empty(kept.shape, dtype=kept.dtype, device=self._device)
        with torch.cuda.stream(self._copies):
            value.copy_(kept, non_blocking=True)
        torch.cuda.current_stream().wait_stream(self._copies)
        return value

    patch.setattr(GpuHostBoundaries, "on_device", on_device)


def blocks_compute_from_boundaries_that_have_not_come(patch: pytest.MonkeyPatch) -> None:
    def on_device(self: GpuHostBoundaries, kept: torch.Tensor) -> torch.Tensor:
        value = torch.empty(kept.shape, dtype=kept.dtype, device=self._device)
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            value.copy_(kept, non_blocking=True)
        return value

    patch.setattr(GpuHostBoundaries, "on_device", on_device)


HOST_FAULTS: list[Break] = [
    boundaries_are_copied_before_they_are_computed,
    the_memory_of_boundaries_is_given_out_while_they_are_copied,
    boundaries_come_back_into_memory_in_use,
    blocks_compute_from_boundaries_that_have_not_come,
]


@pytest.mark.parametrize("fault", HOST_FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_of_boundaries_on_the_host_is_reported(
    fault: Break, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    assert seen_races(folder, Step(boundary="host"), tmp_path)


def test_nothing_is_reported_of_what_is_right(folder: Path, tmp_path: Path) -> None:
    assert not seen_races(folder, Step(), tmp_path)


def test_boundaries_on_the_host_make_it_wait_for_nothing(folder: Path, tmp_path: Path) -> None:
    from tests.fakecuda import simulated_gpu

    assert not seen_races(folder, Step(boundary="host"), tmp_path)
    waits = [place for kind, _, place in simulated_gpu.places if kind == "sync" and "streaming/boundary" in place]
    # Where a buffer of another length is made, page-locked memory may go: once per length.
    assert all("_make_buffer" in place for place in waits), waits
