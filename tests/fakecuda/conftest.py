"""How late copies of the simulated GPU arrive, for tests of what must not wait for them, or must."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def late_copies() -> Iterator[None]:
    """Copies that take long: what the host has seen to be over orders what comes after it, and is no race any more."""
    if torch.cuda.get_device_name() != "Simulated GPU":
        pytest.skip("a real GPU does not report races")
    from tests.fakecuda import simulated_gpu

    simulated_gpu.set_lag(30.0)  # the plugin sets it back
    yield
    torch.cuda.synchronize()  # before the memory goes to another test
