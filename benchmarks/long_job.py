"""One forward and backward of a long sequence, its peak and its time measured: what `long_sequences` runs in children.

Prints one JSON object at the end. A short step comes first, so that what libraries allocate once is not counted.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import SFTConfig, SFTTrainer

import lowmem
from benchmarks.process_memory import PeakMeter
from lowmem.streaming.runtime import runtime_of

Mode = Literal["trl", "lowmem"]
Tuning = Literal["adapter", "full"]
_WARMUP_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class LongJob:
    """What to run."""

    folder: Path
    """A checkpoint."""
    mode: Mode
    """Plain transformers and TRL with gradient checkpointing, or lowmem."""
    seq_len: int
    head_tokens: int | None = None
    """Tokens of a tile of TRL's own head; as shipped if None."""
    chunk_tokens: int | None = None
    device_budget: str | None = None
    """For lowmem: a size; "smallest" for the least that works, with all blocks streamed; None: as much as there is."""
    disk: Path | None = None
    """Folder for boundary activations, and the state of full tuning; they go there whatever the budget."""
    tuning: Tuning = "adapter"
    """LoRA on all linear layers, or gradients of every weight."""
    rank: int = 16

    def arguments(self) -> list[str]:
        """The command line that makes this job again."""
        pairs = [(f"--{name.replace('_', '-')}", value) for name, value in asdict(self).items() if value is not None]
        return [str(word) for pair in pairs for word in pair]


def run(job: LongJob) -> dict[str, object]:
    """Train on one sequence and report growth over the idle process, seconds, loss and what was planned."""
    torch.manual_seed(0)
    lora = None
    if job.tuning == "adapter":
        lora = LoraConfig(r=job.rank, lora_alpha=2 * job.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    if job.head_tokens is not None:
        import trl.kernels.chunked_logprob as head

        head.TOKEN_CHUNK_SIZE = job.head_tokens
    model, plan = load(job, lora)
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output,
                max_length=None,
                report_to="none",
                bf16=False,
                use_cpu=True,
                disable_tqdm=True,
                dataloader_pin_memory=False,
                max_steps=1,
                save_strategy="no",
                optim="sgd",
                learning_rate=0.0,
            ),
            train_dataset=Dataset.from_dict({"input_ids": [list(range(3, 3 + _WARMUP_TOKENS))]}),
            peft_config=lora,
            optimizers=(lowmem.optim.AdamW(model, lr=0.0) if job.tuning == "full" and plan is not None else None, None),
        )
        # The trainer's own preparation: gradient checkpointing is turned on when training starts.
        trainer.train()
        model = trainer.model.train()
        batch = batch_of(job.seq_len, model.config.vocab_size)
        with PeakMeter() as meter:
            start_s = time.perf_counter()
            loss = trainer.training_step(model, batch)
            step_s = time.perf_counter() - start_s
    # Room for gradients that full tuning keeps from step to step was there before; the trainer's are made anew.
    kept_bytes = 0 if plan is None else runtime_of(model).memory().get("gradient_bytes", 0)
    return {
        "growth_bytes": meter.growth_bytes + kept_bytes,
        "kept_gradient_bytes": kept_bytes,
        "idle_bytes": meter.idle_bytes,
        "step_s": step_s,
        "loss": float(loss),
        "plan": None if plan is None else plan.to_dict(),
    }


def load(job: LongJob, lora: LoraConfig | None) -> tuple[PreTrainedModel, "lowmem.Plan | None"]:
    if job.mode == "trl":
        return AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32), None

    def planned(device: str | int) -> "lowmem.Plan":
        return lowmem.plan(
            str(job.folder),
            task="sft",
            seq_len=job.seq_len,
            tuning=job.tuning,
            peft_config=lora,
            chunk_tokens=job.chunk_tokens,
            budget=lowmem.Budget(device=device, host="0", disk=job.disk),
        )

    budget: str | int = job.device_budget or ("smallest" if job.disk is not None else "16GiB")
    plan = planned(planned(0).smallest_device_bytes if budget == "smallest" else budget)
    return lowmem.from_pretrained(str(job.folder), tuning=job.tuning, plan=plan), plan


def batch_of(num_tokens: int, vocab_size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    tokens = torch.randint(3, vocab_size, (1, num_tokens), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}


def parse(arguments: list[str] | None = None) -> LongJob:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--mode", choices=get_args(Mode), required=True)
    parser.add_argument("--seq-len", type=int, required=True)
    for name in ("head-tokens", "chunk-tokens"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--device-budget")
    parser.add_argument("--tuning", choices=get_args(Tuning), default=LongJob.tuning)
    parser.add_argument("--disk", type=Path)
    parser.add_argument("--rank", type=int, default=LongJob.rank)
    return LongJob(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    print(json.dumps(run(parse())), flush=True)
