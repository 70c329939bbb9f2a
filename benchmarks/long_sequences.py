"""Long sequences: how far memory grows over the idle process, and how long a step takes, against TRL's checkpointing.

    python -m benchmarks.long_sequences --root /nvme/checkpoints [--vocab 32k] [--seq-len 8192 ...] [--longest]

A Llama shape (hidden 512, 8 layers, MLP 1408, 8 heads, 2 K/V heads) with LoRA r=16 on all linear layers, one sequence,
fp32. TRL as shipped, and with its head's tile at 256 tokens; lowmem with boundary activations in RAM, weights in memory
and streamed, and with boundaries on disk, weights streamed. --full: gradients of every weight, those of the blocks kept
where the boundaries are.
--longest looks for the longest sequence that grows by at most 128 MiB (hidden 256, 2 layers).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.checkpoints import ensure_checkpoint
from benchmarks.harness import Value, emit, last_json, run_module
from benchmarks.long_job import LongJob, Tuning

BENCHMARK = "long_sequences"
SEQ_LENS = (2048, 4096, 8192, 16384)
ROOM_BYTES = 128 << 20
_CHUNK_TOKENS = 256
_SHORTEST = 64
_LONGEST = 1 << 18


def variants(folder: Path, scratch: Path, seq_len: int, *, tuning: Tuning) -> dict[str, LongJob]:
    """What is compared, by name."""
    plain = LongJob(folder=folder, mode="trl", seq_len=seq_len, tuning=tuning)
    ours = replace(plain, mode="lowmem", chunk_tokens=_CHUNK_TOKENS)
    return {
        "trl": plain,
        "trl-head-256": replace(plain, head_tokens=256),
        "lowmem-ram": ours,
        # In full tuning weights are state, which is in memory or on disk as a whole.
        **({"lowmem-ram-streamed": replace(ours, device_budget="smallest")} if tuning == "adapter" else {}),
        "lowmem-disk": replace(ours, disk=scratch),
    }


def measure(job: LongJob) -> dict[str, Value]:
    """Run one job in a process of its own.

    Raises:
        RuntimeError: It did not end well.
    """
    outcome = run_module("benchmarks.long_job", job.arguments())
    if outcome.returncode != 0:
        raise RuntimeError(f"{job}: exit status {outcome.returncode}")
    return last_json(outcome.output)


def compare(
    vocab: str, seq_len: int, *, root: Path, scratch: Path, tuning: Tuning, leave_out: Collection[str]
) -> dict[str, dict[str, Value]]:
    """All variants at one length, and the ratios to the better of TRL's two."""
    folder = ensure_checkpoint(f"long-{vocab}", root=root, dtype=torch.float32)
    found: dict[str, dict[str, Value]] = {}
    case = f"{_prefix(vocab, tuning)}-{seq_len}"
    for name, job in variants(folder, scratch, seq_len, tuning=tuning).items():
        if name in leave_out:
            continue
        found[name] = result = measure(job)
        plan = result.pop("plan")
        emit(BENCHMARK, f"{case}-{name}", **result, summary=_summary(plan), chunk_tokens=job.chunk_tokens)
        result["planned_bytes"] = _planned_bytes(plan)
    growth = {name: float(str(result["growth_bytes"])) for name, result in found.items()}
    seconds = {name: float(str(result["step_s"])) for name, result in found.items()}
    others = [name for name in found if name.startswith("trl")]
    ours = [name for name in found if name not in others]
    emit(
        BENCHMARK,
        case,
        growth_over_trl={name: growth[name] / min(growth[other] for other in others) for name in ours},
        step_over_trl={name: seconds[name] / min(seconds[other] for other in others) for name in ours},
        losses={name: result["loss"] for name, result in found.items()},
    )
    return found


def report_growth(prefix: str, shorter: dict[str, dict[str, Value]], longer: dict[str, dict[str, Value]]) -> None:
    """Growth from one length to the next, measured and planned."""
    for name in (name for name in shorter if name.startswith("lowmem")):
        measured, planned = (
            float(str(longer[name][field])) - float(str(shorter[name][field]))
            for field in ("growth_bytes", "planned_bytes")
        )
        emit(
            BENCHMARK,
            f"{prefix}-growth-{name}",
            measured_bytes=measured,
            planned_bytes=planned,
            measured_over_planned=measured / planned,
        )


def _prefix(vocab: str, tuning: Tuning) -> str:
    return vocab if tuning == "adapter" else f"{vocab}-full"


def _summary(plan: Value) -> Value:
    return plan["summary"] if isinstance(plan, dict) else None


def _planned_bytes(plan: Value) -> Value:
    summary = _summary(plan)
    return summary["device_bytes"] if isinstance(summary, dict) else 0


def longest(job: LongJob) -> dict[str, Value]:
    """The longest sequence, in steps of an eighth, whose growth stays within the room."""
    fits: dict[str, Value] = {"seq_len": 0}
    seq_len = _SHORTEST
    while seq_len <= _LONGEST:
        result = measure(replace(job, seq_len=seq_len))
        print(json.dumps({"seq_len": seq_len, "growth_bytes": result["growth_bytes"]}), file=sys.stderr, flush=True)
        if float(str(result["growth_bytes"])) > ROOM_BYTES:
            break
        fits = {name: result[name] for name in ("growth_bytes", "step_s", "loss")} | {"seq_len": seq_len}
        seq_len = _next_length(seq_len, float(str(result["growth_bytes"])))
    return fits


def _next_length(seq_len: int, growth_bytes: float) -> int:
    """Doubled while there is room for that, then an eighth more."""
    return 2 * seq_len if growth_bytes < ROOM_BYTES / 2 else seq_len + max(16, seq_len // 8)


def find_longest(*, root: Path, scratch: Path) -> None:
    folder = ensure_checkpoint("long-narrow", root=root, dtype=torch.float32)
    plain = LongJob(folder=folder, mode="trl", seq_len=_SHORTEST, head_tokens=256)
    ours = LongJob(folder=folder, mode="lowmem", seq_len=_SHORTEST, chunk_tokens=256, disk=scratch)
    found = {"trl": longest(plain), "lowmem": longest(ours)}
    lengths = {name: int(str(result["seq_len"])) for name, result in found.items()}
    emit(
        BENCHMARK,
        "longest-in-128MiB",
        room_bytes=ROOM_BYTES,
        results=found,
        ratio=lengths["lowmem"] / lengths["trl"] if lengths["trl"] else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "lowmem-checkpoints")
    parser.add_argument("--scratch", type=Path, help="folder for boundary activations; a temporary one if not given")
    parser.add_argument("--vocab", choices=("32k", "128k"), action="append")
    parser.add_argument("--seq-len", type=int, action="append")
    parser.add_argument("--longest", action="store_true")
    parser.add_argument("--leave-out", action="append", help="name of a variant; trl is the larger of TRL's two")
    parser.add_argument("--full", action="store_true", help="every weight instead of LoRA")
    arguments = parser.parse_args()
    tuning: Tuning = "full" if arguments.full else "adapter"
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        scratch = Path(folder)
        if arguments.longest:
            find_longest(root=arguments.root, scratch=scratch)
            return
        for vocab in arguments.vocab or ("32k", "128k"):
            results = {
                seq_len: compare(
                    vocab,
                    seq_len,
                    root=arguments.root,
                    scratch=scratch,
                    tuning=tuning,
                    leave_out=arguments.leave_out or (),
                )
                for seq_len in arguments.seq_len or SEQ_LENS
            }
            if 8192 in results and 16384 in results:
                report_growth(_prefix(vocab, tuning), results[8192], results[16384])


if __name__ == "__main__":
    main()
