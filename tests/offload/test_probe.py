import os
from pathlib import Path

import pytest
import torch

from offload.errors import SourceError, WriteError
from offload.probe import probe_compute, probe_disk, probe_scratch

MIB = 1 << 20


def test_probe_reads_within_its_limits_writes_nothing_and_returns_the_best(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file, nbytes in zip(files, (3 * MIB + 5, 9 * MIB + 1), strict=True):
        file.write_bytes(os.urandom(nbytes))
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in files}
    rate = probe_disk(files, max_s=60, max_bytes=64 * MIB)
    settings = [(one.num_threads, one.request_bytes // MIB) for one in rate.measured]
    assert settings[:3] == [(1, 4), (2, 4), (4, 4)]
    fastest = max(one.read_bytes_per_s for one in rate.measured)
    assert fastest / 1.05 <= rate.read_bytes_per_s <= fastest
    assert (rate.num_threads, rate.request_bytes // MIB) in settings
    assert 1e6 < rate.read_bytes_per_s < 1e12
    assert before == {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in tmp_path.iterdir()}


def test_every_setting_is_tried_where_time_allows(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(os.urandom(20 * MIB))
    rate = probe_disk([file], max_s=600)
    settings = {(one.num_threads, one.request_bytes // MIB) for one in rate.measured}
    assert {(1, 4), (2, 4), (4, 4), (8, 4)} < settings
    # 16 MiB with eight threads would keep 128 MiB in flight, more than a short probe can read.
    assert {request for _, request in settings} in ({1, 4, 16}, {1, 4})


def test_probe_on_a_slow_disk_stops_after_the_first_setting(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(os.urandom(MIB))
    assert len(probe_disk([file], max_s=1e-9).measured) == 1


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097])
def test_tiny_files_are_enough_for_a_probe(tmp_path: Path, nbytes: int) -> None:
    file = tmp_path / "a"
    file.write_bytes(bytes(nbytes))
    assert probe_disk([file], max_s=0.01).read_bytes_per_s > 0


def test_files_without_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(SourceError, match="empty: size: there are no bytes to read; give a larger file"):
        probe_disk([tmp_path / "empty"])
    with pytest.raises(SourceError, match="absent: file: No such file or directory; check the path"):
        probe_disk([tmp_path / "absent"])


def test_compute_rate_is_measured_without_touching_the_random_numbers() -> None:
    state = torch.random.get_rng_state()
    assert 1e6 < probe_compute(torch.float32, "cpu", max_s=0.05) < 1e15
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(ValueError, match=r"expected a floating-point dtype, got torch\.int8"):
        probe_compute(torch.int8, "cpu")


def test_what_was_written_is_read_back_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "scratch"
    assert probe_scratch(folder, max_bytes=3 << 25) > 1e6
    assert [*folder.iterdir()] == []


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    with pytest.raises(WriteError, match="give a folder that can be written"):
        probe_scratch(file / "scratch")
