"""A saved trace read back, and cut into steps.

One training step as spans per resource: how busy each was, and a picture of it.

The picture has one lane per resource (disk, copy to the device, compute, stall) over the step's time; the compute lane
carries the blocks' numbers, forward and backward in two colours. Drawing needs matplotlib (extra `plot`), which is
imported when a picture is drawn and not before.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from offload import LANES, ORIGIN, Span, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformers import TrainingArguments


Output = str | os.PathLike[str] | Literal[False] | None
"""Where a file of a run goes: there, nowhere (False), or by its usual name into the run's output folder (None)."""


def refuse_other_values(every_s: object, **outputs: object) -> None:
    """Raise TypeError or ValueError for seconds that are none, and for outputs that say no place for a file."""
    if every_s is not None and (isinstance(every_s, bool) or not isinstance(every_s, int | float)):
        raise TypeError(f"every_s={every_s!r}: expected seconds")
    if every_s is not None and every_s < 0:
        raise ValueError(f"every_s: expected seconds >= 0, got {every_s}")
    for name, given in outputs.items():
        if given is not None and given is not False and not isinstance(given, str | os.PathLike):
            raise TypeError(f"{name}={given!r}: expected a file; None for the output folder, False for none")


def output_file(given: Output, args: TrainingArguments, default_name: str) -> Path | None:
    """The file that is meant; of ranks other than 0 one with the rank in its name.

    Raises:
        ValueError: It is a folder.
    """
    if given is False:
        return None
    folder = Path(args.output_dir)
    path = folder / default_name if given is None else Path(given)
    if path.is_dir() or path == folder:
        raise ValueError(
            f"lowmem.Monitor: {path} is a folder; give a file, {path / default_name} for instance, or leave it out: "
            f"{default_name} goes to the trainer's output folder"
        )
    return path if args.process_index == 0 else path.with_name(f"{path.stem}.rank{args.process_index}{path.suffix}")


def read_trace(path: Path) -> tuple[tuple[Span, ...], Mapping[str, object]]:
    """Read a trace file's spans, by their start, and the notes that were kept with them.

    Raises:
        ValueError: The file is not such a trace; names what is wrong with it.
        OSError: The file cannot be read; FileNotFoundError says where traces are found.
    """
    if not path.exists():
        wanted = (
            "the output folder of a run with lowmem.Monitor, which saves its trace there at the end, also by Ctrl-C"
        )
        report = path.with_name("report.html")
        instead = f"; {report} is there, written while the run went on: open it in a browser" if report.exists() else ""
        raise FileNotFoundError(f"{path}: no such file; give {wanted}{instead}")
    if path.suffix.lower() in (".html", ".htm"):
        raise ValueError(
            f"{path}: this is the report of a run: open it in a browser; lowmem trace wants the run's folder, or the "
            "trace.json in it"
        )
    try:
        document = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a trace file: {error}") from error
    events = document.get("traceEvents") if isinstance(document, dict) else None
    if not isinstance(events, list):
        raise ValueError(f"{path}: not a trace file: it has no list of traceEvents")
    notes = document.get("otherData")
    notes = notes if isinstance(notes, dict) else {}
    origin_ns = notes.get(ORIGIN, 0)
    if type(origin_ns) is not int:
        raise ValueError(f"{path}: not a trace file: otherData.{ORIGIN} is {origin_ns!r}")
    spans = tuple(
        _span(path, event, origin_ns) for event in events if isinstance(event, dict) and event.get("ph") == "X"
    )
    if not spans:
        raise ValueError(f"{path}: the trace holds no spans")
    return tuple(sorted(spans, key=lambda span: span.start_ns)), notes


def _span(path: Path, event: Mapping[str, object], origin_ns: int) -> Span:
    try:
        start_us, length_us = float(str(event["ts"])), float(str(event["dur"]))
        args = event.get("args")
        nbytes = args.get("bytes", 0) if isinstance(args, dict) else 0
        return Span(
            lane=str(event["cat"]),
            name=str(event["name"]),
            start_ns=origin_ns + round(start_us * 1000),
            end_ns=origin_ns + round((start_us + length_us) * 1000),
            nbytes=int(nbytes),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: an event is not one of ours ({error!r}): {event}") from error


def steps_of(spans: tuple[Span, ...], known: Sequence[tuple[int, int]] = ()) -> tuple[StepTimeline, ...]:
    """Cut a trace into steps, each from its first forward to the next one's; the whole trace where no step is seen.

    A forward of block 0 that follows a backward begins a step, or one of the batches that a step accumulates. What lies
    before the first one (reading what stays resident) belongs to no step.

    Args:
        spans: By their start.
        known: Number and beginning of steps, which say what begins one; without them every such forward does.
    """
    first_ns: dict[int, int] = {}
    begun_ns = [start_ns for _, start_ns in known]
    for count, start_ns in enumerate(_batch_starts(spans), start=1):
        # A device computes after the host has begun the step, not before.
        if place := bisect_right(begun_ns, start_ns):
            first_ns.setdefault(known[place - 1][0], start_ns)
        elif not known:
            first_ns[count] = start_ns
    end_ns = max(span.end_ns for span in spans)
    if not first_ns:
        first_ns = {1: spans[0].start_ns}
    bounds = zip(first_ns.items(), [*[*first_ns.values()][1:], end_ns], strict=True)
    return tuple(
        StepTimeline(
            step=number,
            start_ns=start_ns,
            end_ns=stop_ns,
            spans=tuple(span for span in spans if span.end_ns > start_ns and span.start_ns < stop_ns),
            passes=(),
        )
        for (number, start_ns), stop_ns in bounds
    )


def _batch_starts(spans: tuple[Span, ...]) -> Iterator[int]:
    after_backward = True
    for span in spans:
        if span.lane != "compute":
            continue
        if after_backward and span.name == "forward 0":
            yield span.start_ns
            after_backward = False
        elif span.name.startswith("backward"):
            after_backward = True


LANE_COLOURS = {"disk": "#4f9d69", "copy": "#9a7bb0", "stall": "#d1495b"}
PHASE_COLOURS = {"forward": "#4f7cac", "backward": "#e39b3a", "no_grad": "#8ab6c4"}
PHASE_LABELS = {"forward": "forward", "backward": "backward", "no_grad": "forward without gradients"}
LANE_LABELS = {"disk": "read from disk", "copy": "copy to the device", "stall": "compute waits"}
OTHER_COLOUR = "#aaa49b"
WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 12.0, 3.9, 150
MAX_EDGED_BARS = 100

LANE_INCHES = 10.7
"""Width of the lanes without their labels, about."""

LABEL_POINTS = 7
"""Size of the block numbers."""

NAMED_PASS = re.compile(r"(forward|backward|no_grad)\D*(\d+)")


@dataclass(frozen=True, kw_only=True)
class BlockPass:
    """One stay of a block's weights on the compute device."""

    block: int
    phase: str
    """"forward", "backward" or "no_grad"."""
    start_ns: int
    end_ns: int


@dataclass(frozen=True, kw_only=True)
class StepTimeline:
    """What every resource did during one optimizer step."""

    step: int
    """Number of the step, from 1, as in the Trainer's logs."""
    start_ns: int
    end_ns: int
    spans: tuple[Span, ...]
    """Spans that overlap the step, of any lane, in any order."""
    passes: tuple[BlockPass, ...]
    """Visits of blocks, in the order in which they happened."""

    @property
    def duration_s(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9

    def busy_s(self, lane: str) -> float:
        """Time in which at least one span of `lane` was under way: requests in parallel count once."""
        return sum(end_ns - start_ns for start_ns, end_ns in self.busy_ns(lane)) / 1e9

    def busy_percent(self, lane: str) -> float:
        """Share of the step in which `lane` was busy, 0 to 100."""
        return 100 * self.busy_s(lane) / self.duration_s if self.duration_s else 0.0

    def num_bytes(self, lane: str) -> int:
        """Bytes moved by the transfers of `lane` that ended within the step."""
        return sum(span.nbytes for span in self.spans if span.lane == lane and span.end_ns <= self.end_ns)

    def busy_ns(self, lane: str, *, gap_ns: int = 0) -> list[tuple[int, int]]:
        """Beginning and end of each time in which `lane` was busy; those at most `gap_ns` apart run together."""
        inside = (
            (max(span.start_ns, self.start_ns), min(span.end_ns, self.end_ns))
            for span in self.spans
            if span.lane == lane
        )
        return merged(inside, gap_ns=gap_ns)


def merged(intervals: Iterable[tuple[int, int]], *, gap_ns: int) -> list[tuple[int, int]]:
    """Unite intervals that overlap or lie at most `gap_ns` apart; sorted by start."""
    united: list[tuple[int, int]] = []
    for start_ns, end_ns in sorted(intervals):
        if united and start_ns <= united[-1][1] + gap_ns:
            united[-1] = (united[-1][0], max(united[-1][1], end_ns))
        elif end_ns > start_ns:
            united.append((start_ns, end_ns))
    return united


def overlap_ns(interval: tuple[int, int], others: Iterable[tuple[int, int]]) -> int:
    """How much of an interval lies within others, which do not overlap each other."""
    start_ns, end_ns = interval
    return sum(max(0, min(end_ns, other_end) - max(start_ns, other_start)) for other_start, other_end in others)


def require_matplotlib() -> None:
    """Fail now rather than after hours of training if pictures cannot be drawn.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; names the extra that brings it.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "drawing a timeline needs matplotlib, which is not installed: pip install 'lowmem[plot]', "
            "or pass timeline=False to lowmem.Monitor",
            name="matplotlib",
        )


def draw_timeline(timeline: StepTimeline, path: Path) -> None:
    """Draw one step as a PNG of 1800 x 585 pixels.

    Args:
        timeline: The step; its times may lie anywhere, the picture starts at 0.
        path: File to write; its folder is made if absent.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: The step has no duration.
    """
    if timeline.end_ns <= timeline.start_ns:
        raise ValueError(
            f"step {timeline.step} ends at {timeline.end_ns} ns, not after its start at {timeline.start_ns} ns: "
            "there is nothing to draw"
        )
    require_matplotlib()
    # Figure and canvas directly: pyplot would keep global state and might open a window.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lanes = [*LANES, *sorted({span.lane for span in timeline.spans} - set(LANES))]
    works = computed_passes(timeline)
    for row, lane in enumerate(lanes):
        if lane == "compute":
            _draw_compute(axes, timeline, works, row=row)
        else:
            _draw_lane(axes, timeline, lane, row=row)
    _label_axes(axes, timeline, lanes)
    _add_legend(figure, works)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


def _draw_lane(axes: Axes, timeline: StepTimeline, lane: str, *, row: int) -> None:
    """Draw one lane's bars as one collection; bars nearer than a third of a pixel run together."""
    unit_s, _ = _time_unit(timeline)
    gap_ns = int((timeline.end_ns - timeline.start_ns) / (WIDTH_INCHES * DOTS_PER_INCH * 3))
    bars = [
        ((start_ns - timeline.start_ns) / 1e9 / unit_s, (end_ns - start_ns) / 1e9 / unit_s)
        for start_ns, end_ns in timeline.busy_ns(lane, gap_ns=gap_ns)
    ]
    if bars:
        axes.broken_barh(bars, (row - 0.36, 0.72), facecolors=LANE_COLOURS.get(lane, OTHER_COLOUR), linewidth=0)


def _draw_compute(axes: Axes, timeline: StepTimeline, works: Sequence[BlockPass], *, row: int) -> None:
    """Draw the compute lane: a bar per visit of a block, micro-batches together, numbered where there is room."""
    unit_s, _ = _time_unit(timeline)
    bars: dict[str, list[tuple[float, float]]] = {}
    numbers: dict[str, list[tuple[int, float]]] = {}
    for (phase, block), group in groupby(works, key=lambda work: (work.phase, work.block)):
        members = list(group)
        start_s = (max(members[0].start_ns, timeline.start_ns) - timeline.start_ns) / 1e9
        end_s = (min(max(work.end_ns for work in members), timeline.end_ns) - timeline.start_ns) / 1e9
        bars.setdefault(phase, []).append((start_s / unit_s, (end_s - start_s) / unit_s))
        if phase:
            numbers.setdefault(phase, []).append((block, (start_s + end_s) / 2))
    # A white edge tells blocks apart while they are wide enough to afford it.
    edge_points = 0.5 if sum(map(len, bars.values())) <= MAX_EDGED_BARS else 0.0
    for phase, extents in bars.items():
        colour = PHASE_COLOURS.get(phase, OTHER_COLOUR)
        axes.broken_barh(extents, (row - 0.36, 0.72), facecolors=colour, edgecolors="white", linewidth=edge_points)
    for labels in numbers.values():
        for block, middle_s in _every_nth(labels, timeline.duration_s):
            axes.text(middle_s / unit_s, row - 0.5, str(block), ha="center", va="center", fontsize=LABEL_POINTS)


def computed_passes(timeline: StepTimeline) -> list[BlockPass]:
    """Compute spans in order, as work on a block; phase "" and block -1 for work outside blocks.

    A span's name says phase and block ("backward 3"). Otherwise the visit that it falls into does, which is right where
    work runs in the thread that asks for it: on a CPU. Without compute spans, the visits themselves are shown.
    """
    computed: list[BlockPass] = []
    visits = list(timeline.passes)
    spans = sorted((span for span in timeline.spans if span.lane == "compute"), key=lambda span: span.start_ns)
    for span in spans:
        named = NAMED_PASS.search(span.name)
        middle_ns = (span.start_ns + span.end_ns) // 2
        while visits and visits[0].end_ns < middle_ns:
            visits.pop(0)
        if named:
            phase, block = named[1], int(named[2])
        elif visits and visits[0].start_ns <= middle_ns:
            phase, block = visits[0].phase, visits[0].block
        else:
            phase, block = "", -1
        computed.append(BlockPass(block=block, phase=phase, start_ns=span.start_ns, end_ns=span.end_ns))
    return computed or list(timeline.passes)


def _every_nth(numbers: Sequence[tuple[int, float]], duration_s: float) -> list[tuple[int, float]]:
    """Those of the (block, second) labels that can be written without touching each other."""
    num_digits = len(str(max((block for block, _ in numbers), default=0)))
    needed_s = duration_s * (num_digits + 0.7) * LABEL_POINTS * 0.6 / 72 / LANE_INCHES
    for stride in (1, 2, 5, 10, 20, 50, 100):
        chosen = [(block, second) for block, second in numbers if block % stride == 0]
        if all(after - before >= needed_s for (_, before), (_, after) in pairwise(chosen)):
            return chosen
    return []


def _time_unit(timeline: StepTimeline) -> tuple[float, str]:
    """Seconds per unit of the time axis, and the unit's name."""
    return (1.0, "s") if timeline.duration_s >= 1 else (1e-3, "ms")


def _label_axes(axes: Axes, timeline: StepTimeline, lanes: Sequence[str]) -> None:
    unit_s, unit = _time_unit(timeline)
    axes.set_xlim(0, timeline.duration_s / unit_s)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_yticks(range(len(lanes)), [_lane_label(timeline, lane) for lane in lanes])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"time in the step ({unit})")
    axes.set_title(_title(timeline), loc="left", fontsize=11)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(visible=True, axis="x", linewidth=0.4, color="#dddddd")
    axes.set_axisbelow(True)


def _add_legend(figure: Figure, works: Sequence[BlockPass]) -> None:
    from matplotlib.patches import Patch

    seen = {work.phase for work in works}
    legend = [
        Patch(color=colour, label=PHASE_LABELS[phase]) for phase, colour in PHASE_COLOURS.items() if phase in seen
    ]
    if "" in seen:
        legend.append(Patch(color=OTHER_COLOUR, label="outside blocks"))
    legend += [Patch(color=LANE_COLOURS[lane], label=label) for lane, label in LANE_LABELS.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False, fontsize=9)


def _lane_label(timeline: StepTimeline, lane: str) -> str:
    label = f"{lane}\n{timeline.busy_percent(lane):.0f}%{'' if lane == 'stall' else ' busy'}"
    num_bytes = timeline.num_bytes(lane)
    return f"{label}\n{format_bytes(num_bytes)}" if num_bytes else label


def _title(timeline: StepTimeline) -> str:
    unit_s, unit = _time_unit(timeline)
    parts = [f"Step {timeline.step}: {timeline.duration_s / unit_s:.3g} {unit}"]
    blocks = {visit.block for visit in timeline.passes}
    if blocks:
        parts.append(f"{len(blocks)} blocks")
    read_bytes, read_s = timeline.num_bytes("disk"), timeline.busy_s("disk")
    if read_s:
        parts.append(f"{format_bytes(read_bytes)} read at {format_bytes(int(read_bytes / read_s))}/s")
    parts.append(f"stalled {timeline.busy_percent('stall'):.1f}%")
    return "   ".join(parts)
