"""A saved trace read back, and cut into steps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from lowmem.timeline import StepTimeline
from offload import Span


def read_spans(path: Path) -> tuple[Span, ...]:
    """Read the spans of a trace file that `lowmem.Monitor` or `offload.Trace.save` wrote, by their start.

    Raises:
        ValueError: The file is not such a trace; names what is wrong with it.
        OSError: The file cannot be read.
    """
    try:
        document = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a trace file: {error}") from error
    events = document.get("traceEvents") if isinstance(document, dict) else None
    if not isinstance(events, list):
        raise ValueError(f"{path}: not a trace file: it has no list of traceEvents")
    spans = tuple(_span(path, event) for event in events if isinstance(event, dict) and event.get("ph") == "X")
    if not spans:
        raise ValueError(f"{path}: the trace holds no spans")
    return tuple(sorted(spans, key=lambda span: span.start_ns))


def _span(path: Path, event: Mapping[str, object]) -> Span:
    try:
        start_us, length_us = float(str(event["ts"])), float(str(event["dur"]))
        args = event.get("args")
        nbytes = args.get("bytes", 0) if isinstance(args, dict) else 0
        return Span(
            lane=str(event["cat"]),
            name=str(event["name"]),
            start_ns=round(start_us * 1000),
            end_ns=round((start_us + length_us) * 1000),
            nbytes=int(nbytes),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: an event is not one of ours ({error!r}): {event}") from error


def steps_of(spans: tuple[Span, ...]) -> tuple[StepTimeline, ...]:
    """Cut a trace into steps, each from its first forward to the next one's; the whole trace where no step is seen.

    A step begins with the forward of block 0 that follows a backward. What lies before the first one (reading what
    stays resident) belongs to no step.

    Args:
        spans: By their start.
    """
    starts_ns = list(_step_starts(spans))
    end_ns = max(span.end_ns for span in spans)
    if not starts_ns:
        starts_ns = [spans[0].start_ns]
    bounds = zip(starts_ns, [*starts_ns[1:], end_ns], strict=True)
    return tuple(
        StepTimeline(
            step=number,
            start_ns=start_ns,
            end_ns=stop_ns,
            spans=tuple(span for span in spans if span.end_ns > start_ns and span.start_ns < stop_ns),
            passes=(),
        )
        for number, (start_ns, stop_ns) in enumerate(bounds, start=1)
    )


def _step_starts(spans: tuple[Span, ...]) -> Iterator[int]:
    after_backward = True
    for span in spans:
        if span.lane != "compute":
            continue
        if after_backward and span.name == "forward 0":
            yield span.start_ns
            after_backward = False
        elif span.name.startswith("backward"):
            after_backward = True
