"""What fits where and how fast, by the planner: writes docs/hardware.md.

    python -m benchmarks.hardware_table [--output docs/hardware.md]

From configurations alone, nothing is downloaded and no card is needed: some models of known shapes, LoRA of rank 16 on
all linear layers (attention only in mixtures of experts), sequences of 2048 tokens, cards by their makers' numbers, RAM
and disk as said in the table. Every number is planned, none is measured.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import lowmem
from benchmarks.harness import ROOT
from lowmem import Plan

SEQ_LEN = 2048
MACHINES = (
    ("RTX 4060", "32GiB", 3.5),
    ("RTX 3060", "32GiB", 3.5),
    ("RTX 5060 Ti 16GB", "64GiB", 7),
    ("RTX 3090", "64GiB", 7),
    ("RTX 4090", "64GiB", 7),
    ("RTX 5090", "128GiB", 12),
)
_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "num_key_value_heads": 8}
_QWEN = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "head_dim": 128}
_MOE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama 3.1 8B": {**_LLAMA, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336},
    "Qwen3 8B": {
        **_QWEN,
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "Qwen3 14B": {
        **_QWEN,
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "intermediate_size": 17408,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
    "Qwen3 32B": {
        **_QWEN,
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "intermediate_size": 25600,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "Llama 3.3 70B": {
        **_LLAMA,
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
    },
    "Qwen3 30B-A3B": {
        **_MOE,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
    },
    "Qwen3 235B-A22B": {
        **_MOE,
        "hidden_size": 4096,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
    },
}


def plan_on(
    folder: Path,
    name: str,
    machine: tuple[str, str, float],
    *,
    batch_size: int | Literal["auto"] = "auto",
    seq_len: int = SEQ_LEN,
) -> Plan:
    """Plan for a model of the table on a machine, from a configuration that is written now.

    Args:
        folder: Where; made if need be.
        name: The model's.
        machine: Card, RAM, and GB/s of the drive.
        batch_size: Sequences per step.
        seq_len: Tokens of each.
    """
    from peft import LoraConfig

    config = MODELS[name]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    names = ["q_proj", "k_proj", "v_proj", "o_proj"] if "num_experts" in config else "all-linear"
    gpu, ram, disk_gbps = machine
    return lowmem.plan(
        folder,
        seq_len=seq_len,
        batch_size=batch_size,
        peft_config=LoraConfig(r=16, target_modules=names),
        machine=lowmem.Machine(gpu=gpu, ram=ram, disk_gbps=disk_gbps),
    )


def cells(folder: Path, name: str) -> Iterator[str]:
    """One row: for each machine the fastest batch, what a step takes, and what it waits for."""
    for machine in MACHINES:
        plan = plan_on(folder, name, machine)
        if not plan.fits:
            yield f"no: needs {plan.smallest_device_bytes / 2**30:.1f} GiB"
            continue
        tokens_per_s = plan.job.step_tokens / plan.step_s
        yield f"{plan.batch_size} x {SEQ_LEN}: {plan.step_s:.0f} s, {tokens_per_s:.0f} tokens/s, {plan.bottleneck}"


_ABOUT = f"""\
Made by `python -m benchmarks.hardware_table` with the planner: **planned, not measured**. bf16 weights as they are
stored, nothing quantised; LoRA of rank 16 on all linear layers, of mixtures of experts on attention; sequences of
{SEQ_LEN} tokens. Cards by their makers' numbers, of which products are supposed to reach 70%. In each cell: the
smallest batch that is nearly as fast per token as any, seconds per optimizer step, tokens per second, and what the step
waits for. `lowmem plan MODEL --gpu ... --search` gives the same for yours."""


def table() -> Iterator[str]:
    """The page, line by line."""
    yield "# What fits where"
    yield ""
    yield from _ABOUT.splitlines()
    yield ""
    heads = [f"{gpu}, {ram} of RAM, disk {disk:g} GB/s" for gpu, ram, disk in MACHINES]
    yield f"| | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 1) + "|"
    with tempfile.TemporaryDirectory() as root:
        for name in MODELS:
            yield f"| {name} | {' | '.join(cells(Path(root) / name.replace(' ', '-'), name))} |"
            print(name, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "hardware.md")
    arguments = parser.parse_args()
    arguments.output.write_text("\n".join(table()) + "\n")


if __name__ == "__main__":
    main()
