"""Devices: the same contract for both, CUDA's order between streams, budgets measured where they are open."""

import time
from pathlib import Path

import pytest
import torch

from offload.budget import Budget, available_ram_bytes
from offload.device import CpuDevice, CudaDevice, Device, open_device
from offload.files.file_io import FileIO
from offload.trace import Trace
from tests.offload.stored_blocks import SlowReads, StoredBlocks, until

MIB = 1 << 20
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> Device:
    return CpuDevice(separate_slots=True) if request.param == "cpu" else CudaDevice()


def until_done(*copies: object) -> None:
    until(lambda: all(copy.done() for copy in copies))  # type: ignore[attr-defined]


def test_a_copy_brings_all_bytes_and_says_when(device: Device) -> None:
    before_ns = time.perf_counter_ns()
    with device.staging(3 * MIB) as buffer:
        buffer.tensor.random_(0, 256)
        slot = device.slot(3 * MIB)
        copy = device.copy(buffer.tensor, into=slot, after=device.mark())
        device.wait_for(copy)
        assert torch.equal(slot.cpu(), buffer.tensor)
        assert copy.done()
        start_ns, end_ns = copy.times_ns()
        device.synchronize()
    # Events of a GPU are tied to this clock to within some tens of microseconds, on a busy machine to within the
    # shortest of a few tries.
    assert before_ns - 20_000_000 <= start_ns <= end_ns <= time.perf_counter_ns() + 20_000_000
    assert slot.device == device.torch_device


def test_copies_end_in_the_order_they_were_started(device: Device) -> None:
    with device.staging(MIB) as buffer:
        slot = device.slot(MIB)
        copies = []
        for value in (1, 2, 3):
            buffer.tensor.fill_(value)
            copies.append(device.copy(buffer.tensor, into=slot, after=device.mark()))
            until_done(*copies)
        ends = [copy.times_ns()[1] for copy in copies]
        assert ends == sorted(ends)
        assert torch.all(slot == 3)
        device.synchronize()


def test_the_processor_computes_from_staging_buffers_unless_told_otherwise() -> None:
    assert CpuDevice().is_host
    assert not CpuDevice(separate_slots=True).is_host
    assert CpuDevice().mark() is None


def test_devices_are_opened_by_torch_device() -> None:
    assert isinstance(open_device("cpu"), CpuDevice)
    assert open_device(torch.device("cpu")).torch_device == torch.device("cpu")
    with pytest.raises(ValueError, match="device: expected a CPU or a CUDA device, got 'meta'"):
        open_device("meta")
    with pytest.raises(ValueError, match="device: expected a CUDA device such as 'cuda:0', got 'cpu'"):
        CudaDevice("cpu")


def test_what_a_budget_gives_is_not_measured() -> None:
    assert Budget(device="1GiB", host=5000).measured("cpu") == Budget(device=1 << 30, host=5000)
    assert Budget(device=2048, host=5000, disk="/x").measured("cuda:7") == Budget(device=2048, host=5000, disk="/x")


def test_both_sizes_of_a_processor_come_out_of_the_same_ram() -> None:
    available = available_ram_bytes()
    nothing_given = Budget().measured("cpu")
    assert nothing_given.host_bytes == 0
    assert nothing_given.device_bytes is not None
    assert 0.5 * available < nothing_given.device_bytes < available
    host_given = Budget(host=64 * MIB).measured("cpu")
    assert host_given.host_bytes == 64 * MIB
    assert host_given.device_bytes is not None
    assert 0.5 * available < host_given.device_bytes + 64 * MIB < available
    device_given = Budget(device=64 * MIB).measured("cpu")
    assert device_given.host_bytes is not None
    assert 0.5 * available < device_given.host_bytes < available
    assert Budget(device=1 << 60).measured("cpu").host_bytes == 0


def test_a_device_of_another_kind_has_no_measure() -> None:
    with pytest.raises(ValueError, match="device: expected a CPU or a CUDA device, got 'meta'"):
        Budget().measured("meta")


@pytest.mark.gpu
def test_a_measured_gpu_budget_is_below_what_is_free() -> None:
    budget = Budget().measured("cuda")
    assert budget.device_bytes is not None
    assert 0 < budget.device_bytes < torch.cuda.mem_get_info()[1]
    assert budget.host_bytes is not None
    assert 0 < budget.host_bytes < available_ram_bytes()


@pytest.mark.gpu
def test_a_copy_waits_for_what_still_computes_with_the_slot() -> None:
    device = CudaDevice()
    with device.staging(16 * MIB) as buffer:
        buffer.tensor.fill_(2)
        slot = device.slot(16 * MIB)
        slot.fill_(1)
        slot.clone()  # loads the kernel: that would wait for the sleep below
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000_000)  # about a second, behind which the kernel that reads the slot is queued
        seen = slot.clone()
        copy = device.copy(buffer.tensor, into=slot, after=device.mark())
        assert not copy.done()
        device.wait_for(copy)
        after = slot.clone()
        device.synchronize()
        assert torch.all(seen == 1)
        assert torch.all(after == 2)


@pytest.mark.gpu
def test_computation_waits_for_a_copy_that_is_still_running() -> None:
    device = CudaDevice()
    with device.staging(256 * MIB) as buffer:
        assert buffer.tensor.is_pinned()
        buffer.tensor.fill_(3)
        slot = device.slot(256 * MIB)
        slot.fill_(0)
        copy = device.copy(buffer.tensor, into=slot, after=device.mark())
        device.wait_for(copy)
        seen = slot.clone()
        device.synchronize()
        assert torch.all(seen == 3)


@pytest.mark.gpu
@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize(("ring", "resident", "cached"), [(2, 0, 0), (3, 0, 0), (2, 1, 2), (2, 0, 6), (2, 4, 0)])
def test_a_gpu_sees_the_stored_bytes_in_every_step(
    tmp_path: Path, ring: int, resident: int, cached: int, poison: bool
) -> None:
    stored = StoredBlocks(tmp_path, 6, block_bytes=4 * MIB)
    trace = Trace()
    plan = stored.plan(ring=ring, resident=resident, cached=cached, is_host=False)
    order = (*range(6), *reversed(range(6)))
    with (
        FileIO(pread=SlowReads(max_s=0.002)) as reader,
        stored.schedule(plan, CudaDevice(), reader=reader, trace=trace, poison=poison) as scheduler,
    ):
        for _ in range(3):
            scheduler.expect((*order, 0, 1))
            seen = []
            for block in order:
                with scheduler.resident(block) as tensors:
                    # Queued behind a wait, so that slots are released long before the device has read them.
                    torch.cuda._sleep(10_000_000)
                    seen.append((block, {name: tensor.clone() for name, tensor in tensors.items()}))
            for block, tensors in seen:
                stored.check(block, tensors)
    assert any(span.lane == "copy" and span.nbytes > 0 for span in trace.spans())
