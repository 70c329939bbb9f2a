"""What shows where inside a step training is: block, direction, bytes per second from disk, time left.

A bar in a terminal or a notebook; in a log file a plain line now and then. Also a bar over the tokens of `generate`,
for use outside of training; within it `lowmem.Monitor` shows the same.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from statistics import median
from time import monotonic
from types import TracebackType
from typing import Self

from torch import nn
from tqdm.std import tqdm  # type: ignore[import-untyped]

from lowmem.generation.hooks import TokenProgress, generation_of
from lowmem.progress_line import EVERY_S_IN_FILES, ProgressLine, writes_to_file
from lowmem.streaming.runtime import runtime_of
from offload import format_bytes

EVERY_S = 0.5

RATE_WINDOW_S = 3.0

BACKWARD_PER_FORWARD = 2.5
"""Guess for the first step: recomputing and two gradients take 3 forwards, waiting for weights as long as 1."""

PHASE_WORDS = {"no_grad": "no grad", "forward": "forward", "backward": "backward"}


class StepEstimate:
    """Predicts the time left in a step from the block visits of this step and of the steps before it.

    Times are seconds of one clock, of any origin.
    """

    def __init__(self, *, num_blocks: int, num_forwards: int, planned_step_s: float | None) -> None:
        self._expected = Counter(forward=num_blocks * num_forwards, backward=num_blocks * num_forwards)
        self._planned_step_s = planned_step_s
        self._step_times_s: list[float] = []
        self._between_times_s: list[float] = []
        self._end_s: float | None = None
        self._visit_times_s: dict[str, tuple[float, int]] = {}
        self._done: Counter[str] = Counter()
        self._start_s = self._last_s = 0.0

    def start_step(self, now_s: float) -> None:
        """Begin a step."""
        self._done.clear()
        if self._end_s is not None:
            self._between_times_s.append(now_s - self._end_s)
        self._start_s = self._last_s = now_s

    def finish_visit(self, phase: str, now_s: float) -> None:
        """Count a block visit, with the time since the one before it."""
        spent_s, num = self._visit_times_s.get(phase, (0.0, 0))
        self._visit_times_s[phase] = (spent_s + now_s - self._last_s, num + 1)
        self._done[phase] += 1
        self._last_s = now_s

    def finish_step(self, now_s: float) -> None:
        """End the step; the next one is expected to be like it."""
        self._step_times_s.append(now_s - self._start_s)
        del self._step_times_s[1:-20]  # the first, to be left out of the median, and the latest
        self._end_s = now_s
        self._expected = Counter(self._done)

    @property
    def num_done(self) -> int:
        """Visits so far in this step."""
        return self._done.total()

    @property
    def num_expected(self) -> int:
        """Visits that this step will have, at least those already done."""
        return sum((self._expected | self._done).values())

    def step_left_s(self, now_s: float) -> float | None:
        """Seconds left in this step, or `None` before anything is known."""
        left = self._expected - self._done
        if self._visit_times_s:
            return sum(num * self._visit_s(phase) for phase, num in left.items())
        if self._planned_step_s is None:
            return None
        return max(0.0, self._planned_step_s - (now_s - self._start_s))

    def run_left_s(self, now_s: float, num_steps_after: int) -> float | None:
        """Seconds left in this step and `num_steps_after` more.

        What lay between the steps so far (data, evaluations, saves) is expected to go on as it was on average.
        """
        left_s = self.step_left_s(now_s)
        if left_s is None:
            return None
        # The first step reads cold files and warms up: once there are others, it says nothing about them.
        known = self._step_times_s[1:] or self._step_times_s
        step_s = median(known) if known else now_s - self._start_s + left_s
        between_s = sum(self._between_times_s) / len(self._between_times_s) if self._between_times_s else 0.0
        return left_s + num_steps_after * (step_s + between_s)

    def _visit_s(self, phase: str) -> float:
        """Mean seconds per visit of `phase`, guessed from the other phase while there was none."""
        if phase in self._visit_times_s:
            spent_s, num = self._visit_times_s[phase]
            return spent_s / num
        seen = next(iter(self._visit_times_s))
        return self._visit_s(seen) * (BACKWARD_PER_FORWARD if phase == "backward" else 1.0)


class ByteRate:
    """Bytes per second over the last few seconds, from a counter that only grows."""

    def __init__(self, read_bytes: Callable[[], int]) -> None:
        self._read_bytes = read_bytes
        self._points: deque[tuple[float, int]] = deque()

    def bytes_per_s(self, now_s: float) -> float:
        """Read the counter and return the rate over the window; 0 at the first call."""
        self._points.append((now_s, self._read_bytes()))
        while len(self._points) > 2 and now_s - self._points[1][0] >= RATE_WINDOW_S:
            self._points.popleft()
        (first_s, first_bytes), (last_s, last_bytes) = self._points[0], self._points[-1]
        return (last_bytes - first_bytes) / (last_s - first_s) if last_s > first_s else 0.0


class StepProgress:
    """Shows the block visits of one step: a tqdm bar below the Trainer's own bar over steps, or lines in a log file.

    All methods belong to the training thread. Nothing is printed before the first visit.

    Args:
        estimate: Told of every visit; asked for the time left.
        read_bytes: Bytes read from disk so far.
        every_s: Least seconds between two refreshes; `None`: 0.5 in a terminal or notebook, 30 in a file.
        shows: Whether there is anything to see; else only the estimate is told.
    """

    def __init__(
        self,
        estimate: StepEstimate,
        *,
        read_bytes: Callable[[], int],
        every_s: float | None = None,
        shows: bool = True,
    ) -> None:
        self._shows = shows
        self._line = ProgressLine()
        self._every_s = every_s if every_s is not None else EVERY_S_IN_FILES if writes_to_file() else EVERY_S
        self._estimate = estimate
        self._rate = ByteRate(read_bytes)
        self._shown_s = -float("inf")
        self._step: tuple[int, int] | None = None
        self._generated: TokenProgress | None = None

    def start_step(self, step: int, num_steps: int) -> None:
        """Begin step `step` (from 1) of `num_steps`."""
        self._step = (step, num_steps)
        self._estimate.start_step(monotonic())

    def finish_step(self) -> None:
        """End the step; visits up to the next one belong to evaluation or generation."""
        self._estimate.finish_step(monotonic())
        self._step = None

    def visit(self, block: int, num_blocks: int, phase: str, *, started: bool) -> None:
        """Show the visit of a block, numbered from 0, if it is time to."""
        now_s = monotonic()
        if not started and self._step is not None:
            self._estimate.finish_visit(phase, now_s)
        if self._shows and now_s - self._shown_s >= self._every_s:
            self._shown_s = now_s
            self._show(f"{PHASE_WORDS[phase]} {block + 1}/{num_blocks}", block, num_blocks, now_s)

    def token(self, progress: TokenProgress) -> None:
        """Note that a token was generated, until its generation has ended."""
        self._generated = None if progress.finished else progress

    def close(self) -> None:
        """Remove the bar."""
        self._line.close()

    def _show(self, where: str, block: int, num_blocks: int, now_s: float) -> None:
        rate = self._rate.bytes_per_s(now_s)
        words = [f"{format_bytes(int(rate))}/s from disk"] if rate else []
        if self._generated is not None:
            words.insert(0, token_words(self._generated))
        if self._step is None:
            left, num_done, total = where, block, num_blocks
        else:
            step, num_steps = self._step
            left, num_done, total = (
                f"step {step}/{num_steps} {where}",
                self._estimate.num_done,
                self._estimate.num_expected,
            )
            step_left_s = self._estimate.step_left_s(now_s)
            run_left_s = self._estimate.run_left_s(now_s, num_steps - step)
            if step_left_s is not None and run_left_s is not None:
                words += [f"step {_clock(step_left_s)} left", f"run {_clock(run_left_s)} left"]
        self._line.show(left, num_done, total, after=", ".join(words))


def token_words(progress: TokenProgress) -> str:
    """Where a generation is, in words; `left` is what is left at most, as all rows may end sooner."""
    left = "" if progress.left_s is None else f", {_clock(progress.left_s)} left"
    rows = f", {progress.num_unfinished} of {progress.num_rows} rows" if progress.num_rows > 1 else ""
    return f"token {progress.num_tokens}/{progress.max_tokens}{rows}, {progress.tokens_per_s:.3g} tokens/s{left}"


def _clock(seconds: float) -> str:
    """Write seconds as m:ss or h:mm:ss."""
    text: str = tqdm.format_interval(seconds)
    return text


class TokenBar:
    """Shows how far `model.generate` is, and when it will be done at the latest.

        with lowmem.TokenBar(model):
            model.generate(**inputs, max_new_tokens=200)

    Args:
        model: A streamed model, wrapped or not.

    Raises:
        ValueError: The model is not a streamed one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._hooks = generation_of(runtime_of(model))
        self._line = ProgressLine()
        self._shown_s = monotonic()  # what takes less time than that has no line
        self._stop = lambda: None

    def show(self, progress: TokenProgress) -> None:
        """Show one more token; in a log file, a line now and then."""
        now_s = monotonic()
        if writes_to_file() and now_s - self._shown_s < EVERY_S_IN_FILES:
            return
        self._shown_s = now_s
        self._line.show(token_words(progress), progress.num_tokens, progress.max_tokens)
        if progress.finished:
            self._line.close()

    def __enter__(self) -> Self:
        if self._hooks is not None:
            self._stop = self._hooks.listen(self.show)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()  # type: ignore[no-untyped-call]
        self._line.close()
