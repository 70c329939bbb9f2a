"""A predicted step corrected by the steps that were seen, and a process that has grown by more than was planned."""

from __future__ import annotations

import mmap
import time
from collections import defaultdict
from collections.abc import Iterable
from statistics import median
from typing import TYPE_CHECKING

from lowmem.planning.step_memory import KEPT_PRODUCTS
from offload import format_bytes

if TYPE_CHECKING:
    from lowmem.planning.plan import Plan

_NUM_REMEMBERED = 20
"""Latest steps that count: a machine's pace changes."""


_SMALL_GROWTH_BYTES = 256 << 20
"""What trainers, data sets and libraries take besides, in no budget."""


_MOST_OVER = 1.1
"""Growth beyond this part of a plan is told."""


_TOUCHED_ROLES = ("gradients", "boundary activations", KEPT_PRODUCTS)
_TOUCHED_BYTES = 16 << 20


class StepCorrection:
    """What a step takes, by those that were seen.

    The first step warms up: pages are touched and kernels made for the first time. Most blocks do not feel it, so that
    the median of their visits stands for all. The first update makes the optimizer's state, whose memory is touched for
    the first time: of it what was planned counts, where that is less. Each block's gradients and what it keeps for the
    backward are touched for the first time too, for which what that takes here is left out; what keeps later forwards
    waiting is added. The rest counts as it was. From the second step on the median of all but the first is taken.

    Args:
        planned_update_s: What the optimizer's update takes by measured rates; None where it was not measured.
        touch_s: What `first_touch_s` says.
        late_s: `StepTime.late_s`.
    """

    def __init__(self, planned_update_s: float | None = None, *, touch_s: float = 0.0, late_s: float = 0.0) -> None:
        self._planned_update_s, self._touch_s, self._late_s = planned_update_s, touch_s, late_s
        self._first_s: float | None = None
        self._others_s: list[float] = []

    def see(self, step_s: float, visits: Iterable[tuple[str, float]], *, update_s: float = 0.0) -> None:
        """Take in a step.

        Args:
            step_s: What it took.
            visits: Of each block's visit its phase, and what it took, waits for weights included.
            update_s: The part of the step that the optimizer's update took.
        """
        if self._first_s is not None:
            self._others_s.append(step_s)
            del self._others_s[:-_NUM_REMEMBERED]
            return
        by_phase: dict[str, list[float]] = defaultdict(list)
        for phase, visit_s in visits:
            by_phase[phase].append(visit_s)
        usual_s = sum(len(seen) * median(seen) for seen in by_phase.values())
        between_s = step_s - sum(map(sum, by_phase.values()))
        if self._planned_update_s is not None:
            between_s -= max(0.0, update_s - self._planned_update_s)
        # A block's own median has most of it: what was timed is at least its shortest visits.
        least_s = sum(len(seen) * min(seen) for seen in by_phase.values())
        self._first_s = max(least_s, usual_s + max(0.0, between_s) - self._touch_s) + self._late_s

    @property
    def step_s(self) -> float | None:
        """Seconds of a step; None before one was seen."""
        return median(self._others_s) if self._others_s else self._first_s


def first_touch_s(plan: Plan) -> float:
    """Seconds in which a processor's first step touches memory that later ones find there.

    That is gradients, and what waits for a backward. Measured now, in some milliseconds; 0 on a GPU, whose allocator
    touches nothing.
    """
    if plan.job.device != "cpu":
        return 0.0
    nbytes = sum(role.nbytes for role in plan.roles if role.role in _TOUCHED_ROLES and role.tier != "disk")
    if not nbytes:
        return 0.0
    start_s = time.perf_counter()
    with mmap.mmap(-1, _TOUCHED_BYTES) as memory:
        for page in range(0, _TOUCHED_BYTES, mmap.PAGESIZE):
            memory[page] = 1
    return (time.perf_counter() - start_s) * nbytes / _TOUCHED_BYTES


def growth_beyond(plan: Plan, *, host_growth_bytes: int, device_peak_bytes: int) -> str | None:
    """Say by how much memory has grown beyond a plan, where that is more than trainers and data sets may take.

    Args:
        plan: What was planned.
        host_growth_bytes: By how much the process has grown at most since before the model was opened.
        device_peak_bytes: Largest allocation on the GPU; 0 on a processor, where the host's memory is the device's.

    Returns:
        A sentence, or None where there is nothing to say.
    """
    on_cpu = plan.job.device == "cpu"
    planned_bytes = plan.host_bytes + (plan.device_bytes if on_cpu else 0)
    for what, grown, planned in (
        ("the process has grown by", host_growth_bytes, planned_bytes),
        ("the GPU has held", device_peak_bytes, plan.device_bytes),
    ):
        if grown > _MOST_OVER * planned + _SMALL_GROWTH_BYTES:
            return (
                f"{what} {format_bytes(grown)}, and {format_bytes(planned)} were planned: the data set, the trainer or "
                "another model in this process takes the rest, or batches are larger than planned for; give "
                "lowmem.plan the batch and length that really come, or a smaller budget"
            )
    return None
