"""What a card says of lowmem, in about ten minutes: one JSON line per check, and a table to paste at the end.

    make gpu-check                  # or: python -m benchmarks.gpu_check --root /nvme/checkpoints [--only NAME ...]

Checks: the tests marked `gpu`; some of them under torch's sanitizer of streams; small steps on the card against the
CPU; what makes the host wait within a step; LoRA on a model that fits with transformers and PEFT alone, streamed from
RAM and from disk, and packed to NF4 against bitsandbytes; DoRA, and LoRA beside routed experts, against PEFT alone;
LoRA on blocks of a 70B model from disk in 8 GiB; every weight of a model trained in RAM, and of an 8B-shaped one with
its state on disk; LoRA on 128k tokens in 24 GiB. What
`lowmem bench` measures of a shape is kept before its first job. Each job's device memory is capped at its budget; its
step is set beside the plan's, and beside what the busiest of computation, copies and disk would take alone (the plan's
own parts). Models have as many blocks as there is disk and time for; what is left out is said. The checkpoints stay in
--root for the next run.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

import lowmem
from benchmarks.checkpoints import SHAPES, ExpertsShape, LlamaShape, ensure_checkpoint
from benchmarks.harness import ROOT, Value, emit, emit_skip
from benchmarks.sft_job import StepMeter
from lowmem.loading import prepare_device
from lowmem.machines.bench import bench_lines
from offload.budget import parse_bytes

BENCHMARK = "gpu_check"
_RESERVE_BYTES = 4 << 30
"""Disk that is left free."""

_8B = LlamaShape(hidden=4096, num_layers=32, mlp=14336, num_heads=32, num_kv_heads=8, max_positions=1 << 17)
_70B = LlamaShape(hidden=8192, num_layers=80, mlp=28672, num_heads=64, num_kv_heads=8)
SHAPES |= {
    # Blocks as large as a large model's, few enough for ten minutes.
    "check-1b": LlamaShape(hidden=2048, num_layers=16, mlp=8192, num_heads=32, num_kv_heads=8),
    "check-8b-part": replace(_8B, num_layers=8),
    "check-70b-part": replace(_70B, num_layers=4),
    # A 30B's, of which a token takes 3B.
    "check-experts-part": ExpertsShape(
        hidden=2048, num_layers=6, mlp=768, num_heads=32, num_kv_heads=4, num_experts=128, num_chosen=8
    ),
}


@dataclass(frozen=True, kw_only=True)
class CheckedJob:
    """A job whose steps are measured on the card."""

    name: str
    shape: str
    seq_len: int
    device: str | None
    """Budget of device memory, which is the cap as well; None for what is free."""
    host: str = "4GiB"
    uses_disk: bool = False
    tuning: Literal["adapter", "full"] = "adapter"
    batch_size: int = 1
    num_steps: int = 4
    mode: Literal["streamed", "plain", "bitsandbytes"] = "streamed"
    """Ours, or transformers and PEFT alone with the whole model on the card, as it is stored or packed to NF4."""
    quantization: str | None = None
    use_dora: bool = False

    @property
    def disk_bytes(self) -> int:
        """What it writes: the checkpoint in bf16, masters, moments and gradients in fp32 of full tuning."""
        num = SHAPES[self.shape].num_parameters
        return 2 * num + (16 * num if self.tuning == "full" and self.uses_disk else 0)


JOBS = (
    CheckedJob(name="plain", shape="check-1b", seq_len=2048, batch_size=4, device=None, mode="plain"),
    CheckedJob(name="resident", shape="check-1b", seq_len=2048, batch_size=4, device=None),
    CheckedJob(name="streamed", shape="check-1b", seq_len=2048, batch_size=4, device="4GiB"),
    CheckedJob(name="from-disk", shape="check-1b", seq_len=2048, batch_size=4, device="4GiB", host="0"),
    CheckedJob(name="bitsandbytes", shape="check-1b", seq_len=2048, batch_size=4, device=None, mode="bitsandbytes"),
    CheckedJob(name="nf4", shape="check-1b", seq_len=2048, batch_size=4, device="4GiB", quantization="nf4"),
    CheckedJob(
        name="plain-dora", shape="check-1b", seq_len=2048, batch_size=4, device=None, mode="plain", use_dora=True
    ),
    CheckedJob(name="dora", shape="check-1b", seq_len=2048, batch_size=4, device="4GiB", use_dora=True),
    CheckedJob(name="plain-experts", shape="check-experts-part", seq_len=2048, batch_size=4, device=None, mode="plain"),
    CheckedJob(name="experts", shape="check-experts-part", seq_len=2048, batch_size=4, device="10GiB", host="8GiB"),
    CheckedJob(name="plain-8b", shape="check-8b-part", seq_len=2048, batch_size=4, device=None, mode="plain"),
    CheckedJob(name="streamed-8b", shape="check-8b-part", seq_len=2048, batch_size=4, device="7GiB", host="8GiB"),
    CheckedJob(name="full", shape="check-1b", seq_len=1024, batch_size=4, device="6GiB", host="24GiB", tuning="full"),
    CheckedJob(name="lora-128k", shape="check-8b-part", seq_len=1 << 17, device="24GiB", host="16GiB", num_steps=2),
    CheckedJob(name="lora-70b", shape="check-70b-part", seq_len=1024, batch_size=4, device="8GiB", uses_disk=True),
    CheckedJob(
        name="full-disk",
        shape="check-8b-part",
        seq_len=1024,
        batch_size=4,
        device="24GiB",
        host="8GiB",
        tuning="full",
        uses_disk=True,
    ),
)
_SANITIZED = ("tests/fakecuda/test_steps.py", "tests/fakecuda/test_full.py")
_SANITIZED_PATTERN = "streamed or mixed or every_weight"


@contextmanager
def capped(nbytes: int | None) -> Iterator[None]:
    """Let torch reserve no more of the card than this beyond what it and cuBLAS have; None caps nothing."""
    prepare_device(torch.device("cuda"), None)
    torch.cuda.empty_cache()
    if nbytes is not None:
        total = torch.cuda.mem_get_info()[1]
        fraction = min(1.0, (torch.cuda.memory_reserved() + nbytes) / total)
        torch.cuda.set_per_process_memory_fraction(fraction)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def run_job(job: CheckedJob, *, root: Path, meter: StepMeter | None = None) -> dict[str, Value]:
    """Train a few steps and report them beside the plan.

    Raises:
        offload.OffloadError: The budget is too small, or the disk full.
        torch.cuda.OutOfMemoryError: It took more than the budget.
    """
    folder = ensure_checkpoint(job.shape, root=root)
    scratch = Path(tempfile.mkdtemp(prefix="gpu-check-", dir=root))
    lora = None if job.tuning == "full" else _adapter(job)
    device_bytes = None if job.device is None else parse_bytes(job.device)
    try:
        # Its measurements are no part of the job, and take memory.
        plan = _plan(job, folder, lora, scratch) if job.mode == "streamed" else None
        gc.collect()
        torch.manual_seed(0)
        with capped(device_bytes):
            held_bytes = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            if plan is not None:
                model = lowmem.from_pretrained(folder, plan=plan, tuning=plan.job.tuning, **_quantised(job, root))
            else:
                model = _in_memory(job, folder)
            torch.cuda.reset_peak_memory_stats()
            meter = meter or StepMeter(lockstep=False)
            losses = _train(job, model if lora is None else get_peft_model(model, lora), meter, scratch)
            peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    # The first step fetches what no step before it has left.
    steps_s = meter.step_s[1:] or meter.step_s
    return {
        "step_s": statistics.median(steps_s),
        "steps_s": meter.step_s,
        "tokens_per_s": job.batch_size * job.seq_len / statistics.median(steps_s),
        "device_budget_bytes": device_bytes,
        "peak_allocated_bytes": peaks[0] - held_bytes[0],
        "peak_reserved_bytes": peaks[1] - held_bytes[1],
        "losses": losses,
        **({} if plan is None else _planned(plan, statistics.median(steps_s))),
    }


def _adapter(job: CheckedJob) -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", use_dora=job.use_dora, task_type="CAUSAL_LM")


def _quantised(job: CheckedJob, root: Path) -> dict[str, Any]:
    if job.quantization is None:
        return {}
    return {"quantization": job.quantization, "packed_dir": root / f"{job.shape}-{job.quantization}"}


def _plan(job: CheckedJob, folder: Path, lora: LoraConfig | None, scratch: Path) -> lowmem.Plan:
    _bench(folder, job.quantization)
    budget = lowmem.Budget(device=job.device, host=job.host, disk=scratch if job.uses_disk else None)
    return lowmem.plan(
        folder,
        batch_size=job.batch_size,
        seq_len=job.seq_len,
        peft_config=lora,
        tuning=job.tuning,
        budget=budget,
        quantization=job.quantization,
        device="cuda",
    )


@cache
def _bench(folder: Path, quantization: str | None) -> None:
    """Measure a shape's rates, once; plans find them where they are kept."""
    for line in bench_lines(folder, device="cuda", quantization=quantization):
        print(json.dumps(line), flush=True)


def _planned(plan: lowmem.Plan, step_s: float) -> dict[str, Value]:
    busiest_s = max(plan.time.compute_s, plan.time.copy_s, plan.time.disk_s)
    return {
        "planned_step_s": plan.step_s,
        "busiest_alone_s": busiest_s,
        "fraction_of_busiest": busiest_s / step_s,
        "bottleneck": plan.time.bottleneck,
        "planned_parts_s": {name: getattr(plan.time, f"{name}_s") for name in ("compute", "copy", "disk")},
        "planned_device_bytes": plan.device_bytes,
        "choice": {name: str(value) for name, value in vars(plan.choice).items()},
    }


def _in_memory(job: CheckedJob, folder: Path) -> torch.nn.Module:
    """What one does without us: the whole model on the card."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": 0}}
    if job.mode == "bitsandbytes":
        quantised = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        options["quantization_config"] = quantised
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    prepared: torch.nn.Module = prepare_model_for_kbit_training(model) if job.mode == "bitsandbytes" else model
    return prepared


def _train(job: CheckedJob, model: torch.nn.Module, meter: StepMeter, output: Path) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    size = (job.batch_size * job.num_steps, job.seq_len)
    tokens = torch.randint(3, SHAPES[job.shape].vocab, size, generator=generator)
    options: dict[str, object] = {"gradient_checkpointing": False} if job.tuning == "full" else {}
    if isinstance(SHAPES[job.shape], ExpertsShape):
        options["router_aux_loss_coef"] = 0.0
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            str(output / "trainer"),
            max_length=job.seq_len,
            per_device_train_batch_size=job.batch_size,
            max_steps=job.num_steps,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=True,
            **options,
        ),
        train_dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
        callbacks=[meter],
    )
    if job.tuning == "full":
        trainer.create_optimizer = _ours(trainer)
    trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def _ours(trainer: SFTTrainer) -> Callable[[], torch.optim.Optimizer]:
    def create() -> torch.optim.Optimizer:
        made = lowmem.optim.AdamW(trainer.model.parameters(), lr=1e-5)
        trainer.optimizer = made
        return made

    return create


def compare_with_cpu(root: Path) -> dict[str, Value]:
    """Two small LoRA steps on the card and on the CPU in fp32; the largest difference of their losses."""
    folder = ensure_checkpoint("tiny", root=root)
    found: dict[str, list[float]] = {}
    for device in ("cuda", "cpu"):
        budget = lowmem.Budget(device="32MiB", host=0)
        model = lowmem.from_pretrained(folder, budget=budget, device=device, dtype="float32").train()
        torch.manual_seed(0)
        trained = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        optimizer = torch.optim.SGD([param for param in trained.parameters() if param.requires_grad], lr=0.5)
        ids = torch.arange(64).view(2, 32).to(device)
        found[device] = []
        for _ in range(3):
            loss = trained(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found[device].append(float(loss.detach()))
    difference = max(abs(one - other) for one, other in zip(found["cuda"], found["cpu"], strict=True))
    return {"losses_cuda": found["cuda"], "losses_cpu": found["cpu"], "largest_difference": difference}


def run_tests(*, sanitized: bool = False) -> dict[str, Value]:
    """The tests marked gpu, or some of them under the sanitizer that torch has for missing waits between streams."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "4", "--tb=short"]
    chosen = [*_SANITIZED, "-k", _SANITIZED_PATTERN] if sanitized else ["tests"]
    environment = {**os.environ, **({"TORCH_CUDA_SANITIZER": "1"} if sanitized else {})}
    start_s = time.perf_counter()
    done = subprocess.run([*command, *chosen], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or ["no output"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    seconds = time.perf_counter() - start_s
    return {"passed": done.returncode == 0, "summary": lines[-1], "failed": failed, "seconds": seconds}


def find_waits(root: Path) -> dict[str, Value]:
    """Where the host waits for the card in steps of a streamed model, as torch reports it: how often in one step."""
    job = next(job for job in JOBS if job.name == "streamed")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run_job(job, root=root, meter=_WaitMeter())
    places = [(Path(entry.filename), entry.lineno) for entry in seen if "synchronizing" in str(entry.message)]
    found = Counter(f"{file.parent.name}/{file.name}:{line}" for file, line in places)
    return {place: count / job.num_steps for place, count in found.most_common(20)}


class _WaitMeter(StepMeter):
    """Has torch report waits of the host during steps."""

    def __init__(self) -> None:
        super().__init__(lockstep=False)

    def on_step_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        torch.cuda.set_sync_debug_mode("default")
        super().on_step_end(args, state, control, **kwargs)


def check(*, root: Path, only: Sequence[str] = (), jobs: Sequence[CheckedJob] = JOBS) -> list[tuple[str, str]]:
    """Run what was asked for, or all; prints a line for each and returns rows for the table."""
    rows: list[tuple[str, str]] = []
    others: dict[str, Callable[[], dict[str, Value]]] = {
        "tests": run_tests,
        "sanitizer": lambda: run_tests(sanitized=True),
        "cpu": lambda: compare_with_cpu(root),
        "waits": lambda: find_waits(root),
    }
    for name, run in others.items():
        if not only or name in only:
            result = run()
            emit(BENCHMARK, name, **result)
            rows.append((name, ", ".join(f"{key} {value}" for key, value in result.items())))
    for job in jobs:
        if only and job.name not in only:
            continue
        reason = _reason_to_skip(job, root)
        if reason is not None:
            emit_skip(BENCHMARK, job.name, reason)
            rows.append((job.name, f"left out: {reason}"))
            continue
        try:
            result = run_job(job, root=root)
        # A check that fails is a result, and the ones behind it count too.
        except (RuntimeError, OSError) as error:
            emit(BENCHMARK, job.name, failed=f"{type(error).__name__}: {error}")
            rows.append((job.name, f"failed: {type(error).__name__}"))
            continue
        emit(BENCHMARK, job.name, **result)
        rows.append((job.name, _in_words(result)))
    return rows


def _reason_to_skip(job: CheckedJob, root: Path) -> str | None:
    total_bytes = torch.cuda.mem_get_info()[1]
    if job.device is not None and parse_bytes(job.device) > total_bytes:
        return f"the card has {total_bytes / 2**30:.1f} GiB"
    root.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(root).free - _RESERVE_BYTES
    if job.disk_bytes > free_bytes:
        return f"it needs {job.disk_bytes / 1e9:.0f} GB of disk in {root}, {max(0, free_bytes) / 1e9:.0f} GB are free"
    return None


def _in_words(result: dict[str, Value]) -> str:
    def number(name: str, per: float = 1.0) -> float:
        value = result[name]
        assert isinstance(value, int | float)
        return value / per

    step, memory = f"{number('step_s'):.3f} s per step", f"{number('peak_reserved_bytes', 2**30):.2f} GiB reserved"
    if "planned_step_s" not in result:
        return f"{step}; {memory}"
    return (
        f"{step} (planned {number('planned_step_s'):.3f} s), "
        f"{number('fraction_of_busiest', 0.01):.0f}% of what its {result['bottleneck']} allows; "
        f"{memory} (planned {number('planned_device_bytes', 2**30):.2f})"
    )


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Markdown to paste."""
    name = torch.cuda.get_device_name()
    lines = [f"| check | {name}, torch {torch.__version__} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {check} | {what} |" for check, what in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "lowmem-checkpoints")
    names = ["tests", "sanitizer", "cpu", "waits", *(job.name for job in JOBS)]
    parser.add_argument(
        "--only", choices=names, action="append", default=[], help="again for several; all if not given"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu-check: torch finds no CUDA device here; lowmem doctor says why")
    print(table(check(root=arguments.root, only=arguments.only)))


if __name__ == "__main__":
    main()
