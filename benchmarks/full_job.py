"""One full-tuning job on a checkpoint, with its steps measured: what `full_tuning` runs in child processes.

"host" and "disk" keep masters, gradients and moments there; "plain" is transformers with torch's fused AdamW and
gradient checkpointing, everything in memory. All three go through TRL's SFTTrainer, with clipping. Prints one JSON
object.
"""

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import SFTConfig, SFTTrainer

import lowmem
from benchmarks.memory_limit import peak_rss_bytes
from benchmarks.sft_job import StepMeter
from lowmem.full import update_in_backward
from lowmem.monitoring.timeline import StepTimeline
from lowmem.streaming.runtime import runtime_of

Mode = Literal["plain", "host", "disk"]
GALORE_RANK = 128


@dataclass(frozen=True, kw_only=True)
class FullJob:
    """What to train and how."""

    folder: Path
    """The checkpoint."""
    mode: Mode
    """Where the state is."""
    disk: Path | None = None
    """Folder for state on disk."""
    seq_len: int = 512
    accumulation: int = 1
    num_steps: int = 3
    device_budget: str = "2100MiB"
    """For "disk"; "host" takes what it needs."""
    max_grad_norm: float = 1.0
    optimizer: str = "AdamW"
    """Name in `lowmem.optim`; GaLore has rank 128 and projects embeddings and head as well."""
    masters: str = "fp32"
    """Type of the weights; bf16 ones are rounded stochastically."""
    state_dtype: str | None = None
    """How AdamW's moments are stored; None for the weights' type."""
    update_in_backward: bool = False
    """Whether blocks on disk are updated within their backward; takes max_grad_norm 0."""
    seed: int = 0

    def arguments(self) -> list[str]:
        """The command line that makes this job again."""
        flags = {name: value for name, value in asdict(self).items() if value is not None}
        in_backward = ["--update-in-backward"] if flags.pop("update_in_backward") else []
        pairs = [(f"--{name.replace('_', '-')}", value) for name, value in flags.items()]
        return [*(str(word) for pair in pairs for word in pair), *in_backward]


def run(job: FullJob, *, lockstep: bool = False) -> dict[str, object]:
    """Train `job.num_steps` steps on random tokens and report them."""
    torch.manual_seed(job.seed)
    model, plan = load(job)
    optimizer = make_optimizer(job, model)
    meter = StepMeter(lockstep=lockstep)
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=model,
            args=training_arguments(job, output),
            train_dataset=random_rows(job, vocab_size=model.config.vocab_size),
            optimizers=(optimizer, None),
            callbacks=[meter],
        )
        trainer.train()
    report: dict[str, object] = {
        "step_s": meter.step_s,
        "disk_read_bytes": meter.disk_read_bytes,
        "logs": [[e["loss"], e["grad_norm"]] for e in trainer.state.log_history if "loss" in e],
        "peak_rss_bytes": peak_rss_bytes(os.getpid()),
        "plan": None if plan is None else plan.to_dict(),
    }
    if plan is not None:
        runtime = runtime_of(model)
        report["memory"] = runtime.memory()
        spans = runtime.trace.spans()
        start_ns, end_ns = spans[0].start_ns, max(span.end_ns for span in spans)
        whole_run = StepTimeline(step=0, start_ns=start_ns, end_ns=end_ns, spans=spans, passes=())
        report["lanes_s"] = {lane: whole_run.busy_s(lane) for lane in sorted({span.lane for span in spans})}
        runtime.close()
    return report


def load(job: FullJob) -> tuple[PreTrainedModel, "lowmem.Plan | None"]:
    """The model, with its plan unless it is plain."""
    if job.mode == "plain":
        model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32)
        model.config.use_cache = False
        return model, None
    budget = lowmem.Budget(device="1TiB", host="0")
    if job.mode == "disk":
        budget = lowmem.Budget(device=job.device_budget, host="0", disk=job.disk)
    plan = lowmem.plan(job.folder, seq_len=job.seq_len, tuning="full", masters=job.masters, budget=budget, device="cpu")
    assert plan.choice.state_tier == {"host": "device"}.get(job.mode, job.mode), plan
    return lowmem.from_pretrained(job.folder, tuning="full", plan=plan, device="cpu"), plan


def make_optimizer(job: FullJob, model: PreTrainedModel) -> torch.optim.Optimizer:
    """As the job names it."""
    if job.mode == "plain":
        return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    options: dict[str, object] = {}
    if job.optimizer == "GaLore":
        options = {"rank": GALORE_RANK, "project_embeddings": True}
    elif job.optimizer == "AdamW":
        options = {"state_dtype": job.state_dtype, "writer": "stochastic" if job.masters == "bf16" else "nearest"}
    optimizer: torch.optim.Optimizer = getattr(lowmem.optim, job.optimizer)(model, lr=1e-5, **options)
    if job.update_in_backward:
        update_in_backward(optimizer)
    return optimizer


def training_arguments(job: FullJob, output: str) -> SFTConfig:
    """Clipping, logging at every step, and the trainer's default, gradient checkpointing."""
    return SFTConfig(
        output,
        max_length=job.seq_len,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=job.accumulation,
        max_grad_norm=job.max_grad_norm,
        max_steps=job.num_steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=job.seed,
    )


def random_rows(job: FullJob, *, vocab_size: int) -> Dataset:
    """Sequences that are all exactly `seq_len` long: every step does the same work."""
    generator = torch.Generator().manual_seed(job.seed)
    tokens = torch.randint(3, vocab_size, (job.accumulation * job.num_steps, job.seq_len), generator=generator)
    return Dataset.from_dict({"input_ids": tokens.tolist()})


def parse(arguments: list[str] | None = None) -> tuple[FullJob, bool]:
    """The job of a command line, and whether it waits for its turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--mode", choices=get_args(Mode), required=True)
    parser.add_argument("--disk", type=Path)
    for name in ("seq-len", "accumulation", "num-steps", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(FullJob, name.replace("-", "_")))
    parser.add_argument("--max-grad-norm", type=float, default=FullJob.max_grad_norm)
    parser.add_argument("--device-budget", default=FullJob.device_budget)
    parser.add_argument("--optimizer", default=FullJob.optimizer)
    parser.add_argument("--masters", default=FullJob.masters)
    parser.add_argument("--state-dtype")
    parser.add_argument("--update-in-backward", action="store_true")
    parser.add_argument("--lockstep", action="store_true")
    options = vars(parser.parse_args(arguments))
    lockstep = options.pop("lockstep")
    return FullJob(**options), lockstep


def main() -> None:
    """Run the job of the command line."""
    job, lockstep = parse()
    print(json.dumps(run(job, lockstep=lockstep)), flush=True)


if __name__ == "__main__":
    main()
