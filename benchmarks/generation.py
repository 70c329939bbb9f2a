"""Generation with a model that does not fit, whole process inside a memory limit: tokens per second by batch size.

    python -m benchmarks.generation --root /nvme/checkpoints [--shape 1.1b] [--limit 1.75GiB]

Each token is a pass over all streamed weights, so the disk bounds how long it takes: the bytes that a token reads (as
the kernel counts them) over the rate of plain O_DIRECT reads of the same files, measured in turn with the generations
in the same process. The answers are compared with those of the resident model, token by token.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.generation_job import GenerationJob
from benchmarks.harness import Value, emit, emit_skip, last_json, run_module, sample
from benchmarks.memory_limit import LimitUnavailable, Outcome
from benchmarks.sft_job import disk_read_bytes
from offload.budget import parse_bytes

BENCHMARK = "generation"
NUM_WARMUP = 1


def measure(job: GenerationJob, *, shape: str, limit: str, compare: bool) -> bool:
    """Generate inside the limit, and with everything resident for comparison; print one result per batch size."""
    name = f"{shape}-{limit}"
    try:
        outcome = run_module(
            "benchmarks.generation_job", job.arguments(), limit_bytes=parse_bytes(limit), echo_errors=True
        )
    except LimitUnavailable as error:
        emit_skip(BENCHMARK, name, str(error))
        return False
    memory: dict[str, Value] = {
        "limit_bytes": parse_bytes(limit),
        "peak_group_bytes": outcome.peak_bytes,
        "peak_rss_bytes": outcome.peak_rss_bytes,
        "num_oom_kills": outcome.num_oom_kills,
    }
    if outcome.returncode != 0:
        failed = f"killed at {limit}" if outcome.num_oom_kills else f"exit status {outcome.returncode}"
        emit(BENCHMARK, name, completed=False, failed=failed, memory=memory)
        return False
    report = last_json(outcome.output)
    resident = resident_tokens(job) if compare else None
    num_bytes = sum(file.stat().st_size for file in job.folder.glob("*.safetensors"))
    sizes: dict[str, Value] = {
        "num_parameters": SHAPES[shape].num_parameters,
        "checkpoint_bytes": num_bytes,
        "device_budget": job.device_budget,
        "num_prompt_tokens": job.num_prompt_tokens,
        "num_new_tokens": job.num_new_tokens,
    }
    return _report(name, report, resident=resident, memory=memory, sizes=sizes)


def resident_tokens(job: GenerationJob) -> dict[int, dict[str, Any]] | None:
    """What the model in memory, without a limit, answers at each batch size."""
    whole = GenerationJob(**{**vars(job), "mode": "resident"})
    outcome: Outcome = run_module("benchmarks.generation_job", whole.arguments())
    if outcome.returncode != 0:
        return None
    generations = last_json(outcome.output)["generations"]
    assert isinstance(generations, list)
    return {entry["batch_size"]: entry for entry in generations}


def _report(
    name: str,
    report: dict[str, Value],
    *,
    resident: dict[int, dict[str, Any]] | None,
    memory: dict[str, Value],
    sizes: dict[str, Value],
) -> bool:
    generations, rates = report["generations"], report["raw_bytes_per_s"]
    assert isinstance(generations, list)
    assert isinstance(rates, list)
    first_per_s = 0.0
    all_equal = True
    for index, entry in enumerate(generations):
        token = sample(entry["token_s"], num_warmup=NUM_WARMUP)
        # Measured right before and right after this generation.
        raw_bytes_per_s = statistics.fmean(rates[index : index + 2])
        limit_s = entry["read_bytes_per_token"] / raw_bytes_per_s
        batch_size = entry["batch_size"]
        per_s = batch_size / token.median
        first_per_s = first_per_s or per_s / batch_size
        other = resident.get(batch_size) if resident else None
        equal = None if other is None else other["tokens"] == entry["tokens"]
        all_equal = all_equal and equal is not False
        emit(
            BENCHMARK,
            f"{name}-batch{batch_size}",
            completed=True,
            batch_size=batch_size,
            tokens_per_s=per_s,
            token_s=token.to_dict(),
            prompt_s=entry["prompt_s"],
            read_bytes_per_token=entry["read_bytes_per_token"],
            raw_bytes_per_s=raw_bytes_per_s,
            share_of_io_limit=limit_s / token.median,
            tokens_per_s_over_batch1=per_s / first_per_s,
            equals_resident=equal,
            resident_token_s=None if other is None else sample(other["token_s"], num_warmup=NUM_WARMUP).to_dict(),
            sizes=sizes,
            memory=memory,
            raw_setting=report["raw_setting"],
            plan=report["plan"],
        )
    return all_equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "lowmem-checkpoints")
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--limit", default="1.75GiB")
    parser.add_argument("--device-budget", default=GenerationJob.device_budget)
    parser.add_argument("--batch-sizes", default=GenerationJob.batch_sizes)
    parser.add_argument("--tokens", type=int, default=GenerationJob.num_new_tokens, help="new tokens per sequence")
    parser.add_argument("--no-resident", action="store_true", help="leave the comparison with the resident model out")
    arguments = parser.parse_args()
    if disk_read_bytes() is None:
        emit_skip(BENCHMARK, arguments.shape, "O_DIRECT and /proc/self/io exist on Linux only")
        return
    job = GenerationJob(
        folder=ensure_checkpoint(arguments.shape, root=arguments.root),
        device_budget=arguments.device_budget,
        batch_sizes=arguments.batch_sizes,
        num_new_tokens=arguments.tokens,
    )
    if not measure(job, shape=arguments.shape, limit=arguments.limit, compare=not arguments.no_resident):
        sys.exit(1)


if __name__ == "__main__":
    main()
