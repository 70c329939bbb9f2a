"""Memory limits that the kernel enforces on a child."""

import sys
from pathlib import Path

import pytest

from benchmarks import memory_limit
from benchmarks.memory_limit import LimitUnavailable, MemoryLimit, run_limited

MIB = 1 << 20


@pytest.fixture
def _limits() -> None:
    try:
        MemoryLimit(64 * MIB).close()
    except LimitUnavailable as error:
        pytest.skip(str(error))


def take(nbytes: int) -> list[str]:
    return [sys.executable, "-c", f"import time; held = bytearray({nbytes}); print(len(held)); time.sleep(0.1)"]


@pytest.mark.usefixtures("_limits")
def test_child_that_exceeds_its_limit_is_killed_and_counted() -> None:
    outcome = run_limited(take(256 * MIB), limit_bytes=96 * MIB)
    assert outcome.returncode == -9
    assert outcome.num_oom_kills == 1
    assert outcome.output == ""


@pytest.mark.usefixtures("_limits")
def test_child_within_its_limit_ends_and_its_peaks_are_measured() -> None:
    outcome = run_limited(take(64 * MIB), limit_bytes=128 * MIB)
    assert outcome.returncode == 0
    assert outcome.output == f"{64 * MIB}\n"
    assert outcome.num_oom_kills == 0
    assert outcome.peak_bytes is not None
    assert 64 * MIB < outcome.peak_bytes <= 128 * MIB
    assert 64 * MIB < outcome.peak_rss_bytes < 128 * MIB


@pytest.mark.usefixtures("_limits")
def test_group_is_gone_afterwards_even_when_the_body_fails() -> None:
    def fail_inside(group: MemoryLimit) -> None:
        with group:
            raise KeyError("body")

    group = MemoryLimit(64 * MIB)
    folder = Path(group.command(["true"])[3]).parent
    assert folder.is_dir()
    with pytest.raises(KeyError, match="body"):
        fail_inside(group)
    assert not folder.exists()


def test_without_a_limit_the_peak_of_the_child_alone_is_measured() -> None:
    large, small = (run_limited(take(nbytes), limit_bytes=None) for nbytes in (128 * MIB, MIB))
    assert large.peak_bytes is None
    assert large.num_oom_kills is None
    assert 128 * MIB < large.peak_rss_bytes < 192 * MIB
    assert small.peak_rss_bytes < large.peak_rss_bytes - 64 * MIB


def test_no_controller_is_said_and_nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("proc /proc proc rw 0 0\n")
    monkeypatch.setattr(memory_limit, "_MOUNTS", mounts)
    started = tmp_path / "started"
    with pytest.raises(LimitUnavailable, match="no control group file system"):
        run_limited(["touch", str(started)], limit_bytes=64 * MIB)
    assert not started.exists()
