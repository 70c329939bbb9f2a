"""Available RAM: the tightest of the machine and the control groups of either version."""

from pathlib import Path

import pytest

from offload.budget import available_ram_bytes

MIB = 1 << 20


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A machine with 1000 MiB available."""
    folder = tmp_path / "proc"
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:  {1000 * 1024} kB\n")
    return folder


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_without_control_groups_it_is_what_the_machine_has(proc: Path, tmp_path: Path) -> None:
    assert available_ram_bytes(proc=proc, cgroups=tmp_path / "none") == 1000 * MIB


def test_here_it_is_positive_and_below_what_is_installed() -> None:
    assert 0 < available_ram_bytes() < 1 << 50


def test_a_limit_of_version_2_leaves_what_is_not_used_with_cache_counted_as_free(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/job/task\n")
    group = tmp_path / "cgroups" / "job" / "task"
    stat = f"anon 5\ninactive_file {50 * MIB}\nactive_file 7\n"
    write(group, memory__max=f"{300 * MIB}\n", memory__current=f"{120 * MIB}\n", memory__stat=stat)
    write(group.parent, memory__max="max\n", memory__current=f"{999 * MIB}\n", memory__stat=stat)
    assert available_ram_bytes(proc=proc, cgroups=tmp_path / "cgroups") == 230 * MIB


def test_the_tightest_group_on_the_way_up_counts(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/job/task\n")
    group = tmp_path / "cgroups" / "job" / "task"
    write(group, memory__max=f"{300 * MIB}", memory__current="0", memory__stat="")
    write(group.parent, memory__max=f"{500 * MIB}", memory__current=f"{490 * MIB}", memory__stat="")
    assert available_ram_bytes(proc=proc, cgroups=tmp_path / "cgroups") == 10 * MIB


def test_a_limit_of_version_1_counts_as_well(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("5:cpu:/\n4:memory:/job\n0::/\n")
    write(
        tmp_path / "cgroups" / "memory" / "job",
        memory__limit_in_bytes=f"{400 * MIB}",
        memory__usage_in_bytes=f"{300 * MIB}",
        memory__stat=f"inactive_file 1\ntotal_inactive_file {20 * MIB}\n",
    )
    # The root's limit of version 1 is a number too large to mean anything.
    root = tmp_path / "cgroups" / "memory"
    write(root, memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="0", memory__stat="")
    assert available_ram_bytes(proc=proc, cgroups=tmp_path / "cgroups") == 120 * MIB


def test_inside_a_container_the_mounted_root_is_this_group(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/not/visible/here\n")
    write(tmp_path / "cgroups", memory__max=f"{64 * MIB}", memory__current=f"{70 * MIB}", memory__stat="")
    assert available_ram_bytes(proc=proc, cgroups=tmp_path / "cgroups") == 0
