"""LoRA SFT of checkpoints that do not fit, whole process inside a memory limit that the kernel enforces.

    python -m benchmarks.sft_memory --root /nvme/checkpoints [--job 1.1b-2GiB ...]

Without --job all run; the 6.7B checkpoint takes 13.5 GB of disk. A job that exceeds its limit is killed, and reported.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.harness import Value, emit, emit_skip, last_json, run_module, sample
from benchmarks.memory_limit import LimitUnavailable, Outcome
from benchmarks.sft_job import Job
from offload.budget import format_bytes, parse_bytes

BENCHMARK = "sft_memory"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A job and its limit."""

    shape: str
    limit: str
    device_budget: str
    """What the limit leaves for the model once the frameworks are in; `lowmem.plan` prints the smallest that works."""
    batch_size: int = 1
    num_steps: int = 2


CASES = {
    "1.1b-2GiB": Case(shape="1.1b", limit="2GiB", device_budget="1200MiB"),
    "1.1b-1.6GiB": Case(shape="1.1b", limit="1.6GiB", device_budget="smallest"),
    "1.1b-batch8-2.75GiB": Case(shape="1.1b", limit="2.75GiB", device_budget="1700MiB", batch_size=8),
    "6.7b-4.5GiB": Case(shape="6.7b", limit="4.5GiB", device_budget="3500MiB", num_steps=1),
}
NUM_WARMUP = 1


def measure(name: str, case: Case, *, root: Path) -> float | None:
    """Run one case and print its result; the median step in seconds, or None if it did not end."""
    folder = ensure_checkpoint(case.shape, root=root)
    job = Job(
        folder=folder,
        mode="streamed",
        batch_size=case.batch_size,
        num_steps=case.num_steps,
        device_budget=case.device_budget,
    )
    try:
        outcome = run_module(
            "benchmarks.sft_job", job.arguments(), limit_bytes=parse_bytes(case.limit), echo_errors=True
        )
    except LimitUnavailable as error:
        emit_skip(BENCHMARK, name, str(error))
        return None
    sizes: dict[str, Value] = {
        "shape": case.shape,
        "num_parameters": SHAPES[case.shape].num_parameters,
        "checkpoint_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "batch_size": job.batch_size,
        "seq_len": job.seq_len,
        "rank": job.rank,
        "device_budget": case.device_budget,
        "host_budget": job.host_budget,
    }
    return _report(name, case, outcome, sizes=sizes)


def _report(name: str, case: Case, outcome: Outcome, *, sizes: dict[str, Value]) -> float | None:
    memory: dict[str, Value] = {
        "limit_bytes": parse_bytes(case.limit),
        "peak_group_bytes": outcome.peak_bytes,
        "peak_rss_bytes": outcome.peak_rss_bytes,
        "num_oom_kills": outcome.num_oom_kills,
    }
    if outcome.returncode != 0:
        failed = f"killed at {case.limit}" if outcome.num_oom_kills else f"exit status {outcome.returncode}"
        emit(BENCHMARK, name, completed=False, failed=failed, sizes=sizes, memory=memory)
        return None
    report = last_json(outcome.output)
    step_s = report["step_s"]
    assert isinstance(step_s, list)
    steps = sample(step_s, num_warmup=min(NUM_WARMUP, len(step_s) - 1))
    emit(
        BENCHMARK,
        name,
        completed=True,
        sizes=sizes,
        memory=memory,
        step_s=steps.to_dict(),
        losses=report["losses"],
        disk_read_bytes=report["disk_read_bytes"],
        load_s=report["load_s"],
        plan=report["plan"],
    )
    return steps.median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "lowmem-checkpoints")
    parser.add_argument("--job", choices=CASES, action="append", help="again for several; all if not given")
    parser.add_argument("--limit", help="another limit than the case's, to find how far down it goes")
    parser.add_argument("--device-budget", help="another device budget than the case's")
    arguments = parser.parse_args()
    medians: dict[str, float | None] = {}
    for name in arguments.job or CASES:
        case = CASES[name]
        changes = {"limit": arguments.limit, "device_budget": arguments.device_budget}
        case = replace(case, **{field: value for field, value in changes.items() if value})
        print(f"{name}: limit {format_bytes(parse_bytes(case.limit))}", file=sys.stderr)
        medians[name] = measure(name, case, root=arguments.root)
    one, eight = medians.get("1.1b-2GiB"), medians.get("1.1b-batch8-2.75GiB")
    if one and eight:
        emit(BENCHMARK, "1.1b-batch8-over-batch1", step_ratio=eight / one)
    if not all(medians.values()):
        sys.exit(json.dumps({"failed_or_skipped": [name for name, median in medians.items() if not median]}))


if __name__ == "__main__":
    main()
