"""Two ranks on two cores against one rank on one core: tokens per second, bytes from disk, memory, in one run.

    python -m benchmarks.processes --root ~/.cache/lowmem-bench [--shape 350m] [--steps 4]

Cases: streamed with few tokens (the disk limits), streamed with many (computing limits), kept in RAM. Each is a loop of
forward, backward and SGD on a LoRA under DDP, started by torchrun. Memory is what the kernel says of the mappings:
shared pages are divided among those who map them (PSS), so that the sum over ranks counts each page once.
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

from benchmarks.checkpoints import ensure_checkpoint
from benchmarks.harness import ROOT, Value, child_environment, emit, sample

NUM_WARMUP = 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """What each rank does in a step."""

    batch: int
    seq_len: int
    budget: str
    """Of RAM for blocks, activations and all else of one rank."""


CASES = {
    "disk": Case(batch=1, seq_len=32, budget="0"),
    "compute": Case(batch=2, seq_len=256, budget="0"),
    "kept": Case(batch=1, seq_len=32, budget="12GiB"),
}


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
    from dataclasses import replace

    import torch.distributed as dist
    from peft import LoraConfig, get_peft_model
    from torch.nn.parallel import DistributedDataParallel

    import lowmem
    from lowmem.streaming.runtime import runtime_of

    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    budget = lowmem.Budget(device=case.budget, host="0")
    plan = lowmem.plan(folder, batch_size=case.batch, seq_len=case.seq_len, budget=budget, device="cpu")
    if not plan.fits:
        plan = replace(plan, device_budget_bytes=8 << 30)
    base = lowmem.from_pretrained(folder, plan=plan)
    model: torch.nn.Module = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    dist.init_process_group("gloo")
    if size > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1)
    ids = torch.randint(0, 500, (case.batch, case.seq_len), generator=torch.Generator().manual_seed(rank))
    times, reads = [], []
    for _ in range(num_steps + NUM_WARMUP):
        dist.barrier()
        start_s, before = time.perf_counter(), read_bytes()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        times.append(time.perf_counter() - start_s)
        reads.append(read_bytes() - before)
    dist.barrier()
    held = memory_bytes()
    dist.barrier()
    blocks = sum(streamed.spec.nbytes for streamed in runtime_of(base).blocks)
    result = {"times_s": times, "reads": reads, "memory": held, "base_bytes": blocks}
    (output / f"rank{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def measure(folder: Path, name: str, num_ranks: int, *, num_steps: int) -> dict[str, Value]:
    """Run a case with so many ranks."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_ranks)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "benchmarks.processes"]
        command += ["--rank-job", name, "--folder", str(folder), "--output", scratch, "--steps", str(num_steps)]
        subprocess.run(command, cwd=ROOT, env=child_environment(), check=True)
        ranks = [json.loads((Path(scratch) / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]
    case = CASES[name]
    slowest = [max(times) for times in zip(*(one["times_s"] for one in ranks), strict=True)]
    per_step = [sum(reads) for reads in zip(*(one["reads"] for one in ranks), strict=True)]
    step = sample(slowest, num_warmup=NUM_WARMUP)
    return {
        "num_ranks": num_ranks,
        "step_s": step.to_dict(),
        "tokens_per_s": num_ranks * case.batch * case.seq_len / step.median,
        "read_bytes_per_step": sample(per_step, num_warmup=NUM_WARMUP).median,
        "pss_bytes": sum(one["memory"]["all"] for one in ranks),
        "pss_of_shared_blocks_bytes": sum(one["memory"]["blocks"] for one in ranks),
        "base_bytes": ranks[0]["base_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="where checkpoints are made")
    parser.add_argument("--shape", default="350m")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--case", action="append", choices=CASES, help="all of them if not given")
    parser.add_argument("--rank-job", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_job:
        rank_job(options.folder, CASES[options.rank_job], options.output, num_steps=options.steps)
        return
    folder = ensure_checkpoint(options.shape, root=options.root)
    for name in options.case or CASES:
        one, two = (measure(folder, name, num, num_steps=options.steps) for num in (1, 2))
        speedup = float(two["tokens_per_s"]) / float(one["tokens_per_s"])  # type: ignore[arg-type]
        emit("processes", f"{options.shape}-{name}", one=one, two=two, speedup=speedup)


if __name__ == "__main__":
    main()
