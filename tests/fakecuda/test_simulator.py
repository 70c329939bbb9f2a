"""The simulated GPU itself: placement, late copies, races, host waits, random state, memory."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _only_simulated() -> None:
    if torch.cuda.get_device_name() != "Simulated GPU":
        pytest.skip("about the simulator")


def observed() -> object:
    from tests.fakecuda import simulated_gpu

    return simulated_gpu


def test_operators_run_and_stay_on_the_device() -> None:
    x = torch.arange(12.0, device="cuda").view(3, 4)
    product = x @ x.T
    assert product.device.type == "cuda"
    assert torch.equal(product.cpu(), torch.arange(12.0).view(3, 4) @ torch.arange(12.0).view(3, 4).T)
    assert x[1].data_ptr() == x.data_ptr() + 16


def test_tensors_of_two_devices_do_not_mix() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(4, device="cuda") + torch.ones(4)


def test_host_code_cannot_read_device_memory() -> None:
    program = """
import tests.fakecuda.simulated_gpu as gpu, ctypes, torch
gpu.install()
ctypes.string_at(torch.ones(4, device="cuda").data_ptr(), 4)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -11, done.stderr


def test_backward_runs_in_a_thread_of_the_device() -> None:
    threads: list[str] = []

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            threads.append(threading.current_thread().name)
            return grad * 2

    x = torch.ones(3, device="cuda", requires_grad=True)
    Noting.apply(x).sum().backward()
    assert threads != [threading.current_thread().name]
    assert torch.equal(x.grad.cpu(), torch.full((3,), 2.0))


@pytest.mark.racy
def test_a_late_copy_that_nobody_waits_for_is_poison_and_a_race() -> None:
    stream = torch.cuda.Stream()
    source, target = torch.ones(4).pin_memory(), torch.zeros(4, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
    assert target.clone().cpu().isnan().all()
    races = observed().simulator.races()  # type: ignore[attr-defined]
    assert any("is not ordered after write by copy_" in race for race in races)
    torch.cuda.synchronize()  # before the memory goes to another test


def test_a_late_copy_that_is_waited_for_arrives() -> None:
    stream, event = torch.cuda.Stream(), torch.cuda.Event()
    source, target = torch.ones(4).pin_memory(), torch.zeros(4, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
        event.record(stream)
    torch.cuda.current_stream().wait_event(event)
    assert torch.equal(target.cpu(), torch.ones(4))


def test_copies_on_one_stream_keep_their_order() -> None:
    first, second, back = (torch.full((1000,), value).pin_memory() for value in (1.0, 2.0, 0.0))
    there = torch.empty(1000, device="cuda")
    torch.cuda.synchronize()
    there.copy_(first, non_blocking=True)
    back.copy_(there, non_blocking=True)
    there.copy_(second, non_blocking=True)
    torch.cuda.synchronize()
    assert back.eq(1).all()
    assert there.eq(2).all()


@pytest.mark.racy
def test_memory_given_back_while_another_stream_uses_it_is_a_race() -> None:
    stream = torch.cuda.Stream()
    first = torch.ones(256, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _ = first * 2
    del first
    torch.zeros(256, device="cuda")  # the same memory, on the default stream, and no record_stream
    assert observed().simulator.races()  # type: ignore[attr-defined]
    torch.cuda.synchronize()


@pytest.mark.racy
def test_the_host_writing_what_a_copy_reads_is_a_race() -> None:
    gpu = observed()
    source, target = torch.ones(4).pin_memory(), torch.zeros(4, device="cuda")
    target.copy_(source, non_blocking=True)
    gpu.told_of(source.nbytes, source.data_ptr(), writes=True, who="a test")  # type: ignore[attr-defined]
    assert any("a test" in race for race in gpu.simulator.races())  # type: ignore[attr-defined]
    torch.cuda.synchronize()


def test_what_makes_the_host_wait_is_counted() -> None:
    gpu = observed()
    x = torch.ones(4, device="cuda")
    gpu.forget()  # type: ignore[attr-defined]
    x.sum().item()
    x.cpu()
    x.nonzero()
    waits = gpu.simulator.waits()  # type: ignore[attr-defined]
    assert waits["aten::_local_scalar_dense"] == 1
    assert waits["D2H blocking"] == 1
    assert waits["aten::nonzero"] == 1


def test_random_numbers_follow_the_devices_own_state() -> None:
    state = torch.cuda.get_rng_state()
    first = torch.randn(5, device="cuda").cpu()
    torch.randn(5)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.randn(5, device="cuda").cpu(), first)


def test_memory_beyond_the_limit_is_refused() -> None:
    limit = observed().simulator.limit_bytes()  # type: ignore[attr-defined]
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(limit + 1, dtype=torch.uint8, device="cuda")
