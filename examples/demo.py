"""The demo: fine-tune a model inside a memory limit that could not hold it, then show what happened.

    make demo            (or: python -m examples.demo [--output demo-output])

Makes a model, a tokenizer and a data set, runs examples/sft.py on them inside a memory limit that the kernel enforces
(where that can be had), runs a few steps with everything resident for comparison, and prints both. Needs no network.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import ROOT, child_environment
from benchmarks.memory_limit import LimitUnavailable, Outcome, run_limited
from examples.demo_model import DemoShape, make_rows, make_tokenizer, write_model, write_rows
from offload.budget import format_bytes, parse_bytes

LIMIT = "1000MiB"
DEVICE_BUDGET = "380MiB"
NUM_STEPS = 14
NUM_RESIDENT_STEPS = 5
BATCH_SIZE = 12
NUM_ROWS = 400
_BARS = "▁▂▃▄▅▆▇█"
_FRAMEWORKS = "import datasets, peft, torch, transformers, trl; trl.SFTTrainer"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run as it is shown."""

    outcome: Outcome
    losses: list[float]
    step_s: float
    """Median, the first step left out."""


def train(output: Path, *, inputs: Path, options: Sequence[str], limit_bytes: int | None) -> Run:
    """Run examples/sft.py on the demo's files and read back what it logged.

    Raises:
        SystemExit: It failed; its own messages are above.
    """
    command = [sys.executable, str(ROOT / "examples" / "sft.py"), "--output", str(output)]
    command += ["--model", str(inputs / "model"), "--data", str(inputs / "train.jsonl")]
    command += ["--batch-size", str(BATCH_SIZE), "--learning-rate", "2e-3", "--seq-len", "128", *options]
    env = {**child_environment(), "HF_HOME": str(inputs / "hf-home"), "MPLBACKEND": "Agg"}
    outcome = run_limited(command, limit_bytes=limit_bytes, env=env, echo=True)
    if outcome.returncode != 0:
        why = f"killed at its memory limit of {limit_bytes} bytes" if outcome.num_oom_kills else "failed"
        sys.exit(f"training {why} (exit status {outcome.returncode})")
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    return Run(
        outcome=outcome,
        losses=[float(entry["loss"]) for entry in steps],
        step_s=statistics.median(float(entry["step_s"]) for entry in steps[1:]),
    )


def train_within_limit(output: Path, *, inputs: Path) -> tuple[Run, str]:
    """The streamed run, inside the limit if one can be enforced, and a sentence that says which."""
    options = ["--device", DEVICE_BUDGET, "--host", "0", "--max-steps", str(NUM_STEPS)]
    limit_bytes = parse_bytes(LIMIT)
    try:
        run = train(output, inputs=inputs, options=options, limit_bytes=limit_bytes)
    except LimitUnavailable as error:
        run = train(output, inputs=inputs, options=options, limit_bytes=None)
        return run, f"no memory limit was enforced: {error}"
    return run, f"whole process inside {format_bytes(limit_bytes)}, enforced by the kernel"


def sparkline(values: Sequence[float]) -> str:
    """One bar per value, from the smallest to the largest of them."""
    low, high = min(values), max(values)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in values)


def report(
    streamed: Run, resident: Run, *, limit: str, checkpoint_bytes: int, frameworks_bytes: int, output: Path
) -> str:
    """What the demo ends with."""
    losses = streamed.losses
    every = max(1, len(losses) // 5)
    shown = "  ".join(f"step {i + 1}: {losses[i]:.2f}" for i in range(0, len(losses), every))
    lines = [
        "",
        f"Loss            {sparkline(losses)}  {losses[0]:.2f} -> {losses[-1]:.2f}",
        f"                {shown}",
        f"Checkpoint      {format_bytes(checkpoint_bytes)} on disk, {format_bytes(2 * checkpoint_bytes)} in fp32",
        f"Frameworks      {format_bytes(frameworks_bytes)} before any model (torch, transformers, TRL, PEFT)",
        f"Peak, streamed  {format_bytes(streamed.outcome.peak_rss_bytes)}; {limit}",
        f"Peak, resident  {format_bytes(resident.outcome.peak_rss_bytes)}, no limit",
        f"Step, streamed  {streamed.step_s:.2f} s",
        f"Step, resident  {resident.step_s:.2f} s (streamed takes {streamed.step_s / resident.step_s:.2f}x)",
        f"Adapter         {output / 'adapter_model.safetensors'}",
        f"Timeline        {output / 'timeline.png'}",
        f"Trace           {output / 'trace.json'} (opens in https://ui.perfetto.dev)",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    folder = parser.parse_args().output
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rows = make_rows(NUM_ROWS)
    tokenizer = make_tokenizer(rows)
    checkpoint_bytes = write_model(folder / "model", tokenizer, shape=DemoShape())
    write_rows(folder / "train.jsonl", rows)
    print(f"Made a model of {format_bytes(checkpoint_bytes)} and {len(rows)} examples in {folder}\n", flush=True)
    frameworks = run_limited([sys.executable, "-c", _FRAMEWORKS], limit_bytes=None, env=child_environment())
    output = folder / "adapter"
    streamed, limit = train_within_limit(output, inputs=folder)
    print("\nThe same with every block resident, for comparison:\n", flush=True)
    options = ["--device", str(8 * checkpoint_bytes), "--max-steps", str(NUM_RESIDENT_STEPS)]
    resident = train(folder / "resident", inputs=folder, options=options, limit_bytes=None)
    print(
        report(
            streamed,
            resident,
            limit=limit,
            checkpoint_bytes=checkpoint_bytes,
            frameworks_bytes=frameworks.peak_rss_bytes,
            output=output,
        )
    )
    if statistics.fmean(streamed.losses[-3:]) > 0.6 * streamed.losses[0]:
        sys.exit("the loss did not fall as it should")


if __name__ == "__main__":
    main()
