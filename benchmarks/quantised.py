"""NF4 against bf16, both streamed, and against bitsandbytes in memory: step time, bytes read, memory of the process.

    python -m benchmarks.quantised --root /nvme/checkpoints [--shape 1.1b] [--batch-size 4] [--device-budget 900MiB]
        [--disk /nvme/scratch] [--limit 3.0GiB [--limited-budget smallest]]

The checkpoint is written at random (benchmarks.checkpoints), packed with `lowmem.pack`, and its packed folder is what
bitsandbytes loads too. What `lowmem bench` measures of both folders is kept under the root, and plans are made with it:
each line has the planned step beside the measured one. Steps of the jobs take turns. The smallest budget has sequences
cut into short chunks; more of it makes steps shorter. With --limit the streamed NF4 job runs once more inside a memory
limit that the kernel enforces.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import lowmem
from benchmarks.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.harness import Value, emit, emit_skip, last_json, run_module, sample
from benchmarks.lockstep import LockstepJob
from benchmarks.memory_limit import LimitUnavailable
from benchmarks.sft_job import Job
from lowmem.machines.bench import bench_lines
from offload.budget import parse_bytes

BENCHMARK = "quantised"
NUM_WARMUP = 1


def ensure_packed(base: Path, *, dtype: str) -> tuple[Path, float]:
    """The packed folder of a checkpoint, and the seconds it took to make (0 if an earlier run made it)."""
    folder = base.parent / f"{base.name}-nf4"
    start_s = time.perf_counter()
    existed = folder.is_dir()
    lowmem.pack(base, quantization="nf4", output=folder, device="cpu")
    # bitsandbytes computes in the dtype that the checkpoint names: all jobs in the same.
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_compute_dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder, 0.0 if existed else time.perf_counter() - start_s


def weight_file_bytes(folder: Path) -> int:
    """Bytes of the weight files of a checkpoint."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def planned(report: Mapping[str, Value], step_s: float) -> dict[str, Value]:
    """What a streamed job's plan said, and how the measured step compares; nothing for a job without one."""
    plan = report.get("plan")
    if not isinstance(plan, Mapping):
        return {}
    summary, choice = plan["summary"], plan["choice"]
    assert isinstance(summary, Mapping)
    assert isinstance(choice, Mapping)
    predicted_s = summary["step_s"]
    assert isinstance(predicted_s, float)
    said = {key: choice[key] for key in ("micro_batch", "chunk_tokens", "boundary_tier", "keeps_products")}
    return {
        "plan": {**said, "device_bytes": summary["device_bytes"], "host_bytes": summary["host_bytes"]},
        "planned_step_s": predicted_s,
        "over_planned": step_s / predicted_s,
    }


def compare(name: str, base: Path, packed: Path, *, job: Job, with_bitsandbytes: bool) -> None:
    """Steps of all jobs in turn, and one line for each of them."""
    jobs = {
        "bf16 streamed": job,
        "nf4 streamed": replace(job, folder=packed),
        **({"nf4 bitsandbytes": replace(job, folder=packed, mode="plain")} if with_bitsandbytes else {}),
    }
    running = {label: LockstepJob(one) for label, one in jobs.items()}
    steps: dict[str, list[float]] = {label: [] for label in jobs}
    try:
        for _ in range(job.num_steps):
            for label, child in running.items():
                steps[label].append(child.step())
        reports = {label: child.finish() for label, child in running.items()}
    finally:
        for child in running.values():
            child.__exit__(None, None, None)
    medians = {label: sample(seconds, num_warmup=NUM_WARMUP).median for label, seconds in steps.items()}
    for label, report in reports.items():
        reads = report["disk_read_bytes"]
        assert isinstance(reads, list)
        num_passes = 2
        # What a step writes and reads back comes from storage too.
        is_told = reads[-1] is not None and job.disk is None
        per_weight = reads[-1] / num_passes / SHAPES[name].num_block_parameters if is_told else None
        emit(
            BENCHMARK,
            f"{name} {label}",
            dtype=job.dtype,
            batch_size=job.batch_size,
            step_s=sample(steps[label], num_warmup=NUM_WARMUP).to_dict(),
            over_bf16=medians[label] / medians["bf16 streamed"],
            bytes_per_weight_and_pass=per_weight,
            peak_rss_bytes=report["peak_rss_bytes"],
            losses=report["losses"],
            checkpoint_bytes=weight_file_bytes(packed if label.startswith("nf4") else base),
            **planned(report, medians[label]),
        )


def limited(name: str, *, job: Job, limit: str) -> bool:
    """One job inside an enforced limit; whether it ended."""
    try:
        outcome = run_module("benchmarks.sft_job", job.arguments(), limit_bytes=parse_bytes(limit), echo_errors=True)
    except LimitUnavailable as error:
        emit_skip(BENCHMARK, f"{name} in {limit}", str(error))
        return False
    memory: dict[str, Value] = {
        "limit_bytes": parse_bytes(limit),
        "peak_group_bytes": outcome.peak_bytes,
        "num_oom_kills": outcome.num_oom_kills,
    }
    completed = outcome.returncode == 0
    report = last_json(outcome.output) if completed else {}
    steps_s = report.get("step_s", [])
    assert isinstance(steps_s, list)
    emit(
        BENCHMARK,
        f"{name} in {limit}",
        completed=completed,
        memory=memory,
        batch_size=job.batch_size,
        dtype=job.dtype,
        steps_s=steps_s,
        disk_read_bytes=report.get("disk_read_bytes"),
        peak_rss_bytes=report.get("peak_rss_bytes"),
        **(planned(report, sample(steps_s, num_warmup=NUM_WARMUP).median) if completed else {}),
    )
    return completed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "lowmem-checkpoints")
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--num-steps", type=int, default=3)
    parser.add_argument("--dtype", default="float32", help="what all jobs compute in")
    parser.add_argument("--device-budget", default="smallest", help="of both streamed jobs")
    parser.add_argument("--disk", type=Path, help="folder for what a step of a streamed job writes and reads back")
    parser.add_argument("--limit", help="run the NF4 job inside this much memory too")
    parser.add_argument("--limited-budget", default="smallest", help="what that job's model may hold")
    parser.add_argument("--only-limited", action="store_true", help="leave the comparison out")
    parser.add_argument("--without-bitsandbytes", action="store_true", help="where its model does not fit into memory")
    options = parser.parse_args()
    # Rates of these folders on this machine, apart from what its user has measured.
    os.environ["XDG_CACHE_HOME"] = str(options.root / "rates")
    base = ensure_checkpoint(options.shape, root=options.root)
    packed, pack_s = ensure_packed(base, dtype=options.dtype)
    emit(
        BENCHMARK,
        f"{options.shape} packing",
        pack_s=pack_s,
        bytes_before=weight_file_bytes(base),
        bytes_after=weight_file_bytes(packed),
    )
    job = Job(
        folder=base,
        mode="streamed",
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        num_steps=options.num_steps,
        dtype=options.dtype,
        device_budget=options.device_budget,
        disk=options.disk,
    )
    for folder in (packed,) if options.only_limited else (base, packed):
        list(bench_lines(folder, device="cpu", dtype=options.dtype))
    if not options.only_limited:
        compare(options.shape, base, packed, job=job, with_bitsandbytes=not options.without_bitsandbytes)
    small = replace(job, folder=packed, device_budget=options.limited_budget)
    if options.limit and not limited(options.shape, job=small, limit=options.limit):
        sys.exit(1)


if __name__ == "__main__":
    main()
