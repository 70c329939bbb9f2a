"""Options of the Trainer that a streamed model cannot honour: refused by name when the Trainer is made.

The Trainer callback that shows, logs and records what streaming does: `callbacks=[lowmem.Monitor()]`.
"""

from __future__ import annotations

import inspect
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from lowmem.errors import UnsupportedError
from lowmem.monitoring.progress import StepEstimate, StepProgress
from lowmem.monitoring.step_record import RepresentativeStep, StepRecord, StepRecorder, log_values
from lowmem.monitoring.timeline import draw_timeline, require_matplotlib
from lowmem.streaming.runtime import Runtime, is_streamed, runtime_of
from lowmem.streaming.visits import Visit

if TYPE_CHECKING:
    from transformers import TrainingArguments


_BLOCKS = "a streamed block is always recomputed in its backward, and keeps only its input"


def refuse_training_options(args: TrainingArguments) -> None:
    """Refuse what would be ignored or would go wrong.

    Gradient checkpointing itself may be on or off: blocks are recomputed either way.

    Args:
        args: Of transformers or TRL.

    Raises:
        UnsupportedError: Names the option, the reason and what to use instead.
    """
    kwargs = getattr(args, "activation_checkpointing_kwargs", None) or {}
    harmless = {"every_n_layers": (None, 1), "offload": (None, False), "selective": (None, False)}
    for option, values in harmless.items():
        # By identity: True equals 1.
        if not any(kwargs.get(option) is value for value in values):
            raise UnsupportedError(
                f"activation_checkpointing_kwargs={{{option!r}: {kwargs[option]!r}}}",
                reason=_BLOCKS,
                instead="lowmem.plan, which decides from the budget what is kept where",
            )
    if getattr(args, "activation_offloading", False):
        raise UnsupportedError(
            "activation_offloading=True",
            reason="it would take streamed weights for activations",
            instead="Budget.device: block inputs go to the host where the plan finds no room",
        )
    if getattr(args, "torch_compile", False):
        raise UnsupportedError(
            "torch_compile=True",
            reason="a compiled graph cannot have its weights exchanged from block to block",
            instead="torch_compile=False",
        )
    for option in ("use_vllm", "use_transformers_continuous_batching"):
        if getattr(args, option, False):
            raise UnsupportedError(
                f"{option}=True",
                reason="another engine would need all weights, which are streamed",
                instead=f"{option}=False: generate goes block by block with the whole batch",
            )
    for option in ("deepspeed", "fsdp"):
        if getattr(args, option, None):
            raise UnsupportedError(
                f"{option}={getattr(args, option)!r}",
                reason="it moves and shards the weights itself",
                instead=f"no {option}: the scheduler streams the weights",
            )


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

    A step that did not go through the model's blocks stops training with a RuntimeError before the optimizer uses it.
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

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Refuse options that a streamed model cannot honour, as soon as the Trainer is made."""
        model = kwargs.get("model")
        if isinstance(model, nn.Module) and is_streamed(model):
            refuse_training_options(args)

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
        _stand_before_reporters(self)
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

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Make sure that the gradients came from the streamed blocks.

        Raises:
            RuntimeError: They did not.
        """
        if self._run is not None:
            self._run.recorder.check_blocks_were_used()

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
        """Add the values to a log of training steps, or to the final one; logs of evaluations stay as they are."""
        if self._run is None or logs is None:
            return
        if "loss" in logs:
            values = self._run.values_since_last_log()
        elif "train_loss" in logs:
            values = {f"train_{name}": value for name, value in self._run.values_of_run().items()}
        else:
            return
        logs.update(values)
        # The Trainer copied `logs` into its history just before this event.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

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
        self._stop_counting: Callable[[], None] = lambda: None
        self._start_ns = time.perf_counter_ns()

    def show(self, *, num_forwards: int, every_s: float | None) -> None:
        estimate = StepEstimate(
            num_blocks=self._runtime.num_blocks, num_forwards=num_forwards, planned_step_s=self._runtime.plan.step_s
        )
        self._progress = StepProgress(estimate, read_bytes=self.recorder.disk_bytes, every_s=every_s)
        if self._runtime.generation is not None:
            self._stop_counting = self._runtime.generation.listen(self._progress.token)

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

    def planned(self) -> dict[str, float]:
        plan = self._runtime.plan
        planned = {
            "planned_step_s": plan.step_s,
            "planned_host_bytes": plan.host_bytes,
            "planned_device_bytes": plan.device_bytes,
        }
        return {name: value for name, value in planned.items() if value is not None}

    def values_since_last_log(self) -> dict[str, float]:
        records, self._since_log = self._since_log, []
        return {**log_values(records), **self.planned()} if records else {}

    def values_of_run(self) -> dict[str, float]:
        return {**log_values(self._all), **self.planned()} if self._all else {}

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


def _stand_before_reporters(monitor: Monitor) -> None:
    """Move the monitor to the front of the Trainer's callbacks.

    The Trainer tells callbacks of a log in their order, `report_to` integrations before the user's own, and hands no
    callback the list or the Trainer: what a callback adds to a log would reach no integration. The list is found
    through the caller, which is walking it: all before the monitor move back by one, the next one stays where it is.
    Where it is not found, the values still reach `log_history` and the callbacks behind.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler) and monitor in caller.callbacks:
            caller.callbacks.remove(monitor)
            caller.callbacks.insert(0, monitor)
            return
        frame = frame.f_back


__all__ = ["refuse_training_options"]
