"""The Trainer callback that shows, logs and records what streaming does: `callbacks=[lowmem.Monitor()]`.

A `StepRecorder` listens to the runtime and makes one record of each optimizer step; the monitor sums records up for the
logs, and keeps the timeline of the step that stands best for the others.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Lock
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from lowmem.generation.hooks import generation_of
from lowmem.host_memory import process_peak_bytes
from lowmem.monitoring.progress import StepEstimate, StepProgress
from lowmem.monitoring.timeline import BlockPass, StepTimeline, draw_timeline, require_matplotlib
from lowmem.streaming.runtime import Runtime, Visit, runtime_of

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

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
    """Largest allocation on the compute device so far; a CPU's memory is the host's."""


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
        "disk_read_bytes": sum(record.disk_read_bytes for record in records) / len(records),
        "host_peak_bytes": max(record.host_peak_bytes for record in records),
        "device_peak_bytes": max(record.device_peak_bytes for record in records),
    }
    if disk_busy_s:  # nothing was read where every block is resident or cached
        values["disk_gb_per_s"] = sum(record.disk_busy_bytes for record in records) / disk_busy_s / 1e9
    return values


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
        """End the step and return what it took; the timeline holds all of its spans."""
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
        host_peak_bytes = process_peak_bytes()
        device = self._runtime.device
        record = StepRecord(
            duration_s=timeline.duration_s,
            stall_s=timeline.busy_s("stall"),
            num_tokens=self._num_tokens(),
            disk_read_bytes=read_bytes,
            disk_busy_bytes=timeline.num_bytes("disk"),
            disk_busy_s=timeline.busy_s("disk"),
            host_peak_bytes=host_peak_bytes,
            device_peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else host_peak_bytes,
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


Output = str | os.PathLike[str] | Literal[False] | None


class Monitor(TrainerCallback):
    """Watches the training of a streamed model.

    - A bar within the step, below the Trainer's own: block, direction, bytes per second from disk, time left; while
      tokens are generated, how many, for how many unfinished rows, and how long the rest takes at most.
    - Values in the Trainer's logs (`log_history`, `report_to`), for the steps since the last log: `step_s`,
      `tokens_per_s` (padding not counted), `stall_percent`, `disk_read_bytes` (per step), `disk_gb_per_s`,
      `host_peak_bytes` and `device_peak_bytes` (largest so far; on a CPU both are the process's resident memory),
      beside `planned_step_s`, `planned_host_bytes` and `planned_device_bytes`. The last entry, and with it
      `train()`'s metrics, has them for the whole run with the prefix `train_`.
    - At the end, a trace that Perfetto opens (https://ui.perfetto.dev) and a picture of one representative step.

    With a model that is not streamed there is nothing to watch: it says so once and does nothing.

    Args:
        trace: File for the trace; `None`: `trace.json` in the output folder; `False`: none.
        timeline: File for the picture; `None`: `timeline.png` in the output folder; `False`: none. Needs matplotlib:
            without it a path given here is an error when training starts, and the default is left out with a warning.
        progress: Show the bar, on the main process and unless `TrainingArguments.disable_tqdm` is set.
        every_s: Least seconds between two refreshes of the bar; `None`: 0.5 on a terminal or in a notebook, 30 in a
            log file.
    """

    def __init__(
        self, trace: Output = None, timeline: Output = None, *, progress: bool = True, every_s: float | None = None
    ) -> None:
        if every_s is not None and every_s < 0:
            raise ValueError(f"every_s: expected seconds >= 0, got {every_s}")
        self._trace, self._timeline = trace, timeline
        self._progress, self._every_s = progress, every_s
        self._has_warned = False
        self._run: _Run | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start listening to the model's runtime."""
        self._close()  # a train() that raised has no on_train_end
        model = kwargs.get("model")
        assert isinstance(model, nn.Module), "the Trainer passes its model to callbacks"
        try:
            runtime = runtime_of(model)
        except ValueError:
            self._warn_once("lowmem.Monitor has nothing to watch: the model was not made by lowmem.from_pretrained")
            return
        is_main = state.is_world_process_zero
        trace = _output(self._trace, args, "trace.json") if is_main else None
        timeline = _output(self._timeline, args, "timeline.png") if is_main else None
        if timeline is not None:
            try:
                require_matplotlib()
            except ModuleNotFoundError as error:
                if self._timeline is not None:
                    raise
                self._warn_once(f"lowmem.Monitor draws no timeline: {error}")
                timeline = None
        shows = self._progress and is_main and not args.disable_tqdm
        self._run = _Run(model, runtime, trace=trace, timeline=timeline)
        if shows:
            self._run.show(num_forwards=args.gradient_accumulation_steps, every_s=self._every_s)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Begin an optimizer step, whose micro-steps all belong to it."""
        if self._run is not None:
            self._run.start_step(state.global_step + 1, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """End the optimizer step."""
        if self._run is not None:
            self._run.finish_step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Add the values where `TrainingChecks`, which stands in front of the reporters, has not done so already."""
        if self._run is not None and logs is not None:
            self._run.add_to_log(state, logs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Write the trace and the picture, and stop listening."""
        run = self._run
        self._close()
        if run is not None:
            run.write()

    def _close(self) -> None:
        if self._run is not None:
            self._run.close()
            self._run = None

    def _warn_once(self, message: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(message, UserWarning, stacklevel=2)


class _Run:
    """What belongs to one `train()` call on a streamed model."""

    def __init__(self, model: nn.Module, runtime: Runtime, *, trace: Path | None, timeline: Path | None) -> None:
        self._runtime, self._trace, self._timeline = runtime, trace, timeline
        self.recorder = StepRecorder(model, runtime)
        self._since_log: list[StepRecord] = []
        self._all: list[StepRecord] = []
        self._representative = RepresentativeStep()
        self._progress: StepProgress | None = None
        self._stop_showing = runtime.listen(self._visited)
        runtime.add_to_log = self.add_to_log
        self._stop_counting: Callable[[], None] = lambda: None
        self._start_ns = time.perf_counter_ns()

    def show(self, *, num_forwards: int, every_s: float | None) -> None:
        estimate = StepEstimate(
            num_blocks=self._runtime.num_blocks, num_forwards=num_forwards, planned_step_s=self._runtime.plan.step_s
        )
        self._progress = StepProgress(estimate, read_bytes=self.recorder.disk_bytes, every_s=every_s)
        generation = generation_of(self._runtime)
        if generation is not None:
            self._stop_counting = generation.listen(self._progress.token)

    def start_step(self, step: int, num_steps: int) -> None:
        if self._progress is not None:
            self._progress.start_step(step, num_steps)
        self.recorder.start_step(step)

    def finish_step(self) -> None:
        record, timeline = self.recorder.finish_step()
        if self._progress is not None:
            self._progress.finish_step()
        self._since_log.append(record)
        self._all.append(record)
        self._representative.offer(timeline)

    def _planned(self) -> dict[str, float]:
        plan = self._runtime.plan
        return {
            "planned_step_s": plan.step_s,
            "planned_host_bytes": plan.host_bytes,
            "planned_device_bytes": plan.device_bytes,
        }

    def add_to_log(self, state: TrainerState, logs: dict[str, float]) -> None:
        """Add the values to a log of training steps, or to the final one; logs of evaluations stay as they are."""
        if "loss" in logs:
            records, self._since_log, prefix = self._since_log, [], ""
        elif "train_loss" in logs:
            records, prefix = self._all, "train_"
        else:
            return
        values = {**log_values(records), **self._planned()} if records else {}
        values = {f"{prefix}{name}": value for name, value in values.items()}
        logs.update(values)
        # The Trainer copied `logs` into its history just before this event.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def write(self) -> None:
        """Write the files that were asked for. A full disk must not cost the model that was just trained."""
        try:
            if self._trace is not None:
                self._trace.parent.mkdir(parents=True, exist_ok=True)
                self._runtime.trace.save(self._trace, since_ns=self._start_ns)
            if self._timeline is not None and self._representative.timeline is not None:
                draw_timeline(self._representative.timeline, self._timeline)
        except OSError as error:
            warnings.warn(f"lowmem.Monitor could not write its files: {error}", UserWarning, stacklevel=2)

    def close(self) -> None:
        self._runtime.add_to_log = None
        self._stop_showing()
        self._stop_counting()
        self.recorder.close()
        if self._progress is not None:
            self._progress.close()

    def _visited(self, visit: Visit) -> None:
        if self._progress is not None:
            self._progress.visit(visit.block, visit.num_blocks, visit.phase, started=visit.started)


def _output(given: Output, args: TrainingArguments, default_name: str) -> Path | None:
    if given is False:
        return None
    return Path(args.output_dir) / default_name if given is None else Path(given)
