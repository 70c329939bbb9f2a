"""The visiting order: what is predicted at the start of each pass."""

from lowmem.streaming.runtime import Phase, TrainingPass, VisitingOrder


class _Told:
    def __init__(self, num_blocks: int) -> None:
        self.orders: list[list[int]] = []
        self.order = VisitingOrder(num_blocks, tell=lambda order: self.orders.append(list(order)))

    def run(self, blocks: range, phase: Phase) -> TrainingPass | None:
        kept = None
        for block in blocks:
            self.order.enter(block, phase)
            if phase == "forward":
                kept = self.order.record(block)
        return kept


def test_a_step_is_told_once_per_pass_and_turns_around() -> None:
    told = _Told(3)
    kept = told.run(range(3), "forward")
    told.run(range(2, -1, -1), "backward")
    assert kept is not None
    assert told.orders == [[0, 1, 2, 2, 1, 0, 0, 1, 2], [2, 1, 0, 0, 1, 2]]


def test_generation_wraps_around() -> None:
    told = _Told(3)
    told.run(range(3), "no_grad")
    told.run(range(3), "no_grad")
    assert told.orders == [[0, 1, 2, 0, 1, 2]] * 2


def test_a_pass_without_gradients_before_the_backward_leads_to_the_backward() -> None:
    told = _Told(3)
    kept = told.run(range(3), "forward")
    told.run(range(3), "no_grad")
    assert told.orders[-1] == [0, 1, 2, 2, 1, 0]
    assert kept is not None


def test_a_dropped_graph_is_not_waited_for() -> None:
    told = _Told(3)
    told.run(range(3), "forward")
    told.order.forget()
    told.run(range(3), "no_grad")
    assert told.orders[-1] == [0, 1, 2, 0, 1, 2]


def test_only_blocks_that_recorded_are_expected_in_the_backward() -> None:
    told = _Told(4)
    told.run(range(2), "no_grad")
    kept = told.run(range(2, 4), "forward")
    told.run(range(3, 1, -1), "backward")
    assert told.orders[-1] == [3, 2, 0, 1, 2, 3]
    assert kept is not None
    again = told.run(range(4), "forward")
    assert told.orders[-1] == [0, 1, 2, 3, 3, 2, 0, 1, 2, 3]
    assert again is not None


def test_after_an_error_the_next_visit_begins_a_pass() -> None:
    told = _Told(2)
    told.order.enter(0, "forward")
    told.order.forget()
    told.order.enter(1, "backward")
    assert told.orders[-1] == [1, 0, 0, 1]
