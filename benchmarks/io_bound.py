"""The case that only the disk limits: an fp32 checkpoint (nothing to convert), 4 tokens, nothing cached.

    python -m benchmarks.io_bound --root /nvme/checkpoints [--shape 1.1b]

The rate at which weights arrive at their blocks over whole optimizer steps, two passes each, and the rate of what the
kernel counts as read (the ring saves some reads at each turn), against plain O_DIRECT reads of the same files, one of
each in turn within one run.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.harness import emit, emit_skip, sample
from benchmarks.lockstep import LockstepJob
from benchmarks.raw_disk import best_setting, read_raw
from benchmarks.sft_job import Job, disk_read_bytes

BENCHMARK = "io_bound"
NUM_WARMUP = 1
_CALIBRATION_BYTES = 512 << 20
_RAW_BYTES = 2 << 30
# Between steps the job still fills its ring; it must be done before the disk is measured alone.
_SETTLE_S = 1.0


def measure(job: Job, *, shape: str) -> None:
    """Take steps and raw reads in turn, and print both rates and their ratio."""
    files = sorted(job.folder.glob("*.safetensors"))
    setting = best_setting(files, max_bytes=_CALIBRATION_BYTES)
    raw_bytes_per_s: list[float] = []
    step_s: list[float] = []
    with LockstepJob(job) as child:
        for _ in range(job.num_steps):
            step_s.append(child.step())
            time.sleep(_SETTLE_S)
            raw_bytes_per_s.append(read_raw(files, setting, max_bytes=_RAW_BYTES).bytes_per_s)
        report = child.finish()
    read_bytes = report["disk_read_bytes"]
    assert isinstance(read_bytes, list)
    read_bytes_per_s = [nbytes / seconds for nbytes, seconds in zip(read_bytes, step_s, strict=True)]
    arrived = sample(read_bytes_per_s, num_warmup=NUM_WARMUP)
    plan = report["plan"]
    assert isinstance(plan, dict)
    streamed_bytes = sum(role["nbytes"] for role in plan["roles"] if role["role"] == "decoder blocks")
    visited = sample([2 * streamed_bytes / seconds for seconds in step_s], num_warmup=NUM_WARMUP)
    raw = sample(raw_bytes_per_s, num_warmup=NUM_WARMUP)
    emit(
        BENCHMARK,
        f"{shape}-float32-{job.seq_len}tokens",
        checkpoint_bytes=sum(file.stat().st_size for file in files),
        read_bytes_per_s=arrived.to_dict(),
        arrival_bytes_per_s=visited.to_dict(),
        raw_bytes_per_s=raw.to_dict(),
        raw_setting=vars(setting),
        read_over_raw=arrived.median / raw.median,
        arrival_over_raw=visited.median / raw.median,
        step_s=sample(step_s, num_warmup=NUM_WARMUP).to_dict(),
        read_bytes_per_step=statistics.fmean(read_bytes[NUM_WARMUP:]),
        device_budget=job.device_budget,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "lowmem-checkpoints")
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--device-budget", default="smallest")
    arguments = parser.parse_args()
    if disk_read_bytes() is None or sys.platform != "linux":
        emit_skip(BENCHMARK, arguments.shape, "O_DIRECT and /proc/self/io exist on Linux only")
        return
    job = Job(
        folder=ensure_checkpoint(arguments.shape, root=arguments.root, dtype=torch.float32),
        mode="streamed",
        seq_len=4,
        num_steps=arguments.steps,
        device_budget=arguments.device_budget,
    )
    measure(job, shape=arguments.shape)


if __name__ == "__main__":
    main()
