"""How often a step reads the weights: bytes from storage per optimizer step, counted by the kernel, batch 1 and 32.

    python -m benchmarks.passes --root /nvme/checkpoints [--shape 350m] [--seq-len 64]

Nothing is cached (host budget 0), and with the smallest device budget nothing is resident, so one pass reads the bytes
of all L blocks; the block at the turnaround stays, so two passes read 2 L - 1 blocks.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.harness import emit, emit_skip, last_json, run_module, sample
from benchmarks.sft_job import Job, disk_read_bytes

BENCHMARK = "passes"
NUM_WARMUP = 1


def measure(job: Job, *, shape: str) -> None:
    """Run one job and print the bytes that a step read, in passes over the blocks."""
    case = f"{shape}-batch{job.batch_size}x{job.seq_len}"
    outcome = run_module("benchmarks.sft_job", job.arguments(), echo_errors=True)
    if outcome.returncode != 0:
        emit(BENCHMARK, case, failed=f"exit status {outcome.returncode}")
        sys.exit(1)
    report = last_json(outcome.output)
    read_bytes, step_s = report["disk_read_bytes"], report["step_s"]
    assert isinstance(read_bytes, list)
    assert isinstance(step_s, list)
    block_bytes = SHAPES[shape].num_block_parameters * torch.bfloat16.itemsize
    # The mean rather than the median: reading ahead moves whole blocks from one step's count to the step before.
    per_step_bytes = statistics.fmean(read_bytes[NUM_WARMUP:])
    emit(
        BENCHMARK,
        case,
        block_bytes=block_bytes,
        read_bytes_per_step=per_step_bytes,
        passes_per_step=per_step_bytes / block_bytes,
        read_bytes=read_bytes,
        step_s=sample(step_s, num_warmup=NUM_WARMUP).to_dict(),
        device_budget=job.device_budget,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "lowmem-checkpoints")
    parser.add_argument("--shape", choices=SHAPES, default="350m")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, action="append", help="again for several; 1 and 32 if not given")
    parser.add_argument("--device-budget", default="smallest")
    arguments = parser.parse_args()
    if disk_read_bytes() is None:
        emit_skip(BENCHMARK, arguments.shape, "no /proc/self/io: bytes from storage are counted on Linux only")
        return
    folder = ensure_checkpoint(arguments.shape, root=arguments.root)
    for batch_size in arguments.batch_size or (1, 32):
        job = Job(
            folder=folder,
            mode="streamed",
            batch_size=batch_size,
            seq_len=arguments.seq_len,
            num_steps=arguments.steps,
            device_budget=arguments.device_budget,
        )
        measure(job, shape=arguments.shape)


if __name__ == "__main__":
    main()
