"""Page-locked memory: doctor tries it, and what the driver refuses is said."""

from __future__ import annotations

import pytest
import torch

from lowmem.doctor import examine
from offload import StagingBuffer

pytestmark = pytest.mark.gpu


@pytest.fixture
def _driver_that_pins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_name() != "Simulated GPU":
        pytest.skip("a real driver cannot be told to refuse page-locked memory")
    monkeypatch.setenv("FAKECUDA_NO_PIN", "1")


def test_doctor_says_that_the_driver_locks_memory() -> None:
    (check,) = [check for check in examine(None) if check.name == "locked memory"]
    assert check.finding.startswith("the driver locks 256")
    assert not check.remedy


@pytest.mark.usefixtures("_driver_that_pins_nothing")
def test_doctor_says_that_the_driver_refuses_and_what_to_do() -> None:
    (check,) = [check for check in examine(None) if check.name == "locked memory"]
    assert check.finding.startswith("the driver refuses 256")
    assert "--ulimit memlock=-1" in check.remedy
    assert not check.is_broken


@pytest.mark.usefixtures("_driver_that_pins_nothing")
def test_a_buffer_that_could_not_be_locked_says_so_with_its_size_and_serves() -> None:
    with pytest.warns(UserWarning, match=r"did not page-lock 3.00 MiB of host memory .*lowmem doctor"):
        buffer = StagingBuffer(3 << 20, pin=True)
    with buffer:
        assert not buffer.tensor.is_pinned()
        assert torch.equal(buffer.tensor.fill_(3).cuda().cpu(), buffer.tensor)
