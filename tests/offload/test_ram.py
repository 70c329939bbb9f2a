"""Available RAM: the tightest of the machine and the control groups of either version."""

from pathlib import Path

import pytest

from offload.budget import ControlGroup, available_ram_bytes, control_groups, installed_ram_bytes

MIB = 1 << 20


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A machine with 1000 MiB available."""
    folder = tmp_path / "proc"
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:  {1000 * 1024} kB\n")
    groups = tmp_path / "cgroups"
    (folder / "self" / "mountinfo").write_text(
        f"31 23 0:28 / {groups} rw - cgroup2 cgroup2 rw\n35 31 0:32 / {groups}/memory rw - cgroup cgroup rw,memory\n"
    )
    return folder


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_without_control_groups_it_is_what_the_machine_has(proc: Path, tmp_path: Path) -> None:
    assert available_ram_bytes(proc=proc) == 1000 * MIB


def test_here_it_is_positive_and_below_what_is_installed() -> None:
    assert 0 < available_ram_bytes() < 1 << 50


def test_a_limit_of_version_2_leaves_what_is_not_used_with_cache_counted_as_free(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/job/task\n")
    group = tmp_path / "cgroups" / "job" / "task"
    stat = f"anon 5\ninactive_file {50 * MIB}\nactive_file 7\n"
    write(group, memory__max=f"{300 * MIB}\n", memory__current=f"{120 * MIB}\n", memory__stat=stat)
    write(group.parent, memory__max="max\n", memory__current=f"{999 * MIB}\n", memory__stat=stat)
    assert available_ram_bytes(proc=proc) == 230 * MIB


def test_the_tightest_group_on_the_way_up_counts(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/job/task\n")
    group = tmp_path / "cgroups" / "job" / "task"
    write(group, memory__max=f"{300 * MIB}", memory__current="0", memory__stat="")
    write(group.parent, memory__max=f"{500 * MIB}", memory__current=f"{490 * MIB}", memory__stat="")
    assert available_ram_bytes(proc=proc) == 10 * MIB


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
    assert available_ram_bytes(proc=proc) == 120 * MIB


def test_inside_a_container_the_mounted_root_is_this_group(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/not/visible/here\n")
    write(tmp_path / "cgroups", memory__max=f"{64 * MIB}", memory__current=f"{70 * MIB}", memory__stat="")
    assert available_ram_bytes(proc=proc) == 0


V1_UNLIMITED = "9223372036854771712"


def tightest(proc: Path) -> ControlGroup:
    return min(control_groups(proc), key=lambda group: group.limit_bytes or 1 << 62)


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def v1_files(own_limit: str, parent_limit: str) -> dict[str, str]:
    return {
        "proc/self/cgroup": "9:name=systemd:/\n4:memory:/jobs/mine\n1:cpu,cpuacct:/jobs/mine\n0::/\n",
        "sys/jobs/mine/memory.usage_in_bytes": "1000\n",
        "sys/jobs/mine/memory.limit_in_bytes": own_limit + "\n",
        "sys/jobs/memory.usage_in_bytes": "3000\n",
        "sys/jobs/memory.limit_in_bytes": parent_limit + "\n",
        "sys/memory.usage_in_bytes": "9000\n",
        "sys/memory.limit_in_bytes": V1_UNLIMITED + "\n",
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
    write_tree(tmp_path, {"proc/self/mountinfo": mounts})
    group = tightest(tmp_path / "proc")
    assert (group.path, group.limit_bytes, group.usage_bytes) == (tmp_path / folder, limit_bytes, usage_bytes)


def test_v2_group_of_a_container_is_found_below_the_mounts_root(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/docker/abc/job\n",
        "proc/self/mountinfo": f"30 29 0:26 /docker/abc {tmp_path}/sys rw,nosuid shared:4 - cgroup2 x rw,nsdelegate\n",
        "sys/job/memory.current": "700\n",
        "sys/job/memory.max": "max\n",
        "sys/memory.current": "800\n",
        "sys/memory.max": "5000\n",
    }
    write_tree(tmp_path, files)
    group = tightest(tmp_path / "proc")
    assert (group.path, group.limit_bytes, group.usage_bytes) == (tmp_path / "sys", 5000, 800)


def test_without_control_groups_there_are_none(tmp_path: Path) -> None:
    assert control_groups(tmp_path) == ()


def test_what_is_installed_is_the_machines_or_a_control_groups_limit(proc: Path, tmp_path: Path) -> None:
    assert installed_ram_bytes(proc=proc) == 99999999 * 1024
    (proc / "self" / "cgroup").write_text("0::/job\n")
    write(tmp_path / "cgroups" / "job", memory__max=f"{300 * MIB}", memory__current=f"{120 * MIB}", memory__stat="")
    assert installed_ram_bytes(proc=proc) == 300 * MIB
    (proc / "meminfo").unlink()
    assert 0 < installed_ram_bytes(proc=proc) <= 300 * MIB
    assert available_ram_bytes() <= installed_ram_bytes()
