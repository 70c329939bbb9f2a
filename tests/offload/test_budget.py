"""Budgets: sizes as people write them, refusals that name the field."""

import dataclasses
from pathlib import Path

import pytest

from offload.budget import Budget


def test_sizes_are_read_as_bytes_and_what_is_absent_stays_open() -> None:
    budget = Budget(device="2.5GiB", host=5000)
    assert budget.device_bytes == 5 * 2**29
    assert budget.host_bytes == 5000
    assert Budget().device_bytes is None
    assert Budget().host_bytes is None
    assert Budget(host="0").host_bytes == 0


def test_what_was_written_is_kept_for_printing() -> None:
    assert "device='900MiB'" in repr(Budget(device="900MiB"))
    assert Budget(device="900MiB") == Budget(device="900MiB")
    assert Budget(device="900MiB") != Budget(device="901MiB")


@pytest.mark.parametrize(("field", "size"), [("device", "lots"), ("host", "-1"), ("host", -1), ("device", "3 parsecs")])
def test_a_bad_size_is_refused_naming_the_field(field: str, size: str | int) -> None:
    with pytest.raises(ValueError, match=f"Budget.{field}"):
        Budget(**{field: size})


@pytest.mark.parametrize("size", [6, "6", "24", 1023])
def test_a_number_whose_unit_was_left_out_is_refused(size: int | str) -> None:
    with pytest.raises(ValueError, match=rf'Budget\.device: {size!r} is {size} bytes, .* "{size}GiB" for instance'):
        Budget(device=size)
    assert Budget(device=0).device_bytes == Budget(device="0").device_bytes == 0


def test_a_budget_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match="device"):
        Budget(device=0).device = 2  # type: ignore[misc]


def test_the_folder_may_be_text_and_need_not_exist(tmp_path: Path) -> None:
    assert Budget(disk=str(tmp_path / "later")).disk == tmp_path / "later"
    assert Budget(disk=tmp_path).disk == tmp_path
    assert Budget(disk="~/x").disk == Path.home() / "x"
    assert Budget().disk is None


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"Budget.disk: .*file is a file; give a folder"):
        Budget(disk=tmp_path / "file")
    with pytest.raises(ValueError, match=r"Budget\.disk: expected a folder, got an empty path"):
        Budget(disk="")


@pytest.mark.parametrize(
    ("given", "named", "remedy"),
    [
        (("6GiB",), {}, r"Budget\(device='6GiB'\), or host= for RAM"),
        ((), {"ram": "6GiB"}, r"Budget\(ram='6GiB'\): write host='6GiB'"),
        ((), {"vram": 6 << 30}, r"write device=6442450944"),
        ((), {"folder": "/x"}, r"write disk='/x'"),
        ((), {"size": 1}, r"Budget\(size=1\): it has device=, host= \(RAM\) and disk="),
    ],
)
def test_what_a_budget_does_not_have_is_one_sentence_with_its_name(
    given: tuple[object, ...], named: dict[str, object], remedy: str
) -> None:
    with pytest.raises(TypeError, match=remedy):
        Budget(*given, **named)
