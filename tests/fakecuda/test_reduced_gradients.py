"""GaLore on a GPU: projections leave it, whole norms are known, bases are read off gradients there."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import lowmem
from lowmem.full.engine import OffloadedGradient
from offload.device import CopyStream
from tests.fakecuda.test_full import checkpoint
from tests.lowmem.full_training import backward, batches, weights

pytestmark = pytest.mark.gpu
GAP = 4
NUM_STEPS = 10


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reduced")


def galore(projector: str = "warm", inner: str = "adamw") -> Any:
    return partial(lowmem.optim.GaLore, rank=4, update_proj_gap=GAP, projector=projector, inner=inner, scale=1.0)


def planned(folder: Path, optimizer: Any, **job: Any) -> lowmem.Plan:
    job = {"tuning": "full", "seq_len": 12, "batch_size": 2, "micro_batch": 2, "device": "cuda"} | job
    budget = lowmem.Budget(device="64MiB", host="64MiB")
    return lowmem.plan(folder, budget=budget, optimizer=optimizer, **job)


def on_gpu(folder: Path, optimizer: Any, **job: Any) -> PreTrainedModel:
    plan = planned(folder, optimizer, **job)
    assert plan.fits
    return lowmem.from_pretrained(folder, tuning="full", plan=plan).train()


def reduced(model: PreTrainedModel) -> list[str]:
    """Names of parameters of whose gradients only projections are known."""
    grads = {name: param.grad for name, param in model.named_parameters()}
    return [name for name, grad in grads.items() if isinstance(grad, OffloadedGradient) and grad.reduced is not None]


def train(
    model: PreTrainedModel, optimizer: Any, steps: range, *, parts: int = 1, max_norm: float | None = 0.5
) -> list[tuple[float, int]]:
    """Losses, and of how many weights only a projection of the gradient was kept."""
    seen = []
    for step in steps:
        losses = [backward(model, ids.to(model.device), parts=parts) for ids in batches(parts, seed=step)]
        num_reduced = len(reduced(model))
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((sum(losses), num_reduced))
    return seen


def check(ours: PreTrainedModel, theirs: PreTrainedModel, *, within: float) -> None:
    expected = weights(theirs)
    for name, value in weights(ours).items():
        torch.testing.assert_close(value.cpu(), expected[name].cpu(), rtol=within, atol=within, msg=name)


@pytest.mark.parametrize(
    ("arch", "projector", "inner", "parts", "max_norm"),
    [
        ("llama", "warm", "adamw", 1, 0.5),
        ("llama", "svd", "adamw", 2, None),
        pytest.param("llama", "rsvd", "adamw", 1, 0.5, marks=pytest.mark.slow),
        pytest.param("llama", "warm", "adamw8bit", 1, 0.5, marks=pytest.mark.slow),
        pytest.param("mixtral", "warm", "sgd", 1, 0.5, marks=pytest.mark.slow),
        pytest.param("gemma3_text", "warm", "adafactor", 3, None, marks=pytest.mark.slow),
    ],
)
def test_steps_are_those_of_the_optimizer_on_a_resident_model(
    arch: str, projector: str, inner: str, parts: int, max_norm: float | None, root: Path
) -> None:
    folder, make = checkpoint(arch, root), galore(projector, inner)
    ours = on_gpu(folder, make)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train().to("cuda")
    run = partial(train, steps=range(NUM_STEPS), parts=parts, max_norm=max_norm)
    found, expected = run(ours, make(ours, lr=1e-3)), run(theirs, make(theirs, lr=1e-3))
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    # Rounded otherwise: it is clipped, and parts are added up, once it is projected.
    check(ours, theirs, within=2e-5)
    counts = [number for _, number in found]
    # New bases are read off whole gradients: all in the first step, some in each later one.
    assert counts[0] == 0
    assert all(counts[1:])


def test_a_norm_that_is_not_known_and_values_are_refused_by_name(root: Path) -> None:
    folder = checkpoint("llama", root)
    model = on_gpu(folder, galore())
    optimizer = galore()(model, lr=1e-3)
    train(model, optimizer, range(1))
    for ids in batches(2, seed=1):
        backward(model, ids.cuda())
    name = reduced(model)[0]
    grad = model.get_parameter(name).grad
    assert grad is not None
    with pytest.raises(lowmem.UnsupportedError, match=r"max_grad_norm.*gradient_accumulation_steps"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(lowmem.UnsupportedError, match=f"reading the gradient of {name}"):
        grad.clone()
    optimizer.zero_grad()
    backward(model, batches(1)[0].cuda())
    before = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert torch.isfinite(before)


def test_a_gradient_that_outlives_its_basis_is_refused(root: Path) -> None:
    model = on_gpu(checkpoint("llama", root), galore())
    optimizer = galore()(model, lr=1e-3)
    train(model, optimizer, range(1))

    def go_on() -> None:
        for ids in batches(GAP):
            backward(model, ids.cuda())
            optimizer.step()

    with pytest.raises(lowmem.UnsupportedError, match=r"keeping the gradient of .*zero_grad"):
        go_on()


def test_zeroed_gradients_are_known_as_a_whole(root: Path) -> None:
    folder = checkpoint("llama", root)
    models = [on_gpu(folder, galore()), on_gpu(folder, galore())]
    for model, to_none in zip(models, (True, False), strict=True):
        optimizer = galore()(model, lr=1e-3)
        for ids in batches(GAP + 1):
            backward(model, ids.cuda())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
    check(*models, within=2e-5)


def test_a_resumed_run_is_bitwise_the_run_that_was_not_interrupted(root: Path, tmp_path: Path) -> None:
    folder, make = checkpoint("llama", root), galore()
    whole = on_gpu(folder, make)
    train(whole, make(whole, lr=1e-3), range(7))
    first = on_gpu(folder, make)
    optimizer = make(first, lr=1e-3)
    train(first, optimizer, range(3))
    first.save_pretrained(tmp_path / "saved")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    second = on_gpu(tmp_path / "saved", make)
    resumed = make(second, lr=1e-3)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert all(number for _, number in train(second, resumed, range(3, 7)))
    expected = weights(whole)
    for name, value in weights(second).items():
        assert torch.equal(value, expected[name]), name


def test_a_plan_reduces_where_clipping_can_be_exact_and_says_so(root: Path) -> None:
    folder = checkpoint("llama", root)
    plan = planned(folder, galore())
    assert plan.choice.reduces_gradients
    assert "only projections leave it" in str(plan)
    assert plan.bytes_of("new basis", tier="device") > 0
    for whole in (
        planned(folder, galore(), gradient_accumulation_steps=4),
        planned(folder, galore(), batch_size=4),
        planned(folder, "fira"),
        planned(folder, "apollo"),
        planned(folder, None),
    ):
        assert not whole.choice.reduces_gradients
        assert whole.time.down_bytes > plan.time.down_bytes


def test_of_a_batch_that_comes_in_parts_gradients_are_kept_whole(root: Path) -> None:
    folder, make = checkpoint("llama", root), galore()
    ours = on_gpu(folder, make)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train().to("cuda")
    # Twice as many sequences as were planned for, which go through a block by two.
    ids = torch.cat(batches(2)).cuda()
    for model in (ours, theirs):
        optimizer = make(model, lr=1e-3)
        for _ in range(3):
            backward(model, ids)
            assert not reduced(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    check(ours, theirs, within=2e-5)


@pytest.mark.usefixtures("late_copies")
def test_nothing_is_reported_of_it_as_it_is(root: Path) -> None:
    model = on_gpu(checkpoint("llama", root), galore())
    train(model, galore()(model, lr=1e-3), range(3))


@pytest.mark.racy
@pytest.mark.usefixtures("late_copies")
def test_bases_that_are_used_before_they_have_come_are_reported(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.fakecuda import simulated_gpu

    model = on_gpu(checkpoint("llama", root), galore())
    optimizer = galore()(model, lr=1e-3)
    train(model, optimizer, range(1))

    def at_once(self: CopyStream, kept: torch.Tensor) -> tuple[torch.Tensor, Any]:
        value = torch.empty(kept.shape, dtype=kept.dtype, device=self._device)
        return value, self._copy(kept, value)

    monkeypatch.setattr(CopyStream, "up", at_once)
    backward(model, batches(1)[0].cuda())
    torch.cuda.synchronize()
    assert simulated_gpu.simulator.races()
