"""Where the seconds of steps went and what held the memory, measured beside planned, and the facts of a run.

`lowmem trace` prints them, the report of a run (`report.py`) draws them; a trace file carries the facts as notes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import TYPE_CHECKING, Literal, TypeVar

from lowmem.monitoring.timeline import PHASE_LABELS, StepTimeline, computed_passes, merged, overlap_ns
from lowmem.planning.step_memory import KEPT_PRODUCTS
from offload import format_bytes, format_seconds

if TYPE_CHECKING:
    import torch

    from lowmem.planning.plan import Plan
    from lowmem.streaming.runtime import Runtime

RunState = Literal["running", "finished", "interrupted"]

OUTSIDE_BLOCKS = "outside the blocks"
"""Row of the embedding, the head, norms and buffers."""

TEMPORARIES = "temporaries"
"""Row of what is held only in the planned step's fullest moment."""

PYTHON = "Python and its libraries"

_OUTSIDE = {"embedding", "head", "norms and buffers"}

_WAITS = {"disk": "reading from disk", "copy": "copying to the device", "": "nothing under way"}
"""What was going on while the device waited for a block; copying only where nothing was read."""

_TIME_ROWS = {"compute": "compute, all of the step's"}
"""What a row of times is called where the lane of that name shows less."""

_MOST_POINTS = 500
"""Steps that a run's facts keep, evenly chosen; enough for a curve."""


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Where the seconds of one step went; they add up to its duration."""

    step: int
    duration_s: float
    computing_s: dict[str, float]
    """By phase: forward, backward, no_grad."""
    waiting_s: dict[str, float]
    """Time that the device waited for a block, by what was going on."""
    other_s: float
    """Neither: embeddings, head and loss, the optimizer, and what the Trainer does."""
    waiting_by_block_s: dict[str, float]
    """The same waits by the block that was waited for."""


def step_seconds(timeline: StepTimeline) -> StepSeconds:
    """Account for one step.

    On a GPU, computing and waiting are the device's: times between events on its compute stream.
    """
    computing: Counter[str] = Counter()
    for work in computed_passes(timeline):
        inside = min(work.end_ns, timeline.end_ns) - max(work.start_ns, timeline.start_ns)
        computing[work.phase or "other"] += max(0, inside)
    waiting: Counter[str] = Counter()
    by_block: Counter[str] = Counter()
    disk = timeline.busy_ns("disk")
    moving = merged([*disk, *timeline.busy_ns("copy")], gap_ns=0)
    for span in timeline.spans:
        if span.lane != "stall":
            continue
        wait = (max(span.start_ns, timeline.start_ns), min(span.end_ns, timeline.end_ns))
        length_ns = max(0, wait[1] - wait[0])
        reading_ns = overlap_ns(wait, disk)
        copying_ns = overlap_ns(wait, moving) - reading_ns
        waiting[_WAITS["disk"]] += reading_ns
        waiting[_WAITS["copy"]] += copying_ns
        waiting[_WAITS[""]] += length_ns - reading_ns - copying_ns
        by_block[span.name] += length_ns
    other_ns = timeline.end_ns - timeline.start_ns - computing.total() - waiting.total() + computing.pop("other", 0)
    return StepSeconds(
        step=timeline.step,
        duration_s=timeline.duration_s,
        computing_s={phase: ns / 1e9 for phase, ns in computing.items()},
        waiting_s={cause: ns / 1e9 for cause, ns in waiting.items() if ns},
        other_s=max(0, other_ns) / 1e9,
        waiting_by_block_s={name: ns / 1e9 for name, ns in by_block.most_common()},
    )


@dataclass(frozen=True, kw_only=True)
class RoleMemory:
    """What one role takes on device and host together, planned and seen."""

    role: str
    planned_bytes: int
    measured_bytes: int | None
    """None where it cannot be told apart from others."""


@dataclass(frozen=True, kw_only=True)
class StepPoint:
    """One step of a run's curves."""

    step: int
    duration_s: float
    tokens_per_s: float
    stall_percent: float


@dataclass(frozen=True, kw_only=True)
class LossPoint:
    """The loss that the Trainer logged after a step."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known of a run besides its spans: plain data, kept in the trace file and drawn in the report."""

    title: str
    """Model and job in words."""
    state: RunState
    num_steps: int
    """Of the whole run; `steps` says how far it is."""
    planned_s: dict[str, float]
    """Of a step: "step", "compute", "disk", "copy"."""
    planned_peak_bytes: int
    peak_bytes: int
    """Of the process on a CPU, of the device's allocator on a GPU."""
    memory: tuple[RoleMemory, ...]
    steps: tuple[StepPoint, ...]
    losses: tuple[LossPoint, ...]
    starts_ns: tuple[tuple[int, int], ...]
    """Number and beginning of each of the newest steps, on the clock of the spans."""
    plan: str
    """The plan as text."""

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {"lowmem_run": asdict(self)}

    @staticmethod
    def from_dict(notes: Mapping[str, object]) -> RunFacts | None:
        """What `to_dict` wrote; None where there is no such thing.

        Raises:
            ValueError: It was written by another version.
        """
        data = notes.get("lowmem_run")
        if data is None:
            return None
        names = {field.name for field in fields(RunFacts)}
        if not isinstance(data, Mapping) or set(data) != names:
            raise ValueError("the trace's facts of the run were written by another version of lowmem")
        rows = {"memory": RoleMemory, "steps": StepPoint, "losses": LossPoint}
        try:
            made = {name: tuple(kind(**row) for row in data[name]) for name, kind in rows.items()}
            starts_ns = tuple((int(number), int(start_ns)) for number, start_ns in data["starts_ns"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"the trace's facts of the run are damaged: {error}") from error
        return RunFacts(**{**data, **made, "starts_ns": starts_ns})


Point = TypeVar("Point")


def evenly_chosen(points: Sequence[Point]) -> tuple[Point, ...]:
    """At most so many points, the last one among them."""
    stride = -(-len(points) // _MOST_POINTS) if points else 1
    return tuple(points[::-1][::stride][::-1])


def held_bytes(model: torch.nn.Module, runtime: Runtime, optimizer: object) -> dict[str, int]:
    """Bytes that are held now, by the plan's roles, where they can be told.

    Args:
        model: The streamed model, wrapped or not.
        runtime: Its runtime.
        optimizer: The Trainer's, or None.
    """
    memory = runtime.memory()
    held = {
        "decoder blocks": memory.get("resident_bytes", 0) + memory.get("host_cache_bytes", 0),
        "block ring": memory.get("ring_bytes", 0),
        "staging buffers": memory.get("staging_bytes", 0),
        "unpacked block": memory.get("workspace_bytes", 0),
    }
    if runtime.plan.choice.boundary_tier != "disk" and memory.get("boundary_bytes"):
        held["boundary activations"] = memory["boundary_bytes"]
    if runtime.plan.choice.boundary_tier != "disk" and memory.get("product_bytes"):
        held[KEPT_PRODUCTS] = memory["product_bytes"]
    if runtime.plan.job.tuning == "full":
        return held
    inside = {id(param) for module in runtime.modules for param in module.parameters()}
    trained = [param for param in model.parameters() if param.requires_grad]
    outside = [param for param in model.parameters() if id(param) not in inside and not param.requires_grad]
    held[OUTSIDE_BLOCKS] = sum(param.untyped_storage().nbytes() for param in outside)
    held["adapters"] = sum(param.nbytes for param in trained)
    held["adapter gradients"] = sum(param.grad.nbytes for param in trained if param.grad is not None)
    entries = (entry for entry in getattr(optimizer, "state", {}).values() if isinstance(entry, Mapping))
    held["optimizer state"] = sum(int(getattr(value, "nbytes", 0)) for entry in entries for value in entry.values())
    return held


def memory_rows(plan: Plan, held: Mapping[str, int], *, peak_bytes: int) -> tuple[RoleMemory, ...]:
    """The plan's roles in memory beside what was held; the rest of the measured peak is in the last rows.

    Args:
        plan: What was planned.
        held: Largest seen, by role (`held_bytes`).
        peak_bytes: Of the process on a CPU, of the device's allocator on a GPU.
    """
    planned: Counter[str] = Counter()
    moments: Counter[str] = Counter()
    on_cpu = plan.job.device == "cpu"
    for entry in plan.roles:
        if entry.tier == "disk" or (entry.tier == "host" and not on_cpu):
            continue
        if entry.phase == "always":
            planned[OUTSIDE_BLOCKS if entry.role in _OUTSIDE else entry.role] += entry.nbytes
        else:
            moments[entry.phase] += entry.nbytes
    rows = [
        RoleMemory(role=role, planned_bytes=nbytes, measured_bytes=held.get(role)) for role, nbytes in planned.items()
    ]
    rows.append(RoleMemory(role=TEMPORARIES, planned_bytes=max(moments.values(), default=0), measured_bytes=None))
    if on_cpu:
        rows.append(RoleMemory(role=PYTHON, planned_bytes=plan.framework_bytes, measured_bytes=None))
    rows.append(RoleMemory(role="peak", planned_bytes=planned_peak_bytes(plan), measured_bytes=peak_bytes))
    return tuple(rows)


def planned_peak_bytes(plan: Plan) -> int:
    """What the measured peak is to be compared with: on a CPU the whole process, on a GPU the device."""
    if plan.job.device != "cpu":
        return plan.device_bytes
    return plan.device_bytes + plan.host_bytes + plan.framework_bytes


def account_text(steps: Iterable[StepTimeline], facts: RunFacts | None) -> str:
    """Say where the seconds went, step by step and for the median step, and how that compares with the plan."""
    accounts = [(step, step_seconds(step)) for step in steps]
    lines = []
    if facts is not None:
        num_done = facts.steps[-1].step if facts.steps else 0
        lines = [facts.title, f"{facts.state}, {num_done} of {facts.num_steps} steps", ""]
    for step, account in accounts:
        busy = ", ".join(
            f"{lane} {step.busy_percent(lane):.0f}%" for lane in sorted({span.lane for span in step.spans})
        )
        read = step.num_bytes("disk")
        lines.append(f"step {step.step}: {account.duration_s:.3f} s, {busy}, {read / 1e9:.2f} GB read")
    middle_s = median(account.duration_s for _, account in accounts)
    step, account = min(accounts, key=lambda pair: abs(pair[1].duration_s - middle_s))
    lines += ["", f"Where the {account.duration_s:.3f} s of step {account.step} went", *_seconds_table(account)]
    if facts is not None:
        lines += ["", "Planned and measured", *_planned_table(facts, step)]
    return "\n".join(lines)


def _seconds_table(account: StepSeconds) -> list[str]:
    parts = {f"computing: {PHASE_LABELS.get(phase, phase)}": value for phase, value in account.computing_s.items()}
    parts |= {f"waiting: {cause}": value for cause, value in account.waiting_s.items()}
    parts["outside the blocks: embeddings, head, loss, optimizer"] = account.other_s
    width = max(map(len, parts))
    lines = [
        f"  {name:{width}}  {value:9.3f} s  {100 * value / account.duration_s:5.1f}%" for name, value in parts.items()
    ]
    worst = [f"{name} {value:.3f} s" for name, value in list(account.waiting_by_block_s.items())[:3] if value >= 1e-3]
    if worst:
        lines.append(f"  waited longest for: {', '.join(worst)}")
    return lines


def _planned_table(facts: RunFacts, step: StepTimeline) -> list[str]:
    account = step_seconds(step)
    # As planned: with embeddings, head, loss and optimizer, which the compute lane's spans of blocks are not.
    computing_s = sum(account.computing_s.values()) + account.other_s
    measured = {
        "step": step.duration_s,
        "compute": computing_s,
        "disk": step.busy_s("disk"),
        "copy": step.busy_s("copy"),
    }
    rows = [("time", "planned", "measured")]
    rows += [
        (_TIME_ROWS.get(name, name), format_seconds(planned), format_seconds(measured.get(name, 0.0)))
        for name, planned in facts.planned_s.items()
        if planned or measured.get(name)
    ]
    rows += [("", "", ""), ("memory", "planned", "measured")]
    for row in facts.memory:
        seen = "-" if row.measured_bytes is None else format_bytes(row.measured_bytes)
        rows.append((row.role, format_bytes(row.planned_bytes), seen))
    return [f"  {name:26}{planned:>12}{seen:>12}".rstrip() for name, planned, seen in rows]
