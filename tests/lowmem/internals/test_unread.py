"""Products that nobody reads are not made; whatever is read has the bits that it would have had."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lowmem.internals import unread
from lowmem.internals.torch import TorchDispatchMode
from lowmem.internals.unread import PuttingOff, UnreadTensor, is_worth_putting_off


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unread, "_MANY_OPERATIONS", 1)


class Products(TorchDispatchMode):
    """Counts the products that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.num += "mm" in str(func) and out.device.type != "meta"
        return out


Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x + functional.linear(functional.silu(functional.linear(x, up)), down)


def converted(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (x.float() + functional.linear(functional.gelu(functional.linear(x, up)), down).float() * 0.5).to(x.dtype)


def biased(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x + functional.linear(functional.relu(functional.linear(x, up, up[:, 0])), down, down[:, 0])


def normed(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x + functional.layer_norm(functional.linear(functional.linear(x, up), down), (x.shape[-1],))


def gated(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = functional.linear(x, up)
    return x * functional.linear(hidden, down)


def in_place(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = functional.linear(x, up)
    out = functional.linear(hidden.tanh(), down)
    out += x
    out[:, 0].mul_(2.0)
    return x + out.clamp_(-1.0, 1.0)


def written_under_it(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = functional.linear(x, up).detach()
    out = functional.linear(hidden, down.detach())
    hidden.zero_()
    return x * out + out


@pytest.mark.parametrize(
    ("forward", "num_left_out"),
    [(mlp, 1), (converted, 1), (biased, 1), (normed, 0), (gated, 0), (in_place, 0), (written_under_it, 0)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", [False, True])
def test_gradients_have_the_bits_of_everything_computed(
    forward: Forward, num_left_out: int, dtype: torch.dtype, trains: bool
) -> None:
    torch.manual_seed(0)
    x, grad = (torch.randn(2, 5, 8).to(dtype) for _ in range(2))
    up, down = torch.randn(12, 8).to(dtype).requires_grad_(trains), torch.randn(8, 12).to(dtype).requires_grad_(trains)
    leaf = x.clone().requires_grad_()
    sought = [leaf, up, down] if trains else [leaf]
    with Products() as all_of_them:
        expected = forward(leaf, up, down)
    wanted = torch.autograd.grad(expected, sought, grad, allow_unused=True)
    with Products() as some, PuttingOff() as later:
        output = forward(leaf, up, down)
    later.give_up(output)
    assert all_of_them.num - some.num == num_left_out
    found = torch.autograd.grad(output, sought, grad, allow_unused=True)
    assert [one is None for one in found] == [one is None for one in wanted]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True) if other is not None)
    # And read after all, by whatever reads it.
    with PuttingOff():
        again = forward(x, up, down)
    assert torch.equal(again + 0, expected)
    assert again.tolist() == expected.tolist()


def test_what_was_given_up_says_so() -> None:
    weight = torch.randn(4, 4)
    with PuttingOff() as later:
        output = functional.linear(torch.randn(3, 4), weight)
    assert isinstance(output, UnreadTensor)
    later.give_up([output])
    with pytest.raises(RuntimeError, match="read after its recomputation"):
        output.sum()


def test_what_it_is_made_of_may_not_be_written_to_before() -> None:
    x, weight = torch.randn(3, 4), torch.randn(4, 4)
    with PuttingOff():
        output = functional.linear(x, weight)
    x.zero_()
    with pytest.raises(RuntimeError, match="was written to before it was read"):
        output.sum()


def test_what_is_given_up_keeps_nothing() -> None:
    x, weight = torch.randn(3, 4), torch.randn(4, 4)
    kept = weakref.ref(x)
    with PuttingOff() as later:
        output = functional.linear(x, weight)
    del x
    assert kept() is not None
    later.give_up(output)
    assert kept() is None


def test_only_large_blocks_on_a_processor() -> None:
    wide = [torch.Size((4096, 4096)), torch.Size((4096,))]
    assert is_worth_putting_off(torch.device("cpu"), wide, num_tokens=1024)
    assert not is_worth_putting_off(torch.device("cpu"), wide, num_tokens=8)
    assert not is_worth_putting_off(torch.device("cuda"), wide, num_tokens=4096)
    assert not is_worth_putting_off(torch.device("cpu"), [*wide, torch.Size((8, 512, 512))], num_tokens=4096)
