"""Placement: what fits, how evenly the rest is spread, and how small a budget may be."""

import json
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest

from offload.errors import BudgetError
from offload.placement import Placement, PlacementPlan, place_blocks

RESIDENT, HOST, STREAMED = Placement.RESIDENT, Placement.HOST, Placement.STREAMED


def place(
    sizes: Sequence[int], device: int, host: int = 0, *, is_host: bool = True, max_ring: int = 3
) -> PlacementPlan:
    return place_blocks(sizes, device_bytes=device, host_bytes=host, device_is_host=is_host, max_ring=max_ring)


def random_jobs(num_jobs: int, *, equal: bool) -> Iterator[tuple[list[int], int, int, bool]]:
    """Block sizes, device bytes, host bytes and kind of device."""
    chance = random.Random(7)
    for _ in range(num_jobs):
        num_blocks = chance.randint(1, 40)
        sizes = [100] * num_blocks if equal else [chance.randint(1, 100) for _ in range(num_blocks)]
        yield (
            sizes,
            chance.randint(0, 110 * num_blocks),
            chance.choice([0, chance.randint(0, 3000)]),
            chance.random() < 0.5,
        )


def neighbours(plan: PlacementPlan, placement: Placement) -> int:
    return sum(pair == (placement, placement) for pair in pairwise(plan.placements))


def letters(plan: PlacementPlan) -> str:
    return "".join(placement.value[0] for placement in plan.placements)


def test_everything_stays_where_it_fits_and_no_buffers_are_planned() -> None:
    plan = place([10, 20, 30], 60)
    assert plan.placements == (RESIDENT,) * 3
    assert (plan.num_staging, plan.num_slots, plan.device_bytes, plan.streamed_bytes) == (0, 0, 60, 0)


def test_one_byte_less_streams() -> None:
    plan = place([10] * 6, 59)
    assert plan.num_staging == 3
    assert plan.placements.count(RESIDENT) == 2
    assert plan.streamed_bytes == 40


def test_a_ring_of_two_is_used_where_three_do_not_fit() -> None:
    assert place([10] * 6, 29).num_staging == 2
    assert place([10] * 6, 30).num_staging == 3
    assert place([10] * 6, 59, max_ring=2).placements.count(RESIDENT) == 3


def test_a_device_with_its_own_memory_gets_slots_and_staging_besides() -> None:
    plan = place([10] * 8, 40, 20, is_host=False)
    assert (plan.num_slots, plan.num_staging, plan.slot_bytes) == (3, 3, 10)
    assert [plan.placements.count(tier) for tier in Placement] == [1, 2, 5]
    assert (plan.resident_bytes, plan.host_bytes, plan.streamed_bytes) == (10, 20, 50)
    assert (plan.device_bytes, plan.staging_bytes) == (40, 30)


def test_cached_blocks_need_slots_only_where_the_device_has_its_own_memory() -> None:
    beside = place([10] * 4, 30, 40, is_host=False)
    assert (beside.placements, beside.num_slots, beside.num_staging) == ((HOST,) * 4, 3, 0)
    same = place([10] * 4, 0, 40, is_host=True)
    assert (same.placements, same.num_slots, same.num_staging) == ((HOST,) * 4, 0, 0)


def test_the_host_cache_of_a_processor_saves_reads_as_resident_blocks_do() -> None:
    plan = place([10] * 8, 40, 20)
    assert [plan.placements.count(tier) for tier in Placement] == [1, 2, 5]
    assert (plan.device_bytes, plan.host_bytes, plan.staging_bytes) == (40, 20, 0)


def test_streamed_blocks_are_spread_and_take_the_ends() -> None:
    assert letters(place([10] * 9, 70)) == "srsrsrsrs"
    assert letters(place([10] * 9, 80)) == "srrsrsrrs"
    assert letters(place([10] * 9, 50)) == "ssrsssrss"


@pytest.mark.parametrize("is_host", [True, False])
def test_budgets_are_kept_and_rings_are_large_enough(is_host: bool) -> None:
    for sizes, device, host, _ in random_jobs(400, equal=False):
        try:
            plan = place(sizes, device, host, is_host=is_host)
        except BudgetError:
            continue
        assert plan.device_bytes <= device
        assert plan.host_bytes <= host
        assert plan.resident_bytes + plan.host_bytes + plan.streamed_bytes == sum(sizes)
        if plan.moving:
            assert plan.ring_size >= 2
            assert plan.slot_bytes == max(sizes[block] for block in plan.moving)
        if STREAMED in plan.placements:
            assert plan.num_staging >= 2


def test_the_error_names_the_smallest_budget_that_works() -> None:
    needed = []
    for sizes, device, host, is_host in random_jobs(400, equal=False):
        try:
            place(sizes, device, host, is_host=is_host)
        except BudgetError as error:
            needed.append((sizes, device, host, is_host, error.needed_bytes))
    assert len(needed) > 10
    for sizes, device, host, is_host, needed_bytes in needed:
        assert device < needed_bytes
        place(sizes, needed_bytes, host, is_host=is_host)
        with pytest.raises(BudgetError, match=f"{needed_bytes} bytes"):
            place(sizes, needed_bytes - 1, host, is_host=is_host)


def test_a_budget_error_says_what_to_raise() -> None:
    with pytest.raises(
        BudgetError, match=r"1\.50 MiB are left for 4 blocks of up to 1\.00 MiB.*raise Budget.device by 512"
    ):
        place([1 << 20] * 4, 3 << 19)


def test_blocks_of_one_size_use_all_that_the_budgets_hold() -> None:
    for sizes, device, host, is_host in random_jobs(400, equal=True):
        if device >= sum(sizes) or device < 200:
            continue
        plan = place(sizes, device, host, is_host=is_host)
        ring = plan.ring_size * 100
        num_kept = (device - ring) // 100 + host // 100
        assert plan.placements.count(STREAMED) == max(0, len(sizes) - num_kept)
        if not plan.streamed_bytes and not is_host:
            assert plan.placements.count(HOST) == len(sizes) - (device - ring) // 100


def test_streamed_blocks_are_neighbours_only_where_they_must_be() -> None:
    for sizes, device, host, is_host in random_jobs(600, equal=True):
        if device < 200:
            continue
        plan = place(sizes, device, host, is_host=is_host)
        num_streamed = plan.placements.count(STREAMED)
        if 2 * num_streamed - 1 <= len(sizes):
            assert neighbours(plan, STREAMED) == 0
        # Where they must be, those that stay are never wasted next to each other.
        elif host == 0:
            assert neighbours(plan, RESIDENT) == 0


def test_distances_between_streamed_blocks_differ_by_at_most_one() -> None:
    for sizes, device, host, is_host in random_jobs(600, equal=True):
        if device < 200:
            continue
        plan = place(sizes, device, host, is_host=is_host)
        places = [block for block, placement in enumerate(plan.placements) if placement == STREAMED]
        if len(places) > 1:
            assert (places[0], places[-1]) == (0, len(sizes) - 1)
            distances = [after - before for before, after in pairwise(places)]
            assert max(distances) - min(distances) <= 1


def test_what_moves_between_host_and_device_is_spread_as_well() -> None:
    plan = place([10] * 12, 90, 1000, is_host=False)
    assert letters(plan) == "hrhrhrrhrhrh"


def test_more_budget_never_streams_more_blocks_of_one_size() -> None:
    for host in (0, 250):
        streamed = [place([100] * 20, device, host).streamed_bytes for device in range(200, 2100, 10)]
        # A third ring buffer takes a resident block's room once.
        assert all(after <= before + 100 for before, after in pairwise(streamed))
        assert streamed[-1] == 0
        reads = [place([100] * 20, device, host).step_read_bytes for device in range(200, 2100, 10)]
        assert reads == sorted(reads, reverse=True)


def test_gaps_left_by_unequal_sizes_are_used() -> None:
    plan = place([90, 10, 90, 10, 90], 2 * 90 + 25, max_ring=2)
    assert [plan.placements[block] for block in (1, 3)] == [RESIDENT, RESIDENT]


def test_both_turns_of_a_step_save_what_the_ring_holds() -> None:
    assert place([10] * 8, 30).step_read_bytes == 2 * 80 - 2 * 30
    assert place([10] * 8, 20).step_read_bytes == 2 * 80 - 2 * 20
    assert place([10] * 8, 80).step_read_bytes == 0
    odd = place_blocks([10] * 8, device_bytes=30, host_bytes=0, device_is_host=True, num_passes=3)
    assert odd.step_read_bytes == 3 * 80


def test_a_plan_is_plain_data() -> None:
    plan = place([10] * 8, 40, 20, is_host=False)
    told = json.loads(json.dumps(plan.to_dict()))
    assert told["placements"].count("streamed") == 5
    assert told["streamed_bytes"] == 50
    assert told["step_read_bytes"] == plan.step_read_bytes
    assert plan == place([10] * 8, 40, 20, is_host=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_bytes": []}, "block_bytes: expected one or more blocks"),
        ({"block_bytes": [4, 0]}, "of at least 1 byte"),
        ({"device_bytes": -1}, "device_bytes and host_bytes must be 0 or more, got -1"),
        ({"host_bytes": -1}, "device_bytes and host_bytes must be 0 or more"),
        ({"max_ring": 1}, "max_ring: expected at least 2"),
        ({"num_passes": 0}, "num_passes: expected at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, object], message: str) -> None:
    usual: dict[str, object] = {"block_bytes": [4], "device_bytes": 8, "host_bytes": 0, "device_is_host": True}
    with pytest.raises(ValueError, match=message):
        place_blocks(**(usual | arguments))  # type: ignore[arg-type]


def test_a_plan_that_contradicts_itself_is_refused() -> None:
    usual = {"device_is_host": True, "num_staging": 2, "num_slots": 0, "num_passes": 2}
    with pytest.raises(ValueError, match="expected one placement for each block, got 1 for 2"):
        PlacementPlan(placements=(STREAMED,), block_bytes=(1, 2), **usual)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_staging, num_slots must be 0 or more"):
        PlacementPlan(placements=(STREAMED,), block_bytes=(1,), **usual | {"num_slots": -1})  # type: ignore[arg-type]
