"""Step time of streamed, resident and plain training, steps taken in turn within one run.

    python -m benchmarks.sft_step_time --root /nvme/checkpoints [--shape 1.1b] [--steps 5]

"resident" is the same code with every block kept; "plain" is transformers, PEFT and TRL with gradient checkpointing.
All three train at the same time, one step each in turn, so memory must hold two whole models: 16 GiB for 1.1B.
"""

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import get_args

from benchmarks.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.harness import emit, sample
from benchmarks.lockstep import LockstepJob
from benchmarks.sft_job import Job, Mode

BENCHMARK = "sft_step_time"
NUM_WARMUP = 1


def measure(job: Job, *, shape: str, modes: list[Mode]) -> None:
    """Run the modes in turn and print one result each, then the streamed step over the others'."""
    jobs = {mode: Job(**{**vars(job), "mode": mode}) for mode in modes}
    step_s: dict[str, list[float]] = {mode: [] for mode in modes}
    reports = {}
    with contextlib.ExitStack() as stack:
        children = {mode: stack.enter_context(LockstepJob(job)) for mode, job in jobs.items()}
        for _ in range(job.num_steps):
            for mode, child in children.items():
                step_s[mode].append(child.step())
        for mode, child in children.items():
            reports[mode] = child.finish()
    samples = {mode: sample(values, num_warmup=NUM_WARMUP) for mode, values in step_s.items()}
    case = f"{shape}-batch{job.batch_size}x{job.seq_len}"
    for mode in modes:
        emit(
            BENCHMARK,
            f"{case}-{mode}",
            step_s=samples[mode].to_dict(),
            losses=reports[mode]["losses"],
            peak_rss_bytes=reports[mode]["peak_rss_bytes"],
            disk_read_bytes=reports[mode]["disk_read_bytes"],
            device_budget=job.device_budget if mode == "streamed" else None,
        )
    if "streamed" in samples:
        others = {mode: other.median for mode, other in samples.items() if mode != "streamed"}
        ratios = {f"streamed_over_{mode}": samples["streamed"].median / median for mode, median in others.items()}
        emit(BENCHMARK, f"{case}-ratio", num_parameters=SHAPES[shape].num_parameters, **ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "lowmem-checkpoints")
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--steps", type=int, default=5, help=f"per mode, the first {NUM_WARMUP} of them for warm-up")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--device-budget", default="1200MiB", help="of the streamed run")
    parser.add_argument("--mode", choices=get_args(Mode), action="append", help="again for several; all if not given")
    arguments = parser.parse_args()
    job = Job(
        folder=ensure_checkpoint(arguments.shape, root=arguments.root),
        mode="streamed",
        batch_size=arguments.batch_size,
        seq_len=arguments.seq_len,
        num_steps=arguments.steps,
        device_budget=arguments.device_budget,
    )
    measure(job, shape=arguments.shape, modes=arguments.mode or list(get_args(Mode)))


if __name__ == "__main__":
    main()
