"""A training step of whole sequences in a process of its own: what it grows by, and what was planned; one JSON line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

import lowmem
from benchmarks.process_memory import PeakMeter
from lowmem.streaming.runtime import runtime_of


def run(folder: Path, *, num_sequences: int, seq_len: int) -> dict[str, object]:
    """Two steps, after a short one in which libraries allocate what they keep."""
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    plan = lowmem.plan(
        folder,
        batch_size=num_sequences,
        seq_len=seq_len,
        micro_batch=num_sequences,
        peft_config=lora,
        budget=lowmem.Budget(device="8GiB", host=0),
        device="cpu",
    )
    model = get_peft_model(lowmem.from_pretrained(folder, plan=plan), lora).train()

    def step(shape: tuple[int, int]) -> None:
        tokens = torch.randint(3, 120, shape)
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss.backward()

    step((1, 64))
    # The weights are there already.
    there = plan.bytes_of("decoder blocks", tier="device") + plan.bytes_of("unpacked block") + plan.bytes_of("adapters")
    there += plan.bytes_of("embedding", tier="device") + plan.bytes_of("head") + plan.bytes_of("adapter gradients")
    # Nothing is optimized here.
    there += plan.bytes_of("optimizer state")
    growth = []
    for _ in range(2):
        with PeakMeter() as meter:
            step((num_sequences, seq_len))
        growth.append(meter.growth_bytes)
    assert runtime_of(model).plan is plan
    return {"planned": plan.device_bytes - there, "grown": max(growth), "chunk_tokens": plan.chunk_tokens}


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), num_sequences=int(sys.argv[2]), seq_len=int(sys.argv[3]))))
