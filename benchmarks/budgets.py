"""Budgets held against the process: what TRL's trainer makes it grow by, with and without a plan that says what comes.

    python -m benchmarks.budgets [--root /nvme/checkpoints] [--case lora-1x2048-planned ...]

24 jobs on a small model: LoRA and every weight, batches of 1 to 64, 128 to 8192 tokens, each with a plan for just that
job and with nothing but `from_pretrained(budget=...)`. The budget is a little more than the smallest that fits, and
96 MiB at least. Growth is the kernel's high-water mark from before the model is loaded to
the end of the second step, in a process that has trained a tiny model before. Each job runs in a process of its own; a
few minutes in all.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.harness import emit, last_json, run_module

BENCHMARK = "budgets"
SHAPE = "budgets"
MOST_OVER = 1.03
SMALLEST_BUDGET = 96 << 20
"""Below it, what trainers and data sets take for themselves is more than the budget may be missed by."""
_SIZES = ((1, 128), (1, 2048), (1, 8192), (4, 512), (16, 512), (64, 128))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A job and what it is given."""

    tuning: str
    batch_size: int
    seq_len: int
    planned: bool
    """Whether `from_pretrained` gets a plan for this job, or only the budget."""

    @property
    def name(self) -> str:
        """As it is asked for."""
        kind = "lora" if self.tuning == "adapter" else "full"
        return f"{kind}-{self.batch_size}x{self.seq_len}-{'planned' if self.planned else 'unplanned'}"


CASES = {
    case.name: case
    for tuning in ("adapter", "full")
    for batch_size, seq_len in _SIZES
    for planned in (True, False)
    for case in [Case(tuning=tuning, batch_size=batch_size, seq_len=seq_len, planned=planned)]
}


def run(case: Case, *, root: Path) -> dict[str, object]:
    """Train two steps and report growth, budget and what was planned in the end."""
    import lowmem
    from benchmarks.process_memory import PeakMeter
    from lowmem.streaming.runtime import runtime_of
    from offload import BudgetError

    folder, scratch = ensure_checkpoint(SHAPE, root=root), tempfile.mkdtemp(dir=root)
    lora = _lora() if case.tuning == "adapter" else None
    # On a CPU both are RAM. Larger batches may cache blocks on the host, or keep their activations there.
    host_bytes = 32 << 20 if case.batch_size > 4 and case.tuning == "adapter" else 0
    disk = scratch if case.tuning == "full" else None

    def plan(device_bytes: int) -> lowmem.Plan:
        return lowmem.plan(
            folder,
            batch_size=case.batch_size,
            seq_len=case.seq_len,
            peft_config=lora,
            tuning=case.tuning,  # type: ignore[arg-type]
            budget=lowmem.Budget(device=device_bytes, host=host_bytes, disk=disk),
            device="cpu",
        )

    device_bytes = max(SMALLEST_BUDGET, int(1.1 * plan(0).smallest_device_bytes))
    planned = plan(device_bytes)
    _warm_up(root)
    outcome, visits, model = "kept", 0, None
    with PeakMeter() as meter:
        try:
            model = lowmem.from_pretrained(
                folder,
                plan=planned if case.planned else None,
                budget=None if case.planned else lowmem.Budget(device=device_bytes, host=host_bytes, disk=disk),
                tuning=case.tuning,  # type: ignore[arg-type]
                device="cpu",
            )
            seen: list[object] = []
            runtime_of(model).listen(seen.append)
            _train(model, lora, batch_size=case.batch_size, seq_len=case.seq_len)
        except BudgetError as error:
            outcome = f"refused: {error}"
        visits = 0 if model is None else len(seen)
    budget_bytes = device_bytes + host_bytes
    if outcome != "kept" and visits:
        outcome = f"refused after {visits} visits"
    if meter.growth_bytes > MOST_OVER * budget_bytes:
        outcome = "over"
    made = planned if model is None else runtime_of(model).plan
    return {
        "outcome": outcome,
        "growth_bytes": meter.growth_bytes,
        "budget_bytes": budget_bytes,
        "device_budget_bytes": device_bytes,
        "growth_over_budget": round(meter.growth_bytes / budget_bytes, 3),
        "planned_device_bytes": made.device_bytes,
        "planned_host_bytes": made.host_bytes,
        "micro_batch": made.micro_batch,
        "chunk_tokens": made.chunk_tokens,
        "boundary_tier": made.boundary_tier,
        "placements": [place.value for place in made.placements],
    }


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def _warm_up(root: Path) -> None:
    """Have libraries allocate what they keep, with another model."""
    import lowmem

    lora = _lora()
    model = lowmem.from_pretrained(
        ensure_checkpoint("tiny", root=root), budget=lowmem.Budget(device="256MiB", host=0), device="cpu"
    )
    _train(model, lora, batch_size=2, seq_len=64)


def _train(model: Any, lora: Any, *, batch_size: int, seq_len: int) -> None:
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    import lowmem

    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 250, (2 * batch_size, seq_len), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as output:
        SFTTrainer(
            model=model,
            args=SFTConfig(
                output,
                max_length=None,
                per_device_train_batch_size=batch_size,
                max_steps=2,
                report_to="none",
                save_strategy="no",
                bf16=False,
                use_cpu=True,
                disable_tqdm=True,
                dataloader_pin_memory=False,
                logging_steps=1,
            ),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            peft_config=lora,
            optimizers=(lowmem.optim.AdamW(model, lr=1e-5) if lora is None else None, None),
        ).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "lowmem-checkpoints")
    parser.add_argument("--case", choices=CASES, action="append", help="again for several; all if not given")
    parser.add_argument("--here", action="store_true", help="run the one case in this process")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(run(CASES[arguments.case[0]], root=arguments.root)), flush=True)
        return
    ensure_checkpoint(SHAPE, root=arguments.root)
    failed = []
    for name in arguments.case or CASES:
        outcome = run_module(
            "benchmarks.budgets", ["--here", "--case", name, "--root", str(arguments.root)], echo_errors=True
        )
        report = last_json(outcome.output) if outcome.returncode == 0 else {"outcome": f"exit {outcome.returncode}"}
        shape = {"num_parameters": SHAPES[SHAPE].num_parameters, "hidden": SHAPES[SHAPE].hidden}
        emit(BENCHMARK, name, sizes=shape, **report)
        result = str(report["outcome"])
        print(f"{name}: {report.get('growth_over_budget')} of the budget, {result}", file=sys.stderr)
        if result != "kept" and not result.startswith("refused:"):
            failed.append(name)
    if failed:
        sys.exit(f"over budget, or stopped too late: {', '.join(failed)}")


if __name__ == "__main__":
    main()
