"""What happened when: every transfer, wait and computation as a span on the lane of the resource that was busy."""

from __future__ import annotations

import json
import os
import sys
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from offload.files.folder import Folder

LANES = ("disk", "copy", "compute", "stall")
"""The usual lanes, in the order in which a saved trace shows them; any other name is a lane of its own below these."""

ORIGIN = "origin_ns"
"""Where a saved trace notes what its times are counted from, by `time.perf_counter_ns()`."""


class Span(NamedTuple):
    """One stretch of time in which one resource was busy. Times are `time.perf_counter_ns()`."""

    lane: str
    """Resource: "disk", "copy", "compute", "stall" or another name."""
    name: str
    """What it was busy with, such as a block's name."""
    start_ns: int
    """Beginning."""
    end_ns: int
    """End, not before the beginning."""
    nbytes: int
    """Bytes moved; 0 where nothing moves."""


class Trace:
    """The newest spans of a run, bounded in number. Any thread may add and read.

    Args:
        capacity: Spans that are kept, at 40 bytes each; older ones are dropped.
    """

    def __init__(self, capacity: int = 65_536) -> None:
        if capacity < 1:
            raise ValueError(f"capacity: expected at least 1 span, got {capacity}")
        self._capacity = capacity
        # A ring once it is full. As objects, spans would take ten times the memory.
        self._lanes: list[str] = []
        self._names: list[str] = []
        self._numbers = array("q")  # start_ns, end_ns and nbytes of each
        self._oldest = 0
        self._lock = threading.Lock()
        # Replaced, never changed: add() reads it without the lock.
        self._listeners: tuple[Callable[[Span], None], ...] = ()

    def add(self, lane: str, name: str, start_ns: int, end_ns: int, *, nbytes: int = 0) -> None:
        """Record a span that is over. Times are `time.perf_counter_ns()`.

        Raises:
            ValueError: The span ends before it starts.
        """
        if end_ns < start_ns:
            raise ValueError(f"span {name!r} on lane {lane!r} ends {start_ns - end_ns} ns before it starts")
        # Names come again and again, often as new strings.
        lane, name = sys.intern(lane), sys.intern(name)
        numbers = (start_ns, end_ns, nbytes)
        with self._lock:
            if len(self._names) < self._capacity:
                self._lanes.append(lane)
                self._names.append(name)
                self._numbers.extend(numbers)
            else:
                at = self._oldest
                self._lanes[at], self._names[at] = lane, name
                self._numbers[3 * at], self._numbers[3 * at + 1], self._numbers[3 * at + 2] = numbers
                self._oldest = (at + 1) % self._capacity
        for listener in self._listeners:
            listener(Span(lane, name, start_ns, end_ns, nbytes))

    def listen(self, callback: Callable[[Span], None]) -> Callable[[], None]:
        """Call `callback` with every span from now on, in the thread that adds it and before `add` returns.

        It must be quick and must not raise: spans come from the training thread and from the threads that move bytes.

        Returns:
            A function that stops the calls.
        """
        with self._lock:
            self._listeners = (*self._listeners, callback)

        def stop() -> None:
            with self._lock:
                self._listeners = tuple(kept for kept in self._listeners if kept is not callback)

        return stop

    def spans(self, since_ns: int | None = None) -> tuple[Span, ...]:
        """Spans kept, in the order in which they were added; with `since_ns`, those that ended after it."""
        with self._lock:
            numbers = self._numbers
            return tuple(
                Span(self._lanes[at], self._names[at], numbers[3 * at], numbers[3 * at + 1], numbers[3 * at + 2])
                for at in (*range(self._oldest, len(self._names)), *range(self._oldest))
                if since_ns is None or numbers[3 * at + 1] > since_ns
            )

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        since_ns: int | None = None,
        notes: Mapping[str, object] | None = None,
    ) -> None:
        """Write the kept spans as Chrome trace events, which Perfetto and chrome://tracing open.

        One row per lane; spans of a lane that overlap get further rows, because a row of the format can only nest. The
        file appears whole or not at all.

        Args:
            path: File to write, usually ending in ``.json``. Its folder must exist.
            since_ns: Leave out spans that ended before.
            notes: What else is to be kept with the spans, as plain data for JSON; viewers show it as metadata, and the
                origin of the times beside it.

        Raises:
            OSError: The file cannot be written.
        """
        target = Path(path)
        spans = self.spans(since_ns)
        origin_ns = min((span.start_ns for span in spans), default=0)
        document = {
            "traceEvents": _chrome_events(spans, origin_ns=origin_ns),
            "displayTimeUnit": "ms",
            "otherData": {**(notes or {}), ORIGIN: origin_ns},
        }
        with Folder.open(target.parent) as folder:
            folder.put(target.name, json.dumps(document).encode(), mode=0o666)


def _chrome_events(spans: tuple[Span, ...], *, origin_ns: int) -> list[Mapping[str, object]]:
    """Trace events: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU."""
    pid = os.getpid()
    rows: dict[tuple[str, int], int] = {}
    events: list[Mapping[str, object]] = []
    for span, depth in _rows(spans):
        tid = rows.setdefault((span.lane, depth), len(rows) + 1)
        args: dict[str, object] = {}
        if span.nbytes:
            args["bytes"] = span.nbytes
            if span.end_ns > span.start_ns:
                args["GB/s"] = round(span.nbytes / (span.end_ns - span.start_ns), 3)
        times = {"ts": (span.start_ns - origin_ns) / 1e3, "dur": (span.end_ns - span.start_ns) / 1e3}
        events.append({"ph": "X", "pid": pid, "tid": tid, "name": span.name, "cat": span.lane, "args": args, **times})
    names: list[Mapping[str, object]] = [_named(pid, "process_name", "offload")]
    for (lane, depth), tid in rows.items():
        names.append({**_named(pid, "thread_name", f"{lane} ({depth + 1})" if depth else lane), "tid": tid})
        names.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}})
    return names + events


def _named(pid: int, event: str, name: str) -> dict[str, object]:
    return {"ph": "M", "pid": pid, "name": event, "args": {"name": name}}


def _rows(spans: tuple[Span, ...]) -> Iterator[tuple[Span, int]]:
    """Each span with the first row of its lane that is free when it starts; lanes in the order of `LANES`."""
    lanes = {lane: [span for span in spans if span.lane == lane] for lane in (*LANES, *(span.lane for span in spans))}
    for lane_spans in lanes.values():
        row_ends_ns: list[int] = []
        for span in sorted(lane_spans, key=lambda span: (span.start_ns, span.end_ns)):
            depth = next((row for row, end_ns in enumerate(row_ends_ns) if end_ns <= span.start_ns), len(row_ends_ns))
            row_ends_ns[depth : depth + 1] = [span.end_ns]
            yield span, depth
