"""What is made of the spans of steps: sums for the logs, and the step that stands for the others."""

import pytest

from lowmem.monitoring.monitor import RepresentativeStep, StepRecord, log_values
from lowmem.monitoring.timeline import StepTimeline


def record(duration_s: float, **changes: float) -> StepRecord:
    values = {
        "duration_s": duration_s,
        "stall_s": 0.0,
        "num_tokens": 0,
        "disk_read_bytes": 0,
        "disk_busy_bytes": 0,
        "disk_busy_s": 0.0,
        "host_peak_bytes": 0,
        "device_peak_bytes": 0,
    }
    return StepRecord(**(values | changes))  # type: ignore[arg-type]


def test_logs_weigh_steps_by_their_duration() -> None:
    first = record(
        1, stall_s=1, num_tokens=10, disk_read_bytes=100, disk_busy_bytes=90, disk_busy_s=1, host_peak_bytes=7
    )
    second = record(3, num_tokens=90, disk_read_bytes=300, disk_busy_bytes=210, disk_busy_s=2, device_peak_bytes=9)
    assert log_values([first, second]) == {
        "step_s": 2,
        "tokens_per_s": 25,
        "stall_percent": 25,
        "read_gb": pytest.approx(2e-7),
        "host_peak_gib": 7 / 2**30,
        "device_peak_gib": 9 / 2**30,
        "disk_gb_per_s": pytest.approx(1e-7),
    }


def test_no_disk_rate_where_nothing_was_read() -> None:
    assert "disk_gb_per_s" not in log_values([record(1)])


def test_no_peak_of_a_device_where_it_is_the_hosts() -> None:
    assert "device_peak_gib" not in log_values([record(1)])


def timeline(step: int, duration_s: float) -> StepTimeline:
    return StepTimeline(step=step, start_ns=0, end_ns=int(duration_s * 1e9), spans=(), passes=())


@pytest.mark.parametrize(
    ("durations_s", "chosen"),
    [
        ([9.0], 1),
        ([9.0, 2.0], 2),
        ([2.0, 9.0, 2.0, 2.1, 1.9, 2.2], 4),  # the second step was an outlier, and the first does not count
        ([1.0, 2.0, 2.0, 9.0], 2),
    ],
)
def test_the_step_nearest_to_the_median_is_kept(durations_s: list[float], chosen: int) -> None:
    representative = RepresentativeStep()
    for step, duration_s in enumerate(durations_s, start=1):
        representative.offer(timeline(step, duration_s))
    assert representative.timeline is not None
    assert representative.timeline.step == chosen
