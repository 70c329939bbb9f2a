"""Rates of a model's own shapes: measured by `lowmem bench`, kept, and used by plans."""

from __future__ import annotations

import json
import time
from dataclasses import MISSING, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowmem
from lowmem.machines import bench, measured, rates
from lowmem.machines.bench import bench_lines
from lowmem.machines.measured import measure_shape
from lowmem.machines.rates import Stopwatch
from lowmem.models.checkpoint import Opened, open_checkpoint
from lowmem.planning.job import Job
from lowmem.planning.planner import plan_step
from lowmem.planning.read_model import read_shapes
from lowmem.planning.shapes import ModelShapes
from lowmem.planning.step_time import Rates, ShapeRates, Trained
from tests.zoo.architectures import build

BUDGET = lowmem.Budget(device="64MiB", host="64MiB")


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return build("llama", tmp_path / "llama", dtype=torch.bfloat16)


def opened(folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Opened:
    checkpoint = open_checkpoint(folder, name="m", device=torch.device(device), dtype=dtype)
    checkpoint.source.close()
    return checkpoint


def test_what_is_measured_is_kept_and_plans_use_it(llama: Path) -> None:
    before = lowmem.plan(llama, seq_len=16, budget=BUDGET, device="cpu")
    assert before.rates.measured == ()
    lines = list(bench_lines(llama, device="cpu"))
    assert {line["probe"] for line in lines} == {"disk", "copy", "compute", "blocks", "pace", "kept"}
    assert {line["trains"] for line in lines if line["probe"] == "blocks"} == {"lora", "dora", "full"}
    assert Path(str(lines[-1]["file"])).is_file()
    plan = lowmem.plan(llama, seq_len=16, budget=BUDGET, device="cpu")
    assert plan.rates.measured == ("disk", "copy", "compute")
    assert plan.rates.shape is not None
    assert plan.rates.shape.trains == "lora"
    assert "of these shapes measured" in str(plan)
    assert lowmem.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    # Plans that were written before a GPU's attention of chunks was measured can still be read.
    assert "chunk_attention" not in json.dumps(plan.to_dict())
    on_gpu = replace(plan.rates.shape, chunk_attention_flops_per_s=(2e12, 1e12))
    told = replace(plan, rates=replace(plan.rates, shape=on_gpu))
    assert lowmem.Plan.from_dict(json.loads(json.dumps(told.to_dict()))) == told
    full = lowmem.plan(llama, seq_len=16, tuning="full", budget=BUDGET, device="cpu")
    assert full.rates.shape is not None
    assert full.rates.shape.trains == "full"
    # What opens a model without a plan plans with them too.
    model = lowmem.from_pretrained(llama, budget=BUDGET, device="cpu")
    from lowmem.streaming.runtime import runtime_of

    assert runtime_of(model).plan.rates.shape == plan.rates.shape


def test_what_cannot_be_timed_again_stays_as_it_was(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, cpu = read_shapes(opened(llama)), torch.device("cpu")
    rates.keep(rates.KeptRates(rates=Rates(), shapes={"lora": shape_rates()}), shapes, cpu)

    def fails(*_: object, **__: object) -> ShapeRates:
        raise NotImplementedError("its positions end before")

    monkeypatch.setattr(bench, "measure_shape", fails)
    lines = list(bench_lines(llama, device="cpu"))
    assert [line["skipped"] for line in lines if line["probe"] == "blocks"] == ["its positions end before"] * 3
    kept = rates.read_kept(shapes, cpu)
    assert kept is not None
    assert kept.shapes == {"lora": shape_rates()}
    assert kept.rates.measured == ("disk", "copy", "compute")


@pytest.mark.parametrize("damage", ["", "{}", '{"rates": {}, "shapes": {}}', '{"rates": 3}'])
def test_a_kept_file_that_cannot_be_read_is_as_good_as_none(llama: Path, damage: str) -> None:
    shapes = read_shapes(opened(llama))
    file = rates.kept_file(shapes, torch.device("cpu"))
    file.parent.mkdir(parents=True)
    file.write_text(damage)
    assert rates.read_kept(shapes, torch.device("cpu")) is None
    assert lowmem.plan(llama, seq_len=16, budget=BUDGET, device="cpu").rates.measured == ()


def test_rates_are_kept_by_shape_and_type(llama: Path, tmp_path: Path) -> None:
    other = build("qwen3", tmp_path / "other", dtype=torch.bfloat16)
    cpu = torch.device("cpu")
    files = {rates.kept_file(read_shapes(opened(folder)), cpu) for folder in (llama, other)}
    assert len(files) == 2
    adapted = read_shapes(opened(llama), peft_config=LoraConfig(r=4, target_modules="all-linear"))
    assert rates.kept_file(adapted, cpu) in files


def test_a_half_type_is_timed_under_autocast_unless_told_otherwise(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def times(*_: object, autocast: bool, **__: object) -> ShapeRates:
        seen.append(autocast)
        return shape_rates(head_token_s=2.0 if autocast else 3.0)

    def planned(**options: Any) -> float | None:
        shape = lowmem.plan(llama, seq_len=16, budget=BUDGET, device="cpu", **options).rates.shape
        return None if shape is None else shape.head_token_s

    monkeypatch.setattr(bench, "measure_shape", times)
    list(bench_lines(llama, device="cpu", dtype="bfloat16"))
    assert planned(dtype="bfloat16") == planned(dtype="bfloat16", autocast=False) == 2
    list(bench_lines(llama, device="cpu", dtype="bfloat16", autocast=False))
    assert (planned(dtype="bfloat16"), planned(dtype="bfloat16", autocast=False)) == (2, 3)
    assert planned() is None
    plan = lowmem.plan(llama, seq_len=16, budget=BUDGET, device="cpu", dtype="bfloat16")
    assert plan.rates.caveat == ""
    assert "caveat" not in json.dumps(plan.to_dict())
    # In fp32 it is all one.
    list(bench_lines(llama, device="cpu", autocast=False))
    assert planned() == planned(autocast=False) == 3
    assert seen == [True] * 2 + [False] * 5


@pytest.mark.parametrize("autocast", [True, False])
def test_rates_of_the_other_kind_of_job_stand_in_and_plans_say_so(llama: Path, autocast: bool) -> None:
    keep_rates(llama, autocast=not autocast)
    plan = lowmem.plan(llama, seq_len=16, budget=BUDGET, device="cpu", dtype="bfloat16", autocast=autocast)
    assert plan.rates.measured == ("disk", "copy", "compute")
    assert plan.rates.shape is not None
    assert ("without" if autocast else "with") + " autocast, which this job has" in plan.rates.caveat
    assert ("--no-autocast" in plan.rates.caveat) is not autocast
    assert plan.rates.caveat in str(plan)
    assert lowmem.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def keep_rates(folder: Path, *, autocast: bool, **changes: Any) -> None:
    checkpoint = open_checkpoint(folder, name="m", device=torch.device("cpu"), dtype=torch.bfloat16)
    checkpoint.source.close()
    general = Rates(disk_bytes_per_s=3e9, measured=("disk", "copy", "compute"))
    kept = rates.KeptRates(rates=general, shapes={"lora": shape_rates(**changes)})
    rates.keep(kept, read_shapes(checkpoint), torch.device("cpu"), autocast=autocast)


@pytest.mark.parametrize("given", [None, Rates(disk_bytes_per_s=2e9)])
@pytest.mark.parametrize("both", [True, False])
def test_a_run_without_autocast_is_planned_again_with_the_rates_of_such_runs(
    llama: Path, both: bool, given: Rates | None
) -> None:
    keep_rates(llama, autocast=False, head_token_s=3.0)
    if both:
        keep_rates(llama, autocast=True, head_token_s=2.0)
    how: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16"}
    if given is None:
        model = lowmem.from_pretrained(llama, budget=BUDGET, **how)
    else:
        plan = lowmem.plan(llama, seq_len=16, budget=BUDGET, rates=given, **how)
        model = lowmem.from_pretrained(llama, plan=plan, **how)
    tokens = torch.arange(16)[None]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))  # type: ignore[arg-type]
    adapted.train()(input_ids=tokens, labels=tokens).loss.backward()
    again = model.lowmem_plan
    assert not again.job.autocast
    if given is not None:
        # What was given is the user's, and is not looked up.
        assert again.rates == given
        return
    assert again.rates.shape is not None
    assert again.rates.shape.head_token_s == 3
    assert again.rates.measured == ("disk", "copy", "compute")
    assert again.rates.caveat == ""


def keep_disturbed(folder: Path, seen: rates.SeenPace | None, **changes: Any) -> lowmem.Plan:
    """Keep rates that were measured at a pace, and plan with what is kept then."""
    checkpoint, cpu = opened(folder), torch.device("cpu")
    if seen is not None:
        rates.keep_pace(seen, cpu)
    general = Rates(measured=("disk", "copy", "compute"), scratch_bytes_per_s=changes.pop("scratch", None))
    kept = rates.KeptRates(rates=general, shapes={"lora": shape_rates(**changes)}, pace=seen)
    rates.keep(kept, read_shapes(checkpoint), cpu)
    return lowmem.plan(folder, seq_len=16, budget=BUDGET, device="cpu")


def head_s(plan: lowmem.Plan) -> float:
    assert plan.rates.shape is not None
    return plan.rates.shape.head_token_s


def test_plans_say_that_the_machine_was_disturbed_when_their_rates_were_measured(llama: Path) -> None:
    steady, shaken = (rates.SeenPace(fastest_ms=10.0, slowest_ms=slowest_ms) for slowest_ms in (11.0, 15.0))
    words = "measured while the machine was up to 1.5x slower; run lowmem bench again"
    assert words in str(keep_disturbed(llama, shaken))
    assert keep_disturbed(llama, steady).rates.caveat == ""
    # Slow all the while.
    loaded = rates.SeenPace(fastest_ms=34.0, slowest_ms=35.0)
    assert rates.keep_pace(loaded, torch.device("cpu")) == 10
    assert loaded.is_disturbed(10.0)
    assert not loaded.is_disturbed(None)


def test_a_disturbed_measurement_does_not_replace_a_steadier_one(llama: Path) -> None:
    steady = rates.SeenPace(fastest_ms=10.0, slowest_ms=11.0)
    loaded = rates.SeenPace(fastest_ms=34.0, slowest_ms=35.0)
    # What was kept by those that did not look at the pace is replaced.
    assert head_s(keep_disturbed(llama, None, head_token_s=1.0)) == 1
    assert head_s(keep_disturbed(llama, loaded, head_token_s=2.0)) == 2
    assert head_s(keep_disturbed(llama, steady, head_token_s=3.0)) == 3
    plan = keep_disturbed(llama, loaded, head_token_s=4.0, scratch=5e8)
    assert (head_s(plan), plan.rates.caveat, plan.rates.scratch_bytes_per_s) == (3, "", 5e8)
    assert head_s(keep_disturbed(llama, steady, head_token_s=5.0)) == 5


def test_another_clocks_pace_is_not_compared(llama: Path) -> None:
    cpu = torch.device("cpu")
    rates.keep_pace(rates.SeenPace(fastest_ms=1e-6, slowest_ms=1e-6), cpu)
    *_, pace, kept = bench_lines(llama, device="cpu", clock=time.process_time)
    assert (pace["slower_than_before"], kept["is_of_before"]) == (None, False)
    assert rates.fastest_ever_ms(cpu) == 1e-6
    found = rates.read_kept(read_shapes(opened(llama)), cpu)
    assert found is not None
    assert found.pace is None


def test_a_pace_that_cannot_be_read_is_as_good_as_none(llama: Path) -> None:
    cpu = torch.device("cpu")
    rates.keep_pace(rates.SeenPace(fastest_ms=10.0, slowest_ms=11.0), cpu)
    assert rates.fastest_ever_ms(cpu) == 10
    rates.keep_pace(rates.SeenPace(fastest_ms=12.0, slowest_ms=13.0), cpu)
    assert rates.fastest_ever_ms(cpu) == 10
    for damage in ("", "[]", '{"fastest_ms": "x"}', '{"fastest_ms": 0}'):
        rates._pace_file(cpu).write_text(damage)
        assert rates.fastest_ever_ms(cpu) is None


def test_products_are_autocasts_where_they_are_timed_so(llama: Path) -> None:
    checkpoint = open_checkpoint(llama, name="m", device=torch.device("cpu"), dtype=torch.bfloat16)
    checkpoint.source.close()
    shapes = read_shapes(checkpoint, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    asked: list[bool] = []
    block = checkpoint.built.blocks[0].block.module
    block.register_forward_pre_hook(lambda *_: asked.append(torch.is_autocast_enabled("cpu")))
    with WorkClock() as clock:
        measure_shape(checkpoint, shapes, trains="lora", autocast=False, clock=lambda: clock.now_s)
    assert not any(asked)
    assert asked


class WorkClock(TorchDispatchMode):
    """Seconds by what operators make: on a busy machine as on an idle one."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.now_s += 1e-6 + 1e-9 * sum(made)
        return out


@pytest.mark.parametrize("architecture", ["mixtral", "gemma3_text", "gpt2", "deepseek_v3"])
def test_blocks_of_every_kind_are_timed(architecture: str, tmp_path: Path) -> None:
    checkpoint = opened(build(architecture, tmp_path, dtype=torch.bfloat16))
    shapes = read_shapes(checkpoint, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    with WorkClock() as clock:
        found = measure_shape(checkpoint, shapes, trains="lora", clock=lambda: clock.now_s)
    assert 0 < found.forward_call_s(16) < found.forward_call_s(4096)
    assert found.backward_call_s(100) > found.forward_call_s(100)
    assert found.dropout_s > 0
    assert found.head_token_s > 0
    assert found.unpack_s > 0


def test_a_sequence_in_chunks_is_timed_and_what_a_visit_takes_besides(tmp_path: Path) -> None:
    folder = build("llama", tmp_path, dtype=torch.bfloat16, changes={"max_position_embeddings": 512})
    found = {}
    for trains in ("lora", "full"):
        checkpoint = opened(folder)
        lora = LoraConfig(r=4, target_modules="all-linear") if trains == "lora" else None
        shapes = read_shapes(checkpoint, peft_config=lora)
        with WorkClock() as clock:
            found[trains] = measure_shape(
                checkpoint,
                shapes if lora is not None else shapes.with_every_weight(),
                trains=trains,  # type: ignore[arg-type]
                clock=lambda clock=clock: clock.now_s,  # type: ignore[misc]
            )
    # Attention by parts has more operators, and keys and values are copied.
    assert found["lora"].chunk_forward_s > 0
    assert found["lora"].chunk_backward_s > 0
    # The clock counts operators, and giving memory back is none.
    assert found["lora"].visit_backward_s == found["full"].visit_backward_s == 0
    assert found["lora"].call_tokens == (1, 8, 32, 128, 512)


def test_a_sequence_in_chunks_counts_its_own_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = measured._beyond

    def noted(in_chunks: Any, **others: Any) -> Any:
        seen.append(in_chunks.num_tokens)
        return real(in_chunks, **others)

    monkeypatch.setattr(measured, "_beyond", noted)
    checkpoint = opened(build("llama", tmp_path, dtype=torch.bfloat16, changes={"max_position_embeddings": 512}))
    shapes = read_shapes(checkpoint, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    with WorkClock() as clock:
        measure_shape(checkpoint, shapes, trains="lora", clock=lambda: clock.now_s)
    assert seen == [512]


def test_chunks_and_visits_take_what_they_took_besides(llama: Path) -> None:
    shapes, sizes = read_shapes(opened(llama)), {"device": 1 << 30, "host": 0}
    given = shape_rates(chunk_forward_s=0.0, chunk_backward_s=0.0, visit_forward_s=0.0, visit_backward_s=0.0)
    slower = replace(given, chunk_forward_s=0.5, chunk_backward_s=0.25)

    def step_s(found: ShapeRates, job: Job, of: ModelShapes) -> float:
        return plan_step(of, job, budget=lowmem.Budget(**sizes), rates=Rates(shape=found)).step_s

    whole, chunked = Job(seq_len=64), Job(seq_len=64, chunk_tokens=32)
    assert step_s(slower, whole, shapes) == step_s(given, whole, shapes)
    more_s = step_s(slower, chunked, shapes) - step_s(given, chunked, shapes)
    assert more_s == pytest.approx(0.75 * 2 * len(shapes.blocks))
    visits = replace(given, visit_forward_s=0.5, visit_backward_s=0.25)
    assert step_s(visits, whole, shapes) - step_s(given, whole, shapes) == pytest.approx(0.75 * len(shapes.blocks))


def test_chunks_attend_as_fast_as_was_measured_of_chunks(llama: Path) -> None:
    shapes = read_shapes(opened(llama))
    whole, chunked = Job(seq_len=64), Job(seq_len=64, chunk_tokens=32)
    flops = shapes.attention_flops(num_sequences=1, seq_len=64)
    given = shape_rates(attention_flops_per_s=flops, attention_backward_flops_per_s=flops / 2)
    told = replace(given, chunk_attention_flops_per_s=(flops / 3, flops / 7))

    def step_s(found: ShapeRates, job: Job) -> float:
        return plan_step(shapes, job, budget=lowmem.Budget(device=1 << 30, host=0), rates=Rates(shape=found)).step_s

    assert step_s(told, whole) == step_s(given, whole)
    assert step_s(told, chunked) - step_s(given, chunked) == pytest.approx((3 - 1) + (7 - 2))
    # Generation has a cache, and takes whole sequences.
    generated = Job(task="generate", seq_len=64, completion_tokens=8, chunk_tokens=32)
    assert step_s(told, generated) == step_s(given, generated)


@pytest.mark.gpu
def test_on_a_gpu_attention_of_chunks_is_measured_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measured._ATTENTION_TOKENS, "cuda", (32, 64))
    checkpoint = opened(build("llama", tmp_path, dtype=torch.bfloat16), device="cuda", dtype=torch.bfloat16)
    watch = Stopwatch(torch.device("cuda"), time.perf_counter)
    found = measured._attention_rates(read_shapes(checkpoint), checkpoint, watch)
    assert len(found) == 4
    assert min(found) > 0


def test_state_on_disk_moves_as_fast_as_was_measured_where_it_is(llama: Path, tmp_path: Path) -> None:
    def planned(scratch_bytes_per_s: float | None, device: int) -> lowmem.Plan:
        rates = Rates(disk_bytes_per_s=1e6, scratch_bytes_per_s=scratch_bytes_per_s)
        budget = lowmem.Budget(device=device, host=0, disk=tmp_path)
        return lowmem.plan(llama, tuning="full", seq_len=16, budget=budget, rates=rates, device="cpu")

    least = planned(None, 0).smallest_device_bytes
    same, slower = planned(None, least), planned(0.5e6, least)
    assert same.choice.state_tier == "disk"
    assert same.choice == slower.choice
    moved = same.time.disk_s - (same.time.read_bytes + same.time.written_bytes) / 1e6
    assert abs(moved) < 0.05 * same.time.disk_s
    assert 1.5 * same.time.disk_s < slower.time.disk_s <= 2 * same.time.disk_s
    assert planned(1e6, least).time.disk_s == same.time.disk_s


def test_a_rate_of_what_is_moved_is_none_or_above_zero() -> None:
    for nothing in (0.0, -1.0):
        with pytest.raises(ValueError, match="scratch_bytes_per_s is"):
            Rates(scratch_bytes_per_s=nothing)


def test_half_types_are_timed_as_trainers_run_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build("llama", tmp_path, dtype=torch.bfloat16)
    seen: dict[torch.dtype, set[bool]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        checkpoint = open_checkpoint(folder, name="llama", device=torch.device("cpu"), dtype=dtype)
        checkpoint.source.close()
        shapes = read_shapes(checkpoint, peft_config=LoraConfig(r=4, target_modules="all-linear"))
        layer = type(next(m for m in checkpoint.built.blocks[0].block.module.modules() if isinstance(m, nn.Linear)))
        found = seen.setdefault(dtype, set())

        def noted(self: Any, *args: Any, real: Any = layer.forward, found: set[bool] = found) -> Any:
            found.add(torch.is_autocast_enabled("cpu"))
            return real(self, *args)

        with monkeypatch.context() as patched, WorkClock() as clock:
            patched.setattr(layer, "forward", noted)
            measure_shape(checkpoint, shapes, trains="lora", clock=lambda clock=clock: clock.now_s)  # type: ignore[misc]
    # The first run, in which the calls are made, is nobody's.
    assert True not in seen[torch.float32]
    assert True in seen[torch.bfloat16]


def test_measured_shapes_must_be_possible() -> None:
    with pytest.raises(ValueError, match="head_token_s is -1"):
        shape_rates(head_token_s=-1.0)
    with pytest.raises(ValueError, match="forward_calls_s is"):
        shape_rates(forward_calls_s=(1.0, -1.0, 2.0))
    with pytest.raises(ValueError, match="two calls or more"):
        shape_rates(call_tokens=(32,))


def shape_rates(**changes: Any) -> ShapeRates:
    calls = {"call_tokens": (32, 128, 1024), "forward_calls_s": (1.0, 2.0, 16.0), "backward_calls_s": (2.0, 5.0, 40.0)}
    needed = (name for name, field in ShapeRates.__dataclass_fields__.items() if field.default is MISSING)
    names = [name for name in needed if name != "trains" and name not in calls]
    return ShapeRates(trains="lora", **{**dict.fromkeys(names, 1.0), **calls, **changes})


def test_a_call_takes_what_those_next_to_it_took() -> None:
    found = shape_rates()
    assert [found.forward_call_s(tokens) for tokens in (32, 80, 128, 576, 1024)] == [1.0, 1.5, 2.0, 9.0, 16.0]
    assert found.forward_call_s(2048) == 32
    assert found.backward_call_s(1) == pytest.approx(2 - 31 * 3 / 96)
    assert shape_rates(forward_calls_s=(0.0, 4.0, 5.0)).forward_call_s(1) == 0


@pytest.mark.parametrize(
    ("small_s", "middle_s", "tokens"),
    [
        (0.01, 0.04, 1024),
        (0.25, 1.0, 256),
        (2.7, 3.0, 1024),  # A mixture's weights take most of it.
        (2.0, 3.5, 352),
        (1.0, 0.9, 1024),
    ],
)
def test_largest_call_follows_what_a_token_adds(small_s: float, middle_s: float, tokens: int) -> None:
    small, middle = (measured._Call(num, 0.0, seconds) for num, seconds in ((32, small_s), (128, middle_s)))
    assert measured._largest_call(small, middle, most=1024) == tokens
    assert measured._largest_call(small, middle, most=64) == 64


def test_attention_is_told_from_what_grows_with_the_length_alone() -> None:
    def seconds(num_tokens: int) -> float:
        return 3.0 * num_tokens**2 + 500.0 * num_tokens

    found = measured._of_square(seconds(512), seconds(1024), short=512, long=1024)
    assert found == pytest.approx(3.0 * 1024**2)
    # Where launching takes all of it, or there was memory for one length only.
    assert measured._of_square(1.0, 1.0, short=512, long=1024) == 1.0
    assert measured._of_square(2.0, 2.0, short=512, long=512) == 2.0


def test_a_step_of_generation_is_measured_with_few_tokens(tmp_path: Path) -> None:
    checkpoint = opened(build("qwen3_moe", tmp_path, dtype=torch.bfloat16))
    shapes = read_shapes(checkpoint, peft_config=LoraConfig(r=4, target_modules=["q_proj"]))
    with WorkClock() as clock:
        found = measure_shape(checkpoint, shapes, trains="lora", clock=lambda: clock.now_s)
    assert found.call_tokens[:3] == (1, 8, 32)
    assert found.forward_call_s(1) == found.forward_calls_s[0] > 0


def test_what_dora_drops_is_multiplied_by_the_weight(tmp_path: Path) -> None:
    folder, kinds = build("llama", tmp_path, dtype=torch.bfloat16), get_args(Trained)
    found: dict[Trained, ShapeRates] = {}
    for trains in (kind for kind in kinds if kind in ("lora", "dora")):
        checkpoint = opened(folder)
        adapter = LoraConfig(r=4, use_dora=trains == "dora", target_modules="all-linear")
        shapes = read_shapes(checkpoint, peft_config=adapter)
        with WorkClock() as clock:
            found[trains] = measure_shape(checkpoint, shapes, trains=trains, clock=lambda now=clock: now.now_s)
    assert found["dora"].dropout_s > found["lora"].dropout_s > 0


@pytest.mark.parametrize(("trains", "passes"), [("lora", 2), ("dora", 3)])
def test_dropout_takes_its_time_in_each_pass(llama: Path, trains: Trained, passes: int) -> None:
    checkpoint = opened(llama)
    adapter = LoraConfig(r=4, lora_dropout=0.1, use_dora=trains == "dora", target_modules="all-linear")
    shapes = read_shapes(checkpoint, peft_config=adapter)
    given = Rates(shape=replace(shape_rates(), trains=trains))
    steps = [
        plan_step(
            shapes, Job(seq_len=16, has_dropout=drops), budget=lowmem.Budget(device=1 << 30, host=0), rates=given
        ).step_s
        for drops in (False, True)
    ]
    dropped = sum(linear.in_features for block in shapes.blocks for linear in block.linears)
    assert steps[1] - steps[0] == pytest.approx(passes * 16 * dropped)
