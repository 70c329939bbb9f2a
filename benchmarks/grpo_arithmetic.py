"""GRPO and ESSA on a streamed model that this benchmark trains itself from scratch: two-digit addition.

    python -m benchmarks.grpo_arithmetic [--figure grpo-arithmetic.png]

A small Llama is trained until it answers some of the problems, a LoRA adapter is tuned on it for a few steps (streamed,
as all that follows), and from that adapter TRL's GRPOTrainer and lowmem's ESSATrainer each raise the reward, exact
match, with several seeds. Measured on problems that neither trained on, with answers sampled at temperature 1
(what GRPO is rewarded for) and greedily (what ESSA is).
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import lowmem
from benchmarks.arithmetic_task import (
    NUM_ANSWER_TOKENS,
    Problem,
    exact_match,
    exact_share,
    make_tokenizer,
    pretrain,
    problems,
    rows_of,
)
from benchmarks.harness import Value, emit
from lowmem.streaming.runtime import runtime_of
from offload import BudgetError

BENCHMARK = "grpo_arithmetic"
NUM_GENERATIONS = 8
BATCH_SIZE = 256
GRPO_LEARNING_RATE = 1e-3
POPULATION, PROMPTS_PER_MEMBER = 16, 64
_EVERY = 10

Curve = list[tuple[int, float, float]]
"""Completions generated so far, and shares of held-out problems answered exactly: sampled (temperature 1), greedily."""


def streamed(folder: Path) -> PreTrainedModel:
    """The model with all blocks on disk, in the smallest budget in which it takes a step of this benchmark."""
    job = {
        "task": "grpo",
        "batch_size": max(BATCH_SIZE, POPULATION * PROMPTS_PER_MEMBER),
        "seq_len": 6 + NUM_ANSWER_TOKENS,
        "completion_tokens": NUM_ANSWER_TOKENS,
        "peft_config": lora(),
    }
    smallest = lowmem.plan(folder, budget=lowmem.Budget(device="0", host="0"), **job).smallest_device_bytes
    try:
        plan = lowmem.plan(folder, budget=lowmem.Budget(device=smallest, host="0"), **job)
        return lowmem.from_pretrained(folder, plan=plan)
    except BudgetError as error:
        sys.exit(str(error))


def lora() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def settings(output: Path, *, learning_rate: float, num_steps: int, seed: int) -> dict[str, object]:
    """What TRL's configurations share here."""
    return {
        "output_dir": str(output),
        "max_steps": num_steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": seed,
    }


def tune_adapter(folder: Path, output: Path, *, num_steps: int) -> Path:
    """A LoRA adapter after a few supervised steps: where both methods begin."""
    set_seed(0)
    training, _ = problems(seed=0)
    rows = rows_of(training[:2048]).map(
        lambda row: {"prompt": row["prompt"], "completion": row["answer"]}, remove_columns=["answer"]
    )
    trainer = SFTTrainer(
        model=streamed(folder),
        args=SFTConfig(
            **settings(output / "sft", learning_rate=1e-4, num_steps=num_steps, seed=0),
            per_device_train_batch_size=64,
        ),
        train_dataset=rows,
        processing_class=make_tokenizer(),
        peft_config=lora(),
    )
    # It prints to standard output, where results go.
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model(str(output / "adapter"))
    return output / "adapter"


class _Watch(TrainerCallback):
    """Evaluates every few optimizer steps."""

    def __init__(self, note: Callable[[int], None]) -> None:
        self._note = note

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        step = getattr(state, "global_step", 0)
        if step % _EVERY == 0:
            self._note(step)


def shares(model: PreTrainedModel, held_out: list[Problem]) -> tuple[float, float]:
    """Held-out problems answered exactly, sampled and greedily."""
    tokenizer = make_tokenizer()
    return exact_share(model, tokenizer, held_out, seed=0), exact_share(model, tokenizer, held_out, seed=0, greedy=True)


def run_grpo(folder: Path, adapter: Path, output: Path, *, seed: int, num_steps: int) -> Curve:
    """TRL's own GRPOTrainer; the curve on held-out problems."""
    training, held_out = problems()
    set_seed(seed)
    model = PeftModel.from_pretrained(streamed(folder), str(adapter), is_trainable=True)
    curve: Curve = [(0, *shares(model, held_out))]

    def note(step: int) -> None:
        curve.append((step * BATCH_SIZE, *shares(model, held_out)))

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=exact_match,
        args=GRPOConfig(
            **settings(output / f"grpo{seed}", learning_rate=GRPO_LEARNING_RATE, num_steps=num_steps, seed=seed),
            per_device_train_batch_size=BATCH_SIZE,
            num_generations=NUM_GENERATIONS,
            max_completion_length=NUM_ANSWER_TOKENS,
        ),
        train_dataset=rows_of(training),
        processing_class=make_tokenizer(),
        callbacks=[_Watch(note)],
    )
    # It prints to standard output, where results go.
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return curve


def run_essa(folder: Path, adapter: Path, output: Path, *, seed: int, num_steps: int) -> Curve:
    """ESSA from the same adapter; members answer greedily."""
    training, held_out = problems()
    model = PeftModel.from_pretrained(streamed(folder), str(adapter), is_trainable=True)
    trainer = lowmem.ESSATrainer(
        model,
        lowmem.ESSAConfig(
            output_dir=str(output / f"essa{seed}"),
            max_steps=_EVERY,
            population_size=POPULATION,
            per_device_train_batch_size=PROMPTS_PER_MEMBER,
            max_completion_length=NUM_ANSWER_TOKENS,
            sigma=1.0,
            save_steps=_EVERY,
            seed=seed,
        ),
        reward_funcs=exact_match,
        train_dataset=rows_of(training),
        processing_class=make_tokenizer(),
    )
    curve: Curve = []
    for step in range(0, num_steps + 1, _EVERY):
        while trainer.strategy.num_steps < step:
            trainer.step()
        with trainer.spectrum.written(trainer.strategy.mean):
            curve.append((step * POPULATION * PROMPTS_PER_MEMBER, *shares(trainer.model, held_out)))
    return curve


def report(
    method: str, curves: list[Curve], *, wall_s: list[float], held_out: list[Problem], fields: dict[str, Value]
) -> None:
    """Print what came of one method over all seeds, and how sure it is."""
    emit(
        BENCHMARK,
        method,
        num_seeds=len(curves),
        num_held_out=len(held_out),
        sampled=gain([curve[0][1] for curve in curves], [curve[-1][1] for curve in curves], num=len(held_out)),
        greedy=gain([curve[0][2] for curve in curves], [curve[-1][2] for curve in curves], num=len(held_out)),
        curves=[[list(point) for point in curve] for curve in curves],
        wall_s=wall_s,
        **fields,
    )


def gain(before: list[float], after: list[float], *, num: int) -> dict[str, Value]:
    """What was gained over all seeds: its mean, Student's t against none, and the smallest in standard deviations.

    Args:
        before: Share of right answers for each seed.
        after: The same at the end.
        num: Problems that a share is taken of.
    """
    gains = [end - start for start, end in zip(before, after, strict=True)]
    mean = statistics.fmean(gains)
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None
    # Two shares of as many problems, as if independent, which overstates the deviation of paired ones.
    pooled = statistics.fmean([*before, *after])
    deviation = math.sqrt(2 * pooled * (1 - pooled) / num)
    return {
        "before": before,
        "after": after,
        "mean_gain": mean,
        "standard_error": error,
        "t": mean / error if error else None,
        "smallest_gain_in_deviations": min(gains) / deviation,
    }


def draw(curves: dict[str, list[Curve]], file: Path) -> None:
    """Sampled and greedy answers side by side; one thin line for each seed, a thick one for their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), sharex=True)
    for column, (axes, title) in enumerate(zip(panels, ("sampled, temperature 1", "greedy"), strict=True), start=1):
        for (method, runs), colour in zip(curves.items(), ("tab:blue", "tab:orange"), strict=True):
            completions = [point[0] for point in runs[0]]
            for run in runs:
                axes.plot(completions, [point[column] for point in run], color=colour, linewidth=0.8, alpha=0.5)
            mean = [statistics.fmean(point[column] for point in points) for points in zip(*runs, strict=True)]
            axes.plot(completions, mean, color=colour, linewidth=2.2, label=f"{method}, mean of {len(runs)} seeds")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("completions generated in training")
        axes.set_ylabel("exact match on held-out problems")
        axes.grid(alpha=0.3)
        axes.legend(loc="center right", fontsize=8)
    figure.suptitle("Two-digit addition on a streamed model; both begin with the same LoRA adapter", fontsize=11)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, default=Path("grpo-arithmetic.png"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--until", type=float, default=0.25, help="share of problems at which pretraining stops")
    parser.add_argument("--sft-steps", type=int, default=10)
    parser.add_argument("--grpo-steps", type=int, default=60)
    parser.add_argument("--essa-steps", type=int, default=50)
    options = parser.parse_args()
    _, held_out = problems()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        start_s = time.perf_counter()
        pretrained = pretrain(folder, until=options.until)
        pretrain_s = time.perf_counter() - start_s
        print(f"pretrained to {pretrained:.0%} in {pretrain_s:.0f} s", file=sys.stderr)
        adapter = tune_adapter(folder, Path(work), num_steps=options.sft_steps)
        fields: dict[str, Value] = {
            "reward_pretrained": pretrained,
            "pretrain_s": pretrain_s,
            "num_blocks_on_disk": len(runtime_of(streamed(folder)).plan.placement.moving),
        }
        curves: dict[str, list[Curve]] = {}
        for method, run, num_steps in (("GRPO", run_grpo, options.grpo_steps), ("ESSA", run_essa, options.essa_steps)):
            wall_s: list[float] = []
            curves[method] = []
            for seed in range(options.seeds):
                start_s = time.perf_counter()
                curves[method].append(run(folder, adapter, Path(work), seed=seed, num_steps=num_steps))
                wall_s.append(time.perf_counter() - start_s)
                print(f"{method} seed {seed}: {curves[method][-1]}", file=sys.stderr)
            report(method, curves[method], wall_s=wall_s, held_out=held_out, fields={**fields, "num_steps": num_steps})
    draw(curves, options.figure)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the model is too small for more
    main()
