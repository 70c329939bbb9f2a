"""Which slot the next block gets."""

import itertools
import random

import torch

from offload.pipeline import NEVER, Ring, Slot, VisitOrder


def ring_of(*blocks: int | None, ready: bool = True) -> Ring:
    return Ring([Slot(tensor=torch.empty(0), block=block, ready=ready and block is not None) for block in blocks])


def test_a_free_slot_is_taken_first() -> None:
    ring = ring_of(1, None, 2)
    slot = ring.take(5, next_use=lambda block: {1: 9, 2: NEVER, 5: 0}[block])
    assert slot is list(ring)[1]
    assert (slot.block, slot.ready) == (5, False)


def test_the_block_needed_last_gives_way() -> None:
    ring = ring_of(1, 2, 3)
    slot = ring.take(5, next_use=lambda block: {1: 4, 2: 8, 3: 6, 5: 2}[block])
    assert slot is list(ring)[1]
    assert ring.find(2) is None
    assert ring.find(5) is slot


def test_nobody_gives_way_to_a_block_that_is_needed_later() -> None:
    ring = ring_of(1, 2)
    assert ring.take(5, next_use=lambda block: {1: 0, 2: 1, 5: 2}[block]) is None
    assert [slot.block for slot in ring] == [1, 2]


def test_of_blocks_that_are_not_expected_the_one_used_longest_ago_goes() -> None:
    ring = ring_of(1, 2, 3)
    for slot, last_use in zip(ring, (7, 3, 5), strict=True):
        slot.last_use = last_use
    slot = ring.take(5, next_use=lambda block: {5: 0}.get(block, NEVER))
    assert slot is list(ring)[1]


def test_held_and_filling_slots_are_not_to_be_had() -> None:
    held = ring_of(1, 2)
    for slot in held:
        slot.holds = 1
    assert held.take(5, next_use=lambda block: 0 if block == 5 else NEVER) is None
    filling = ring_of(1, 2, ready=False)
    assert filling.take(5, next_use=lambda block: 0 if block == 5 else NEVER) is None


def test_slots_can_be_left_for_blocks_that_are_needed_sooner() -> None:
    def next_use(block: int) -> int:
        return {1: 5, 2: 6, 9: 1}[block]

    assert ring_of(1, 2).take(9, next_use=next_use, leave=2) is None
    ring = ring_of(1, 2)
    taken = ring.take(9, next_use=next_use, leave=1)
    assert taken is list(ring)[1]


def fewest_fetches(order: tuple[int, ...], num_slots: int) -> int:
    """By trying every choice of what to evict."""
    states = {frozenset(): 0}
    for block in order:
        following: dict[frozenset[int], int] = {}
        for held, cost in states.items():
            if block in held:
                choices = [(held, cost)]
            elif len(held) < num_slots:
                choices = [(held | {block}, cost + 1)]
            else:
                choices = [((held - {gone}) | {block}, cost + 1) for gone in held]
            for state, total in choices:
                following[state] = min(total, following.get(state, total))
        states = following
    return min(states.values())


def test_no_other_choice_of_evictions_fetches_less() -> None:
    chance = random.Random(3)
    for num_slots, _ in itertools.product((2, 3), range(40)):
        order = tuple(chance.randrange(5) for _ in range(12))
        visits = VisitOrder(5)
        visits.replace(order)
        ring = ring_of(*[None] * num_slots)
        num_fetches = 0
        for block in order:
            if ring.find(block) is None:
                slot = ring.take(block, next_use=visits.next_use)
                assert slot is not None
                slot.ready = True
                num_fetches += 1
            visits.visit(block)
        assert num_fetches == fewest_fetches(order, num_slots)
