"""One SFTTrainer job on a checkpoint, with its steps measured: what the other benchmarks run in child processes.

Prints one JSON object at the end. With --lockstep every step waits for a line on standard input, so that a parent can
interleave the steps of several jobs.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

import lowmem
from benchmarks.memory_limit import peak_rss_bytes

Mode = Literal["streamed", "resident", "plain"]
STEP_PREFIX = "step "


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train and how."""

    folder: Path
    """The checkpoint."""
    mode: Mode
    """Streamed, the same code with all blocks resident, or transformers and TRL alone."""
    batch_size: int = 1
    seq_len: int = 512
    num_steps: int = 3
    rank: int = 16
    dtype: str = "float32"
    device_budget: str | None = None
    """For "streamed": a size, or "smallest" for the least that works, which streams everything. None: measured."""
    host_budget: str = "0"
    disk: Path | None = None
    """For "streamed": folder for what a step writes and reads back."""
    seed: int = 0

    def arguments(self) -> list[str]:
        """The command line that makes this job again."""
        pairs = [(f"--{name.replace('_', '-')}", value) for name, value in asdict(self).items() if value is not None]
        return [str(word) for pair in pairs for word in pair]


class StepMeter(TrainerCallback):
    """Measures optimizer steps, and waits for the parent's turn before each if asked to."""

    def __init__(self, *, lockstep: bool) -> None:
        self.step_s: list[float] = []
        self.disk_read_bytes: list[int | None] = []
        self._lockstep = lockstep
        self._start_s = 0.0
        self._start_read_bytes: int | None = None

    def on_step_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if self._lockstep and not sys.stdin.readline():
            raise SystemExit("the parent is gone")
        self._start_read_bytes = disk_read_bytes()
        self._start_s = time.perf_counter()

    def on_step_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.step_s.append(time.perf_counter() - self._start_s)
        end, start = disk_read_bytes(), self._start_read_bytes
        self.disk_read_bytes.append(None if end is None or start is None else end - start)
        if self._lockstep:
            print(STEP_PREFIX + json.dumps(self.step_s[-1]), flush=True)


def disk_read_bytes() -> int | None:
    """Bytes that storage has delivered to this process, direct reads of all threads included; None if not Linux."""
    counters = Path("/proc/self/io")
    if not counters.exists():
        return None
    return int(dict(line.split(": ") for line in counters.read_text().splitlines())["read_bytes"])


def run(job: Job, *, lockstep: bool = False) -> dict[str, object]:
    """Train `job.num_steps` steps on random tokens and report them.

    Raises:
        offload.OffloadError: The budget is too small, or the checkpoint cannot be read.
    """
    torch.manual_seed(job.seed)
    start_s = time.perf_counter()
    lora = LoraConfig(r=job.rank, lora_alpha=2 * job.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model, plan = load(job, lora)
    load_s = time.perf_counter() - start_s
    meter = StepMeter(lockstep=lockstep)
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=model,
            args=training_arguments(job, output),
            train_dataset=random_tokens(job, vocab_size=model.config.vocab_size),
            peft_config=lora,
            callbacks=[meter],
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "load_s": load_s,
        "step_s": meter.step_s,
        "disk_read_bytes": meter.disk_read_bytes,
        "losses": [float(loss) for loss in losses],
        "peak_rss_bytes": peak_rss_bytes(os.getpid()),
        "plan": None if plan is None else plan.to_dict(),
    }


def load(job: Job, lora: LoraConfig) -> tuple[PreTrainedModel, "lowmem.Plan | None"]:
    """The model in one of the three modes, with the plan of the first two."""
    if job.mode == "plain":
        return AutoModelForCausalLM.from_pretrained(job.folder, dtype=getattr(torch, job.dtype)), None
    plan = make_plan(job, lora, device_budget=device_budget_of(job, lora))
    return lowmem.from_pretrained(str(job.folder), plan=plan), plan


def device_budget_of(job: Job, lora: LoraConfig) -> str | int | None:
    """What the device may hold in this job."""
    if job.mode == "resident":
        # Room for every block even in a wider type, and for activations; what is not needed is not allocated.
        return 4 * sum(file.stat().st_size for file in job.folder.glob("*.safetensors")) + (4 << 30)
    if job.device_budget == "smallest":
        return make_plan(job, lora, device_budget="0").smallest_device_bytes
    return job.device_budget


def make_plan(job: Job, lora: LoraConfig, *, device_budget: str | int | None) -> "lowmem.Plan":
    return lowmem.plan(
        str(job.folder),
        task="sft",
        batch_size=job.batch_size,
        seq_len=job.seq_len,
        peft_config=lora,
        budget=lowmem.Budget(device=device_budget, host=job.host_budget, disk=job.disk),
        dtype=getattr(torch, job.dtype),
    )


def training_arguments(job: Job, output: str) -> SFTConfig:
    """The trainer's defaults, gradient checkpointing among them, without reports and files."""
    return SFTConfig(
        output,
        max_length=job.seq_len,
        per_device_train_batch_size=job.batch_size,
        max_steps=job.num_steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=job.seed,
        # TRL turns bf16 autocast on by default; processors without bf16 instructions are a hundred times slower in it.
        bf16=job.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )


def random_tokens(job: Job, *, vocab_size: int) -> Dataset:
    """Sequences that are all exactly `seq_len` long: every step does the same work."""
    generator = torch.Generator().manual_seed(job.seed)
    tokens = torch.randint(3, vocab_size, (job.batch_size * job.num_steps, job.seq_len), generator=generator)
    return Dataset.from_dict({"input_ids": tokens.tolist()})


def parse(arguments: list[str] | None = None) -> tuple[Job, bool]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--mode", choices=get_args(Mode), required=True)
    for name in ("batch-size", "seq-len", "num-steps", "rank", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Job, name.replace("-", "_")))
    for name in ("dtype", "device-budget", "host-budget"):
        parser.add_argument(f"--{name}", default=getattr(Job, name.replace("-", "_")))
    parser.add_argument("--disk", type=Path)
    parser.add_argument("--lockstep", action="store_true")
    options = vars(parser.parse_args(arguments))
    lockstep = options.pop("lockstep")
    return Job(**options), lockstep


def main() -> None:
    job, lockstep = parse()
    report = run(job, lockstep=lockstep)
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
