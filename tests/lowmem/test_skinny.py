"""Products of few rows in the order that uses all cores: the same values in training, up to the order of sums."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lowmem
from lowmem import host_memory
from lowmem.host_memory import SkinnyProducts
from tests.lowmem.test_architectures import KINDS
from tests.zoo.architectures import build
from tests.zoo.reference import Outcome, adapt, batch_of, lora, resident, run
from tests.zoo.streamed import streamed


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose MLPs are large enough."""
    changes = {"hidden_size": 1024, "intermediate_size": 1100, "num_hidden_layers": 2}
    return Path(build("llama", tmp_path_factory.mktemp("llama"), changes=changes))


@pytest.mark.parametrize("shape", [(2, 1, 1100), (1, 5, 1100), (32, 1100)])
def test_skinny_products_are_those_of_linear(shape: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(shape), torch.randn(1000, 1100), torch.randn(1000)
    want = torch.nn.functional.linear(x, weight, bias)
    with SkinnyProducts():
        got = torch.nn.functional.linear(x, weight, bias)
        few = torch.nn.functional.linear(x, weight[:10])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    assert got.is_contiguous()
    assert torch.equal(few, torch.nn.functional.linear(x, weight[:10]))


def test_blocks_without_a_large_weight_run_as_they_are() -> None:
    cpu = torch.device("cpu")
    small, large = [(1000, 1000), (64,)], [(64,), (1024, 1024)]
    assert isinstance(host_memory.products_for(cpu, large, num_tokens=32), SkinnyProducts)
    assert isinstance(host_memory.products_for(cpu, None, num_tokens=32), SkinnyProducts)
    assert not isinstance(host_memory.products_for(cpu, small, num_tokens=32), SkinnyProducts)
    assert not isinstance(host_memory.products_for(cpu, large, num_tokens=512), SkinnyProducts)


def assert_close(found: Outcome, expected: Outcome) -> None:
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        error = (found.gradients[name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, name


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the weights whose products were taken in the other order."""
    shapes: list[torch.Size] = []
    real = host_memory.product_of_few

    def noted(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        shapes.append(weight.shape)
        return real(rows, weight)

    monkeypatch.setattr(host_memory, "product_of_few", noted)
    return shapes


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_get_the_resident_models_gradients(kind: str, folder: Path, used: list[torch.Size]) -> None:
    batch = batch_of()
    expected = run(adapt(resident(folder), lora("llama", **KINDS[kind])), batch)
    assert not used
    assert_close(run(adapt(streamed(folder), lora("llama", **KINDS[kind])), batch), expected)
    assert {tuple(shape) for shape in used} >= {(1100, 1024), (1024, 1100)}


@pytest.mark.usefixtures("two_threads")
def test_every_weight_gets_the_resident_models_gradient(folder: Path, used: list[torch.Size]) -> None:
    batch = batch_of()
    plain = resident(folder).requires_grad_(True).train()
    expected = run(plain, batch)
    model = lowmem.from_pretrained(
        folder, tuning="full", device="cpu", budget=lowmem.Budget(device="1GiB", host="0")
    ).train()
    assert_close(run(model, batch), expected)
    assert used
