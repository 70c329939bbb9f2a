"""Keys and values that wait in host memory while tokens are generated on a GPU: exact, without waits, races seen."""

from __future__ import annotations

import pytest
import torch

from lowmem.generation.cache import GrowingLayer, _PinnedMemory
from tests.fakecuda import test_faults as faults

pytestmark = pytest.mark.gpu


def grow(layer: GrowingLayer, *, check: bool = True) -> None:
    want = torch.zeros(3, 2, 0, 4, device="cuda")
    generator = torch.Generator().manual_seed(0)
    for num_tokens in (5, 1, 300, 1, 200, 1):
        new = torch.randn(3, 2, num_tokens, 4, generator=generator).to("cuda")
        keys, values = layer.update(new, -new)
        if check:
            want = torch.cat([want, new], dim=-2)
            assert torch.equal(keys, want)
            assert torch.equal(values, -want)
    if not check:
        return
    with layer.rows(slice(1, 3), num_rows=3):
        new = torch.randn(2, 2, 2, 4, generator=generator).to("cuda")
        keys, _ = layer.update(new, -new)
        assert torch.equal(keys, torch.cat([want[1:3], new], dim=-2))
    assert torch.equal(layer.keys, want.cpu())
    layer.batch_select_indices(torch.tensor([0, 2]))
    layer.crop(-1)
    keys, _ = layer.update(torch.ones(2, 2, 1, 4, device="cuda"), torch.ones(2, 2, 1, 4, device="cuda"))
    assert torch.equal(keys[:, :, :-1], want[[0, 2], :, :-1])


def test_a_layer_on_the_host_gives_the_gpu_what_was_appended() -> None:
    layer = GrowingLayer(max_tokens=700, on_host=True)
    grow(layer)
    torch.cuda.synchronize()
    layer.reset()
    assert layer.get_seq_length() == 0


@pytest.mark.usefixtures("late_copies")
def test_the_host_waits_only_where_memory_is_replaced() -> None:
    from tests.fakecuda import simulated_gpu

    layer = GrowingLayer(max_tokens=700, on_host=True)
    grow(layer, check=False)
    simulated_gpu.forget()
    for _ in range(3):
        layer.update(torch.ones(3, 2, 1, 4, device="cuda"), torch.ones(3, 2, 1, 4, device="cuda"))
    assert not simulated_gpu.simulator.waits()


# What is appended is brought back at once on the same stream, which orders the rest of what could go wrong.
def memory_is_replaced_while_it_is_copied(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_PinnedMemory, "wait", lambda self: None)


KEY_VALUE_FAULTS = [
    memory_is_replaced_while_it_is_copied,
    faults.values_are_copied_down_before_they_are_computed,
    faults.blocks_compute_from_values_that_have_not_come,
]


@pytest.mark.racy
@pytest.mark.usefixtures("late_copies")
@pytest.mark.parametrize("fault", KEY_VALUE_FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_of_keys_and_values_on_the_host_is_reported(
    fault: faults.Break, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.fakecuda import simulated_gpu

    fault(monkeypatch)
    layer = GrowingLayer(max_tokens=700, on_host=True)
    held = []
    for num_tokens in (8, 8, 300):
        # Late copies go on, whatever is given back.
        held.append((layer._keys, layer._values))
        keys, _ = layer.update(*(torch.randn(3, 2, num_tokens, 4, device="cuda") * 2 for _ in range(2)))
        keys.sum()
    assert simulated_gpu.simulator.races()
    torch.cuda.synchronize()
    del held
