"""The count of a blockwise optimizer's visits: forward all blocks, backward down to the lowest that is trained."""

from pathlib import Path

import pytest

import lowmem
from benchmarks.blockwise_traffic import computed_visits, run
from benchmarks.checkpoints import ensure_checkpoint


@pytest.mark.parametrize(
    ("trained", "embedding", "backward"),
    [([21], False, 1), ([3, 20], False, 19), ([0], False, 22), ([21], True, 22), ([], False, 0)],
)
def test_a_backward_ends_at_the_lowest_that_is_trained(trained: list[int], embedding: bool, backward: int) -> None:
    visits = computed_visits(22, trained, embedding=embedding)
    assert visits == {"no_grad": 22 - backward, "forward": backward, "backward": backward}


@pytest.mark.parametrize(("optimizer", "switch_every"), [("BAdam", 1), ("LISA", None), ("AdamW", None)])
def test_visits_are_the_computed_ones_for_each_trained_block(
    optimizer: str, switch_every: int | None, tmp_path: Path
) -> None:
    folder = ensure_checkpoint("tiny", root=tmp_path)
    budget = lowmem.Budget(device=0, host=0, disk=tmp_path / "state")
    plan = lowmem.plan(folder, seq_len=16, tuning="full", budget=budget, device="cpu")
    found = run(
        folder,
        tmp_path / "state",
        optimizer=optimizer,
        num_steps=4,
        num_tokens=16,
        budget=plan.smallest_device_bytes,
        switch_every=switch_every,
        switch_mode="descending",
    )
    steps = found["steps"]
    assert isinstance(steps, list)
    assert [step["visits"] for step in steps] == [step["computed_visits"] for step in steps]
    if optimizer == "BAdam":
        assert [step["trained_blocks"] for step in steps] == [[2], [1], [0], [2]]
        assert [step["visits"]["backward"] for step in steps] == [1, 2, 3, 1]
        assert len({step["gradient_bytes_written"] for step in steps}) == 1
