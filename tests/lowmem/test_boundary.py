"""Boundary activations: given back once and unchanged, their memory used again."""

import pytest
import torch

from lowmem.streaming.boundary import DeviceBoundaries, HostBoundaries
from lowmem.streaming.boundary_tiers import GpuHostBoundaries, tier_for

CPU = torch.device("cpu")


def test_what_is_kept_comes_back_bit_by_bit() -> None:
    for tier in (DeviceBoundaries(), HostBoundaries(CPU)):
        value = torch.randn(3, 5, 7)
        assert torch.equal(tier.keep(value).take(), value)


def test_buffers_are_used_again_from_step_to_step() -> None:
    tier = HostBoundaries(CPU)
    for _ in range(3):
        kept = [tier.keep(torch.randn(2, 64)) for _ in range(4)]
        for boundary in kept:
            boundary.take()
            boundary.release()
    assert tier.held_bytes == 4 * 2 * 64 * 4


def test_a_graph_that_is_dropped_gives_its_buffers_back() -> None:
    tier = HostBoundaries(CPU)
    for _ in range(5):
        kept = tier.keep(torch.randn(2, 64))
        del kept
    assert tier.held_bytes == 2 * 64 * 4


def test_other_lengths_do_not_add_up() -> None:
    tier = HostBoundaries(CPU)
    for num in (1024, 64, 4096):
        tier.keep(torch.randn(num)).release()
    assert tier.held_bytes == 4096 * 4


def test_a_second_backward_is_refused() -> None:
    for tier in (DeviceBoundaries(), HostBoundaries(CPU)):
        boundary = tier.keep(torch.randn(3))
        boundary.take()
        boundary.release()
        with pytest.raises(RuntimeError, match="backward ran twice"):
            boundary.take()


def test_a_change_in_place_is_found_where_only_a_reference_is_kept() -> None:
    value = torch.randn(3)
    boundary = DeviceBoundaries().keep(value)
    value.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        boundary.take()


def test_a_cpu_keeps_boundaries_in_buffers_of_their_own() -> None:
    assert isinstance(tier_for(CPU, planned="device"), HostBoundaries)
    assert isinstance(tier_for(torch.device("cuda"), planned="device"), DeviceBoundaries)


@pytest.mark.gpu
def test_a_boundary_on_the_host_comes_back_to_the_gpu() -> None:
    value = torch.randn(3, 5, device="cuda")
    tier = tier_for(value.device, planned="host")
    assert isinstance(tier, GpuHostBoundaries)
    back = tier.keep(value).take()
    assert back.device == value.device
    assert torch.equal(back, value)
