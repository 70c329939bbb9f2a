"""Listens to a runtime during training and makes one record of each optimizer step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from threading import Lock

import torch
from torch import Tensor, nn

from lowmem.monitoring.memory import cuda_memory, process_memory
from lowmem.monitoring.timeline import BlockPass, StepTimeline
from lowmem.streaming.runtime import Runtime
from lowmem.streaming.visits import Visit
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
        host_peak_bytes = process_memory().peak_bytes
        device = self._runtime.device
        record = StepRecord(
            duration_s=timeline.duration_s,
            stall_s=timeline.busy_s("stall"),
            num_tokens=self._num_tokens(),
            disk_read_bytes=read_bytes,
            disk_busy_bytes=timeline.num_bytes("disk"),
            disk_busy_s=timeline.busy_s("disk"),
            host_peak_bytes=host_peak_bytes,
            device_peak_bytes=cuda_memory(device).peak_allocated_bytes if device.type == "cuda" else host_peak_bytes,
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
