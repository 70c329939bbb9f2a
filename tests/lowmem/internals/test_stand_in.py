"""Canaries: torch still brings a stand-in every operator that reads or writes it, and says which is which."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import NoReturn

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lowmem.internals.stand_in import StandIn, View, keeping_last_read
from lowmem.internals.torch import hold_parameter, parameter_table, put_parameter


class Kept(StandIn):
    """Stands for a tensor in a plain attribute; counts how often it is read and written."""

    true: Tensor
    num_reads: int
    num_writes: int

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"Kept({tuple(self.shape)})"

    @staticmethod
    def of(true: Tensor) -> Kept:
        made = Kept.make(true.shape, dtype=true.dtype, device=true.device)
        assert isinstance(made, Kept)
        made.true, made.num_reads, made.num_writes = true, 0, 0
        return made

    def read(self) -> Tensor:
        self.num_reads += 1
        return self.true.clone()

    def write(self, value: Tensor, by: str) -> None:
        self.num_writes += 1
        self.true = value.clone()


@pytest.fixture
def pair() -> tuple[Kept, Tensor]:
    torch.manual_seed(0)
    true = torch.rand(8, 4) + 0.5
    return Kept.of(true.clone()), true.clone()


# Each is run on a stand-in and on the tensor it stands for.
WRITES: dict[str, Callable[[Tensor], object]] = {
    "whole": lambda w: w.mul_(2),
    "operator": lambda w: w.__iadd__(1.0),
    "copy": lambda w: w.copy_(torch.ones(4)),
    "copy of itself": lambda w: w.copy_(w.flip(0)),
    "row": lambda w: w[5].zero_(),
    "item": lambda w: w.__setitem__((slice(1, 3), 2), 7.0),
    "mask": lambda w: w.__setitem__(w > 1, 0.25),
    "transposed": lambda w: w.T.mul_(2),
    "transposed row": lambda w: w.T[1].add_(1),
    "flat": lambda w: w.view(-1)[3:9].fill_(3),
    "reshaped": lambda w: w.reshape(4, 8)[0].neg_(),
    "diagonal": lambda w: w.diagonal().zero_(),
    "strided": lambda w: w.as_strided((2, 2), (4, 2), 1).zero_(),
    "unbound": lambda w: w.unbind(1)[2].mul_(5),
    "split": lambda w: w.split(3)[1].mul_(5),
    "detached": lambda w: w.detach().sub_(1),
    "data": lambda w: w.data[2:].clamp_(max=1),
    "bits": lambda w: w.view(torch.int32).bitwise_and_(0x7FFFFF00),
    "out": lambda w: torch.add(torch.zeros(8, 4), 1, out=w),
    "out of a row": lambda w: torch.add(torch.zeros(4), 1, out=w[3]),
    "both": lambda w: w.addcmul_(w, w.detach()),
    "other view": lambda w: w[:4].add_(w[4:]),
    "list": lambda w: torch._foreach_mul_([w], 3.0),
    "list of views": lambda w: torch._foreach_add_([w[0], w[1:].T], [torch.ones(4), torch.ones(4, 7)]),
    "list of lists": lambda w: torch._foreach_addcdiv_([w], [torch.ones(8, 4)], [torch.full((8, 4), 2.0)], [0.5]),
    "index": lambda w: w.index_add_(0, torch.tensor([1, 1]), torch.ones(2, 4)),
    "scatter": lambda w: w.scatter_(1, torch.zeros(8, 1, dtype=torch.long), 9.0),
    "init": lambda w: nn.init.constant_(w, 0.1),
    "lerp": lambda w: torch.Tensor.lerp_(w, torch.ones(8, 4), 0.3),
}


READS: dict[str, Callable[[Tensor], object]] = {
    "operator": lambda w: w + 0,
    "sum": lambda w: w.sum(),
    "item": lambda w: w[0, 1].item(),
    "list": lambda w: w.tolist(),
    "numpy": lambda w: torch.from_numpy(w.numpy().copy()),
    "contiguous": lambda w: w.contiguous(),
    "another dtype": lambda w: w.to(torch.float64),
    "views": lambda w: w.T[1:].reshape(-1)[::2].clone(),
    "cat": lambda w: torch.cat([w[:4], w[4:]]),
    "product": lambda w: torch.nn.functional.linear(torch.ones(3, 4), w),
    "lookup": lambda w: torch.nn.functional.embedding(torch.tensor([1, 7]), w),
    "einsum": lambda w: torch.einsum("oi,ti->to", w, torch.ones(2, 4)),
    "norm": lambda w: torch.linalg.vector_norm(w, ord=1),
    "norms": lambda w: torch.stack(torch._foreach_norm([w, w[1:]])),
    "list of sums": lambda w: torch.stack(torch._foreach_add([w, w], 1.0)),
    "equal": lambda w: torch.equal(w, w.clone()),
    "twice": lambda w: (w * w.detach()).sum(),
    "copied": lambda w: copy.deepcopy(w),
    "pickled": lambda w: pickle.loads(pickle.dumps(w)),
    "rows": lambda w: torch.stack(list(w)),
    "bool": lambda w: bool((w > 0).all()),
    "zeros": lambda w: torch.zeros_like(w),
    "new": lambda w: w.new_ones(3),
}


def same(got: object, expected: object) -> bool:
    if isinstance(expected, list):
        return isinstance(got, list) and all(map(same, got, expected))
    if isinstance(expected, Tensor):
        return isinstance(got, Tensor) and got.dtype == expected.dtype and torch.equal(got + 0, expected + 0)
    return got == expected


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
def test_every_write_reaches_the_tensor(
    pair: tuple[Kept, Tensor], write: Callable[[Tensor], object], inference: bool
) -> None:
    kept, plain = pair
    with torch.inference_mode(inference), torch.no_grad():
        got, expected = write(kept), write(plain)
        assert torch.equal(kept.true, plain)
        assert kept.num_writes > 0
        assert same(got, expected)


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("read", READS.values(), ids=list(READS))
def test_every_read_sees_the_tensor(
    pair: tuple[Kept, Tensor], read: Callable[[Tensor], object], inference: bool
) -> None:
    kept, plain = pair
    with torch.inference_mode(inference):
        assert same(read(kept), read(plain))
    assert kept.num_writes == 0


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (0, 3)])
def test_small_tensors_do_not_pass_for_their_one_element_of_memory(shape: tuple[int, ...]) -> None:
    true = torch.rand(shape) + 1
    kept = Kept.of(true)
    assert not kept.is_contiguous()
    assert torch.equal(kept.contiguous(), true)
    assert torch.equal(kept + 0, true)


def test_an_operator_reads_each_tensor_once_and_a_list_one_tensor_at_a_time(pair: tuple[Kept, Tensor]) -> None:
    kept, _ = pair
    kept.addcmul_(kept.T.T, kept)
    assert (kept.num_reads, kept.num_writes) == (1, 1)
    torch._foreach_zero_([kept, Kept.of(torch.ones(2))])
    assert (kept.num_reads, kept.num_writes) == (2, 2)


def test_what_needs_no_values_reads_none(pair: tuple[Kept, Tensor]) -> None:
    kept, plain = pair
    views = [kept.T, kept[3], kept.detach(), kept.data, kept.view(-1), *kept.unbind(), torch.zeros_like(kept)]
    assert [view.shape for view in views[:3]] == [plain.T.shape, plain[3].shape, plain.shape]
    assert isinstance(kept.T, View)
    assert (kept.dtype, kept.numel(), kept.device, len(kept), kept.nbytes) == (torch.float32, 32, plain.device, 8, 128)
    assert kept.to("cpu") is kept.float() is kept
    assert kept.num_reads == 0


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), torch.device("cpu", 0), torch.device("cpu", 3)])
def test_moving_to_where_it_is_reads_nothing_whatever_number_the_cpu_has(
    pair: tuple[Kept, Tensor], device: torch.device | str
) -> None:
    stand_in, _ = pair
    for moved in (stand_in.to(device), stand_in.to(device=device), stand_in.to(device, None, False)):
        assert moved is stand_in
    assert stand_in.num_reads == 0


def test_autograd_sees_a_parameter(pair: tuple[Kept, Tensor]) -> None:
    kept, plain = pair
    for leaf in (kept, plain):
        leaf.requires_grad_()
        (leaf.T @ leaf).sum().backward()
        leaf[2].pow(2).sum().backward()
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            leaf.mul_(2)
    assert kept.grad is not None
    assert torch.equal(kept.grad, plain.grad)  # type: ignore[arg-type]


def test_fused_optimizers_write_to_gradients_only_to_unscale_them(pair: tuple[Kept, Tensor]) -> None:
    kept, plain = pair
    gradients = Kept.of(torch.ones(8, 4)), torch.ones(8, 4)
    for weight, gradient in zip((kept, plain), gradients, strict=True):
        for scale in (None, torch.tensor(2.0)):
            state = [torch.zeros(8, 4)], [torch.zeros(8, 4)], [], [torch.ones(())]
            torch._fused_adamw_(
                [weight],
                [gradient],
                *state,
                lr=0.1,
                beta1=0.9,
                beta2=0.99,
                weight_decay=0.1,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
                grad_scale=scale,
            )
    assert torch.equal(kept.true, plain)
    assert torch.equal(gradients[0] + 0, gradients[1])
    assert torch.equal(gradients[1], torch.full((8, 4), 0.5))
    assert (kept.num_writes, gradients[0].num_writes) == (2, 1)


def test_many_views_of_one_tensor_read_it_once(pair: tuple[Kept, Tensor]) -> None:
    kept, plain = pair
    with keeping_last_read():
        assert torch.equal(torch.stack([row + 0 for row in kept.unbind()]), plain)
    assert kept.num_reads == 1


@pytest.mark.parametrize(
    "replace",
    [
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(4, 4))),
        lambda layer: delattr(layer, "weight"),
        lambda layer: layer.register_parameter("weight", None),
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: layer._parameters.pop("weight"),
        lambda layer: layer.load_state_dict({"weight": torch.zeros(4, 4)}, assign=True),
    ],
)
def test_a_held_parameter_stays_what_it_is(replace: Callable[[nn.Linear], object]) -> None:
    layer = nn.Linear(4, 4, bias=False)
    weight = layer.weight

    def refuse() -> NoReturn:
        raise RuntimeError("weight is held")

    hold_parameter(layer, "weight", refuse)
    with pytest.raises(RuntimeError, match="weight is held"):
        replace(layer)
    assert layer.weight is weight
    assert list(layer.state_dict()) == ["weight"]
    put_parameter(layer, "weight", nn.Parameter(torch.ones(4, 4)))
    assert layer.weight is parameter_table(layer)["weight"] is not weight
    copied = copy.deepcopy(layer)
    copied.weight = nn.Parameter(torch.zeros(4, 4))
