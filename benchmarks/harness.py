"""Results of measurements: one JSON line each, with the machine, the versions, the sizes and the spread."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from benchmarks.memory_limit import Outcome, run_limited

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("lowmem", "torch", "transformers", "trl", "peft", "accelerate", "safetensors")

Value = str | int | float | bool | None | Sequence["Value"] | Mapping[str, "Value"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Repeated measurements of one quantity, warm-up left out."""

    values: tuple[float, ...]
    num_warmup: int

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def to_dict(self) -> dict[str, Value]:
        return {
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "num_repeats": len(self.values),
            "num_warmup": self.num_warmup,
        }


def sample(values: Sequence[float], *, num_warmup: int) -> Sample:
    """Drop the first `num_warmup` of a series.

    Raises:
        ValueError: Nothing would be left.
    """
    if len(values) <= num_warmup:
        raise ValueError(f"{len(values)} measurements leave none after {num_warmup} of warm-up")
    return Sample(values=tuple(values[num_warmup:]), num_warmup=num_warmup)


def emit(benchmark: str, case: str, **fields: Value) -> str:
    """Print one result as a JSON line, and return it."""
    line = {"benchmark": benchmark, "case": case, "at": datetime.now(UTC).isoformat(timespec="seconds"), **fields}
    text = json.dumps({**line, "hardware": hardware(), "versions": versions()})
    print(text, flush=True)
    return text


def emit_skip(benchmark: str, case: str, reason: str) -> None:
    """Print that a result could not be had, and why."""
    emit(benchmark, case, skipped=reason)


def hardware() -> dict[str, Value]:
    """Processor, cores this process may use, memory, and the accelerator's name if there is one."""
    import torch

    return {
        "cpu": _cpu_name(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
    }


def versions() -> dict[str, Value]:
    """Versions of Python and of what the measured code stands on; None for what is not installed."""
    found: dict[str, Value] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def run_module(
    module: str, arguments: Sequence[str], *, limit_bytes: int | None = None, echo_errors: bool = False
) -> Outcome:
    """Run `python -m module arguments` from the project's root, offline, inside a limit if one is given.

    Raises:
        LimitUnavailable: As `run_limited`.
    """
    command = [sys.executable, "-m", module, *arguments]
    stderr = None if echo_errors else subprocess.DEVNULL
    return run_limited(command, limit_bytes=limit_bytes, env=child_environment(), stderr=stderr)


def child_environment() -> dict[str, str]:
    """Our environment, with this project importable and the hub left alone."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def last_json(output: str) -> dict[str, Value]:
    """The last line of a child's output that is a JSON object.

    Raises:
        ValueError: There is none.
    """
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            found: dict[str, Value] = json.loads(line)
            return found
    raise ValueError(f"the child printed no JSON object; its output ends with {output[-300:]!r}")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
