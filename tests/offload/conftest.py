"""Tests that count threads count their own."""

import pytest

from tests.offload.own_threads import note


@pytest.fixture(autouse=True)
def _own_threads() -> None:
    note()
