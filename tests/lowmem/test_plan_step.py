"""The pure planner: what fits, what is chosen, what is predicted, what is advised. No model, no device, no file."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest

from lowmem.experts.visiting import expected_share
from lowmem.planning.job import Job, Task
from lowmem.planning.optimizer_sizes import state_traffic
from lowmem.planning.plan import Plan
from lowmem.planning.planner import plan_again, plan_step
from lowmem.planning.search import Room
from lowmem.planning.shapes import ExpertsShape, ModelShapes
from lowmem.planning.step_memory import KEPT_PRODUCTS
from lowmem.planning.step_time import Rates, ShapeRates, assumed_rates, predict
from offload import Budget, BudgetError, Placement, format_bytes
from tests.lowmem.llama_shapes import llama, llama_block

MIB = 1 << 20
RATES = Rates(disk_bytes_per_s=1e9, copy_bytes_per_s=1e10, compute_flops_per_s=1e11)


def planned(
    shapes: ModelShapes | None = None,
    *,
    device: int | str = "1GiB",
    host: int | str = "0",
    disk: Path | None = None,
    rates: Rates = RATES,
    job: Job | None = None,
) -> Plan:
    job = job or Job(task="sft", batch_size=1, seq_len=64)
    return plan_step(shapes or llama(), job, budget=Budget(device=device, host=host, disk=disk), rates=rates)


def test_everything_is_resident_where_it_fits() -> None:
    plan = planned()
    assert plan.fits
    assert set(plan.placements) == {Placement.RESIDENT}
    assert not plan.embedding_on_disk
    assert plan.disk_bytes == 0
    assert plan.time.read_bytes == 0


def test_device_bytes_are_what_is_always_held_and_the_largest_phase() -> None:
    plan = planned()
    always = sum(role.nbytes for role in plan.roles if role.tier == "device" and role.phase == "always")
    phases = {
        phase: sum(role.nbytes for role in plan.roles if role.tier == "device" and role.phase == phase)
        for phase in ("head", "block")
    }
    assert min(phases.values()) > 0
    assert plan.device_bytes == always + max(phases.values())


def test_less_memory_never_gives_a_faster_step() -> None:
    sizes = [planned(device=size * MIB).smallest_device_bytes for size in (1, 64)]
    assert sizes[0] == sizes[1]
    steps = [planned(device=sizes[0] + extra * MIB).step_s for extra in (0, 1, 2, 4, 8, 16, 64)]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > steps[-1]


@pytest.mark.parametrize("task", ["sft", "dpo", "kto", "reward", "grpo", "rloo", "generate"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("host", [0, 4 * MIB, 64 * MIB])
def test_smallest_device_budget_is_the_smallest(task: str, device: str, tied: bool, host: int) -> None:
    job = Job(task=task, batch_size=4, seq_len=32, device=device)
    shapes = llama(tied=tied)
    needed = planned(shapes, device=0, host=host, job=job).smallest_device_bytes
    assert planned(shapes, device=needed, host=host, job=job).fits
    assert not planned(shapes, device=needed - 1, host=host, job=job).fits


def test_a_plan_that_does_not_fit_raises_with_the_budget_that_does() -> None:
    plan = planned(device="64KiB")
    assert not plan.fits
    with pytest.raises(BudgetError, match=str(plan.smallest_device_bytes)) as caught:
        plan.require_fit()
    assert caught.value.needed_bytes == plan.smallest_device_bytes
    assert planned(device=caught.value.needed_bytes).fits


def test_a_plan_that_fits_passes_require_fit() -> None:
    planned().require_fit()


def test_device_and_host_stay_within_their_budgets() -> None:
    for device in (12 * MIB, 14 * MIB, 18 * MIB):
        for host in (0, 2 * MIB, 8 * MIB):
            plan = planned(device=device, host=host)
            assert plan.fits == (device >= plan.smallest_device_bytes)
            if plan.fits:
                assert plan.device_bytes <= device
                assert plan.host_bytes - plan.placement.staging_bytes <= host


@pytest.mark.parametrize("device", [0, 2 * MIB, 6 * MIB])
@pytest.mark.parametrize("host", [3, 4, 6, 8])
def test_buffers_that_transfers_pass_through_count_against_the_host_budget(device: int, host: int) -> None:
    job = Job(task="sft", batch_size=1, seq_len=64, device="cuda")
    needed = planned(job=job, device=0, host=host * MIB).smallest_device_bytes
    plan = planned(job=job, device=needed + device, host=host * MIB)
    assert plan.fits
    assert plan.placement.staging_bytes > 0
    assert plan.kept_host_bytes == plan.host_bytes <= host * MIB


def test_a_host_budget_below_the_buffers_of_transfers_is_refused_and_none_is_not() -> None:
    job = Job(task="sft", batch_size=1, seq_len=64, device="cuda")
    needed = planned(job=job, device=0, host=0).smallest_device_bytes
    none, short = (planned(job=job, device=needed, host=host) for host in (0, 1 * MIB))
    assert none.fits
    assert none.kept_host_bytes == 0 < none.host_bytes
    with pytest.raises(BudgetError, match=r'it has to hold at least .* bytes\), or "0" for the buffers of transfers'):
        short.require_fit()


def test_a_larger_batch_is_planned_for_where_blocks_are_or_moves_them_or_is_refused() -> None:
    small = planned(device=0).smallest_device_bytes
    roomy = planned(device=small + 24 * MIB)
    again = plan_again(roomy, llama(), num_sequences=4, seq_len=64)
    assert again.fits
    assert again.placement == roomy.placement
    assert (again.job.num_sequences, again.job.has_mask, again.device_budget_bytes) == (4, True, small + 24 * MIB)
    many = Job(task="sft", batch_size=32, seq_len=64)
    tight = planned(device=planned(device=0, job=many).smallest_device_bytes + 2 * MIB)
    moved = plan_again(tight, llama(), num_sequences=32, seq_len=64)
    assert moved.fits
    assert moved.placement.resident_bytes < tight.placement.resident_bytes
    assert moved.embedding_on_disk == tight.embedding_on_disk
    with pytest.raises(BudgetError, match="step of 64 x 512 tokens needs at least"):
        plan_again(tight, llama(), num_sequences=64, seq_len=512).require_fit()


def test_streamed_blocks_are_cached_on_the_host_where_it_has_room() -> None:
    small = planned(device=0).smallest_device_bytes
    plan = planned(device=small, host="1GiB")
    assert Placement.HOST in plan.placements
    assert Placement.STREAMED not in plan.placements
    assert plan.time.read_bytes == 0


def test_micro_batch_shrinks_until_it_fits_and_takes_the_largest_that_does() -> None:
    shapes, job = llama(), Job(task="sft", batch_size=8, seq_len=64)
    roomy = planned(shapes, job=job)
    assert roomy.micro_batch == 8
    sizes = []
    for micro_batch in (1, 2, 3, 4, 8):
        fixed = planned(shapes, device=0, job=replace(job, micro_batch=micro_batch))
        sizes.append(fixed.smallest_device_bytes)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    for micro_batch, nbytes in zip((1, 2, 3, 4, 8), sizes, strict=True):
        largest = max(size for size, needed in zip((1, 2, 3, 4, 8), sizes, strict=True) if needed <= nbytes)
        assert planned(shapes, device=nbytes, job=job).micro_batch == largest >= micro_batch


def test_blocks_come_before_a_micro_batch_larger_than_it_takes_to_be_fast() -> None:
    fast = planned(job=Job(task="sft", batch_size=64, seq_len=512, micro_batch=2))
    assert set(fast.placements) == {Placement.RESIDENT}
    job = Job(task="sft", batch_size=64, seq_len=512)
    tight = planned(device=fast.device_bytes, job=job)
    assert (tight.micro_batch, tight.placements) == (2, fast.placements)


def test_room_that_is_left_goes_to_a_larger_micro_batch_as_it_does_in_a_run() -> None:
    plan = planned(job=Job(task="sft", batch_size=64, seq_len=512))
    assert plan.fits
    assert plan.micro_batch > 2
    assert set(plan.placements) == {Placement.RESIDENT}
    less = planned(device=plan.device_bytes - 1, job=plan.job)
    assert 2 <= less.micro_batch < plan.micro_batch


def test_a_given_micro_batch_is_kept() -> None:
    assert planned(job=Job(task="sft", batch_size=8, seq_len=64, micro_batch=3)).micro_batch == 3


def test_dpo_counts_both_sequences_of_a_pair() -> None:
    single, paired = (planned(job=Job(task=task, batch_size=4, seq_len=64)) for task in ("sft", "dpo"))
    assert paired.bytes_of("boundary activations") == 2 * single.bytes_of("boundary activations")
    assert paired.job.num_sequences == 8


def test_boundary_activations_go_to_the_host_where_the_device_has_no_room() -> None:
    job = Job(task="sft", batch_size=8, seq_len=256, device="cuda")
    on_device = planned(job=job, device=0).smallest_device_bytes
    with_host = planned(job=job, device=0, host="64MiB").smallest_device_bytes
    assert with_host < on_device
    plan = planned(job=job, device=with_host, host="64MiB")
    assert plan.fits
    assert plan.boundary_tier == "host"
    assert plan.bytes_of("boundary activations", tier="device") == 0
    assert plan.bytes_of("boundary activations", tier="host") == 8 * 8 * 256 * 256 * 4


def test_boundary_activations_stay_where_host_has_no_room_for_them() -> None:
    assert planned(job=Job(task="sft", batch_size=8, seq_len=256), device=0, host=0).boundary_tier == "device"


def test_embedding_stays_on_disk_where_memory_is_short_unless_it_is_the_head() -> None:
    untied = planned(device=0)
    assert untied.embedding_on_disk
    assert untied.bytes_of("embedding", tier="disk") == 1000 * 256 * 2
    tied = planned(llama(tied=True), device=0)
    assert not tied.embedding_on_disk


def test_equal_dtypes_need_no_workspace() -> None:
    assert planned(llama(stored_itemsize=4)).bytes_of("unpacked block") == 0
    assert planned(llama(stored_itemsize=2)).bytes_of("unpacked block") == llama().blocks[0].num_params * 4


def test_training_state_is_counted_per_trainable_byte() -> None:
    plan, nbytes = planned(), llama().adapter_bytes
    assert plan.bytes_of("adapters") == nbytes
    assert plan.bytes_of("adapter gradients") == nbytes
    assert plan.bytes_of("optimizer state") == 2 * nbytes


def test_generation_needs_no_training_state() -> None:
    plan = planned(job=Job(task="generate", batch_size=4, seq_len=64, completion_tokens=16))
    for role in ("adapter gradients", "optimizer state", "boundary activations", "block recomputation"):
        assert plan.bytes_of(role) == 0
    # 8 blocks, 128 key and 128 value elements of 4 bytes for each of 64 tokens of 4 sequences
    assert plan.bytes_of("K/V cache") == 8 * 2 * 128 * 4 * 64 * 4


def test_block_bytes_are_counted_once_over_all_tiers() -> None:
    for device in (12 * MIB, 14 * MIB, 16 * MIB):
        plan = planned(device=device, host=MIB)
        assert plan.bytes_of("decoder blocks") == llama().stored_bytes


def test_step_is_as_long_as_its_slowest_lane() -> None:
    small = planned(device=0).smallest_device_bytes
    plan = planned(device=small, rates=replace(RATES, disk_bytes_per_s=1e6))
    assert plan.bottleneck == "disk"
    assert plan.step_s == pytest.approx(plan.time.disk_s)
    assert plan.time.read_bytes == plan.placement.step_read_bytes
    slow = planned(device=small, rates=replace(RATES, compute_flops_per_s=1e7))
    assert slow.bottleneck == "compute"
    assert slow.step_s == pytest.approx(slow.time.compute_s, rel=1e-3)


def test_compute_time_is_six_operations_per_parameter_and_token() -> None:
    shapes = llama(hidden=1024)
    job = Job(task="sft", batch_size=4, seq_len=16)
    plan = planned(shapes, device="8GiB", job=job, rates=replace(RATES, copy_bytes_per_s=1e15))
    products = 6 * (shapes.num_params + shapes.num_adapter_params + shapes.num_head_params) * job.num_tokens / 1e11
    assert plan.time.compute_s == pytest.approx(products, rel=0.02)


def test_a_gpu_waits_for_copies_of_what_is_not_resident() -> None:
    job = Job(task="sft", batch_size=1, seq_len=64, device="cuda")
    small = planned(job=job, device=0, host="1GiB").smallest_device_bytes
    plan = planned(job=job, device=small, host="1GiB", rates=replace(RATES, copy_bytes_per_s=1e6))
    assert plan.bottleneck == "copy"
    assert plan.time.copy_s >= 2 * llama().stored_bytes / 1e6


def test_gradient_accumulation_multiplies_passes_and_reads_but_not_memory() -> None:
    small = planned(device=0).smallest_device_bytes
    one = planned(device=small)
    four = planned(device=small, job=Job(task="sft", batch_size=1, seq_len=64, gradient_accumulation_steps=4))
    assert (one.passes, four.passes) == (2, 8)
    assert four.device_bytes == one.device_bytes
    assert four.time.read_bytes > 3 * one.time.read_bytes


def test_batch_size_changes_neither_passes_nor_bytes_read() -> None:
    small = planned(device=0).smallest_device_bytes
    batched = Job(task="sft", batch_size=32, seq_len=64)
    large = planned(device=planned(device=0, job=batched).smallest_device_bytes, job=batched)
    assert large.passes == planned(device=small).passes == 2
    assert large.time.read_bytes <= planned(device=small).time.read_bytes


def test_equal_inputs_give_equal_plans() -> None:
    first, second = planned(device=13 * MIB), planned(device=13 * MIB)
    assert first == second
    assert hash(first) == hash(second)
    assert first != planned(device=14 * MIB)


def test_both_sizes_of_the_budget_are_needed() -> None:
    with pytest.raises(ValueError, match=r"offload\.measured"):
        plan_step(llama(), Job(task="sft", batch_size=1, seq_len=8), budget=Budget(device="1GiB"), rates=RATES)


def test_advice_names_the_smallest_budget_where_nothing_fits() -> None:
    plan = planned(device="64KiB")
    assert any(str(plan.smallest_device_bytes) in sentence for sentence in plan.advice)


def test_advised_host_budget_is_as_fast_as_it_says() -> None:
    slow = replace(RATES, disk_bytes_per_s=1e7)
    small = planned(device=0).smallest_device_bytes
    plan = planned(device=small, rates=slow)
    assert plan.bottleneck == "disk"
    assert any("host budget" in sentence for sentence in plan.advice)
    better = planned(device=small, host=plan.placement.streamed_bytes, rates=slow)
    assert better.step_s < 0.95 * plan.step_s


@pytest.mark.parametrize(("task", "fewest"), [("sft", 1), ("rloo", 2), ("grpo", 8)])
def test_advice_to_take_a_smaller_batch_keeps_whole_groups_of_completions(task: Task, fewest: int) -> None:
    plan = planned(job=Job(task=task, batch_size=32, seq_len=64), device="1KiB")
    (advice,) = [sentence for sentence in plan.advice if sentence.startswith("A batch of ")]
    assert advice.startswith("A batch of one takes" if fewest == 1 else f"A batch of {fewest}, one prompt's")
    assert ("gradient_accumulation_steps=32" in advice) == (fewest == 1)
    smallest = planned(job=Job(task=task, batch_size=fewest, seq_len=64), device="1KiB")
    assert not any(sentence.startswith("A batch of ") for sentence in smallest.advice)


def test_advice_to_take_a_larger_batch_where_the_disk_decides() -> None:
    job = Job(task="sft", batch_size=1, seq_len=8)
    slow = replace(RATES, disk_bytes_per_s=1e7)
    plan = planned(llama(num_blocks=64), device="64MiB", rates=slow, job=job)
    assert plan.fits
    assert plan.bottleneck == "disk"
    assert any("batch_size=" in sentence for sentence in plan.advice)


def test_advice_is_silent_on_memory_where_computation_decides() -> None:
    advice = planned(rates=replace(RATES, compute_flops_per_s=1e6)).advice
    assert len(advice) == 1
    assert "limited by computation" in advice[0]


def test_blocks_of_different_sizes_are_planned_by_the_largest() -> None:
    small, large = llama_block(mlp=256), llama_block(mlp=1024)
    shapes = replace(llama(), blocks=(small, large, small, small, large, large, small))
    plan = planned(shapes, device=0)
    assert plan.bytes_of("unpacked block") == large.workspace_bytes
    assert plan.placement.slot_bytes == large.buffer_bytes


def test_room_with_another_budget_keeps_the_job() -> None:
    room = Room(llama(), Job(task="sft", batch_size=2, seq_len=8), assumed_rates("cpu"), 1, 2)
    changed = room.with_budget(device_bytes=5)
    assert (changed.device_bytes, changed.host_bytes, changed.job) == (5, 2, room.job)


def test_chunks_come_after_whole_sequences_and_the_longest_that_fit_first() -> None:
    job = Job(task="sft", batch_size=1, seq_len=4096)
    assert planned(job=job, device="8GiB").chunk_tokens is None
    smallest = planned(job=job, device=0).smallest_device_bytes
    assert planned(job=job, device=smallest).chunk_tokens == 128
    lengths = [planned(job=job, device=smallest + extra * MIB).chunk_tokens or 4096 for extra in (0, 8, 16, 32, 64)]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 1


def test_chunk_tokens_are_kept_to_where_blocks_can_be_cut() -> None:
    job = Job(task="sft", batch_size=2, seq_len=512, chunk_tokens=96)
    assert planned(job=job).chunk_tokens == 96
    assert "chunks of 96 tokens" in str(planned(job=job))
    whole = planned(replace(llama(), unchunkable="its blocks mix tokens"), job=job)
    assert whole.chunk_tokens is None
    assert "whole sequences: its blocks mix tokens" in str(whole)
    assert planned(job=Job(task="sft", batch_size=2, seq_len=64, chunk_tokens=96)).chunk_tokens is None


def test_boundary_activations_go_to_disk_where_memory_has_no_room(tmp_path: Path) -> None:
    job = Job(task="sft", batch_size=8, seq_len=256)
    boundary = 8 * 8 * 256 * 256 * 4

    def with_disk(device: int) -> Plan:
        return plan_step(llama(), job, budget=Budget(device=device, host=0, disk=tmp_path), rates=RATES)

    smallest = with_disk(0).smallest_device_bytes
    assert smallest < planned(job=job, device=0).smallest_device_bytes - boundary // 2
    plan = with_disk(smallest)
    assert plan.fits
    assert plan.boundary_tier == "disk"
    assert plan.bytes_of("boundary activations", tier="disk") == boundary
    assert plan.written_bytes == boundary + plan.bytes_of("keys and values", tier="disk")
    assert f"per step to {tmp_path}, " in str(plan)
    assert "a drive of 1 TB rated for 600 TB lasts" in str(plan)
    assert with_disk(1 << 30).boundary_tier == "device"
    assert Plan.from_dict(plan.to_dict()) == plan


def test_keys_and_values_are_kept_where_that_is_faster_than_computing_them_again(tmp_path: Path) -> None:
    job = Job(task="sft", batch_size=1, seq_len=512, chunk_tokens=128)

    def kept(flops_per_s: float, disk_bytes_per_s: float) -> bool:
        rates = replace(RATES, compute_flops_per_s=flops_per_s, disk_bytes_per_s=disk_bytes_per_s)
        budget = Budget(device=0, host=0, disk=tmp_path)
        smallest = plan_step(llama(), job, budget=budget, rates=rates).smallest_device_bytes
        made = plan_step(llama(), job, budget=Budget(device=smallest, host=0, disk=tmp_path), rates=rates)
        assert made.boundary_tier == "disk"
        on_disk = made.bytes_of("keys and values", tier="disk")
        assert (on_disk > 0) == made.choice.keeps_keys_values
        return made.choice.keeps_keys_values

    assert kept(1e10, 1e12)
    assert not kept(1e14, 1e9)


WIDE = llama(hidden=2048)
WIDE_JOB = Job(task="sft", batch_size=4, seq_len=512, micro_batch=4)


def test_large_products_are_kept_where_there_is_room_and_a_step_gets_shorter(tmp_path: Path) -> None:
    rates = replace(RATES, compute_flops_per_s=2e11, disk_bytes_per_s=2e9)
    plenty = plan_step(WIDE, WIDE_JOB, budget=Budget(device=1 << 36, host=0), rates=rates)
    kept = plenty.bytes_of(KEPT_PRODUCTS, tier="device")
    # Seven layers, what heads give, and their sums.
    assert kept == 8 * 2048 * 4 * (3 * 2048 + 2 * 1024 + 2 * 4096 + 2048 + 4)
    assert plenty.choice.keeps_products
    # A budget in which all blocks are resident still; without any of them, products have no room either.
    budget = Budget(device=plenty.device_bytes - kept, host=0)
    short = plan_step(WIDE, WIDE_JOB, budget=budget, rates=rates)
    assert not short.choice.keeps_products
    # 4 of 6 operations of a parameter and token, without down's quarter of one third.
    assert 0.7 < plenty.time.step_s / short.time.step_s < 0.85
    on_disk = plan_step(WIDE, WIDE_JOB, budget=replace(budget, disk=tmp_path), rates=rates)
    assert (on_disk.choice.keeps_products, on_disk.boundary_tier) == (True, "disk")
    assert on_disk.bytes_of(KEPT_PRODUCTS, tier="disk") == kept
    # Down's product is kept by the first step alone.
    assert on_disk.written_bytes == kept - 8 * 2048 * 4 * 2048 + on_disk.bytes_of("boundary activations", tier="disk")
    assert plenty.time.step_s < on_disk.time.step_s < short.time.step_s
    # A smaller part of the batch, of which products have room, is taken before a larger one of which they have none.
    free = replace(WIDE_JOB, micro_batch=None)
    assert plan_step(WIDE, free, budget=Budget(device=1 << 36, host=0), rates=rates).micro_batch == 4
    less = plan_step(WIDE, free, budget=Budget(device=plenty.device_bytes - 1, host=0), rates=rates)
    assert (less.choice.keeps_products, less.boundary_tier, less.micro_batch) == (True, "device", 2)


def test_advice_says_what_would_keep_large_products(tmp_path: Path) -> None:
    rates = replace(RATES, compute_flops_per_s=2e11, disk_bytes_per_s=2e9)
    # All blocks are resident, and there is no room for their products.
    budget = Budget(device="1600MiB", host=0)
    short = plan_step(WIDE, WIDE_JOB, budget=budget, rates=rates)
    assert not short.choice.keeps_products
    (memory,) = (line for line in short.advice if "keeps large products for the backward" in line)
    (disk,) = (line for line in short.advice if "With Budget(disk=...)" in line)
    assert not any("no faster" in line for line in short.advice)
    size = memory.removeprefix("A device budget of ").split(" keeps")[0].replace(" ", "")
    taken = plan_step(WIDE, WIDE_JOB, budget=Budget(device=size, host=0), rates=rates)
    assert taken.choice.keeps_products
    assert taken.time.step_s < 0.95 * short.time.step_s
    on_disk = plan_step(WIDE, WIDE_JOB, budget=replace(budget, disk=tmp_path), rates=rates)
    assert (on_disk.choice.keeps_products, on_disk.boundary_tier) == (True, "disk")
    assert format_bytes(on_disk.written_bytes) in disk
    for told in (taken, on_disk):
        assert not any("large products" in line for line in told.advice)


@pytest.mark.parametrize(
    ("shapes", "changes", "flops_per_s"),
    [
        (WIDE, {"device": "cuda"}, 2e11),
        (WIDE, {"chunk_tokens": 128}, 2e11),
        (WIDE, {"seq_len": 32}, 2e11),
        (WIDE, {"task": "generate"}, 2e11),
        (WIDE, {}, 1e15),
        (llama(), {}, 2e11),
    ],
    ids=["gpu", "chunks", "few-tokens", "generation", "fast", "narrow"],
)
def test_large_products_are_computed_again_elsewhere(
    shapes: ModelShapes, changes: dict[str, object], flops_per_s: float, tmp_path: Path
) -> None:
    fields = {"task": "sft", "batch_size": 4, "seq_len": 512, "micro_batch": 1, **changes}
    rates = replace(RATES, compute_flops_per_s=flops_per_s, disk_bytes_per_s=2e9)
    budget = Budget(device=1 << 36, host=0, disk=tmp_path)
    made = plan_step(shapes, Job(**fields), budget=budget, rates=rates)  # type: ignore[arg-type]
    assert not made.choice.keeps_products
    assert made.bytes_of(KEPT_PRODUCTS, tier="device") == 0


def test_smallest_budget_of_full_tuning_keeps_to_the_host_budget() -> None:
    shapes, job = llama().with_every_weight(), Job(task="sft", batch_size=1, seq_len=64, tuning="full")
    without, on_disk = (planned(shapes, device=0, disk=disk, job=job) for disk in (None, Path("state")))
    # In RAM that there is not, the device would need less.
    assert without.kept_host_bytes == on_disk.kept_host_bytes == 0
    assert on_disk.choice.state_tier == "disk"
    assert on_disk.smallest_device_bytes < without.smallest_device_bytes
    assert planned(shapes, device=on_disk.smallest_device_bytes, disk=Path("state"), job=job).fits
    with pytest.raises(BudgetError, match=r"a folder on disk for state, Budget\(disk=\.\.\.\)"):
        without.require_fit()


def test_advice_for_long_sequences_names_a_folder_for_boundary_activations() -> None:
    job = Job(task="sft", batch_size=1, seq_len=65536)
    with pytest.raises(BudgetError, match="a folder on disk for boundary activations"):
        planned(device=0, job=job).require_fit()


def test_an_update_of_state_on_disk_moves_with_one_forward_and_keeps_its_first_block_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes, job = llama().with_every_weight(), Job(seq_len=64, tuning="full", gradient_accumulation_steps=4)
    made = planned(shapes, device="4GiB", job=job)
    choice = replace(made.choice, state_tier="disk")
    moved = state_traffic(shapes, job, choice)
    # The core that updates takes nothing here.
    monkeypatch.setattr("lowmem.planning.step_time._HOST_S_PER_BYTE", 0.0)
    base = replace(RATES, shape=shape_rates())
    instant = predict(shapes, job, choice=choice, placement=made.placement, rates=replace(base, disk_bytes_per_s=1e15))
    # Over four forwards it would hide: one takes two thirds of the time that the update moves.
    forward_s = (instant.step_s - instant.update_s) / 4 / 4
    rates = replace(base, disk_bytes_per_s=moved.update_bytes / (1.5 * forward_s))
    found = predict(shapes, job, choice=choice, placement=made.placement, rates=rates)
    update_s = moved.update_bytes / rates.disk_bytes_per_s
    assert found.step_s >= instant.step_s + update_s - 1.3 * forward_s
    # Of one that hides, the first block's part is waited for.
    fast = replace(base, disk_bytes_per_s=moved.update_bytes / (forward_s / 10))
    waited = predict(shapes, job, choice=choice, placement=made.placement, rates=fast).step_s - instant.step_s
    assert waited == pytest.approx(forward_s / 10 / len(shapes.blocks), rel=0.01)
    assert found.late_s == pytest.approx(found.step_s - instant.step_s, rel=0.3)
    assert made.time.late_s == 0


def test_updates_of_state_on_disk_take_a_core_from_the_model_and_leave_the_optimizers_step() -> None:
    shapes = llama().with_every_weight()
    beside_s, optimizer_s = 1e-6 * shapes.num_params, 1e-6 * (shapes.num_trainable - shapes.num_params)
    # Small against it: a core's time for the bytes that are read and written.
    rates = replace(RATES, disk_bytes_per_s=1e15, shape=shape_rates(update_beside_s_per_param=1e-6))
    for num_backwards in (1, 4):
        job = Job(seq_len=64, tuning="full", gradient_accumulation_steps=num_backwards)
        made = planned(shapes, device="4GiB", job=job, rates=rates)
        on_disk = replace(made.choice, state_tier="disk")
        in_ram, found = (
            predict(shapes, job, choice=choice, placement=made.placement, rates=rates)
            for choice in (made.choice, on_disk)
        )
        assert found.update_s - in_ram.update_s == pytest.approx(optimizer_s, rel=0.01)
        # A copy and a checksum of each backward's gradients besides.
        gradients_s = 0.3 * num_backwards * beside_s
        assert found.compute_s - in_ram.compute_s == pytest.approx(beside_s + optimizer_s + gradients_s, rel=0.01)
        # The first step has no update before it.
        assert found.late_s == pytest.approx(beside_s, rel=0.01)
        # On a GPU it is a lane of its own: the processor's cores are its alone.
        on_gpu, at_once = (
            predict(shapes, replace(job, device="cuda"), choice=on_disk, placement=made.placement, rates=one)
            for one in (rates, replace(rates, shape=shape_rates()))
        )
        assert on_gpu.compute_s - at_once.compute_s == pytest.approx(optimizer_s, rel=0.01)
        # What is read and written takes a core's time too, by its bytes.
        base = replace(rates, shape=shape_rates())
        still, moving = (
            predict(shapes, job, choice=choice, placement=made.placement, rates=base)
            for choice in (made.choice, on_disk)
        )
        moved = state_traffic(shapes, job, on_disk)
        host_s = 9e-11 * (moved.update_bytes + moved.gradient_bytes)
        assert moving.compute_s - still.compute_s == pytest.approx(host_s, rel=0.01)
        slow = replace(rates, shape=shape_rates(update_beside_s_per_param=1.0))
        waits = predict(shapes, replace(job, device="cuda"), choice=on_disk, placement=made.placement, rates=slow)
        assert waits.step_s > shapes.num_params


def shape_rates(**changes: float) -> ShapeRates:
    calls = (32, 128), (1e-3, 4e-3), (3e-3, 12e-3)
    values = dict(zip(("call_tokens", "forward_calls_s", "backward_calls_s"), calls, strict=True))
    others = (field.name for field in fields(ShapeRates) if field.default is MISSING)
    rest = {name: 1e-9 for name in others if name not in (*values, "trains")}
    rest |= {"attention_flops_per_s": 1e12, "attention_backward_flops_per_s": 1e12, "update_beside_s_per_param": 0.0}
    rest |= {"update_s_per_param": 0.0}
    return ShapeRates(trains="full", **values, **rest | changes)  # type: ignore[arg-type]


def test_what_autocast_leaves_in_the_blocks_type_is_counted_so() -> None:
    budget, plain = {"device": "4GiB"}, Job(seq_len=512, autocast=False)
    taken = {
        (kind, autocast): planned(shapes, job=replace(plain, autocast=autocast), **budget).bytes_of(  # type: ignore[arg-type]
            "block recomputation", tier="device"
        )
        for kind, shapes in (("fp32", llama()), ("bf16", half(llama())), ("dora", half(llama(), is_dora=True)))
        for autocast in (True, False)
    }
    assert taken["fp32", True] == taken["fp32", False]
    # Inputs of seven layers in fp32, and what adapters make of them, are not there.
    assert taken["bf16", True] < 0.75 * taken["bf16", False]
    # DoRA scales what comes out in fp32 for a moment, and keeps each input once more.
    assert taken["bf16", True] < taken["dora", True] < taken["dora", False]


def half(shapes: ModelShapes, *, is_dora: bool = False) -> ModelShapes:
    """The same model in bf16, its adapters in fp32."""
    blocks = tuple(
        replace(block, workspace_bytes=0, linears=tuple(replace(one, is_dora=is_dora) for one in block.linears))
        for block in shapes.blocks
    )
    return replace(shapes, blocks=blocks, compute_dtype="bfloat16")


def test_experts_that_are_asked_for_hide_behind_nothing() -> None:
    experts = ExpertsShape(num_experts=128, num_per_token=8, expanded_size=512, product_size=256)
    dense = llama_block()
    block = replace(dense, experts=experts, buffer_bytes=10 * dense.buffer_bytes, expert_bytes=9 * dense.buffer_bytes)
    shapes = replace(llama(), blocks=(block,) * 8)
    job = Job(task="generate", batch_size=1, seq_len=12, completion_tokens=8)
    made = planned(shapes, device=0, job=job)
    # Computing takes far longer than reading.
    rates, placement = replace(RATES, compute_flops_per_s=1e6), made.placement
    found = predict(shapes, job, choice=replace(made.choice, embedding_on_disk=False), placement=placement, rates=rates)
    shares = [expected_share(num, num_experts=128, num_per_token=8) for num in (4, *[1] * 7)]
    asked = sum(shares) * 0.9 * placement.step_read_bytes / job.num_passes
    assert found.step_s - found.compute_s == pytest.approx(asked / rates.disk_bytes_per_s, rel=1e-3)
