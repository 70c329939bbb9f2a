"""`pytest -p tests.fakecuda.plugin -m gpu`: tests marked `gpu` run on the simulated GPU; a race fails its test.

Where it cannot be had (no compiler, a torch with a GPU of its own), the session goes on without and the tests that need
it are skipped with the reason. FAKECUDA_LAG_MS sets how late copies are.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_built = subprocess.run([sys.executable, "-m", "tests.fakecuda.build"], capture_output=True, text=True, check=False)
if _built.returncode == 0:
    from tests.fakecuda import simulated_gpu

    simulated_gpu.install(lag_ms=float(os.environ.get("FAKECUDA_LAG_MS", "1")))
    simulated_gpu.watch()
else:
    os.environ["LOWMEM_NO_GPU"] = (_built.stderr.strip().splitlines() or ["it could not be built"])[-1]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave files without a test marked gpu unread where only such tests are wanted: importing them takes longest."""
    if config.option.markexpr != "gpu" or not collection_path.match("test_*.py"):
        return None
    return True if b"mark.gpu" not in collection_path.read_bytes() else None


def pytest_configure(config: pytest.Config) -> None:
    if _built.returncode == 0:
        from tests.fakecuda.host_memory import watch_host_memory

        watch_host_memory()


@pytest.fixture(autouse=True)
def _no_race(request: pytest.FixtureRequest) -> Iterator[None]:
    if _built.returncode:
        yield
        return
    simulated_gpu.forget()
    lag_ns = simulated_gpu.simulator.lag_ns()
    yield
    simulated_gpu.simulator.set_lag(lag_ns)
    races = simulated_gpu.simulator.races()
    seen = [f"{what}  at {place}" for (kind, what, place) in simulated_gpu.places if kind == "race"]
    simulated_gpu.forget()
    if "racy" not in request.keywords:
        assert not races, "\n".join(["the simulated GPU saw a race:", *(seen or races)])
