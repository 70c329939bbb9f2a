"""Canaries: what lowmem.internals.torch uses of torch is there and means what it did."""

from __future__ import annotations

import logging
import weakref

import torch
from torch import Tensor

from lowmem.internals.torch import (
    FakeTensorMode,
    TorchDispatchMode,
    is_grouped_product,
    quiet_fake_tensors,
    storage_key,
)


def test_views_of_one_storage_have_one_key() -> None:
    one, other = torch.zeros(4), torch.zeros(4)
    assert storage_key(one.untyped_storage()) == storage_key(one[2:].untyped_storage())
    assert storage_key(one.untyped_storage()) != storage_key(other.untyped_storage())


def test_a_dispatch_mode_sees_operators_and_fake_tensors_have_shapes_and_storages_that_end() -> None:
    seen: list[object] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"), Recorder():
        made = torch.empty(1 << 20, 1 << 20)
        storage = made.untyped_storage()
        assert storage.nbytes() == 4 << 40
        ended = weakref.ref(storage)
        (product,) = torch.autograd.grad((made.requires_grad_() @ made).sum(), made)
        assert product.shape == made.shape
    assert torch.ops.aten.mm.default in seen
    del made, storage, product
    assert ended() is None


def test_the_product_of_stacked_experts_is_known_by_its_operator() -> None:
    found = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            found.append(is_grouped_product(func))
            return torch.zeros(4, 16)

    with Recorder():
        left, right = torch.zeros(4, 16, dtype=torch.bfloat16), torch.zeros(2, 16, 16, dtype=torch.bfloat16)
        offsets = torch.tensor([2, 4], dtype=torch.int32)
        result = torch.nn.functional.grouped_mm(left, right, offs=offsets)
    assert isinstance(result, Tensor)
    assert any(found)


def test_fake_tensors_log_under_the_name_that_is_made_quiet() -> None:
    from torch._subclasses import fake_tensor

    assert fake_tensor.log.name == "torch._subclasses.fake_tensor"
    with quiet_fake_tensors():
        assert logging.getLogger(fake_tensor.log.name).disabled
    assert not fake_tensor.log.disabled
