"""The demo: teach a model to talk like a pirate inside a memory limit that cannot hold it, then show what happened.

    make demo            (or: python -m examples.demo [--output demo-output] [--made-up])

The model is SmolLM2-135M-Instruct, from a package (examples/smollm.py); where that cannot be had, a made-up one with
data of its own. Training first runs as usual, with transformers, PEFT and TRL alone, inside a memory limit that the
kernel enforces; then streamed, inside the same limit. What the model answers before and after stands at the end.
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
from examples.smollm import ModelUnavailable, write_smollm
from offload.budget import format_bytes, parse_bytes

NUM_ROWS = 400
_BARS = "▁▂▃▄▅▆▇█"
_FRAMEWORKS = "import datasets, peft, torch, transformers, trl; trl.SFTTrainer"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is trained, and how."""

    model: Path
    data: Path
    questions: tuple[str, ...]
    """Asked before and after; none of them is in the real model's data."""
    checkpoint_bytes: int
    limit: str
    device_budget: str
    batch_size: int
    num_steps: int
    expected_fall: float
    """By which the loss must have fallen at the end, as a share of the first."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run as it is shown."""

    outcome: Outcome
    losses: list[float]
    step_s: float
    """Median, the first step left out."""


def real_subject(folder: Path) -> Subject:
    """SmolLM2 and the pirate's chats.

    Raises:
        ModelUnavailable: The model cannot be had.
    """
    return Subject(
        model=folder / "model",
        data=ROOT / "examples" / "data" / "pirate.jsonl",
        questions=("What is the best way to learn to swim?", "Why is the sky blue?", "How do I make a cup of tea?"),
        checkpoint_bytes=write_smollm(folder / "model"),
        limit="1000MiB",
        device_budget="360MiB",
        batch_size=8,
        num_steps=26,
        expected_fall=0.25,
    )


def made_up_subject(folder: Path) -> Subject:
    """A model of random weights with data that it can learn from."""
    rows = make_rows(NUM_ROWS)
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", rows)
    return Subject(
        model=folder / "made-up-model",
        data=folder / "train.jsonl",
        questions=("What is the opposite of hot?", "What colour is the sky?"),
        checkpoint_bytes=write_model(folder / "made-up-model", make_tokenizer(rows), shape=DemoShape()),
        limit="1000MiB",
        device_budget="380MiB",
        batch_size=12,
        num_steps=14,
        expected_fall=0.4,
    )


def limited(command: Sequence[str], subject: Subject, *, folder: Path, echo: bool) -> tuple[Outcome, str]:
    """Run a command inside the subject's limit, and a sentence on whether that was enforced."""
    env = {**child_environment(), "HF_HOME": str(folder / "hf-home"), "MPLBACKEND": "Agg"}
    limit_bytes = parse_bytes(subject.limit)
    try:
        outcome = run_limited(command, limit_bytes=limit_bytes, env=env, echo=echo)
    except LimitUnavailable as error:
        return run_limited(command, limit_bytes=None, env=env, echo=echo), f"no memory limit was enforced: {error}"
    return outcome, f"inside {format_bytes(limit_bytes)}, enforced by the kernel"


def train(subject: Subject, *, folder: Path, output: Path) -> tuple[Run, str]:
    """Run examples/sft.py inside the limit and read back what it logged.

    Raises:
        SystemExit: It failed; its own messages are above.
    """
    command = [sys.executable, str(ROOT / "examples" / "sft.py"), "--output", str(output)]
    command += ["--model", str(subject.model), "--data", str(subject.data), "--seq-len", "128"]
    command += ["--device", subject.device_budget, "--host", "0", "--batch-size", str(subject.batch_size)]
    command += ["--max-steps", str(subject.num_steps), "--learning-rate", "2e-3"]
    outcome, limit = limited(command, subject, folder=folder, echo=True)
    if outcome.returncode != 0:
        why = f"was killed at its memory limit of {subject.limit}" if outcome.num_oom_kills else "failed"
        sys.exit(f"training {why} (exit status {outcome.returncode})")
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    step_s = statistics.median(float(entry["lowmem/step_s"]) for entry in steps[1:])
    return Run(outcome=outcome, losses=[float(entry["loss"]) for entry in steps], step_s=step_s), limit


def train_plainly(subject: Subject, *, folder: Path) -> tuple[Outcome, str]:
    """The same without lowmem in the same limit: what became of it, in a sentence too."""
    command = [sys.executable, "-m", "examples.demo_plain", "--output", str(folder / "plain")]
    command += ["--model", str(subject.model), "--data", str(subject.data), "--batch-size", str(subject.batch_size)]
    outcome, _ = limited(command, subject, folder=folder, echo=False)
    if outcome.num_oom_kills:
        return outcome, "killed by the kernel at the limit"
    if outcome.returncode:
        return outcome, f"failed with exit status {outcome.returncode}"
    return outcome, f"peak {format_bytes(outcome.peak_rss_bytes)}, not limited"


def ask(subject: Subject, *, folder: Path, adapter: Path) -> dict[str, list[str]]:
    """What the model answers without and with the adapter, streamed inside the same limit."""
    file = folder / "answers.json"
    command = [sys.executable, str(ROOT / "examples" / "ask.py"), "--model", str(subject.model), "--json", str(file)]
    command += ["--adapter", str(adapter), "--device", subject.device_budget, "--host", "0", "--tokens", "40"]
    outcome, _ = limited([*command, *subject.questions], subject, folder=folder, echo=False)
    if outcome.returncode != 0:
        sys.exit(f"asking the model failed (exit status {outcome.returncode})")
    found: dict[str, list[str]] = json.loads(file.read_text())
    return found


def sparkline(values: Sequence[float]) -> str:
    """One bar per value, from the smallest to the largest of them."""
    low, high = min(values), max(values)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in values)


def draw(file: Path, *, losses: Sequence[float], sizes: dict[str, int], limit_bytes: int) -> None:
    """Draw the loss of every step, and what takes how much memory against the limit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    curve, bars = figure.subplots(1, 2, width_ratios=(1, 1.3))
    curve.plot(range(1, len(losses) + 1), losses, color="#4f7cac")
    curve.set(title="loss", xlabel="step", ylim=(0, None))
    mib = [size / 2**20 for size in sizes.values()]
    drawn = bars.barh([*sizes], mib, color="#4f9d69")
    bars.bar_label(drawn, [f"{size:.0f} MiB" for size in mib], padding=4)
    bars.axvline(limit_bytes / 2**20, color="#d1495b", linestyle="--", label=f"limit: {limit_bytes / 2**20:.0f} MiB")
    bars.set(title="memory", xlabel="MiB", xlim=(0, 1.25 * max(*mib, limit_bytes / 2**20)))
    bars.invert_yaxis()
    bars.legend(loc="upper right", frameon=False)
    for axes in (curve, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def report(
    subject: Subject, run: Run, *, limit: str, plain: str, frameworks_bytes: int, said: dict[str, list[str]]
) -> str:
    """What the demo ends with."""
    losses, weights = run.losses, subject.checkpoint_bytes
    lines = [""]
    for question, before, after in zip(subject.questions, said["model"], said["adapter"], strict=True):
        lines += [f"> {question}", f"  before:  {before}", f"  after:   {after}", ""]
    lines += [
        f"Loss            {sparkline(losses)}  {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps",
        f"Checkpoint      {format_bytes(weights)} in bf16, {format_bytes(2 * weights)} as it computes, in fp32",
        f"Frameworks      {format_bytes(frameworks_bytes)} before any model (torch, transformers, TRL, PEFT)",
        f"Plain TRL       {plain}",
        f"Streamed        peak {format_bytes(run.outcome.peak_rss_bytes)}; {limit}",
        f"Step            {run.step_s:.2f} s for {subject.batch_size} chats",
    ]
    return "\n".join(lines)


def choose_subject(folder: Path, *, made_up: bool) -> Subject:
    """The real model where it can be had, and word of it where not."""
    if not made_up:
        try:
            return real_subject(folder)
        except ModelUnavailable as error:
            print(f"No real model: {error}\nA made-up one takes its place.", flush=True)
    return made_up_subject(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--made-up", action="store_true", help="use a made-up model; nothing is downloaded")
    options = parser.parse_args()
    folder: Path = options.output
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    subject = choose_subject(folder, made_up=options.made_up)
    print(f"A model of {format_bytes(subject.checkpoint_bytes)} in {subject.model}, data in {subject.data}\n")
    frameworks = run_limited([sys.executable, "-c", _FRAMEWORKS], limit_bytes=None, env=child_environment())
    print(f"1. transformers, PEFT and TRL alone, inside {subject.limit}:", flush=True)
    plain_outcome, plain = train_plainly(subject, folder=folder)
    print(f"   {plain}\n\n2. The same with lowmem, inside {subject.limit}:\n", flush=True)
    output = folder / "adapter"
    run, limit = train(subject, folder=folder, output=output)
    print("\n3. Its answers, before and after:", flush=True)
    said = ask(subject, folder=folder, adapter=output)
    print(
        report(subject, run, limit=limit, plain=plain, frameworks_bytes=frameworks.peak_rss_bytes, said=said),
        flush=True,
    )
    sizes = {
        "checkpoint, bf16": subject.checkpoint_bytes,
        "checkpoint, fp32": 2 * subject.checkpoint_bytes,
        "libraries alone": frameworks.peak_rss_bytes,
        "lowmem, whole process": run.outcome.peak_rss_bytes,
    }
    if not plain_outcome.num_oom_kills:
        sizes["plain TRL, whole process"] = plain_outcome.peak_rss_bytes
    draw(folder / "demo.png", losses=run.losses, sizes=sizes, limit_bytes=parse_bytes(subject.limit))
    print(f"\nPictures        {folder / 'demo.png'}, {output / 'timeline.png'}")
    print(f"Report          {output / 'report.html'} (opens in a browser)")
    print(f"Trace           {output / 'trace.json'} (lowmem trace {output}; or https://ui.perfetto.dev)")
    print(f"Ask it yourself python examples/ask.py --model {subject.model} --adapter {output} 'What is a ship?'")
    if statistics.fmean(run.losses[-3:]) > (1 - subject.expected_fall) * run.losses[0]:
        sys.exit("the loss did not fall as it should")


if __name__ == "__main__":
    main()
