"""A packed mixture of experts that is trained, or that generates: what benchmarks.packed_experts runs in children.

Prints one JSON object at the end.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

import lowmem
from benchmarks.memory_limit import peak_rss_bytes
from benchmarks.sft_job import disk_read_bytes

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True, kw_only=True)
class ExpertsJob:
    """What to do with a checkpoint."""

    folder: Path
    """The checkpoint."""
    device_budget: str
    """What the model may hold."""
    seq_len: int = 256
    """Tokens of the one sequence of a step."""
    num_steps: int = 2
    num_prompt_tokens: int = 4
    num_new_tokens: int = 8
    rank: int = 16


def _planned(plan: lowmem.Plan) -> dict[str, object]:
    """What a plan says of what is measured."""
    return {
        "device_bytes": plan.device_bytes,
        "step_s": plan.time.step_s,
        "read_bytes": plan.time.read_bytes,
        "whole_blocks_bytes": plan.placement.streamed_bytes,
    }


def train(job: ExpertsJob) -> dict[str, object]:
    """LoRA on attention, plain SGD, as a training loop without a trainer does it."""
    torch.manual_seed(0)
    budget = lowmem.Budget(device=job.device_budget, host="0")
    lora = LoraConfig(r=job.rank, lora_alpha=2 * job.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    start_s = time.perf_counter()
    plan = lowmem.plan(
        str(job.folder), batch_size=1, seq_len=job.seq_len, budget=budget, peft_config=lora, device="cpu"
    )
    plan_s = time.perf_counter() - start_s
    model = get_peft_model(lowmem.from_pretrained(str(job.folder), plan=plan, device="cpu"), lora)
    load_s = time.perf_counter() - start_s
    model.train()
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1)
    steps: list[dict[str, object]] = []
    for _ in range(job.num_steps):
        ids = torch.randint(3, model.config.vocab_size, (1, job.seq_len))
        start_s, start_bytes = time.perf_counter(), disk_read_bytes()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        end_bytes = disk_read_bytes()
        steps.append(
            {
                "step_s": time.perf_counter() - start_s,
                "loss": float(loss.detach()),
                "disk_read_bytes": None if start_bytes is None or end_bytes is None else end_bytes - start_bytes,
            }
        )
        print(f"step: {steps[-1]}", flush=True)
    return {"plan_s": plan_s, "load_s": load_s, "steps": steps, "planned": _planned(plan)}


def generate(job: ExpertsJob) -> dict[str, object]:
    """One sequence, greedily; bytes read per token."""
    budget = lowmem.Budget(device=job.device_budget, host="0")
    plan = lowmem.plan(
        str(job.folder),
        task="generate",
        batch_size=1,
        seq_len=job.num_prompt_tokens + job.num_new_tokens,
        completion_tokens=job.num_new_tokens,
        budget=budget,
        device="cpu",
    )
    model = lowmem.from_pretrained(str(job.folder), plan=plan, device="cpu")
    marks = [(time.perf_counter(), disk_read_bytes())]

    def note(ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        marks.append((time.perf_counter(), disk_read_bytes()))
        return torch.zeros(len(ids), dtype=torch.bool)

    ids = torch.randint(3, model.config.vocab_size, (1, job.num_prompt_tokens))
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=job.num_new_tokens,
        do_sample=False,
        stopping_criteria=[note],
        eos_token_id=None,
        pad_token_id=0,
    )
    pairs = list(pairwise(marks))
    return {
        "token_s": [end[0] - start[0] for start, end in pairs],
        "token_read_bytes": [None if end[1] is None or start[1] is None else end[1] - start[1] for start, end in pairs],
        "planned": _planned(plan),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("train", "generate"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device-budget", required=True)
    parser.add_argument("--seq-len", type=int, default=ExpertsJob.seq_len)
    parser.add_argument("--num-steps", type=int, default=ExpertsJob.num_steps)
    parser.add_argument("--num-new-tokens", type=int, default=ExpertsJob.num_new_tokens)
    arguments = vars(parser.parse_args())
    task = arguments.pop("task")
    job = ExpertsJob(**arguments)
    report = train(job) if task == "train" else generate(job)
    print(json.dumps({**report, "peak_rss_bytes": peak_rss_bytes(os.getpid())}))


if __name__ == "__main__":
    main()
