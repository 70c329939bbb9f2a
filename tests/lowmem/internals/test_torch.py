"""Canaries: what lowmem.internals.torch uses of torch is there and means what it did."""

from __future__ import annotations

import logging
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from lowmem.errors import UnsupportedError
from lowmem.internals import torch as internals
from lowmem.internals.torch import (
    FakeTensorMode,
    TorchDispatchMode,
    change_class,
    cpu_attention,
    cpu_attention_backward,
    is_grouped_product,
    is_sole_owner,
    leave_out_of_ddp,
    modules_in,
    parameter_table,
    parameters_in,
    quiet_fake_tensors,
    storage_key,
    version_of,
    without_gradient_hooks,
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


class _Asks(torch.autograd.Function):
    """Notes whether the gradient that arrives belongs to nobody else."""

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, found: list[bool]) -> Tensor:
        ctx.found = found  # type: ignore[attr-defined]
        return value * 2

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.found.append(is_sole_owner(grad, like=grad))  # type: ignore[attr-defined]
        return grad * 2, None


def owned(*, shared: bool) -> bool:
    value = torch.ones(3, requires_grad=True)
    found: list[bool] = []
    out = _Asks.apply(value, found)  # type: ignore[no-untyped-call]
    arrives = out * 3 + (out * 5 if not shared else 0)
    if shared:
        torch.autograd.grad((arrives * torch.ones(3)).sum(), [out, value])
    else:
        arrives.sum().backward()
    return found[0]


def test_a_gradient_that_nobody_else_sees_is_told_from_one_that_is_captured() -> None:
    assert internals._counts_as_expected()
    assert owned(shared=False)
    assert not owned(shared=True)


@pytest.mark.parametrize("counts", [(2, 2), (1, 3), (0, 1)])
def test_counts_that_mean_something_else_make_no_gradient_writable(
    counts: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    internals._counts_as_expected.cache_clear()
    monkeypatch.setattr(internals, "_reference_counts", lambda tensor: counts)
    assert not owned(shared=False)
    internals._counts_as_expected.cache_clear()


def test_a_count_that_is_gone_makes_no_gradient_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(tensor: Tensor) -> tuple[int, int]:
        raise AttributeError("_use_count")

    internals._counts_as_expected.cache_clear()
    monkeypatch.setattr(internals, "_reference_counts", gone)
    assert not owned(shared=False)
    internals._counts_as_expected.cache_clear()


def test_gradient_hooks_do_not_act_on_parts_and_are_there_afterwards() -> None:
    param = nn.Parameter(torch.ones(2))
    first, second = param.register_hook(lambda grad: grad * 2), param.register_hook(lambda grad: grad + 1)

    def gradient() -> list[float]:
        found: list[float] = torch.autograd.grad((param * 3).sum(), [param])[0].tolist()
        return found

    with without_gradient_hooks([param]):
        assert gradient() == [3, 3]
    assert gradient() == [7, 7]
    first.remove()
    assert gradient() == [4, 4]
    second.remove()
    assert gradient() == [3, 3]


def test_versions_count_writes_in_place() -> None:
    value = torch.zeros(2)
    before = version_of(value)
    value.add_(1)
    assert version_of(value) == before + 1


def test_attributes_are_looked_up_in_the_tables() -> None:
    module = nn.Linear(2, 2)
    weight = nn.Parameter(torch.ones(2, 2))
    parameter_table(module)["weight"] = weight
    assert module.weight is weight


def test_a_changed_class_is_the_copy_s_too() -> None:
    import copy

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    module = nn.Linear(2, 2)
    once = module(torch.ones(2))
    change_class(module, Doubled)
    assert torch.equal(copy.deepcopy(module)(torch.ones(2)), 2 * once)


@pytest.mark.parametrize("causal", [True, False])
def test_the_fused_kernel_gives_its_log_sum_exp_and_takes_it_back(*, causal: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3))
    hidden = torch.ones(4, 4).triu(1).bool() if causal else torch.zeros(4, 4).bool()
    scores = (0.3 * query @ key.transpose(-1, -2)).masked_fill(hidden, -torch.inf)
    expected = scores.softmax(-1) @ value
    leaves = [tensor.detach() for tensor in (query, key, value)]
    out, lse = cpu_attention(*leaves, causal=causal, mask=None, scale=0.3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    grad = torch.randn_like(out)
    got = cpu_attention_backward(grad, *leaves, out, lse, causal=causal, mask=None, scale=0.3)
    torch.testing.assert_close(got, torch.autograd.grad(expected, [query, key, value], grad))


def test_ddp_leaves_parameters_out_by_the_names_that_a_wrapper_gives_them() -> None:
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.nn.parallel import DistributedDataParallel

    class Wrapper(nn.Module):
        """Hands unknown attributes on, as PEFT's do."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.base_model = module

        def __getattr__(self, name: str) -> object:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.base_model, name)

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    leave_out_of_ddp(model, prefixes=("", "base_model."), is_left_out=lambda param: not param.requires_grad)
    # What is left out, and under which name, is asked when it is wrapped.
    model[0] = nn.Sequential(model[0])
    model[0].requires_grad_(False)
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        for module, prefix in ((model, ""), (Wrapper(model), "base_model.")):
            wrapped = DistributedDataParallel(module)
            assert {f"{prefix}0.0.weight", f"{prefix}0.0.bias"} <= wrapped.parameters_to_ignore
            assert f"{prefix}1.weight" not in wrapped.parameters_to_ignore
    finally:
        destroy_process_group()


def test_a_torch_whose_ddp_asks_for_no_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.parallel.DistributedDataParallel, "__init__", lambda self: None)
    with pytest.raises(UnsupportedError, match=r"torch 2\.\d+.*DistributedDataParallel"):
        leave_out_of_ddp(nn.Linear(1, 1), prefixes=("",), is_left_out=lambda param: True)


def test_modules_are_those_that_torch_lists_in_its_order() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.Sequential(nn.Sequential(shared), nn.Tanh())})
    model["a"].register_module("gone", None)
    assert modules_in(model) == list(model.modules())
    assert modules_in(shared) == [shared]
    # One parameter under two names, and one that is not there.
    model["b"][0].register_parameter("again", shared.bias)
    model["b"][0].register_parameter("gone", None)
    assert list(map(id, parameters_in(model))) == list(map(id, model.parameters()))
