"""The Trainer callback that shows, logs and records what streaming does: `callbacks=[lowmem.Monitor()]`.

A `StepRecorder` listens to the runtime and makes one record of each optimizer step; the monitor sums records up for the
logs, and keeps the timeline of the step that stands best for the others.
"""

from __future__ import annotations

import atexit
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from threading import Lock
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from lowmem.generation.hooks import generation_of
from lowmem.host_memory import process_peak_bytes
from lowmem.machines.correction import StepCorrection, first_touch_s, growth_beyond
from lowmem.monitoring.account import (
    LossPoint,
    RunFacts,
    RunState,
    StepPoint,
    evenly_chosen,
    held_bytes,
    memory_rows,
    planned_peak_bytes,
)
from lowmem.monitoring.progress import StepEstimate, StepProgress
from lowmem.monitoring.report import save_report
from lowmem.monitoring.timeline import (
    BlockPass,
    Output,
    StepTimeline,
    draw_timeline,
    output_file,
    refuse_other_values,
    require_matplotlib,
)
from lowmem.planning.plan import plan_title
from lowmem.progress_line import runs_in_notebook, show_in_notebook, writes_to_file
from lowmem.streaming.runtime import Runtime, Visit, runtime_of

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import TrainerState, TrainingArguments

    from lowmem.planning.plan import Plan
    from offload import Span


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one optimizer step took, all its micro-steps together."""

    duration_s: float
    """Wall time from the Trainer's on_step_begin to its on_step_end: forward, backward and update, not data loading."""
    stall_s: float
    """Time in which the compute device waited for weights."""
    num_tokens: int
    """Tokens of the batch that are not padding."""
    disk_read_bytes: int
    """Bytes that arrived from disk for this step, prefetches between the steps included."""
    disk_busy_bytes: int
    """The part of them that arrived within the step."""
    disk_busy_s: float
    """Time within the step in which a read was under way."""
    host_peak_bytes: int
    """Largest resident memory of this process so far, by the kernel's high-water mark."""
    device_peak_bytes: int
    """The most that torch has reserved on the compute device since training began, with what fragmentation keeps from
    use; 0 for a CPU, whose memory is the host's."""


PREFIX = "lowmem/"
"""Of the values' names in the Trainer's logs: reporters show them as a group of their own."""

REPORT_EVERY_S = 5.0
"""Least seconds between two versions of the report; one takes some 20 ms (`tests/lowmem/test_report.py`)."""

NUM_REPORTED_STEPS = 3
"""The last steps whose spans are drawn in the report."""


def log_values(records: Sequence[StepRecord]) -> dict[str, float]:
    """Sum up the steps since the last log: means per step, rates over the whole time, largest peaks.

    Args:
        records: At least one step.
    """
    duration_s = sum(record.duration_s for record in records)
    disk_busy_s = sum(record.disk_busy_s for record in records)
    values: dict[str, float] = {
        "step_s": duration_s / len(records),
        "tokens_per_s": sum(record.num_tokens for record in records) / duration_s,
        "stall_percent": 100 * sum(record.stall_s for record in records) / duration_s,
        "read_gb": sum(record.disk_read_bytes for record in records) / len(records) / 1e9,
        "host_peak_gib": max(record.host_peak_bytes for record in records) / 2**30,
    }
    device_peak_bytes = max(record.device_peak_bytes for record in records)
    if device_peak_bytes:
        values["device_peak_gib"] = device_peak_bytes / 2**30
    if disk_busy_s:  # nothing was read where every block is resident or cached
        values["disk_gb_per_s"] = sum(record.disk_busy_bytes for record in records) / disk_busy_s / 1e9
    return values


def planned_values(plan: Plan) -> dict[str, float]:
    """What the plan says of the values that are measured; on a CPU, of the whole process."""
    values = {"planned_step_s": plan.step_s}
    if plan.job.device == "cpu":
        return values | {"planned_host_peak_gib": planned_peak_bytes(plan) / 2**30}
    return values | {
        "planned_host_peak_gib": (plan.host_bytes + plan.framework_bytes) / 2**30,
        "planned_device_peak_gib": plan.device_bytes / 2**30,
    }


class StepRecorder:
    """Collects visits, spans, tokens and memory peaks from one `train()` call.

    All methods belong to the training thread.

    Args:
        model: The model that the Trainer calls; its inputs are looked at to count tokens.
        runtime: The runtime behind it.
    """

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        self._runtime = runtime
        self._lock = Lock()
        self._read_bytes = 0
        self._counted_bytes = 0
        self._step: int | None = None
        self._start_ns = 0
        self._open: Visit | None = None
        self._passes: list[BlockPass] = []
        self._token_counts: list[int | Tensor] = []
        self._block_tokens: dict[int, int] = {}
        if runtime.device.type == "cuda":
            # Loading may have taken more than training does.
            torch.cuda.reset_peak_memory_stats(runtime.device)
        hook = model.register_forward_pre_hook(self._count_tokens, with_kwargs=True)
        self._detach: list[Callable[[], None]] = [
            runtime.listen(self._visited),
            runtime.trace.listen(self._spanned),
            hook.remove,
        ]

    def close(self) -> None:
        """Stop listening; the model and the runtime are left as they were found. May be called twice."""
        for detach in self._detach:
            detach()
        self._detach.clear()

    def disk_bytes(self) -> int:
        """Bytes read from disk since this recorder was made."""
        with self._lock:
            return self._read_bytes

    def start_step(self, step: int) -> None:
        """Begin optimizer step `step`, counted from 1."""
        self._step, self._open = step, None
        self._passes, self._token_counts, self._block_tokens = [], [], {}
        self._start_ns = time.perf_counter_ns()

    def finish_step(self) -> tuple[StepRecord, StepTimeline]:
        """End the step and return what it took; the timeline holds all of its spans. On a GPU, waits for it."""
        self._runtime.settle_times()
        end_ns = time.perf_counter_ns()
        assert self._step is not None, "finish_step without start_step"
        timeline = StepTimeline(
            step=self._step,
            start_ns=self._start_ns,
            end_ns=end_ns,
            spans=self._runtime.trace.spans(self._start_ns),
            passes=tuple(self._passes),
        )
        self._step = None
        read_bytes, self._counted_bytes = self.disk_bytes() - self._counted_bytes, self.disk_bytes()
        device = self._runtime.device
        record = StepRecord(
            duration_s=timeline.duration_s,
            stall_s=timeline.busy_s("stall"),
            num_tokens=self._num_tokens(),
            disk_read_bytes=read_bytes,
            disk_busy_bytes=timeline.num_bytes("disk"),
            disk_busy_s=timeline.busy_s("disk"),
            host_peak_bytes=process_peak_bytes(),
            device_peak_bytes=torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0,
        )
        return record, timeline

    def _visited(self, visit: Visit) -> None:
        if self._step is None:
            # Evaluation, generation: what was read up to here was read for it.
            self._counted_bytes = self.disk_bytes()
        elif visit.started:
            self._open = visit
            if visit.phase == "forward":
                self._block_tokens[visit.block] = self._block_tokens.get(visit.block, 0) + visit.num_tokens
        elif self._open is not None:
            start_ns, self._open = self._open.time_ns, None
            self._passes.append(
                BlockPass(block=visit.block, phase=visit.phase, start_ns=start_ns, end_ns=visit.time_ns)
            )

    def _spanned(self, span: Span) -> None:
        # In the threads that read.
        if span.lane == "disk":
            with self._lock:
                self._read_bytes += span.nbytes

    def _count_tokens(self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        # Reference and generation passes run without gradients and train on nothing.
        if self._step is None or not torch.is_grad_enabled():
            return
        mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids", args[0] if args else None)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            # Not .item(): that would make a GPU wait in the middle of the step.
            self._token_counts.append(mask.detach().sum())
        elif isinstance(ids, Tensor):
            self._token_counts.append(ids.numel())

    def _num_tokens(self) -> int:
        """Tokens by the model's inputs; where only a part of the model was called, by what went through the blocks."""
        counted = sum(int(count) for count in self._token_counts)
        return counted or max(self._block_tokens.values(), default=0)


class RepresentativeStep:
    """Keeps the timeline whose duration is nearest to the median of all steps but the first, holding one at a time."""

    def __init__(self) -> None:
        self.timeline: StepTimeline | None = None
        self._durations_s: list[float] = []
        self._num_steps = 0

    def offer(self, timeline: StepTimeline) -> None:
        """Keep `timeline` if it stands for the steps so far better than the one kept."""
        self._num_steps += 1
        if self._num_steps <= 2 or self.timeline is None:
            # The first step warms up: the second replaces it in any case.
            self._durations_s = [timeline.duration_s]
            self.timeline = timeline
            return
        self._durations_s.append(timeline.duration_s)
        middle_s = median(self._durations_s)
        if abs(timeline.duration_s - middle_s) < abs(self.timeline.duration_s - middle_s):
            self.timeline = timeline


class Monitor(TrainerCallback):
    """Watches the training of a streamed model.

    - A bar within the step, below the Trainer's own: block, direction, bytes per second from disk, time left; while
      tokens are generated, how many, for how many unfinished rows, and how long the rest takes at most. Where the
      output goes to a file, a plain line every 30 s instead, without control characters.
    - Values in the Trainer's logs (`log_history`, `report_to`), for the steps since the last log: `lowmem/step_s`,
      `lowmem/tokens_per_s` (padding not counted), `lowmem/stall_percent`, `lowmem/read_gb` (per step),
      `lowmem/disk_gb_per_s`, `lowmem/host_peak_gib` (of the process, so far) and, on a GPU, `lowmem/device_peak_gib`.
      The first log also has what was planned, once, and the planned step corrected by those that were seen. The last
      entry, and with it `train()`'s metrics, has them for the whole run as `lowmem/train_step_s` and so on.
    - While training goes on, a report that a browser opens: loss, pace, memory by role against the plan, the last
      steps. It reloads itself.
    - At the end, also one by Ctrl-C, a trace that `lowmem trace` and Perfetto (https://ui.perfetto.dev) open, and a
      picture of one representative step.

    With a model that is not streamed there is nothing to watch: it says so once and does nothing.

    Args:
        trace: File for the trace; `None`: `trace.json` in the output folder; `False`: none. Rank 1: `trace.rank1.json`.
        timeline: File for the picture; `None`: `timeline.png` in the output folder; `False`: none. Needs matplotlib:
            without it a path given here is an error when training starts, and the default is left out with a warning.
        report: File for the report; `None`: `report.html` in the output folder; `False`: none.
        progress: Show the bar, on the main process and unless `TrainingArguments.disable_tqdm` is set; the lines of a
            log file do not depend on that.
        every_s: Least seconds between two refreshes of the bar; `None`: 0.5 on a terminal or in a notebook, 30 in a
            log file.
    """

    def __init__(
        self,
        trace: Output = None,
        timeline: Output = None,
        *,
        report: Output = None,
        progress: bool = True,
        every_s: float | None = None,
    ) -> None:
        refuse_other_values(every_s, trace=trace, timeline=timeline, report=report)
        self._trace, self._timeline, self._report = trace, timeline, report
        self._progress, self._every_s = progress, every_s
        self._has_warned = False
        self._run: _Run | None = None
        # Python's list of what to do at its exit must not keep the model alive.
        self._at_exit = partial(_end_interrupted, weakref.ref(self))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        """Start listening to the model's runtime."""
        self.end("interrupted")  # a train() that raised has no on_train_end
        model = kwargs.get("model")
        assert isinstance(model, nn.Module), "the Trainer passes its model to callbacks"
        try:
            runtime = runtime_of(model)
        except ValueError:
            self._warn_once("lowmem.Monitor has nothing to watch: the model was not made by lowmem.from_pretrained")
            return
        is_main = state.is_world_process_zero
        trace = output_file(self._trace, args, "trace.json")
        timeline = output_file(self._timeline, args, "timeline.png") if is_main else None
        if timeline is not None:
            try:
                require_matplotlib()
            except ModuleNotFoundError as error:
                if self._timeline is not None:
                    raise
                self._warn_once(f"lowmem.Monitor draws no timeline: {error}")
                timeline = None
        report = output_file(self._report, args, "report.html") if is_main else None
        self._run = _Run(
            model,
            runtime,
            trace=trace,
            timeline=timeline,
            report=report,
            num_forwards=args.gradient_accumulation_steps,
            every_s=self._every_s,
            shows=self._progress and is_main and (writes_to_file() or not args.disable_tqdm),
        )
        self._run.num_steps = state.max_steps
        # For an interruption that is the end of the program.
        atexit.register(self._at_exit)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        """Begin an optimizer step, whose micro-steps all belong to it."""
        if self._run is not None:
            self._run.start_step(state.global_step + 1, state.max_steps)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object
    ) -> None:
        """Begin the optimizer's update."""
        if self._run is not None:
            self._run.update_start_s = time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object
    ) -> None:
        """End the update, and see what is held while gradients and the optimizer's state both are."""
        if self._run is not None:
            self._run.finish_update(kwargs.get("optimizer"))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        """End the optimizer step."""
        if self._run is not None:
            self._run.finish_step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: object,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Add the values where `TrainingChecks`, which stands in front of the reporters, has not done so already."""
        if self._run is not None and logs is not None:
            self._run.add_to_log(state, logs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        """Write the trace, the picture and the report, and stop listening."""
        self.end("finished")

    def end(self, how: RunState) -> None:
        """Stop listening to a run, if there is one, and write its files."""
        run, self._run = self._run, None
        atexit.unregister(self._at_exit)
        if run is not None:
            run.close()
            run.write(how)

    def _warn_once(self, message: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(message, UserWarning, stacklevel=2)


def _end_interrupted(monitor: weakref.ref[Monitor]) -> None:
    found = monitor()
    if found is not None:
        found.end("interrupted")


class _Run:
    """What belongs to one `train()` call on a streamed model."""

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        *,
        trace: Path | None,
        timeline: Path | None,
        report: Path | None,
        num_forwards: int,
        every_s: float | None,
        shows: bool,
    ) -> None:
        self._runtime, self._trace, self._timeline, self._report = runtime, trace, timeline, report
        # The callbacks that hold this live as long as the Trainer, which must not keep a model that was let go of.
        self._model = weakref.ref(model)
        self.recorder = StepRecorder(model, runtime)
        self.num_steps = 0
        self._since_log: list[StepRecord] = []
        self._all: list[StepRecord] = []
        self._points: list[StepPoint] = []
        self._losses: list[LossPoint] = []
        self._starts_ns: deque[tuple[int, int]] = deque(maxlen=4096)  # of as many steps as a trace has spans for
        self._held: dict[str, int] = {}
        self._last_steps: deque[StepTimeline] = deque(maxlen=NUM_REPORTED_STEPS)
        self._representative = RepresentativeStep()
        plan = runtime.plan
        update_s = None if plan.rates.shape is None else plan.time.update_s
        self._correction = StepCorrection(update_s, touch_s=first_touch_s(plan), late_s=plan.time.late_s)
        self.update_start_s = self._update_s = 0.0
        self._has_told_growth = False
        self._estimate = StepEstimate(
            num_blocks=runtime.num_blocks, num_forwards=num_forwards, planned_step_s=runtime.plan.step_s
        )
        self._progress = StepProgress(self._estimate, read_bytes=self.recorder.disk_bytes, every_s=every_s, shows=shows)
        self._detach = [runtime.listen(self._visited), self.recorder.close, self._progress.close]
        runtime.add_to_log = self.add_to_log
        runtime.note_interrupted = self.note_interrupted
        if shows and (generation := generation_of(runtime)) is not None:
            self._detach.append(generation.listen(self._progress.token))
        self._start_ns = time.perf_counter_ns()
        self._reported_s = -float("inf")
        self._has_told_plan = self._is_written = False
        self._shows_result = shows and runs_in_notebook()

    def start_step(self, step: int, num_steps: int) -> None:
        # A run that is resumed behind its last step takes one more.
        self.num_steps = max(step, num_steps)
        self._progress.start_step(step, self.num_steps)
        self._starts_ns.append((step, time.perf_counter_ns()))
        self.recorder.start_step(step)

    def finish_update(self, optimizer: object) -> None:
        self._update_s = time.perf_counter() - self.update_start_s
        model = self._model()
        if model is not None:
            for role, nbytes in held_bytes(model, self._runtime, optimizer).items():
                self._held[role] = max(nbytes, self._held.get(role, 0))

    def finish_step(self) -> None:
        record, timeline = self.recorder.finish_step()
        self._progress.finish_step()
        self._since_log.append(record)
        self._all.append(record)
        values = log_values([record])
        self._points.append(
            StepPoint(
                step=timeline.step,
                duration_s=record.duration_s,
                tokens_per_s=values["tokens_per_s"],
                stall_percent=values["stall_percent"],
            )
        )
        self._last_steps.append(timeline)
        self._representative.offer(timeline)
        visits = ((seen.phase, (seen.end_ns - seen.start_ns) / 1e9) for seen in timeline.passes)
        self._correction.see(record.duration_s, visits, update_s=self._update_s)
        self._update_s = 0.0
        self._tell_growth(record)

    def _tell_growth(self, record: StepRecord) -> None:
        told = growth_beyond(
            self._runtime.plan,
            host_growth_bytes=record.host_peak_bytes - self._runtime.idle_bytes,
            device_peak_bytes=record.device_peak_bytes,
        )
        if told is not None and not self._has_told_growth:
            self._has_told_growth = True
            warnings.warn(f"lowmem.Monitor: {told}", UserWarning, stacklevel=2)

    def add_to_log(self, state: TrainerState, logs: dict[str, float]) -> None:
        """Add the values to a log of training steps, or to the final one; logs of evaluations stay as they are."""
        if any(name.startswith(PREFIX) for name in logs):
            return
        if "loss" in logs:
            records, self._since_log, prefix = self._since_log, [], PREFIX
            if not self._losses or self._losses[-1].step != state.global_step:
                self._losses.append(LossPoint(step=state.global_step, loss=float(logs["loss"])))
        elif "train_loss" in logs:
            records, prefix = self._all, f"{PREFIX}train_"
        else:
            return
        values = log_values(records) if records else {}
        if values and not self._has_told_plan:
            self._has_told_plan = True
            values |= planned_values(self._runtime.plan)
            if self._correction.step_s is not None:
                values["corrected_step_s"] = self._correction.step_s
        values = {f"{prefix}{name}": value for name, value in values.items()}
        logs.update(values)
        # The Trainer copied `logs` into its history just before this event.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)
        self._report_now_and_then()

    def _report_now_and_then(self) -> None:
        now_s = time.monotonic()
        if self._report is None or not self._all or now_s - self._reported_s < REPORT_EVERY_S:
            return
        self._reported_s = now_s
        left_s = None
        if self._points:
            left_s = self._estimate.run_left_s(now_s, self.num_steps - self._points[-1].step)
        try:
            save_report(self._report, self.facts("running"), tuple(self._last_steps), left_s=left_s)
        except OSError as error:
            self._report = None
            warnings.warn(f"lowmem.Monitor could not write its report: {error}", UserWarning, stacklevel=2)

    def facts(self, how: RunState) -> RunFacts:
        plan, last = self._runtime.plan, self._all[-1] if self._all else None
        host, device = (last.host_peak_bytes, last.device_peak_bytes) if last else (process_peak_bytes(), 0)
        peak_bytes = host if plan.job.device == "cpu" else device
        return RunFacts(
            title=plan_title(plan),
            state=how,
            num_steps=self.num_steps,
            planned_s={
                "step": plan.step_s,
                "compute": plan.time.compute_s,
                "disk": plan.time.disk_s,
                "copy": plan.time.copy_s,
            },
            planned_peak_bytes=planned_peak_bytes(plan),
            peak_bytes=peak_bytes,
            memory=memory_rows(plan, self._held, peak_bytes=peak_bytes),
            steps=evenly_chosen(self._points),
            losses=evenly_chosen(self._losses),
            starts_ns=tuple(self._starts_ns),
            plan=str(plan),
        )

    def note_interrupted(self) -> None:
        """Write what there is: nobody may call this run again."""
        self.write("interrupted")
        self._is_written = True

    def write(self, how: RunState) -> None:
        """Write the files that were asked for. A full disk must not cost the model that was just trained."""
        if self._is_written or (how == "finished" and not self._all):
            # Without a step, the files are those of the run that was resumed after its last one.
            return
        try:
            facts = self.facts(how)
            if self._trace is not None:
                self._trace.parent.mkdir(parents=True, exist_ok=True)
                self._runtime.trace.save(self._trace, since_ns=self._start_ns, notes=facts.to_dict())
            if self._report is not None:
                save_report(self._report, facts, tuple(self._last_steps))
            if self._timeline is not None and self._representative.timeline is not None:
                draw_timeline(self._representative.timeline, self._timeline)
            if self._shows_result and self._all:
                show_in_notebook(self._words(how), self._timeline)
        except OSError as error:
            warnings.warn(f"lowmem.Monitor could not write its files: {error}", UserWarning, stacklevel=2)

    def _words(self, how: RunState) -> str:
        values = log_values(self._all)
        planned = planned_values(self._runtime.plan)
        words = f"lowmem: {how} after {len(self._all)} steps, {values['step_s']:.3g} s each"
        words += f" (planned {planned['planned_step_s']:.3g}), {values['tokens_per_s']:.3g} tokens/s"
        words += f", waited {values['stall_percent']:.1f}%, read {values['read_gb']:.3g} GB per step"
        return f"{words}, peak {values['host_peak_gib']:.3g} GiB (planned {planned['planned_host_peak_gib']:.3g})"

    def close(self) -> None:
        self._runtime.add_to_log = None
        self._runtime.note_interrupted = None
        for detach in self._detach:
            detach()

    def _visited(self, visit: Visit) -> None:
        self._progress.visit(visit.block, visit.num_blocks, visit.phase, started=visit.started)
