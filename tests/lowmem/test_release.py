"""A model that is dropped is freed at once; one model serves one thread at a time."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedModel

import lowmem
from lowmem.host_memory import give_back_freed
from tests.lowmem.tiny_training import lora, resident, streamed
from tests.zoo.architectures import build

ROOT = Path(__file__).resolve().parents[2]
IDS = (torch.arange(40).view(4, 10) * 7) % 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def untouched(model: PreTrainedModel) -> object:
    return model


def evaluated(model: PreTrainedModel) -> object:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def generated(model: PreTrainedModel) -> object:
    return model.generate(IDS, max_new_tokens=3, do_sample=False)


def trained(model: PreTrainedModel) -> object:
    made = get_peft_model(model, lora())
    made(input_ids=IDS, labels=IDS).loss.backward()
    return made


USES: dict[str, Callable[[PreTrainedModel], object]] = {
    "untouched": untouched,
    "evaluated": evaluated,
    "generated": generated,
    "trained": trained,
}
LOADS: dict[str, dict[str, object]] = {
    "streamed": {},
    "chunks": {"chunk_tokens": 4},
    "micro-batches": {"micro_batch": 1},
    "full": {"tuning": "full", "budget": lowmem.Budget(device="64MiB", host="64MiB")},
}


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize(
    ("options", "use"),
    [
        pytest.param(options, use, marks=() if options == "streamed" or use == "generated" else pytest.mark.slow)
        for options in LOADS
        for use in USES
        if (options, use) != ("full", "trained")
    ],
)
def test_a_dropped_model_is_freed_without_a_collection_where_a_plain_one_is(
    folder: Path, options: str, use: str
) -> None:
    def is_freed(model: PreTrainedModel) -> bool:
        alive = [weakref.ref(model), *(weakref.ref(module) for module in model.modules())]
        kept = USES[use](model)
        del model, kept
        return not any(ref() is not None for ref in alive)

    # Outside of the assertion, which would keep the models in order to show them.
    plain = is_freed(resident(folder))
    ours = is_freed(streamed(folder, **LOADS[options]))
    assert (plain, ours) == (True, True)


def held() -> tuple[int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    """Of this process, without what the C library keeps of memory that was freed."""
    give_back_freed()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose 17 MiB of weights would be seen if they stayed."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    return Path(build("llama", tmp_path_factory.mktemp("larger"), changes=sizes))


_SPREAD_BYTES = 4 << 20
"""Of the allocator's pages, from load to load: a quarter of the larger model."""


def adapted(model: PreTrainedModel) -> None:
    model = get_peft_model(model, lora())
    model(input_ids=IDS, labels=IDS).loss.backward()


def fully_trained(model: PreTrainedModel) -> None:
    optimizer = lowmem.optim.AdamW(model, lr=1e-3)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


KINDS = [(tuning, tier) for tuning in ("adapter", "full") for tier in ("memory", "disk")]


def six_loads(folder: Path, state: Path, *, tuning: str, tier: str) -> list[tuple[int, int, int]]:
    """Open, train and drop a model six times: threads, descriptors and resident bytes after each."""
    job: dict[str, object] = {"seq_len": 10, "batch_size": 4, "tuning": tuning, "device": "cpu"}
    smallest = lowmem.plan(folder, **job, budget=lowmem.Budget(device=0, host=0, disk=state))
    size = {"memory": 256 << 20, "disk": smallest.smallest_device_bytes}[tier]
    plan = lowmem.plan(folder, **job, budget=lowmem.Budget(device=size, host=0, disk=state))
    on_disk = plan.choice.state_tier == "disk" if tuning == "full" else bool(plan.placement.streamed_bytes)
    assert on_disk == (tier == "disk"), plan
    after = []
    for _ in range(6):
        model = lowmem.from_pretrained(folder, tuning=tuning, plan=plan)
        (fully_trained if tuning == "full" else adapted)(model)
        del model
        after.append((*held(), resident_bytes()))
    return after


_CHILD = """
import gc, json, sys, torch
from pathlib import Path
from tests.lowmem.test_release import KINDS, six_loads
torch.set_num_threads(1)
folder, state = map(Path, sys.argv[1:])
gc.collect()
gc.disable()
found = [six_loads(folder, state / f"{kind} {tier}", tuning=kind, tier=tier) for kind, tier in KINDS]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def loads(larger: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[list[int]]]:
    """Of every kind, in one process of its own.

    With one arena of the C library: each of a thread's keeps some MiB of what was freed at its end, and which threads
    get which is chance.
    """
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, str(larger), str(tmp_path_factory.mktemp("state"))]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(KINDS, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_six_loads_leave_memory_threads_and_descriptors_as_after_the_first(
    kind: tuple[str, str], loads: dict[tuple[str, str], list[list[int]]]
) -> None:
    after = loads[kind]
    assert [found[:2] for found in after] == [after[0][:2]] * 6
    sizes = [found[2] - after[0][2] for found in after]
    assert max(sizes) < _SPREAD_BYTES, sizes


@pytest.mark.usefixtures("no_collection")
def test_boundaries_on_disk_are_released_too(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "llama", changes={"num_hidden_layers": 5})
    job = {"seq_len": 4096, "batch_size": 4}
    smallest = lowmem.plan(folder, **job, budget=lowmem.Budget(device=0, host=0, disk=tmp_path), device="cpu")
    budget = lowmem.Budget(device=smallest.smallest_device_bytes, host=0, disk=tmp_path)
    plan = lowmem.plan(folder, **job, budget=budget, device="cpu")
    assert plan.boundary_tier == "disk"
    before = held()
    for _ in range(2):
        model = lowmem.from_pretrained(folder, plan=plan)
        trained(model)
        del model
    gc.collect()
    assert held() == before


def test_a_block_that_outlives_its_model_says_so(folder: Path) -> None:
    model = streamed(folder)
    inner, block = model.model, model.model.layers[0]
    del model
    with torch.no_grad():
        assert inner(IDS, use_cache=False).last_hidden_state.shape == (4, 10, 32)
    del inner
    with pytest.raises(RuntimeError, match="block 0 has outlived its streamed model"):
        block(torch.zeros(1, 2, 32))


def test_a_second_thread_in_one_model_is_refused(folder: Path) -> None:
    model = streamed(folder)
    turn, errors = threading.Event(), []

    def second() -> None:
        evaluated(model)
        turn.set()

    def wait(*args: object) -> None:
        """Between two blocks of the first thread's forward, the second thread runs its own."""
        if threading.current_thread() is threading.main_thread():
            threading.Thread(target=second).start()
            assert turn.wait(30)

    handle = model.model.layers[1].register_forward_pre_hook(wait)
    with pytest.raises(lowmem.UnsupportedError, match="in two threads at a time"):
        evaluated(model)
    handle.remove()
    assert torch.equal(evaluated(model), evaluated(streamed(folder)))  # type: ignore[arg-type]
    assert not errors


def test_a_second_thread_inside_a_visit_is_refused(folder: Path) -> None:
    model = streamed(folder)
    errors: list[BaseException] = []

    def second() -> None:
        try:
            evaluated(model)
        except lowmem.UnsupportedError as error:
            errors.append(error)

    def inside(*args: object) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=second)
            thread.start()
            thread.join(30)

    handle = model.model.layers[1].mlp.register_forward_pre_hook(inside)
    with pytest.raises(lowmem.UnsupportedError, match="in two threads at a time"):
        evaluated(model)
    handle.remove()
    assert len(errors) == 1
    assert torch.equal(evaluated(model), evaluated(streamed(folder)))  # type: ignore[arg-type]


def test_threads_may_take_turns(folder: Path) -> None:
    model = streamed(folder)
    found = [evaluated(model)]
    thread = threading.Thread(target=lambda: found.append(evaluated(model)))
    thread.start()
    thread.join()
    assert torch.equal(*found)  # type: ignore[arg-type]
