"""Traces: bounded, shared by threads, readable by Perfetto."""

import json
import random
import threading
import time
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest

from offload.trace import Span, Trace


def test_spans_come_back_in_the_order_they_were_added() -> None:
    trace = Trace()
    trace.add("disk", "block 1", 30, 50, nbytes=7)
    trace.add("stall", "block 1", 10, 50)
    assert trace.spans() == (Span("disk", "block 1", 30, 50, 7), Span("stall", "block 1", 10, 50, 0))


def test_the_oldest_spans_go_when_it_is_full() -> None:
    trace = Trace(capacity=3)
    for number in range(5):
        trace.add("disk", str(number), number, number + 1)
    assert [span.name for span in trace.spans()] == ["2", "3", "4"]


def test_since_leaves_out_what_had_ended() -> None:
    trace = Trace()
    for start in (0, 10, 20):
        trace.add("disk", str(start), start, start + 10, nbytes=1)
    assert [span.name for span in trace.spans(since_ns=10)] == ["10", "20"]
    assert trace.spans(since_ns=30) == ()


def test_a_full_trace_takes_little_memory() -> None:
    tracemalloc.start()
    trace = Trace()
    for number in range(66_000):
        trace.add("compute", f"forward {number % 80}", 10**12 + number, 10**12 + number + 5, nbytes=10**9)
    used_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(trace.spans()) == 65_536
    assert used_bytes < 4 << 20


def test_listeners_hear_every_span_until_they_stop() -> None:
    trace = Trace()
    heard: list[Span] = []
    others: list[Span] = []
    stop = trace.listen(heard.append)
    trace.listen(others.append)
    trace.add("disk", "a", 0, 1)
    stop()
    stop()
    trace.add("disk", "b", 1, 2)
    assert [span.name for span in heard] == ["a"]
    assert [span.name for span in others] == ["a", "b"]


def test_threads_lose_no_spans() -> None:
    trace = Trace()

    def add_many(name: str) -> None:
        for number in range(500):
            trace.add("disk", name, number, number + 1)
            if number % 100 == 0:
                trace.spans()

    threads = [threading.Thread(target=add_many, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trace.spans()) == 2000


def test_a_span_costs_little() -> None:
    trace = Trace(capacity=1000)
    costs_ns = []
    for _ in range(20):
        start_ns = time.thread_time_ns()
        for number in range(500):
            trace.add("disk", "block", number, number + 1, nbytes=1)
        costs_ns.append((time.thread_time_ns() - start_ns) / 500)
    assert min(costs_ns) < 3000


def saved(trace: Trace, path: Path) -> tuple[dict[int, str], list[dict[str, object]]]:
    """Names of the rows and the spans' events."""
    document = json.loads(path.read_text())
    assert document["displayTimeUnit"] == "ms"
    events = document["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    return rows, [event for event in events if event["ph"] == "X"]


def test_a_saved_trace_has_one_named_row_per_lane(tmp_path: Path) -> None:
    trace = Trace()
    trace.add("own", "x", 1_000, 2_000)
    trace.add("stall", "block 1", 1_000, 4_000)
    trace.add("disk", "block 1", 3_000, 5_000, nbytes=4_000)
    trace.save(tmp_path / "trace.json")
    rows, events = saved(trace, tmp_path / "trace.json")
    assert list(rows.values()) == ["disk", "stall", "own"]
    (disk,) = [event for event in events if event["cat"] == "disk"]
    assert (disk["name"], disk["ts"], disk["dur"]) == ("block 1", 2.0, 2.0)
    assert disk["args"] == {"bytes": 4000, "GB/s": 2.0}
    assert rows[disk["tid"]] == "disk"  # type: ignore[index]
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_overlapping_spans_of_a_lane_get_rows_of_their_own(tmp_path: Path) -> None:
    trace = Trace()
    trace.add("disk", "a", 0, 1_000)
    trace.add("disk", "b", 500, 1_500)
    trace.add("disk", "c", 1_000, 2_000)
    trace.save(str(tmp_path / "trace.json"))
    rows, events = saved(trace, tmp_path / "trace.json")
    assert {event["name"]: rows[event["tid"]] for event in events} == {  # type: ignore[index]
        "a": "disk",
        "b": "disk (2)",
        "c": "disk",
    }


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_a_saved_trace_keeps_to_the_formats_rules(tmp_path: Path) -> None:
    """What the description of the Trace Event Format asks of complete and metadata events (its "ph" X and M)."""
    trace = Trace()
    generator = random.Random(0)
    for number in range(300):
        start_ns = generator.randrange(10_000)
        lane = generator.choice(["disk", "copy", "compute", "stall", 'own "lane"\n'])
        end_ns = start_ns + generator.randrange(800)
        trace.add(lane, f"blöck {number % 7}", start_ns, end_ns, nbytes=generator.randrange(2) * number)
    trace.save(tmp_path / "trace.json", notes={"plan": None})
    document = json.loads((tmp_path / "trace.json").read_bytes(), parse_constant=no_constant)
    assert set(document) == {"traceEvents", "displayTimeUnit", "otherData"}
    rows: dict[int, list[tuple[float, float]]] = {}
    for event in document["traceEvents"]:
        assert isinstance(event["pid"], int)
        assert isinstance(event["name"], str)
        assert isinstance(event["args"], dict)
        if event["ph"] == "X":
            assert set(event) == {"ph", "pid", "tid", "name", "cat", "args", "ts", "dur"}
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            rows.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
        else:
            assert event["ph"] == "M"
            assert event["name"] in ("process_name", "thread_name", "thread_sort_index")
    named = [event["tid"] for event in document["traceEvents"] if event["name"] == "thread_name"]
    assert sorted(named) == sorted(rows)
    for spans in rows.values():
        # Spans of a row may nest, but not overlap in part.
        for (_, end), (start, _) in pairwise(sorted(spans)):
            assert start >= end - 1e-6


def test_an_empty_trace_is_saved_too(tmp_path: Path) -> None:
    Trace().save(tmp_path / "trace.json")
    rows, events = saved(Trace(), tmp_path / "trace.json")
    assert (rows, events) == ({}, [])


def test_a_trace_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        Trace().save(tmp_path / "no" / "trace.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        Trace().save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="capacity: expected at least 1 span, got 0"):
        Trace(capacity=0)
    with pytest.raises(ValueError, match="span 'a' on lane 'disk' ends 5 ns before it starts"):
        Trace().add("disk", "a", 10, 5)
