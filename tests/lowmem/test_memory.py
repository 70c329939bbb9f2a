"""Memory readings: the kernel's numbers, and both cgroup versions from recorded /proc files."""

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowmem.monitoring.memory import cgroup_memory, cuda_memory, process_memory, reset_process_peak

MIB = 1 << 20
linux_only = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
V1_UNLIMITED = "9223372036854771712"


def touch(num_bytes: int) -> None:
    """Make pages resident and give them back: mmap, because malloc may keep what it frees."""
    with mmap.mmap(-1, num_bytes) as pages:
        for offset in range(0, num_bytes, mmap.PAGESIZE):
            pages[offset] = 1


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@linux_only
def test_resident_memory_rises_by_what_is_touched() -> None:
    before = process_memory()
    with mmap.mmap(-1, 64 * MIB) as pages:
        for offset in range(0, 64 * MIB, mmap.PAGESIZE):
            pages[offset] = 1
        held = process_memory()
    assert before.rss_bytes is not None
    assert held.rss_bytes is not None
    assert held.anonymous_bytes is not None
    assert 60 * MIB < held.rss_bytes - before.rss_bytes < 80 * MIB
    assert held.anonymous_bytes <= held.rss_bytes <= held.peak_bytes


def test_without_proc_the_peak_comes_from_getrusage(tmp_path: Path) -> None:
    memory = process_memory(tmp_path / "absent")
    assert memory.rss_bytes is None
    assert memory.anonymous_bytes is None
    assert memory.peak_bytes > 20 * MIB


def test_peak_reset_is_reported_as_refused_where_the_kernel_has_no_such_file(tmp_path: Path) -> None:
    assert not reset_process_peak(tmp_path / "absent")


@linux_only
def test_peak_reset_forgets_earlier_peaks() -> None:
    program = """
from tests.lowmem.test_memory import touch, MIB
from lowmem.monitoring.memory import process_memory, reset_process_peak
before = process_memory().peak_bytes
touch(128 * MIB)
risen = process_memory().peak_bytes
assert risen - before > 100 * MIB, (before, risen)
if reset_process_peak():
    assert process_memory().peak_bytes < risen - 100 * MIB
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


def v1_files(own_limit: str, parent_limit: str) -> dict[str, str]:
    return {
        "proc/cgroup": "9:name=systemd:/\n4:memory:/jobs/mine\n1:cpu,cpuacct:/jobs/mine\n0::/\n",
        "sys/jobs/mine/memory.usage_in_bytes": "1000\n",
        "sys/jobs/mine/memory.limit_in_bytes": own_limit + "\n",
        "sys/jobs/mine/memory.max_usage_in_bytes": "1500\n",
        "sys/jobs/memory.usage_in_bytes": "3000\n",
        "sys/jobs/memory.limit_in_bytes": parent_limit + "\n",
        "sys/jobs/memory.max_usage_in_bytes": "3500\n",
        "sys/memory.usage_in_bytes": "9000\n",
        "sys/memory.limit_in_bytes": V1_UNLIMITED + "\n",
        "sys/memory.max_usage_in_bytes": "9500\n",
    }


@pytest.mark.parametrize(
    ("own", "parent", "folder", "limit_bytes", "usage_bytes"),
    [
        ("2048", V1_UNLIMITED, "sys/jobs/mine", 2048, 1000),
        ("8192", "4096", "sys/jobs", 4096, 3000),
        (V1_UNLIMITED, V1_UNLIMITED, "sys/jobs/mine", None, 1000),
    ],
)
def test_v1_limit_is_the_smallest_on_the_way_to_the_root(
    tmp_path: Path, own: str, parent: str, folder: str, limit_bytes: int | None, usage_bytes: int
) -> None:
    write_tree(tmp_path, v1_files(own, parent))
    mounts = f"31 23 0:28 / {tmp_path} rw - tmpfs tmpfs rw\n35 31 0:32 / {tmp_path}/sys rw - cgroup cgroup rw,memory\n"
    write_tree(tmp_path, {"proc/mountinfo": mounts})
    group = cgroup_memory(tmp_path / "proc")
    assert group is not None
    assert (group.path, group.limit_bytes, group.usage_bytes) == (tmp_path / folder, limit_bytes, usage_bytes)


def test_v2_group_of_a_container_is_found_below_the_mounts_root(tmp_path: Path) -> None:
    files = {
        "proc/cgroup": "0::/docker/abc/job\n",
        "proc/mountinfo": f"30 29 0:26 /docker/abc {tmp_path}/sys rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
        "sys/job/memory.current": "700\n",
        "sys/job/memory.max": "max\n",
        "sys/job/memory.peak": "900\n",
        "sys/memory.current": "800\n",
        "sys/memory.max": "5000\n",
    }
    write_tree(tmp_path, files)
    group = cgroup_memory(tmp_path / "proc")
    assert group is not None
    assert (group.path, group.limit_bytes, group.usage_bytes, group.peak_bytes) == (tmp_path / "sys", 5000, 800, None)


def test_no_control_group_is_none(tmp_path: Path) -> None:
    assert cgroup_memory(tmp_path) is None


@pytest.mark.gpu
def test_cuda_peak_remembers_tensors_that_are_gone() -> None:
    device = torch.device("cuda", 0)
    torch.ones(1, device=device)
    before = cuda_memory(device)
    above = before.peak_allocated_bytes - before.allocated_bytes
    tensor = torch.zeros(above + 8 * MIB, dtype=torch.uint8, device=device)
    del tensor
    after = cuda_memory(device)
    assert after.allocated_bytes == before.allocated_bytes
    assert after.peak_allocated_bytes >= before.peak_allocated_bytes + 8 * MIB
    assert after.peak_reserved_bytes >= after.peak_allocated_bytes
