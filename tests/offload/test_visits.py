"""The expected order: distances, excursions, jumps."""

import pytest

from offload.pipeline import NEVER, VisitOrder


def expecting(*order: int, num_blocks: int = 10) -> VisitOrder:
    visits = VisitOrder(num_blocks)
    visits.replace(order)
    return visits


def test_distances_are_counted_from_the_next_visit() -> None:
    visits = expecting(0, 1, 2, 2, 1, 0)
    assert [visits.next_use(block) for block in range(4)] == [0, 1, 2, NEVER]
    visits.visit(0)
    assert [visits.next_use(block) for block in range(4)] == [4, 0, 1, NEVER]
    visits.visit(1)
    visits.visit(2)
    assert list(visits.upcoming()) == [2, 1, 0]
    assert visits.next_use(2) == 0
    for block in (2, 1, 0):
        visits.visit(block)
    assert list(visits.upcoming()) == []
    assert visits.next_use(0) == NEVER


def test_an_excursion_leaves_the_order_where_it_is() -> None:
    visits = expecting(0, 1, 2, 3)
    visits.visit(0)
    visits.visit(3)
    visits.visit(7)
    assert list(visits.upcoming()) == [1, 2, 3]
    visits.visit(1)
    assert list(visits.upcoming()) == [2, 3]


def test_two_visits_that_follow_each_other_move_the_order_there() -> None:
    visits = expecting(0, 1, 2, 3, 4, 5)
    visits.visit(0)
    visits.visit(3)
    visits.visit(4)
    assert list(visits.upcoming()) == [5]


def test_a_pass_begun_again_is_followed_from_its_second_visit() -> None:
    visits = expecting(0, 1, 2, 3)
    for block in (0, 1, 2, 3, 0, 1):
        visits.visit(block)
    assert list(visits.upcoming()) == [2, 3]


def test_visits_without_any_order_are_no_error() -> None:
    visits = VisitOrder(3)
    for block in (0, 2, 2, 1):
        visits.visit(block)
    assert list(visits.upcoming()) == []


def test_a_new_order_starts_at_its_beginning() -> None:
    visits = expecting(0, 1, 2)
    visits.visit(0)
    visits.visit(2)
    visits.replace((2, 1, 0))
    assert list(visits.upcoming()) == [2, 1, 0]


def test_a_number_that_is_no_block_is_refused_and_changes_nothing() -> None:
    visits = expecting(0, 1, num_blocks=2)
    with pytest.raises(ValueError, match="order: expected block numbers from 0 to 1, got 2"):
        visits.replace((0, 2))
    with pytest.raises(ValueError, match="got -1"):
        visits.replace((-1,))
    assert list(visits.upcoming()) == [0, 1]
