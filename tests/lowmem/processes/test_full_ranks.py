"""Every weight, trained by several ranks: what one process trains with the whole batch, from one copy of the state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lowmem
from lowmem.processes.ranks import Ranks, refuse_full
from tests.lowmem.processes.full_ranks_job import run
from tests.lowmem.processes.test_kill_ranks import assert_the_others_ended
from tests.lowmem.processes.test_ranks import assert_logged_the_same, assert_near
from tests.zoo.architectures import build

ROOT = Path(__file__).resolve().parents[3]
# Adam divides by a gradient's size: with a larger epsilon, a gradient of next to nothing is not told by its last bits.
STEADY = {"adam_epsilon": 1e-3}
OURS = {"lr": 3e-3, "weight_decay": 0.1, "eps": 1e-3}


def case(name: str, *, model: str = "llama", **others: Any) -> dict[str, Any]:
    options = {"per_device_train_batch_size": 2, **STEADY, **others.pop("options", {})}
    return {"name": name, "model": model, "options": options, **others}


def accumulated(**options: object) -> dict[str, object]:
    """Four backwards per step: DDP's `no_sync` in three of them."""
    return {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "max_steps": 3, **options}


SAVED = case("saved", optimizer=OURS, options={"save_strategy": "steps", "save_steps": 2})
# Equal to one process with the whole batch.
QUICK = [
    SAVED,
    case("accumulated", optimizer=OURS, options=accumulated(max_grad_norm=0.3)),
    case("torchs-adamw", options=accumulated()),
    case("experts", model="qwen3_moe", optimizer=OURS, options={"router_aux_loss_coef": 0.0}),
]
SLOW = [
    case("tied-in-host", model="tied", optimizer=OURS, budget={"device": "64MiB", "host": "64MiB"}),
    case("default", options={}),
]
FOUR = [
    case("two-by-two", optimizer=OURS, options=accumulated(), num_ranks=4),
    case("two-by-two-experts", model="qwen3_moe", options={"router_aux_loss_coef": 0.0}, num_ranks=4),
]
RESUMED = case("resumed", output="saved", optimizer=OURS)
BY_HAND = {"name": "by-hand", "model": "llama", "kind": "by hand"}
OWN_WEIGHTS = {"name": "own-weights", "model": "llama", "kind": "own weights"}


def whole_batch(one: dict[str, Any]) -> dict[str, Any]:
    """The same job for one process."""
    per_rank = one["options"]["per_device_train_batch_size"]
    options = {**one["options"], "per_device_train_batch_size": one.get("num_ranks", 2) * per_rank}
    return {**one, "name": f"{one['name']}-alone", "options": options}


def run_alone(one: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A case in this process; what other libraries warn of is other tests' business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(one, folder)


def make_models(folder: Path) -> None:
    build("llama", folder / "llama")
    build("llama", folder / "tied", changes={"tie_word_embeddings": True, "num_hidden_layers": 3})
    build("qwen3_moe", folder / "qwen3_moe", changes={"num_experts": 8, "num_experts_per_tok": 2})


def launch(folder: Path, groups: list[dict[str, Any]], *, limit_s: float = 300) -> None:
    """Run groups of ranks, one after the other."""
    (folder / "groups.json").write_text(json.dumps(groups))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.lowmem.processes.full_ranks_job", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert done.stdout.endswith("finished\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks did, on one machine and on two: importing takes longer than all of the runs."""
    made = tmp_path_factory.mktemp("full-ranks")
    make_models(made)
    # One process goes half the way, and two go on.
    run_alone({**whole_batch(SAVED), "name": "one-then-two", "output": "one-then-two"}, made)
    resumed = {**RESUMED, "resume": str(made / "saved" / "checkpoint-2")}
    from_one = {**RESUMED, "name": "from-one", "output": "from-one"}
    from_one["resume"] = str(made / "one-then-two" / "checkpoint-2")
    cases = [*QUICK, resumed, from_one, BY_HAND, OWN_WEIGHTS]
    across = [{**BY_HAND, "name": "two-nodes-by-hand"}]
    launch(made, [{"ranks": 2, "cases": cases}, {"ranks": 2, "nodes": 2, "cases": across}])
    return made


@pytest.fixture(scope="module")
def slow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks did in the slow cases, and four on two machines."""
    made = tmp_path_factory.mktemp("slow-full-ranks")
    make_models(made)
    launch(made, [{"ranks": 2, "cases": SLOW}, {"ranks": 4, "nodes": 2, "cases": FOUR}])
    return made


@pytest.fixture
def ran(one: dict[str, Any], request: pytest.FixtureRequest) -> Path:
    """Where the results of a case are."""
    found: Path = request.getfixturevalue("slow_folder" if one in [*SLOW, *FOUR] else "folder")
    return found


def of_rank(folder: Path, name: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{name}.rank{rank}.pt", weights_only=True)
    return found


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """What was logged, and every weight: equal but for the order of sums."""
    assert_logged_the_same(found, expected)
    assert_near(found["weights"], expected["weights"])


def each(cases: list[dict[str, Any]]) -> pytest.MarkDecorator:
    slow = [one["name"] for one in [*SLOW, *FOUR]]
    marked = [
        pytest.param(one, id=one["name"], marks=[pytest.mark.slow] if one["name"] in slow else []) for one in cases
    ]
    return pytest.mark.parametrize("one", marked)


@each([*QUICK, RESUMED, *SLOW, *FOUR])
def test_the_ranks_have_the_same_bits(one: dict[str, Any], ran: Path) -> None:
    first, *others = (of_rank(ran, one["name"], rank) for rank in range(one.get("num_ranks", 2)))
    assert first["is_wrapped"]
    for other in others:
        assert_same_bits(other["weights"], first["weights"])


@each([*QUICK, *SLOW, *FOUR])
def test_a_run_is_that_of_one_process_with_the_whole_batch(one: dict[str, Any], ran: Path, tmp_path: Path) -> None:
    alone = run_alone({**whole_batch(one), "model": str(ran / one["model"])}, tmp_path)
    assert_close(of_rank(ran, one["name"], 0), alone)


@pytest.mark.parametrize("name", ["by-hand", "two-nodes-by-hand"])
def test_gradients_and_weights_are_those_of_one_process_whatever_is_done_to_them(
    name: str, folder: Path, tmp_path: Path
) -> None:
    alone = run_alone({**BY_HAND, "model": str(folder / "llama")}, tmp_path)
    for rank in range(2):
        found = of_rank(folder, name, rank)
        for what in ("gradients 0", "gradients 1", "after a step", "halved", "set"):
            assert_near(found[what], alone[what])
        torch.testing.assert_close(found["norm"], alone["norm"], rtol=1e-6, atol=0)
        assert found["cleared"] == 0
        changed, set_to, galore, eight_bits = found["refused"]
        assert "changing the gradient of" in changed
        assert "setting or changing the gradient of" in set_to
        assert 'tuning="full" in 2 processes and lowmem.optim.GaLore' in galore
        assert 'tuning="full" in 2 processes and lowmem.optim.AdamW' in eight_bits


def test_a_weight_in_the_loss_itself_has_the_mean_gradient(folder: Path, tmp_path: Path) -> None:
    alone = run_alone({**OWN_WEIGHTS, "model": str(folder / "llama")}, tmp_path)
    for rank in range(2):
        torch.testing.assert_close(
            of_rank(folder, "own-weights", rank)["gradient"], alone["gradient"], rtol=1e-6, atol=1e-6
        )


def test_a_resumed_run_is_the_run_that_was_not_interrupted(folder: Path) -> None:
    for rank in range(2):
        assert_same_bits(of_rank(folder, "resumed", rank)["weights"], of_rank(folder, "saved", rank)["weights"])


def test_one_process_goes_on_where_two_stopped(folder: Path, tmp_path: Path) -> None:
    resume = str(folder / "saved" / "checkpoint-2")
    one = {**whole_batch(RESUMED), "model": str(folder / "llama"), "resume": resume, "output": str(tmp_path / "on")}
    assert_near(run_alone(one, tmp_path)["weights"], of_rank(folder, "saved", 0)["weights"])


def test_two_processes_go_on_where_one_stopped(folder: Path) -> None:
    whole = of_rank(folder, "saved", 0)["weights"]
    for rank in range(2):
        assert_near(of_rank(folder, "from-one", rank)["weights"], whole)


def test_rank_0_alone_writes_what_there_is_one_of(folder: Path) -> None:
    files = of_rank(folder, "saved", 0)["files"]
    assert files.count("optimizer.pt") == 2  # two checkpoints
    assert {file for file in files if file.startswith("rng_state")} == {"rng_state_0.pth", "rng_state_1.pth"}


def test_each_rank_counts_its_part_of_the_state(folder: Path) -> None:
    found = of_rank(folder, "saved", 0)
    assert "2 ranks of the machine train one copy of the state, a part each, in RAM" in found["plan"]
    num = sum(weight.numel() for weight in found["weights"].values())
    # Weights, two moments; what is outside the blocks has them too. Pages make tiny models larger.
    for field in ("weight_bytes", "exp_avg_bytes", "exp_avg_sq_bytes"):
        assert 4 * num / 2 <= found["memory"][field] < 8 * num, field


@pytest.mark.slow
@pytest.mark.parametrize(("num", "seed"), [(1, 0), (5, 1)])
def test_a_rank_that_is_killed_takes_nothing_with_it(num: int, seed: int, tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model")
    command = [sys.executable, "-W", "ignore", "-m", "tests.lowmem.processes.full_kill_ranks_job"]
    done = subprocess.run(
        [*command, str(model), str(tmp_path), str(num), str(seed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert_the_others_ended(tmp_path)
    assert_same_bits(
        load_file(tmp_path / "killed" / "final" / "model.safetensors"),
        load_file(tmp_path / "whole" / "final" / "model.safetensors"),
    )


# One process, asked as if it were one of several.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"masters": torch.bfloat16}, r'tuning="full" in 2 processes and masters='),
        ({"tier": "disk"}, r'tuning="full" in 2 processes and state on disk'),
    ],
)
def test_what_several_processes_cannot_do_to_every_weight_is_refused(options: dict[str, Any], says: str) -> None:
    refuse_full(Ranks(), **options)
    with pytest.raises(lowmem.UnsupportedError, match=says):
        refuse_full(Ranks(size=2), **options)


def test_it_is_refused_before_anything_is_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    several = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (several | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(lowmem.UnsupportedError, match='tuning="full" in 2 processes and masters='):
        lowmem.from_pretrained(tmp_path / "nothing", tuning="full", masters="bf16", device="cpu")
