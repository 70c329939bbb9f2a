"""Two processes under torchrun train what one process trains with the whole batch, and read the base once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

import lowmem
from lowmem.monitoring.resume_checks import check_before_resume, newest_complete
from lowmem.monitoring.training_checks import refuse_training_options
from lowmem.processes.ranks import Ranks, budget_of_rank, ranks, refuse_engines
from offload import Budget, SourceError
from tests.lowmem.processes.ranks_job import run
from tests.lowmem.tiny_training import lora, streamed
from tests.offload.kernel_counts import can_swap, page_bytes_of_shared_memory
from tests.zoo.architectures import build

ROOT = Path(__file__).resolve().parents[3]
NUM_RANKS = 2
PER_RANK = 2

STACKS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
WITHOUT_BALANCE = {"router_aux_loss_coef": 0.0}
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3}


def case(name: str, task: str = "sft", model: str = "llama", **others: object) -> dict[str, Any]:
    options = {"per_device_train_batch_size": PER_RANK, **others.pop("options", {})}  # type: ignore[dict-item]
    return {"name": name, "task": task, "model": model, "options": options, **others}


def accumulated(options: dict[str, object] | None = None) -> dict[str, object]:
    """Four backwards per step: DDP's `no_sync` in three of them."""
    return {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "max_steps": 3, **(options or {})}


# Equal to one process with the whole batch.
EXACT = [
    case("sft", generates=True),
    case("sft-accumulated", options=accumulated()),
    case("sft-finds-unused", options={"ddp_find_unused_parameters": True, **ADAMW}),
    case("sft-finds-none", options={"ddp_find_unused_parameters": False, "gradient_checkpointing": False}),
    case("streamed", model="deep", tight=True),
    case("dora", adapter={"use_dora": True}),
    case("dora-accumulated", adapter={"use_dora": True}, options=accumulated(ADAMW)),
    case("experts", model="qwen3_moe", adapter=STACKS, options={**ADAMW, **WITHOUT_BALANCE}, tight=True),
    case("experts-accumulated", model="qwen3_moe", adapter=STACKS, options=accumulated(WITHOUT_BALANCE)),
    case("dpo", task="dpo"),
    case("dpo-accumulated", task="dpo", options=accumulated()),
    case("reward", task="reward"),
    case("saving", options={"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **ADAMW}),
]
# What TRL computes by process is compared with its own model in memory, in as many processes: KTO's baseline, samples,
# how evenly a batch uses experts, the mean loss of evaluated batches where the last one is short.
BESIDE_PLAIN = [
    case("evaluated", num_evaluated=7),
    case("experts-balanced", model="qwen3_moe", adapter=STACKS, options=ADAMW),
    case("kto", task="kto"),
    case("grpo", task="grpo"),
    case("rloo", task="rloo"),
]
SLOW = {"sft-finds-unused", "sft-finds-none", "dora-accumulated", "experts-accumulated", "dpo-accumulated", "reward"}
SLOW |= {"experts-balanced", "rloo"}
RESUMED = case("resumed", output="saving", options={"max_steps": 4, **ADAMW})
# Each rank opens a folder of its own, and one of them must not: then all of them are told why.
ANOTHER = {"name": "another", "opens": ["llama", "trained on"]}
MISSING = {"name": "missing", "opens": ["llama", "nothing"]}
# The same folder, opened with other settings: rank 0's, rank 1's, and what is said of them.
SETTINGS = {
    "dtype": ({}, {"dtype": "bfloat16"}, "dtype=bfloat16, and rank 0 with dtype=float32"),
    "tuning": ({}, {"tuning": "full"}, "tuning=full, and rank 0 with tuning=adapter"),
    "full": ({"tuning": "full"}, {}, "tuning=adapter, and rank 0 with tuning=full"),
    "labels": ({"num_labels": 1}, {}, "num_labels=None, and rank 0 with num_labels=1"),
    "micro-batch": ({"micro_batch": 1}, {"micro_batch": 2}, "micro_batch=2, and rank 0 with micro_batch=1"),
    "chunks": ({}, {"chunk_tokens": 16}, "chunk_tokens=16, and rank 0 with chunk_tokens=None"),
}
SMALLEST = [{"name": f"smallest {kind}", "model": "llama", "smallest": kind} for kind in ("adapter", "full")]
DIFFERENT = [
    {"name": f"other {name}", "opens": ["llama"] * 2, "settings": [first, second]}
    for name, (first, second, _) in SETTINGS.items()
]


def run_ranks(
    folder: Path, *options: str, num_ranks: int = NUM_RANKS, limit_s: float
) -> subprocess.CompletedProcess[str]:
    """Run a folder's `cases.json` under torchrun, with options of its own; it is killed after so many seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc_per_node", str(num_ranks)]
    # A free port chosen by the system, so that two such tests may run at a time.
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.run(
        [*command, "-m", "tests.lowmem.processes.ranks_job", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )


def launch(folder: Path, cases: list[dict[str, Any]], *, num_ranks: int = NUM_RANKS, limit_s: float = 240) -> None:
    """Run cases under torchrun.

    Args:
        folder: Has the models; gets `NAME.rankR.pt`.
        cases: What to run.
        num_ranks: Processes.
        limit_s: It is killed then.
    """
    (folder / "cases.json").write_text(json.dumps(cases))
    done = run_ranks(folder, num_ranks=num_ranks, limit_s=limit_s)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def make_models(folder: Path) -> None:
    build("llama", folder / "llama")
    build("llama", folder / "trained on", seed=1)
    # More blocks than pass through shared memory at a time.
    build("llama", folder / "deep", changes={"num_hidden_layers": 8})
    build("qwen3_moe", folder / "qwen3_moe", changes={"num_experts": 8, "num_experts_per_tok": 2})


def run_on_ranks(made: Path, cases: list[dict[str, Any]]) -> Path:
    make_models(made)
    plain = [{**one, "name": f"{one['name']}-plain", "streamed": False} for one in cases if one in BESIDE_PLAIN]
    launch(made, [*cases, *plain])
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks did in the quick cases: importing takes longer than all of the runs."""
    made = tmp_path_factory.mktemp("ranks")
    resumed = {**RESUMED, "resume": str(made / "saving" / "checkpoint-2")}
    quick = [one for one in (*EXACT, *BESIDE_PLAIN) if one["name"] not in SLOW]
    return run_on_ranks(made, [*quick, resumed, ANOTHER, MISSING, *DIFFERENT, *SMALLEST])


@pytest.fixture(scope="module")
def slow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What they did in the slow ones."""
    made = tmp_path_factory.mktemp("slow-ranks")
    return run_on_ranks(made, [one for one in (*EXACT, *BESIDE_PLAIN) if one["name"] in SLOW])


@pytest.fixture
def ran(one: dict[str, Any], request: pytest.FixtureRequest) -> Path:
    """Where the results of a case are."""
    found: Path = request.getfixturevalue("slow_folder" if one["name"] in SLOW else "folder")
    return found


def each(cases: list[dict[str, Any]]) -> pytest.MarkDecorator:
    marked = [
        pytest.param(one, id=one["name"], marks=[pytest.mark.slow] if one["name"] in SLOW else []) for one in cases
    ]
    return pytest.mark.parametrize("one", marked)


def of_rank(folder: Path, name: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{name}.rank{rank}.pt", weights_only=True)
    return found


def whole_batch(one: dict[str, Any]) -> dict[str, Any]:
    """The same job for one process."""
    per_rank = one["options"]["per_device_train_batch_size"]
    options = {**one["options"], "per_device_train_batch_size": NUM_RANKS * per_rank}
    return {**one, "name": f"{one['name']}-alone", "options": options}


def run_alone(one: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A case in this process; what other libraries warn of is other tests' business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(one, folder)


def assert_logged_the_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses, gradient norms and whatever else was logged: equal but for the order of sums."""
    assert len(found["records"]) == len(expected["records"]) > 0
    for ours, theirs in zip(found["records"], expected["records"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-6), name


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Values by name, likewise."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """What was logged, the adapter and the evaluation: equal but for the order of sums."""
    assert_logged_the_same(found, expected)
    assert_near(found["adapter"], expected["adapter"])
    assert found["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-6)


@each([*EXACT, RESUMED, *BESIDE_PLAIN])
def test_the_ranks_have_the_same_bits(one: dict[str, Any], ran: Path) -> None:
    first, second = (of_rank(ran, one["name"], rank) for rank in range(NUM_RANKS))
    assert first["is_wrapped"]
    assert second["is_wrapped"]
    for name, value in first["adapter"].items():
        assert torch.equal(second["adapter"][name], value), name


@each(EXACT)
def test_a_run_is_that_of_one_process_with_the_whole_batch(one: dict[str, Any], ran: Path, tmp_path: Path) -> None:
    alone = run_alone({**whole_batch(one), "model": str(ran / one["model"]), "generates": False}, tmp_path)
    found = of_rank(ran, one["name"], 0)
    assert_close(found, alone)
    # Each rank counts what was read because it asked first: together no more than one process reads.
    read = [of_rank(ran, one["name"], rank)["read_bytes"] for rank in range(NUM_RANKS)]
    if one.get("tight"):
        assert 0 < sum(read) <= 1.05 * alone["read_bytes"]
    else:
        assert sum(read) == alone["read_bytes"], "everything is kept, in one copy"


@each(BESIDE_PLAIN)
def test_a_trainer_of_processes_is_that_of_the_plain_model_in_as_many(one: dict[str, Any], ran: Path) -> None:
    assert_close(of_rank(ran, one["name"], 0), of_rank(ran, f"{one['name']}-plain", 0))


def test_a_resumed_run_is_the_run_that_was_not_interrupted(folder: Path) -> None:
    for rank in range(NUM_RANKS):
        found, whole = of_rank(folder, "resumed", rank), of_rank(folder, "saving", rank)
        for name, value in whole["adapter"].items():
            assert torch.equal(found["adapter"][name], value), name


def test_one_process_goes_on_where_two_stopped(folder: Path, tmp_path: Path) -> None:
    resume = str(folder / "saving" / "checkpoint-2")
    one = {**whole_batch(RESUMED), "model": str(folder / "llama"), "resume": resume, "output": str(tmp_path / "on")}
    found, expected = run_alone(one, tmp_path), of_rank(folder, "saving", 0)
    for record in (*found["records"], *expected["records"]):
        del record["num_tokens"]  # TRL counts from the resume on
    assert_close(found, expected)


def test_rank_0_alone_writes_what_there_is_one_of(folder: Path) -> None:
    files = of_rank(folder, "saving", 0)["files"]
    assert files.count("adapter_model.safetensors") == 2  # two checkpoints
    # Each rank's random state is its own.
    assert {file for file in files if file.startswith("rng_state")} == {"rng_state_0.pth", "rng_state_1.pth"}


def test_ranks_generate_for_themselves(folder: Path) -> None:
    first, second = (of_rank(folder, "sft", rank)["generated"] for rank in range(NUM_RANKS))
    assert first.shape[1] != second.shape[1]


def test_blocks_that_ranks_keep_are_one_copy(folder: Path) -> None:
    found = [of_rank(folder, "sft", rank) for rank in range(NUM_RANKS)]
    page = page_bytes_of_shared_memory()
    sizes = found[0]["block_bytes"]
    one_copy = sum(-(-size // page) * page for size in sizes)
    mapped = [one["mapped"] for one in found]
    rounding = 1024 * sum(one["num"] for one in mapped)
    for one in mapped:
        assert can_swap() or one["rss"] >= 0.9 * sum(sizes), "each maps all of them"
    found_bytes = sum(one["pss"] for one in mapped)
    assert found_bytes <= one_copy + rounding
    assert can_swap() or found_bytes >= sum(sizes) - rounding


def test_a_checkpoint_that_is_another_ones_is_refused_on_all_ranks(folder: Path) -> None:
    for rank in range(NUM_RANKS):
        refused = of_rank(folder, "another", rank)["refused"]
        assert refused.startswith(f"ValueError: rank {rank} of 2: the files of {folder / 'trained on'} on ")
        assert "which rank 1 has opened, are not copies of those of" in refused
        assert str(folder / "llama") in refused


@pytest.mark.parametrize(("name", "says"), [(name, says) for name, (_, _, says) in SETTINGS.items()], ids=SETTINGS)
def test_a_model_that_is_opened_with_other_settings_is_refused_on_all_ranks(name: str, says: str, folder: Path) -> None:
    for rank in range(NUM_RANKS):
        refused = of_rank(folder, f"other {name}", rank)["refused"]
        opened = f"rank 1 has opened {folder / 'llama'} with {says}; give all ranks the same"
        assert refused == f"ValueError: rank {rank} of 2: {opened}"


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_the_smallest_budget_that_ranks_are_told_works_and_a_byte_less_does_not(kind: str, folder: Path) -> None:
    found = [of_rank(folder, f"smallest {kind}", rank) for rank in range(NUM_RANKS)]
    assert found[0] == found[1]
    first, less, same = found[0]["said"]
    assert f"({found[0]['needed']} bytes)" in first
    assert "taken off each rank's budget for what the 2 ranks of this machine pass on" in first
    assert less
    assert not same


def test_what_one_rank_cannot_open_ends_the_others_with_its_reason(folder: Path) -> None:
    assert of_rank(folder, "missing", 1)["refused"].startswith("FileNotFoundError")
    refused = of_rank(folder, "missing", 0)["refused"]
    assert refused.startswith("OffloadError: rank 0 of 2: rank 1 could not open the model: FileNotFoundError")
    assert str(folder / "nothing") in refused


def test_the_plan_says_that_ranks_share(folder: Path) -> None:
    for rank in range(NUM_RANKS):
        assert "2 ranks of the machine read blocks once, and keep one copy" in of_rank(folder, "streamed", rank)["plan"]


# One process, asked as if it were one of several.

LACKING = {
    "of two ranks": (2, [1], "checkpoint-2"),
    "of one process": (1, [1], "checkpoint-4"),
    "of fewer": (4, [], "checkpoint-4"),
}


@pytest.mark.parametrize(("num_ranks", "lacking", "newest"), LACKING.values(), ids=LACKING)
def test_a_checkpoint_without_a_ranks_random_state_is_not_complete(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_ranks: int, lacking: list[int], newest: str
) -> None:
    model = get_peft_model(streamed(folder / "llama"), lora(lora_dropout=0.0))
    shutil.copytree(folder / "saving", tmp_path / "saving")
    last = tmp_path / "saving" / "checkpoint-4"
    for rank in lacking:
        (last / f"rng_state_{rank}.pth").unlink()
    if num_ranks > 1:
        for name, value in {**TWO, "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}.items():
            monkeypatch.setenv(name, value)
    found = newest_complete(last.parent, is_adapter=True)
    assert found is not None
    assert found.name == newest
    if newest == last.name:
        check_before_resume(model, str(last))
        return
    with pytest.raises(SourceError, match=rf"rng_state_1\.pth.*missing: dropout of its rank.*complete one.*{newest}"):
        check_before_resume(model, str(last))


TWO = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}


def test_the_launcher_is_believed() -> None:
    assert ranks({}) == Ranks()
    assert ranks({"LOCAL_RANK": "0", "WORLD_SIZE": "1"}) == Ranks(launched=True)
    assert ranks({**TWO, "GROUP_RANK": "0"}) == Ranks(rank=1, size=2, local_rank=1, local_size=2, launched=True)


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"WORLD_SIZE": "2"}, r"without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: .*torchrun"),
        ({**TWO, "RANK": "2"}, "RANK=2 of WORLD_SIZE=2"),
        ({**TWO, "LOCAL_RANK": "2"}, "LOCAL_RANK=2 of LOCAL_WORLD_SIZE=2"),
        ({**TWO, "WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
    ],
)
def test_an_environment_that_cannot_be_is_named(environ: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ranks(environ)


@pytest.mark.parametrize(
    ("name", "says"),
    [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Meg")],
)
def test_other_engines_are_refused_by_name(name: str, says: str) -> None:
    with pytest.raises(lowmem.UnsupportedError, match=f"{says}.*DDP"):
        refuse_engines({name: "true"})


def test_essa_over_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(lowmem.UnsupportedError, match="ESSATrainer in 2 processes"):
        lowmem.ESSATrainer(None, None, reward_funcs=len, train_dataset=None, processing_class=None)  # type: ignore[arg-type]


def test_a_static_graph_with_accumulation_is_refused(tmp_path: Path) -> None:
    from trl import SFTConfig

    options: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "ddp_static_graph": True}
    refuse_training_options(SFTConfig(str(tmp_path), **options))
    with pytest.raises(lowmem.UnsupportedError, match="ddp_static_graph=True with gradient_accumulation_steps=2"):
        refuse_training_options(SFTConfig(str(tmp_path), gradient_accumulation_steps=2, **options))


def test_ranks_of_a_node_share_its_host_budget() -> None:
    two = Ranks(size=4, local_size=2)
    given = Budget(device="1GiB", host="4GiB")
    assert budget_of_rank(given, torch.device("cpu"), found=two).host_bytes == 2 << 30
    assert budget_of_rank(given, torch.device("cpu"), found=two).device_bytes == 1 << 30
    less = budget_of_rank(given, torch.device("cpu"), found=two, shared_bytes=1 << 20)
    assert less.device_bytes == (1 << 30) - (1 << 20)
    assert budget_of_rank(given, torch.device("cpu"), found=Ranks()).host_bytes == 4 << 30
    alone = budget_of_rank(None, torch.device("cpu"), found=Ranks()).device_bytes
    half = budget_of_rank(None, torch.device("cpu"), found=two).device_bytes
    assert alone is not None
    assert half is not None
    assert half == pytest.approx(alone / 2, rel=0.1)


def test_a_process_that_was_launched_alone_has_one_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    model = streamed(Path(build("llama", tmp_path / "model")))
    assert list(model.hf_device_map.values()) == [torch.device("cpu")]
