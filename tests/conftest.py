"""Test session: offline, seeded, single-threaded; `gpu` and `slow` tests are skipped with a reason."""

import gc
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before anything of Hugging Face is imported: no hub, and no caches outside this session.
_HF_HOME = Path(tempfile.mkdtemp(prefix="lowmem-tests-hf-"))
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=str(_HF_HOME),
    HF_DATASETS_CACHE=str(_HF_HOME / "datasets"),
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reason = os.environ.get(
        "LOWMEM_NO_GPU", "needs a CUDA device; runs on a simulated one with -p tests.fakecuda.plugin"
    )
    no_gpu = pytest.mark.skip(reason=reason)
    no_slow = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(no_slow)


def pytest_collection_finish() -> None:
    """No collection looks at what was imported any more: accelerate collects in every training, which took 0.35 s.

    What tests make is collected as ever.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    shutil.rmtree(_HF_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def _cache_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `lowmem bench` keeps and headers of hub repositories: one test's are not found by the next."""
    monkeypatch.setenv("XDG_CACHE_HOME", tempfile.mkdtemp(dir=_HF_HOME))


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Same seeds for every test, whatever ran before; tiny operators gain nothing from threads."""
    random.seed(0)
    torch.manual_seed(0)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
