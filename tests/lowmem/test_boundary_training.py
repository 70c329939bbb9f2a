"""Streamed training with its boundary activations on disk: the same gradients, and steps that go on after a failure."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import lowmem
from lowmem.streaming.boundary import DiskBoundaries
from lowmem.streaming.runtime import Runtime, runtime_of
from offload import ReadError, Scratch, WriteError
from tests.zoo.architectures import build
from tests.zoo.reference import Outcome, adapt, batch_of, lora, run
from tests.zoo.streamed import streamed

if TYPE_CHECKING:
    from peft import PeftModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("zoo"), changes={"num_hidden_layers": 5})


@pytest.fixture
def model(checkpoint: Path) -> Iterator[PeftModel]:
    base = streamed(checkpoint, micro_batch=1)
    yield adapt(base, lora("llama", lora_dropout=0.1))
    runtime_of(base).close()


def with_boundaries_in(folder: Path, model: PeftModel, *, num_buffers: int, broken: threading.Event) -> Runtime:
    def pwrite(fd: int, buffers: list[memoryview], offset: int) -> int:
        if broken.is_set():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.pwritev(fd, buffers, offset)

    runtime = runtime_of(model)
    runtime.boundaries.close()
    runtime.boundaries = DiskBoundaries(CPU, Scratch(folder, pwrite=pwrite), num_buffers=num_buffers)
    return runtime


def outcome(model: PeftModel) -> Outcome:
    torch.manual_seed(7)
    return run(model.train(), batch_of(padding=True))


def assert_same(got: Outcome, expected: Outcome) -> None:
    assert torch.equal(got.loss, expected.loss)
    assert got.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert torch.equal(got.gradients[name], gradient), name


@pytest.mark.parametrize("num_buffers", [1, 2])
def test_gradients_are_bitwise_those_of_boundaries_in_memory(
    model: PeftModel, tmp_path: Path, num_buffers: int
) -> None:
    expected = outcome(model)
    runtime = with_boundaries_in(tmp_path, model, num_buffers=num_buffers, broken=threading.Event())
    for _ in range(2):
        assert_same(outcome(model), expected)
    tier = runtime.boundaries
    assert isinstance(tier, DiskBoundaries)
    assert tier.scratch.written_bytes == 2 * tier.scratch.file_bytes, "the second step used the slots of the first"
    assert runtime.memory()["boundary_bytes"] == num_buffers * tier.scratch.file_bytes // 5
    assert os.listdir(tmp_path) == []


def test_several_forwards_may_wait_for_their_backward(model: PeftModel, tmp_path: Path) -> None:
    batches = [batch_of(seed=seed) for seed in range(3)]
    params = [param for param in model.parameters() if param.requires_grad]
    model.eval()
    expected = [torch.autograd.grad(model(**batch, use_cache=False).loss, params) for batch in batches]
    with_boundaries_in(tmp_path, model, num_buffers=2, broken=threading.Event())
    losses = [model(**batch, use_cache=False).loss for batch in batches]
    model(**batches[0], use_cache=False).loss.item()
    for index in (1, 2, 0):
        grads = torch.autograd.grad(losses[index], params)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads, expected[index], strict=True))


def test_a_disk_that_fails_stops_the_step_and_the_next_one_is_right(model: PeftModel, tmp_path: Path) -> None:
    expected = outcome(model)
    broken = threading.Event()
    runtime = with_boundaries_in(tmp_path, model, num_buffers=2, broken=broken)
    for _ in range(2):
        broken.set()
        with pytest.raises(WriteError, match=r"writing \d+ bytes"):
            outcome(model)
        broken.clear()
        assert_same(outcome(model), expected)
    tier = runtime.boundaries
    assert isinstance(tier, DiskBoundaries)
    loss = model(**batch_of(), use_cache=False).loss
    # Writes that came afterwards would make the file as long as it was.
    while any(stored.under_way for stored in list(tier._kept.values())):
        time.sleep(0.01)
    os.ftruncate(tier.scratch._file.fd, 0)
    with pytest.raises(ReadError):
        loss.backward()
    del loss
    model.zero_grad()
    assert_same(outcome(model), expected)


def test_a_folder_that_cannot_be_written_leaves_no_threads(checkpoint: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    job = {"seq_len": 4096, "batch_size": 4}
    smallest = lowmem.plan(checkpoint, **job, budget=lowmem.Budget(device=0, host=0, disk=taken), device="cpu")
    budget = lowmem.Budget(device=smallest.smallest_device_bytes, host=0, disk=taken)
    plan = lowmem.plan(checkpoint, **job, budget=budget, device="cpu")
    assert plan.boundary_tier == "disk"
    taken.write_text("a file where the folder should be")
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match=r"disk: .*taken cannot be written to"):
        lowmem.from_pretrained(checkpoint, plan=plan)
    # Threads of other tests' models may end meanwhile.
    assert not set(threading.enumerate()) - before
