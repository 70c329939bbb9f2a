"""Two ranks on two cores against one rank on one core: tokens per second, bytes from disk, memory, in one run.

    python -m benchmarks.processes --root ~/.cache/lowmem-bench [--shape 350m] [--steps 5]

Cases: "disk" (stored as fp32, so that nothing is converted; few tokens; streamed past the page cache), "compute" (many
tokens, weights kept in RAM), and between them "streamed" (many tokens) and "kept" (few). Each is a loop of forward,
backward and SGD on a LoRA under DDP, started by torchrun, each rank one thread of torch on a core of its own, with its
readers. Memory is what the kernel says of the mappings: shared pages are divided among those who map them (PSS), so
that the sum over ranks counts each page once. In the same run: what the disk gives plain reads of the same files.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.harness import ROOT, Value, child_environment, emit, emit_skip, sample
from benchmarks.raw_disk import best_setting, read_raw

NUM_WARMUP = 1
_CALIBRATION_BYTES = 256 << 20
_RAW_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class Case:
    """What each rank does in a step."""

    batch: int
    seq_len: int
    budget: str
    """Of RAM for blocks, activations and all else of one rank."""
    dtype: torch.dtype = torch.bfloat16
    """Of the stored weights; they are computed with in fp32."""


CASES = {
    "disk": Case(batch=1, seq_len=8, budget="0", dtype=torch.float32),
    "streamed": Case(batch=2, seq_len=256, budget="0"),
    "kept": Case(batch=1, seq_len=32, budget="12GiB"),
    "compute": Case(batch=2, seq_len=256, budget="12GiB"),
}


def stay_on_core(number: int) -> None:
    """Keep this process, the threads it has and those it will make, on one of the cores that it may use."""
    core = sorted(os.sched_getaffinity(0))[number]
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def read_bytes() -> int:
    """Bytes that this process has had from storage."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def memory_bytes() -> dict[str, int]:
    """This process's part of its pages, those of the shared blocks (memfd) apart."""
    found = {"blocks": 0, "all": 0}
    is_blocks = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            is_blocks = "lowmem-blocks" in line
        elif line.startswith("Pss:"):
            nbytes = int(line.split()[1]) * 1024
            found["all"] += nbytes
            found["blocks"] += nbytes if is_blocks else 0
    return found


def rank_job(folder: Path, case: Case, output: Path, *, num_steps: int) -> None:
    """What one rank does."""
    stay_on_core(int(os.environ["LOCAL_RANK"]))
    from dataclasses import replace

    import torch.distributed as dist
    from peft import LoraConfig, get_peft_model
    from torch.nn.parallel import DistributedDataParallel

    import lowmem
    from lowmem.streaming.runtime import runtime_of
    from offload import Scheduler

    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    budget = lowmem.Budget(device=case.budget, host="0")
    plan = lowmem.plan(folder, batch_size=case.batch, seq_len=case.seq_len, budget=budget, device="cpu")
    if not plan.fits:
        plan = replace(plan, device_budget_bytes=8 << 30)
    base = lowmem.from_pretrained(folder, plan=plan)
    scheduler = runtime_of(base).scheduler
    assert isinstance(scheduler, Scheduler)
    model: torch.nn.Module = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    dist.init_process_group("gloo")
    if size > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1)
    ids = torch.randint(0, 500, (case.batch, case.seq_len), generator=torch.Generator().manual_seed(rank))
    times, reads, stalls = [], [], []
    for _ in range(num_steps + NUM_WARMUP):
        dist.barrier()
        start_s, before, stall_s = time.perf_counter(), read_bytes(), scheduler.counters.stall_s
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        times.append(time.perf_counter() - start_s)
        reads.append(read_bytes() - before)
        stalls.append(scheduler.counters.stall_s - stall_s)
    dist.barrier()
    held = memory_bytes()
    dist.barrier()
    blocks = sum(streamed.spec.nbytes for streamed in runtime_of(base).blocks)
    result = {"times_s": times, "reads": reads, "stalls_s": stalls, "memory": held, "base_bytes": blocks}
    (output / f"rank{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def measure(folder: Path, name: str, num_ranks: int, *, num_steps: int) -> dict[str, Value]:
    """Run a case with so many ranks."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_ranks)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "benchmarks.processes"]
        command += ["--rank-job", name, "--folder", str(folder), "--output", scratch, "--steps", str(num_steps)]
        subprocess.run(command, cwd=ROOT, env=child_environment() | {"OMP_NUM_THREADS": "1"}, check=True)
        ranks = [json.loads((Path(scratch) / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]
    case = CASES[name]
    slowest = [max(times) for times in zip(*(one["times_s"] for one in ranks), strict=True)]
    per_step = [sum(reads) for reads in zip(*(one["reads"] for one in ranks), strict=True)]
    # Of the step that all wait for the same disk; where one waits for another, the longest is the step's.
    waited = [max(stalls) for stalls in zip(*(one["stalls_s"] for one in ranks), strict=True)]
    step, read = sample(slowest, num_warmup=NUM_WARMUP), sample(per_step, num_warmup=NUM_WARMUP)
    return {
        "num_ranks": num_ranks,
        "step_s": step.to_dict(),
        "tokens_per_s": num_ranks * case.batch * case.seq_len / step.median,
        "read_bytes_per_step": read.median,
        "read_bytes_per_s": read.median / step.median,
        "stall_s": sample(waited, num_warmup=NUM_WARMUP).median,
        "pss_bytes": sum(one["memory"]["all"] for one in ranks),
        "pss_of_shared_blocks_bytes": sum(one["memory"]["blocks"] for one in ranks),
        "base_bytes": ranks[0]["base_bytes"],
    }


def raw_bytes_per_s(folder: Path) -> float:
    """What plain reads of the same files get from the disk, by two cores."""
    files = sorted(folder.glob("*.safetensors"))
    return read_raw(files, best_setting(files, max_bytes=_CALIBRATION_BYTES), max_bytes=_RAW_BYTES).bytes_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="where checkpoints are made")
    parser.add_argument("--shape", default="350m", choices=SHAPES)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--case", action="append", choices=CASES, help="all of them if not given")
    parser.add_argument("--rank-job", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_job:
        rank_job(options.folder, CASES[options.rank_job], options.output, num_steps=options.steps)
        return
    if options.root is None:
        parser.error("--root: give a folder for the checkpoints")
    for name in options.case or CASES:
        if len(os.sched_getaffinity(0)) < 2:
            emit_skip("processes", f"{options.shape}-{name}", "two ranks need two cores")
            continue
        folder = ensure_checkpoint(options.shape, root=options.root, dtype=CASES[name].dtype)
        one, two = (measure(folder, name, num, num_steps=options.steps) for num in (1, 2))
        speedup = float(two["tokens_per_s"]) / float(one["tokens_per_s"])  # type: ignore[arg-type]
        raw = raw_bytes_per_s(folder)
        emit("processes", f"{options.shape}-{name}", one=one, two=two, speedup=speedup, raw_bytes_per_s=raw)


if __name__ == "__main__":
    main()
