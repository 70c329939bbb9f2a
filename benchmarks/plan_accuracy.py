"""Plans held against what happened: peak memory and seconds per step, predicted and measured, job by job.

    python -m benchmarks.plan_accuracy [--root /nvme/checkpoints] [--case NAME ...] [--results FILE] [--table]
        [--cpu-time] [--bench-each]

50 jobs of TRL's trainers on a processor: shapes, adapters and every weight, optimizers, batches, sequences, budgets and
tiers. Each runs in a process of its own, forked from one that has imported everything, and trains a tiny model first.
Memory is the kernel's high-water mark from before the model is loaded to the end of the last step, less what was there;
time is the median of the steps after the second.
Steps are predicted twice: with the rates that `lowmem bench` keeps for the shape (measured here once for each), and as
lowmem.Monitor corrects them: after the first step, the second and the tenth, which is the first that TRL's defaults
log. What lies in FILE already is not run again. Half an hour on two quiet cores. With --cpu-time everything is timed by
the processor's time instead of the wall's, which says as much of computation where other programs run, and nothing of
disks. With --bench-each rates are measured right before each job, which takes another twenty minutes: for machines
whose speed changes from minute to minute. There, a product that is always the same is timed before, between and after
the measurements and after the job; where its times, or those of the first and the second half of the job's steps,
differ by more than a tenth, both are done again, three times at most. All that was seen is written to FILE; the last
counts.
"""

import argparse
import importlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import SHAPES, ensure_checkpoint, write_tokenizer
from benchmarks.harness import ROOT, emit

BENCHMARK = "plan_accuracy"
NUM_STEPS, _MOST_STEPS = 12, 25
"""A machine's pace changes from step to step, whatever runs on it."""

_CORRECTED_AFTER = (1, 2, 10)
_STEADY, _MOST_ATTEMPTS = 1.1, 3
_RUN_S = 6.0
"""Jobs of short steps take more of them, to fill so much: a shared machine's pace differs from second to second."""
_MIB = 1 << 20
Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A job and what it is given."""

    shape: str = "plan-medium"
    kind: str = "lora"
    """lora, dora or full."""
    optimizer: str = "adamw"
    """The Trainer's own by its name there, or one of lowmem.optim's."""
    batch_size: int = 1
    seq_len: int = 512
    accumulation: int = 1
    task: str = "sft"
    dtype: str = "float32"
    autocast: bool = True
    """Of bf16: TRL's default; else SFTConfig(bf16=False)."""
    dropout: float = 0.0
    budget: str = "ample"
    """tight: a twentieth more than the smallest that fits; half: half way to where nothing moves; ample: 4 GiB."""
    host_mib: int = 0
    disk: bool = False

    @property
    def name(self) -> str:
        """As it is asked for."""
        words = [self.shape.removeprefix("plan-"), self.kind, self.optimizer, f"{self.batch_size}x{self.seq_len}"]
        words += [f"acc{self.accumulation}"] if self.accumulation > 1 else []
        words += [self.task] if self.task != "sft" else []
        words += [("bf16" if self.autocast else "bf16alone")] if self.dtype == "bfloat16" else []
        words += ["dropout"] if self.dropout else []
        words += [self.budget]
        words += [f"host{self.host_mib}"] if self.host_mib else []
        return "-".join([*words, "disk"] if self.disk else words)


CASES = {
    case.name: case
    for case in (
        Case(shape="budgets", seq_len=1024),
        Case(seq_len=128),
        Case(),
        Case(budget="tight"),
        Case(budget="half"),
        Case(batch_size=4),
        Case(batch_size=4, budget="tight", host_mib=64),
        Case(batch_size=16, seq_len=128, budget="tight"),
        Case(seq_len=2048),
        Case(seq_len=2048, budget="tight"),
        Case(seq_len=4096, budget="tight", disk=True),
        Case(batch_size=2, accumulation=2, budget="tight"),
        Case(dtype="bfloat16"),
        Case(dtype="bfloat16", batch_size=4, budget="tight"),
        Case(dtype="bfloat16", autocast=False, batch_size=2),
        Case(optimizer="sgd", batch_size=2),
        Case(optimizer="adafactor", batch_size=2, budget="half"),
        Case(dropout=0.1, batch_size=2),
        Case(task="dpo", batch_size=2, seq_len=256),
        Case(shape="plan-wide", seq_len=256, budget="tight"),
        Case(shape="plan-wide"),
        Case(shape="plan-wide", batch_size=4, seq_len=256, budget="tight", disk=True),
        Case(shape="plan-wide", batch_size=2, dtype="bfloat16", budget="half"),
        Case(kind="dora"),
        Case(kind="dora", batch_size=4, seq_len=256, budget="tight"),
        Case(shape="plan-wide", kind="dora", seq_len=256, budget="tight"),
        Case(shape="plan-wide", kind="dora", dtype="bfloat16", seq_len=512),
        Case(kind="dora", dtype="bfloat16", autocast=False, batch_size=2, seq_len=256),
        Case(kind="dora", dtype="bfloat16", autocast=False, dropout=0.1, batch_size=2, seq_len=256),
        Case(kind="dora", dtype="bfloat16", dropout=0.1, batch_size=2, seq_len=256),
        Case(kind="dora", dropout=0.1, batch_size=2, seq_len=256),
        Case(kind="dora", dropout=0.1, batch_size=4, seq_len=256, budget="tight"),
        Case(shape="plan-wide", kind="dora", dtype="bfloat16", autocast=False, batch_size=2, seq_len=256),
        Case(shape="plan-moe", seq_len=256),
        Case(shape="plan-moe", batch_size=4, seq_len=256, budget="tight"),
        Case(shape="budgets", kind="full", seq_len=1024),
        Case(kind="full", seq_len=256),
        Case(kind="full", batch_size=4, seq_len=128, budget="tight", disk=True),
        Case(kind="full", seq_len=512, budget="tight", host_mib=512),
        Case(kind="full", accumulation=2, seq_len=256, budget="tight", disk=True),
        Case(shape="plan-wide", kind="full", seq_len=128, budget="tight", disk=True),
        Case(kind="full", optimizer="AdaLomo", seq_len=256),
        Case(kind="full", optimizer="GaLore", seq_len=256),
        Case(kind="full", optimizer="Fira", seq_len=256),
        Case(kind="full", optimizer="APOLLO", seq_len=256),
        # Products are kept in these.
        Case(shape="plan-wide", batch_size=2),
        Case(shape="plan-wide", batch_size=4, dtype="bfloat16"),
        Case(shape="plan-wide", batch_size=4, budget="half", disk=True),
        Case(shape="plan-wide", kind="dora", batch_size=2, budget="half"),
        Case(shape="plan-wide", kind="full", batch_size=2),
    )
}


def ensure_model(shape: str, *, root: Path) -> Path:
    """The folder of a shape's checkpoint, written now unless it is there."""
    if shape in SHAPES:
        return ensure_checkpoint(shape, root=root)
    folder = root / shape
    if not folder.is_dir():
        import torch
        from transformers import AutoModelForCausalLM, Qwen3MoeConfig

        config = Qwen3MoeConfig(
            hidden_size=512,
            intermediate_size=1024,
            moe_intermediate_size=256,
            num_experts=16,
            num_experts_per_tok=4,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            vocab_size=8000,
        )
        unfinished = Path(tempfile.mkdtemp(dir=root))
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(unfinished)
        write_tokenizer(unfinished)
        unfinished.rename(folder)
    return folder


def run(case: Case, *, root: Path, clock: Clock) -> dict[str, object]:
    """Train some steps and report what was predicted and what happened."""
    import torch

    from lowmem.machines.rates import Pace, Stopwatch

    folder = ensure_model(case.shape, root=root)
    with tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True) as scratch:
        report = _run(case, folder, scratch=scratch, clock=clock)
    # What takes memory comes after the job.
    pace = Pace(Stopwatch(torch.device("cpu"), clock))
    pace.look()
    return report | {"paces_ms": pace.looks_ms}


def _run(case: Case, folder: Path, *, scratch: str, clock: Clock) -> dict[str, object]:
    import lowmem
    from benchmarks.process_memory import PeakMeter
    from lowmem.planning.step_memory import peak_bytes
    from lowmem.streaming.runtime import runtime_of

    lora = None if case.kind == "full" else _lora(case)

    def plan(device_bytes: int) -> lowmem.Plan:
        return lowmem.plan(
            folder,
            task=case.task,  # type: ignore[arg-type]
            batch_size=case.batch_size,
            seq_len=case.seq_len,
            gradient_accumulation_steps=case.accumulation,
            peft_config=lora,
            tuning="full" if case.kind == "full" else "adapter",
            optimizer=case.optimizer,
            budget=lowmem.Budget(device=device_bytes, host=case.host_mib * _MIB, disk=scratch if case.disk else None),
            device="cpu",
            dtype=case.dtype,
            autocast=case.autocast,
        )

    ample = plan(4 << 30)
    smallest_bytes, most_bytes = ample.smallest_device_bytes, ample.device_bytes
    planned = {
        "ample": lambda: ample,
        "tight": lambda: plan(int(1.05 * smallest_bytes)),
        "half": lambda: plan((smallest_bytes + most_bytes) // 2),
    }[case.budget]()
    planned.require_fit()
    steps = _clock(clock)
    with PeakMeter() as meter:
        model = lowmem.from_pretrained(folder, plan=planned, tuning=planned.job.tuning)
        moments = _Moments(meter, num_blocks=len(planned.placements), clock=clock)
        steps.moments, steps.plan = moments, planned
        runtime_of(model).listen(moments.visited)
        num_steps = max(NUM_STEPS, min(_MOST_STEPS, int(_RUN_S / planned.step_s)))
        _train(model, lora, case, callbacks=[steps], num_steps=num_steps)
    measured_s = statistics.median(steps.steps_s[2:])
    predicted_bytes = planned.device_bytes + planned.host_bytes
    return {
        "predicted_bytes": predicted_bytes,
        "peak_bytes": meter.growth_bytes,
        "peaks_mib": {moment: round(nbytes / _MIB, 1) for moment, nbytes in moments.peaks.items()},
        "predicted_mib": {
            moment: round(peak_bytes([r for r in planned.roles if r.phase in ("always", moment)], "device") / _MIB, 1)
            for moment in ("forward", "head", "block")
        },
        "peak_over_predicted": round(meter.growth_bytes / predicted_bytes, 4),
        "predicted_step_s": round(planned.step_s, 4),
        "step_s": round(measured_s, 4),
        "steps_s": [round(step_s, 4) for step_s in steps.steps_s],
        "update_s": [round(update_s, 4) for update_s in steps.update_s],
        "visits_s": {
            phase: round(sum(seconds for seen, seconds in moments.visits if seen == phase), 4)
            for phase in ("forward", "backward", "no_grad")
        },
        "planned_update_s": round(planned.time.update_s, 4),
        "is_cpu_time": clock is time.process_time,
        "corrected_step_s": [round(step_s, 4) for step_s in steps.corrected_s],
        "step_over_corrected": [round(measured_s / step_s, 4) for step_s in steps.corrected_s],
        "planned_lanes_s": {lane: round(getattr(planned.time, f"{lane}_s"), 4) for lane in ("compute", "disk")},
        "step_over_predicted": round(measured_s / planned.step_s, 4),
        "measured_rates": list(planned.rates.measured),
        "micro_batch": planned.micro_batch,
        "chunk_tokens": planned.chunk_tokens,
        "boundary_tier": planned.boundary_tier,
        "state_tier": planned.choice.state_tier,
        "placements": "".join(place.value[0] for place in planned.placements),
        "roles_mib": {
            f"{role.role}/{role.tier[0]}/{role.phase}": round(role.nbytes / _MIB, 1) for role in planned.roles
        },
    }


class _Moments:
    """The largest growth in each moment of a step, told by the blocks that are visited."""

    def __init__(self, meter: Any, *, num_blocks: int, clock: Clock) -> None:
        self.peaks: dict[str, int] = {}
        self.visits: list[tuple[str, float]] = []
        self._meter, self._last, self._now = meter, num_blocks - 1, "loading"
        self._clock, self._start_s = clock, 0.0

    def visited(self, visit: Any) -> None:
        """A visit begins or ends."""
        if visit.started:
            self._start_s = self._clock()
        else:
            self.visits.append((visit.phase, self._clock() - self._start_s))
        if visit.phase != "backward":
            # After the last block comes the head; a reference's blocks come before.
            self._enter("head" if visit.block == self._last and not visit.started else "forward")
        else:
            self._enter("between" if visit.block == 0 and not visit.started else "block")

    def _enter(self, moment: str) -> None:
        if moment != self._now:
            self.peaks[self._now] = max(self.peaks.get(self._now, 0), self._meter.lap())
            self._now = moment


def _lora(case: Case) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=case.dropout,
        use_dora=case.kind == "dora",
        target_modules="all-linear" if case.shape != "plan-moe" else ["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )


def _warm_up(root: Path, *, dtype: str = "float32") -> None:
    """Have libraries allocate what they keep, with another model; in bf16 that is 9 MiB more."""
    import lowmem

    case = Case(batch_size=2, seq_len=64)
    model = lowmem.from_pretrained(
        ensure_checkpoint("tiny", root=root), budget=lowmem.Budget(device="256MiB", host=0), device="cpu", dtype=dtype
    )
    _train(model, _lora(case), case, callbacks=[], num_steps=2)


def _import_everything() -> None:
    """Have children find all libraries imported. Nothing is computed: threads of the parent's would hang them."""
    import lowmem

    importlib.import_module("trl").SFTTrainer  # noqa: B018 - TRL imports what it is asked for
    importlib.import_module("trl").DPOTrainer  # noqa: B018
    lowmem.from_pretrained  # noqa: B018


def _clock(clock: Clock) -> Any:
    from transformers import TrainerCallback

    from lowmem.machines.correction import StepCorrection, first_touch_s

    class StepClock(TrainerCallback):
        def __init__(self) -> None:
            self.steps_s: list[float] = []
            self.corrected_s: list[float] = []
            self.plan: Any = None
            self.update_s: list[float] = []
            self.moments: Any = None
            self._correction: StepCorrection | None = None
            self._start_s = 0.0

        def on_step_begin(self, *_: object, **__: object) -> None:
            self._start_s = clock()
            if self.moments is not None:
                self.moments.visits.clear()

        def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
            self.update_s.append(clock())

        def on_optimizer_step(self, *_: object, **__: object) -> None:
            self.update_s[-1] = clock() - self.update_s[-1]

        def on_step_end(self, *_: object, **__: object) -> None:
            self.steps_s.append(clock() - self._start_s)
            if self.moments is None:
                return
            if self._correction is None:
                told = self.plan.time
                self._correction = StepCorrection(told.update_s, touch_s=first_touch_s(self.plan), late_s=told.late_s)
            self._correction.see(self.steps_s[-1], self.moments.visits, update_s=self.update_s[-1])
            if len(self.steps_s) in _CORRECTED_AFTER:
                self.corrected_s.append(self._correction.step_s or 0.0)

    return StepClock()


def _train(model: Any, lora: Any, case: Case, *, callbacks: list[Any], num_steps: int = NUM_STEPS) -> None:
    import torch
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    import lowmem

    generator = torch.Generator().manual_seed(0)
    num_rows = num_steps * case.batch_size * case.accumulation

    def rows(length: int) -> list[list[int]]:
        drawn: list[list[int]] = torch.randint(3, 250, (num_rows, length), generator=generator).tolist()
        return drawn

    own = None
    if case.optimizer not in ("adamw", "sgd", "adafactor"):
        own = getattr(lowmem.optim, case.optimizer)(model, lr=1e-5)
    elif case.kind == "full":
        own = lowmem.optim.AdamW(model, lr=1e-5)
    with tempfile.TemporaryDirectory() as output:
        settings: dict[str, Any] = {
            "output_dir": output,
            "max_length": None,
            "per_device_train_batch_size": case.batch_size,
            "gradient_accumulation_steps": case.accumulation,
            "max_steps": num_steps,
            "report_to": "none",
            "save_strategy": "no",
            "bf16": case.dtype == "bfloat16" and case.autocast,
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "logging_steps": 1,
            "optim": {"adamw": "adamw_torch_fused"}.get(case.optimizer, case.optimizer) if own is None else "sgd",
        }
        common = {"model": model, "peft_config": lora, "optimizers": (own, None), "callbacks": callbacks}
        if case.task == "dpo":
            # A byte is a token; the completion gets its end.
            lengths = {"prompt": case.seq_len // 2, "chosen": case.seq_len // 2 - 1, "rejected": case.seq_len // 2 - 1}
            texts = {name: ["".join(chr(97 + i % 26) for i in row) for row in rows(n)] for name, n in lengths.items()}
            data = Dataset.from_dict(texts)
            DPOTrainer(args=DPOConfig(**settings), train_dataset=data, **common).train()
        else:
            # The auxiliary loss collects routers' logits from inside the blocks, which then go as they are.
            settings |= {"router_aux_loss_coef": 0.0} if case.shape == "plan-moe" else {}
            data = Dataset.from_dict({"input_ids": rows(case.seq_len)})
            SFTTrainer(args=SFTConfig(**settings), train_dataset=data, **common).train()


def read_results(file: Path) -> dict[str, dict[str, Any]]:
    """The last result of each case in a file of JSON lines."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {found["case"]: found for found in map(json.loads, lines)}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: predicted and measured, job by job."""
    lines = [
        "| job | peak predicted | measured | | step predicted | measured | | "
        + " | ".join(f"after step {number}" for number in _CORRECTED_AFTER)
        + " |",
        "|---|" + (6 + len(_CORRECTED_AFTER)) * "---:|",
    ]
    for name in CASES:
        found = results.get(name)
        if found is None or "peak_bytes" not in found:
            lines.append(f"| {name} | {'not run' if found is None else found.get('outcome')} | | | | | | | |")
            continue
        after = [f"{100 * (ratio - 1):+.0f}%" for ratio in found["step_over_corrected"]]
        after += [""] * (len(_CORRECTED_AFTER) - len(after))
        lines.append(
            f"| {name} | {found['predicted_bytes'] / _MIB:.0f} MiB | {found['peak_bytes'] / _MIB:.0f} MiB "
            f"| {100 * (found['peak_over_predicted'] - 1):+.0f}% | {found['predicted_step_s']:.2f} s "
            f"| {found['step_s']:.2f} s | {100 * (found['step_over_predicted'] - 1):+.0f}% "
            f"| {' | '.join(after)} |"
        )
    return "\n".join(lines)


def _bench(case: Case, *, root: Path, clock: Clock) -> dict[str, object]:
    """Measure a shape's rates, and have plans find them."""
    from lowmem.machines.bench import bench_lines

    model, scratch = ensure_model(case.shape, root=root), root / "scratch" if case.disk else None
    if scratch is not None:
        scratch.mkdir(exist_ok=True)
    # Each job's own: what a disturbed measurement found would not replace steadier rates.
    shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]) / "lowmem" / "rates", ignore_errors=True)
    lines = list(bench_lines(model, device="cpu", dtype=case.dtype, disk=scratch, autocast=case.autocast, clock=clock))
    return {"lines": lines}


def _run_forked(run: Callable[..., dict[str, object]], case: Case, *, root: Path, clock: Clock) -> dict[str, Any]:
    """Run a job in a copy of this process, which knows all libraries and has no memory of other jobs."""
    with tempfile.TemporaryFile("w+") as file:
        child = os.fork()
        if not child:
            code = 1
            try:
                # Pages of libraries are not copied with the process: touch them, or they would count as growth.
                _warm_up(root, dtype=case.dtype)
                json.dump(run(case, root=root, clock=clock), file)
                file.flush()
                code = 0
            except Exception:  # noqa: BLE001 - the other jobs go on
                traceback.print_exc()
            finally:
                # Past the parent's clean-up.
                os._exit(code)
        _, status = os.waitpid(child, 0)
        file.seek(0)
        report: dict[str, Any] = json.load(file) if status == 0 else {"outcome": f"failed with status {status}"}
        return report


def _of_halves(steps_s: list[float]) -> list[float]:
    """How long a step took in each half of a job; nothing where the job is short."""
    half = len(steps_s) // 2
    return [statistics.median(part) for part in (steps_s[:half], steps_s[-half:])] if half else []


def _changed(times: list[float]) -> float:
    return max(times, default=1.0) / min(times, default=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "lowmem-checkpoints")
    parser.add_argument("--case", choices=CASES, action="append", help="again for several; all if not given")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "plan_accuracy.jsonl")
    parser.add_argument("--cpu-time", action="store_true", help="time by the processor's time")
    parser.add_argument("--bench-each", action="store_true", help="measure the rates right before each job")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    arguments = parser.parse_args()
    found = read_results(arguments.results)
    names = [] if arguments.table else arguments.case or [name for name in CASES if name not in found]
    if names:
        _import_everything()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    # Kept apart from what `lowmem bench` has measured for this machine's user.
    os.environ["XDG_CACHE_HOME"] = str(arguments.root / ("rates-of-cpu-time" if arguments.cpu_time else "rates"))
    benched: set[tuple[str, str, bool]] = set()
    for name in names:
        case = CASES[name]
        for attempt in range(_MOST_ATTEMPTS):
            paces_ms: list[float] = []
            if arguments.bench_each or (case.shape, case.dtype, case.autocast) not in benched:
                benched.add((case.shape, case.dtype, case.autocast))
                measured = _run_forked(_bench, case, root=arguments.root, clock=clock)
                paces_ms += [ms for line in measured.get("lines", ()) for ms in line.get("looks_ms", ())]
            report = _run_forked(run, case, root=arguments.root, clock=clock)
            paces_ms += report.pop("paces_ms", [])
            changed = max(_changed(paces_ms), _changed(_of_halves(report.get("steps_s", [])[2:])))
            report |= {"attempt": attempt, "paces_ms": paces_ms, "slowest_over_fastest": round(changed, 3)}
            line = emit(BENCHMARK, name, **report)
            with arguments.results.open("a") as file:
                file.write(line + "\n")
            shown = ("outcome", "peak_over_predicted", "step_over_predicted", "step_over_corrected", "attempt")
            summary = {key: report.get(key) for key in (*shown, "slowest_over_fastest")}
            print(name, summary, file=sys.stderr, flush=True)
            if changed <= _STEADY or not arguments.bench_each:
                break
    print(table(read_results(arguments.results)))


if __name__ == "__main__":
    main()
