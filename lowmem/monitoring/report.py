"""A run as one HTML file that a browser opens without a server: loss, pace, memory against the plan, the last steps.

Everything is in the file: no script or style comes from elsewhere. While the run goes on, the page loads itself anew
every few seconds; the file is replaced whole, so that a page never sees half of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from lowmem.monitoring.account import TEMPORARIES, RunFacts, step_seconds
from lowmem.monitoring.timeline import (
    LANE_COLOURS,
    LANE_LABELS,
    OTHER_COLOUR,
    PHASE_COLOURS,
    PHASE_LABELS,
    StepTimeline,
    computed_passes,
    merged,
)
from offload import LANES, Folder, format_bytes, format_seconds

RELOAD_S = 5

_WIDTH, _CHART_HEIGHT, _LANE_HEIGHT = 1000, 190, 26

_LABEL_WIDTH = 74
"""Of the lanes' and axes' names, to the left of a drawing."""

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --faint: #8885; --paper: #fff; --line: #4f7cac; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #191b1e; --line: #7fb0e6; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2em auto;
       max-width: 1080px; padding: 0 1em; }
h1 { font-size: 1.25em; margin: 0 } h2 { font-size: 1em; margin: 2em 0 .4em }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--ink); font: 12px system-ui, sans-serif }
svg text.over { paint-order: stroke; stroke: var(--paper); stroke-width: 4px }
.grid { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2em }
.facts { display: flex; flex-wrap: wrap; gap: .3em 2em; margin: .8em 0 } .facts b { font-size: 1.15em }
.facts span { display: block; font-size: .85em; opacity: .75 }
.legend { font-size: .85em; display: flex; flex-wrap: wrap; gap: 0 1.4em }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .4em }
table { border-collapse: collapse; width: 100%; font-size: .92em } td, th { padding: .15em .5em; text-align: right;
       white-space: nowrap } td:first-child, th:first-child { text-align: left } td.bar { width: 50% }
tr:last-child td { border-top: 1px solid var(--faint); font-weight: 600 }
pre { overflow-x: auto; font-size: .85em } @media (max-width: 700px) { .grid { grid-template-columns: 1fr } }
"""


def save_report(path: Path, facts: RunFacts, steps: Sequence[StepTimeline], *, left_s: float | None = None) -> None:
    """Write the report of a run, whole or not at all.

    Args:
        path: File to write; its folder is made if absent.
        facts: Of the run so far.
        steps: The last steps in order, to be drawn.
        left_s: Seconds that the run will still take, if that is known.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with Folder.open(path.parent) as folder:
        folder.put(path.name, report_html(facts, steps, left_s=left_s).encode(), mode=0o666)


def report_html(facts: RunFacts, steps: Sequence[StepTimeline], *, left_s: float | None = None) -> str:
    """The report as a page."""
    is_running = facts.state == "running"
    reload = f'<meta http-equiv="refresh" content="{RELOAD_S}">' if is_running else ""
    losses = [(point.step, point.loss) for point in facts.losses]
    paces = [(point.step, point.duration_s) for point in facts.steps]
    planned_s = facts.planned_s.get("step", 0.0)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{reload}<title>{escape(facts.title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{escape(facts.title)}</h1>{_numbers(facts, left_s)}"
        f'<div class="grid"><div><h2>Loss</h2>{_curve(losses, name="loss")}</div>'
        f"<div><h2>Seconds per step</h2>{_curve(paces, name='seconds', level=planned_s, from_zero=True)}</div></div>"
        f"<h2>Memory by role: planned, and held so far</h2>{_memory(facts)}"
        f"<h2>Where the seconds of the last step went</h2>{_seconds(steps)}"
        f"<h2>The last steps</h2>{_lanes(steps)}"
        f"<details><summary>Plan</summary><pre>{escape(facts.plan)}</pre></details></body></html>\n"
    )


def _numbers(facts: RunFacts, left_s: float | None) -> str:
    step = facts.steps[-1].step if facts.steps else 0
    shown = [(f"{step} / {facts.num_steps}", f"steps, {facts.state}")]
    if facts.losses:
        shown.append((f"{facts.losses[-1].loss:.4g}", f"loss (first {facts.losses[0].loss:.4g})"))
    if facts.steps:
        last = facts.steps[-1]
        shown += [(format_seconds(last.duration_s), f"per step (planned {format_seconds(facts.planned_s['step'])})")]
        shown += [(f"{last.tokens_per_s:.3g}", "tokens/s"), (f"{last.stall_percent:.1f}%", "of a step waiting")]
    shown.append((format_bytes(facts.peak_bytes), f"peak (planned {format_bytes(facts.planned_peak_bytes)})"))
    if left_s is not None and facts.state == "running":
        shown.append((format_seconds(left_s), "left"))
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in shown)
    return f'<div class="facts">{cells}</div>'


def _curve(points: Sequence[tuple[int, float]], *, name: str, level: float = 0.0, from_zero: bool = False) -> str:
    """A line over steps; `level` is drawn across as what was planned."""
    if not points:
        return "<p>Nothing yet.</p>"
    width, height, left, bottom = _WIDTH // 2, _CHART_HEIGHT, 44, 20
    values = [value for _, value in points] + ([level] if level else [])
    low, high = (0.0 if from_zero else min(values)), max(values)
    span = (high - low) or abs(high) or 1.0
    first, last = points[0][0], points[-1][0]

    def at(step: float, value: float) -> tuple[float, float]:
        across = (step - first) / (last - first) if last > first else 0.5
        return left + across * (width - left - 8), 8 + (high - value) / span * (height - bottom - 12)

    marks = "".join(
        f'<text x="{left - 6}" y="{at(first, value)[1] + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        f'<line x1="{left}" x2="{width - 8}" y1="{at(first, value)[1]:.1f}" y2="{at(first, value)[1]:.1f}" '
        'stroke="var(--faint)"/>'
        for value in (low, low + span / 2, low + span)
    )
    label = ""
    if level:
        y = at(first, level)[1]
        # Below the line where there is no room above it.
        word_y = y - 5 if y > 20 else y + 14
        marks += (
            f'<line x1="{left}" x2="{width - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d1495b" stroke-dasharray="5 4"/>'
        )
        # Over the line, with a rim in the paper's colour.
        label = f'<text class="over" x="{width - 10}" y="{word_y:.1f}" text-anchor="end">planned</text>'
    drawn = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in points)
    dots = "".join('<circle cx="{:.1f}" cy="{:.1f}" r="2.5" fill="var(--line)"/>'.format(*at(*p)) for p in points[-1:])
    steps = "".join(
        f'<text x="{at(step, low)[0]:.1f}" y="{height - 4}" text-anchor="{anchor}">{step}</text>'
        for step, anchor in ((first, "start"), (last, "end"))[: 1 + (last > first)]
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{name} by step">{marks}{steps}'
        f'<polyline points="{drawn}" fill="none" stroke="var(--line)" stroke-width="1.6"/>{dots}{label}</svg>'
    )


def _memory(facts: RunFacts) -> str:
    largest = max((max(row.planned_bytes, row.measured_bytes or 0) for row in facts.memory), default=1) or 1
    rows = []
    for row in facts.memory:
        held = row.measured_bytes
        planned, measured = (100 * (nbytes or 0) / largest for nbytes in (row.planned_bytes, held))
        colour = "#d1495b" if held is not None and held > 1.03 * row.planned_bytes else "#4f9d69"
        bar = (
            '<svg viewBox="0 0 100 4" preserveAspectRatio="none" style="height:1em">'
            f'<rect width="{measured:.2f}" height="4" fill="{colour}"/>'
            f'<rect width="{planned:.2f}" height="4" fill="{OTHER_COLOUR}" fill-opacity=".35"/></svg>'
        )
        name = f"{row.role} (largest moment)" if row.role == TEMPORARIES else row.role
        cells = (format_bytes(row.planned_bytes), "-" if held is None else format_bytes(held))
        rows.append(
            f'<tr><td>{escape(name)}</td><td class="bar">{bar}</td>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    return f"<table><tr><th>role</th><th></th><th>planned</th><th>held</th></tr>{''.join(rows)}</table>"


def _seconds(steps: Sequence[StepTimeline]) -> str:
    if not steps:
        return "<p>No step has ended yet.</p>"
    account = step_seconds(steps[-1])
    parts = [
        (PHASE_LABELS.get(phase, phase), seconds, PHASE_COLOURS.get(phase, OTHER_COLOUR))
        for phase, seconds in account.computing_s.items()
    ]
    parts += [(f"waiting: {cause}", seconds, LANE_COLOURS["stall"]) for cause, seconds in account.waiting_s.items()]
    parts.append(("embeddings, head, loss, optimizer", account.other_s, OTHER_COLOUR))
    bars, at = "", 0.0
    for name, seconds, colour in parts:
        width = _WIDTH * seconds / account.duration_s if account.duration_s else 0.0
        bars += (
            f'<rect x="{at:.2f}" width="{width:.2f}" height="24" fill="{colour}" stroke="var(--paper)">'
            f"<title>{escape(name)}: {format_seconds(seconds)}</title></rect>"
        )
        at += width
    legend = _legend((f"{name} {format_seconds(seconds)}", colour) for name, seconds, colour in parts)
    return f'<svg viewBox="0 0 {_WIDTH} 24" role="img" aria-label="seconds of a step">{bars}</svg>{legend}'


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in entries)
    return f'<div class="legend">{cells}</div>'


def _lanes(steps: Sequence[StepTimeline]) -> str:
    """Each lane of the last steps as a row of bars; bars nearer than half a pixel run together."""
    if not steps:
        return "<p>No step has ended yet.</p>"
    start_ns, end_ns = steps[0].start_ns, steps[-1].end_ns
    scale = (_WIDTH - _LABEL_WIDTH) / max(1, end_ns - start_ns)
    gap_ns = int(0.5 / scale)
    lanes = [lane for lane in LANES if any(span.lane == lane for step in steps for span in step.spans)]
    rows = ""
    for number, lane in enumerate(lanes):
        y = number * _LANE_HEIGHT + 16
        rows += f'<text x="0" y="{y + 14}">{lane}</text>'
        for colour, intervals in _coloured(steps, lane):
            for from_ns, to_ns in merged(intervals, gap_ns=gap_ns):
                x, width = _LABEL_WIDTH + (from_ns - start_ns) * scale, max(0.4, (to_ns - from_ns) * scale)
                rows += f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_LANE_HEIGHT - 7}" fill="{colour}"/>'
    height = len(lanes) * _LANE_HEIGHT + 18
    for step in steps:
        x = _LABEL_WIDTH + (step.start_ns - start_ns) * scale
        rows += f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="var(--ink)" stroke-width=".6"/>'
        rows += f'<text x="{x + 4:.1f}" y="11">step {step.step}, {format_seconds(step.duration_s)}</text>'
    phases = [(PHASE_LABELS[phase], colour) for phase, colour in PHASE_COLOURS.items()]
    legend = _legend(phases + [(word, LANE_COLOURS[lane]) for lane, word in LANE_LABELS.items() if lane in lanes])
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="timeline of the last steps">{rows}</svg>{legend}'
    )


def _coloured(steps: Sequence[StepTimeline], lane: str) -> Iterable[tuple[str, list[tuple[int, int]]]]:
    """A lane's intervals, clipped to their steps, by colour."""
    found: dict[str, list[tuple[int, int]]] = {}
    for step in steps:
        if lane != "compute":
            found.setdefault(LANE_COLOURS.get(lane, OTHER_COLOUR), []).extend(step.busy_ns(lane))
            continue
        for work in computed_passes(step):
            inside = (max(work.start_ns, step.start_ns), min(work.end_ns, step.end_ns))
            found.setdefault(PHASE_COLOURS.get(work.phase, OTHER_COLOUR), []).append(inside)
    return found.items()
