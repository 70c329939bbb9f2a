"""The kernel's high-water mark of this process."""

import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem.host_memory import process_peak_bytes

MIB = 1 << 20
linux_only = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


def touch(num_bytes: int) -> None:
    """Make pages resident and give them back: mmap, because malloc may keep what it frees."""
    with mmap.mmap(-1, num_bytes) as pages:
        for offset in range(0, num_bytes, mmap.PAGESIZE):
            pages[offset] = 1


@linux_only
def test_the_peak_rises_by_what_is_touched_and_stays() -> None:
    # A process of its own: this one may have been larger before.
    program = """
from tests.lowmem.test_memory import MIB, touch
from lowmem.host_memory import process_peak_bytes
before = process_peak_bytes()
touch(128 * MIB)
risen = process_peak_bytes()
assert 100 * MIB < risen - before < 160 * MIB, (before, risen)
assert process_peak_bytes() >= risen
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_without_proc_the_peak_comes_from_getrusage(tmp_path: Path) -> None:
    assert process_peak_bytes(tmp_path / "absent") > 20 * MIB
