"""Absent parameters: metadata is free, values are true, writing is refused."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lowmem.errors import UnsupportedError
from lowmem.models.absent import AbsentParameter
from lowmem.models.whole import refuse_copy


class _Weight:
    """A stored weight that counts how often it is read."""

    def __init__(self) -> None:
        self.true = torch.randn(8, 4)
        self.num_reads = 0
        self.param = AbsentParameter.of(
            (8, 4), dtype=torch.float32, device=torch.device("cpu"), key="layer.weight", load=self._load
        )
        self.linear = nn.Linear(4, 8, bias=False)
        self.linear.weight = self.param

    def _load(self) -> Tensor:
        self.num_reads += 1
        return self.true.clone()


@pytest.fixture
def weight() -> _Weight:
    return _Weight()


def test_metadata_reads_nothing(weight: _Weight) -> None:
    param = weight.param
    assert param.shape == (8, 4)
    assert param.dtype == torch.float32
    assert param.device == torch.device("cpu")
    assert (param.numel(), param.ndim, len(param), param.requires_grad) == (32, 2, 8, False)
    assert isinstance(param, nn.Parameter)
    assert "layer.weight" in repr(param)
    assert list(weight.linear.state_dict()) == ["weight"]
    assert weight.num_reads == 0


def test_it_takes_no_memory() -> None:
    shape = (1 << 24, 1 << 16)
    huge = AbsentParameter.of(shape, dtype=torch.float32, device=torch.device("cpu"), key="huge", load=torch.empty)
    assert huge.nbytes == huge.untyped_storage().nbytes() == 4 << 40
    assert huge.T[1:].detach().shape == (shape[1] - 1, shape[0])


def test_moving_to_where_it_is_keeps_it(weight: _Weight) -> None:
    weight.linear.to("cpu").to(torch.float32).float()
    assert weight.linear.weight is weight.param
    weight.param.data = weight.param.data
    assert weight.param.detach().untyped_storage().data_ptr() == weight.param.untyped_storage().data_ptr()
    assert weight.num_reads == 0


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w.float() + 0,
        lambda w: w.data * 1,
        lambda w: w.detach().clone(),
        lambda w: w.T.T,
        lambda w: w[:],
        lambda w: torch.cat([w[:4], w[4:]]),
        lambda w: w.to(torch.float64).to(torch.float32),
    ],
)
def test_every_read_sees_the_true_values(weight: _Weight, read: Callable[[Tensor], Tensor]) -> None:
    assert torch.equal(read(weight.param), weight.true)
    assert weight.num_reads > 0


def test_a_module_computes_with_the_true_values(weight: _Weight) -> None:
    x = torch.randn(3, 4)
    assert torch.equal(weight.linear(x), x @ weight.true.T)


def test_a_copied_module_holds_the_true_values(weight: _Weight) -> None:
    copied = copy.deepcopy(weight.linear)
    assert torch.equal(copied.weight, weight.true)
    assert type(copied.weight) is nn.Parameter
    copied.weight.requires_grad_(True)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.copy_(torch.zeros(8, 4)),
        lambda w: w.data.mul_(2),
        lambda w: nn.init.zeros_(w),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.requires_grad_(True),
        lambda w: setattr(w, "requires_grad", True),
        lambda w: setattr(w, "data", torch.zeros(8, 4)),
        lambda w: torch.add(torch.zeros(8, 4), 1, out=w),
    ],
)
def test_writing_is_refused_by_name(weight: _Weight, write: Callable[[Tensor], object]) -> None:
    with pytest.raises(UnsupportedError, match=r"layer\.weight.*frozen"):
        write(weight.param)


def test_pickling_is_refused(weight: _Weight, tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UnsupportedError, match=r"pickling layer\.weight.*lowmem\.merge"):
        torch.save(weight.linear.state_dict(), tmp_path / "weights.pt")


def test_copying_the_model_is_refused(weight: _Weight) -> None:
    refuse_copy(weight.linear, what="copy.deepcopy(model)", reason="so", instead="that")
    with pytest.raises(UnsupportedError, match=r"copy\.deepcopy\(model\)"):
        copy.deepcopy(weight.linear)
    assert weight.num_reads == 0
