"""Cases in worker processes with limits on time and memory, which take one case after another.

The caller has imported what the cases need and started no thread: workers are forked from it, because importing takes
longer than hundreds of cases. A worker that dies or does not come back is replaced, and the case it had is a fault.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

_ROOT = Path(__file__).parents[2]
_OURS = (str(_ROOT / "lowmem"), str(_ROOT / "offload"))
_GRACE_S = 30.0
"""Seconds after the alarm until a worker is killed: code that never comes back to Python."""


class Fault(AssertionError):
    """What a case found to be wrong, other than an error that was raised."""


class OutOfTime(BaseException):
    """The case took longer than its limit; no handler of ordinary errors may keep it."""


class Ending(NamedTuple):
    """How a case ended well."""

    outcome: str
    """"refused", "equal" or a finer word."""
    what: str
    """What was damaged."""
    num: int = 1
    """How many of what the fuzzer counts were in the case."""


class Target(Protocol):
    """One fuzzer."""

    limit_s: float
    """Seconds that a case may take."""
    limit_bytes: int
    """Memory that a worker's cases may add."""
    cases_per_worker: int
    """Cases until a worker is replaced by a fresh one."""

    def prepare(self, folder: Path) -> None:
        """Make what the cases are damaged copies of; called once, in a process of its own."""
        ...

    def run(self, seed: int, *, prepared: Path, scratch: Path) -> Ending:
        """Run one case; raises `Fault`, or the error that the library raised."""
        ...


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a case ended."""

    seed: int
    outcome: str
    """"refused", "equal" and the like, or "FAULT"."""
    what: str
    """What was damaged."""
    num: int = 1
    """How many of what the fuzzer counts were in the case."""
    detail: str = ""
    """Of a fault: its kind, the same for all cases of one cause."""
    trace: str = ""
    """Of a fault: where it came from."""
    seconds: float = 0.0


@dataclass
class Report:
    """What a fuzzer found."""

    target: str
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[Result] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, result: Result) -> None:
        self.outcomes[result.outcome] += result.num
        if result.outcome == "FAULT":
            self.faults.append(result)

    def text(self, *, with_traces: bool = True) -> str:
        """Counts, then each kind of fault with how often it was found and one seed that shows it."""
        counts = ", ".join(f"{num} {outcome}" for outcome, num in sorted(self.outcomes.items()))
        lines = [f"{self.target}: {sum(self.outcomes.values())} cases in {self.seconds:.0f} s: {counts}"]
        kinds = Counter(fault.detail for fault in self.faults)
        for detail, num in kinds.most_common():
            first = next(fault for fault in self.faults if fault.detail == detail)
            lines.append(f"  {num} x {detail}\n      seed {first.seed}: {first.what}")
            if with_traces and first.trace:
                lines.append("      " + first.trace.strip().replace("\n", "\n      "))
        return "\n".join(lines)

    def save(self, file: Path) -> None:
        content = {
            "target": self.target,
            "seconds": self.seconds,
            "outcomes": dict(self.outcomes),
            "faults": [asdict(fault) for fault in self.faults],
        }
        file.write_text(json.dumps(content, indent=1))


def describe_fault(error: BaseException) -> tuple[str, str]:
    """The kind of a fault, by type and place, and the end of its trace."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(_OURS)]
    at = ours[-1] if ours else frames[-1]
    place = f"{Path(at.filename).name}:{at.name}"
    raised = f"{Path(frames[-1].filename).name}:{frames[-1].name}"
    kind = f"{type(error).__name__} in {place}" + (f" (from {raised})" if raised != place else "")
    if isinstance(error, Fault):
        kind = str(error).partition(": ")[0]
    shown = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[-6:]]
    return kind, f"{type(error).__name__}: {str(error)[:400]}\n{' <- '.join(reversed(shown))}"


def _serve(target: Target, prepared: Path, requests: int, answers: int) -> None:
    """Take seeds from a pipe until it is closed; one line of JSON for each."""
    gc.collect()
    gc.freeze()
    # What libraries print goes to a file of the worker; where a crash was as well.
    printed = os.open(prepared.parent / f"printed-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    faulthandler.enable()
    signal.signal(signal.SIGALRM, _out_of_time)
    soft = _data_bytes() + target.limit_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (soft, resource.RLIM_INFINITY))
    scratch = Path(tempfile.mkdtemp(prefix=f"worker-{os.getpid()}-", dir=prepared.parent))
    with os.fdopen(requests) as seeds, os.fdopen(answers, "w") as out:
        for line in seeds:
            out.write(json.dumps(asdict(_one(target, int(line), prepared, scratch))) + "\n")
            out.flush()
    shutil.rmtree(scratch, ignore_errors=True)


def _one(target: Target, seed: int, prepared: Path, scratch: Path) -> Result:
    folder = Path(tempfile.mkdtemp(prefix=f"{seed}-", dir=scratch))
    begun = time.monotonic()
    # Again and again, in case it is raised where nothing can pass on, such as in a finaliser.
    signal.setitimer(signal.ITIMER_REAL, target.limit_s, 1.0)
    try:
        outcome, what, num = target.run(seed, prepared=prepared, scratch=folder)
        detail = trace = ""
    except BaseException as error:  # noqa: BLE001
        signal.setitimer(signal.ITIMER_REAL, 0)
        detail, trace = describe_fault(error)
        outcome, what, num = "FAULT", _note(folder), 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.monotonic() - begun
    gc.collect()
    shutil.rmtree(folder, ignore_errors=True)
    return Result(seed=seed, outcome=outcome, what=what, num=num, detail=detail, trace=trace, seconds=seconds)


def note(scratch: Path, what: str) -> str:
    """Remember what was damaged, also for when the case does not come back."""
    (scratch / "what").write_text(what, errors="replace")
    return what


def _note(folder: Path) -> str:
    try:
        return (folder / "what").read_text()
    except OSError:
        return "?"


def _out_of_time(signum: int, frame: object) -> None:
    raise OutOfTime


def _data_bytes() -> int:
    """What RLIMIT_DATA counts, of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmData:")[2].split()[0]) << 10


class _Worker:
    """The parent's side of one worker."""

    def __init__(self, target: Target, prepared: Path, others: Iterable[_Worker]) -> None:
        asked, self._ask = os.pipe()
        self.answers, answer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                for other in others:
                    other.close_ends()
                self.close_ends()
                _serve(target, prepared, asked, answer)
                status = 0
            finally:
                os._exit(status)
        os.close(asked)
        os.close(answer)
        self.seed: int | None = None
        self.num_cases = 0
        self.deadline = 0.0
        self._said = b""
        self._limit_s, self._prepared = target.limit_s, prepared

    def close_ends(self) -> None:
        os.close(self._ask)
        os.close(self.answers)

    def give(self, seed: int) -> None:
        self.seed, self.deadline = seed, time.monotonic() + self._limit_s + _GRACE_S
        self.num_cases += 1
        os.write(self._ask, f"{seed}\n".encode())

    def hear(self) -> Result | None:
        """The case's result, when it is complete; a fault if the worker died."""
        part = os.read(self.answers, 1 << 16)
        self._said += part
        assert self.seed is not None
        if not part:
            return Result(seed=self.seed, outcome="FAULT", what=self._what(), detail=f"worker died: {self._reap()}")
        if not self._said.endswith(b"\n"):
            return None
        result = Result(**json.loads(self._said))
        self._said, self.seed = b"", None
        return result

    def kill(self) -> Result:
        """End a worker that does not come back."""
        assert self.seed is not None
        os.kill(self.pid, signal.SIGKILL)
        self._reap()
        detail = "hang: killed, it did not come back to Python"
        return Result(seed=self.seed, outcome="FAULT", what=self._what(), detail=detail)

    def _what(self) -> str:
        """What the case said it damaged; the worker cannot tell any more."""
        folder = next(self._prepared.parent.glob(f"worker-{self.pid}-*/{self.seed}-*"), None)
        return "?" if folder is None else _note(folder)

    def _reap(self) -> str:
        _, status = os.waitpid(self.pid, 0)
        self.close_ends()
        return f"exit code {os.waitstatus_to_exitcode(status)}"

    def finish(self) -> None:
        os.close(self._ask)
        os.waitpid(self.pid, 0)
        os.close(self.answers)


def run_cases(
    target: Target, seeds: Iterable[int], *, prepared: Path, jobs: int, until: float | None = None
) -> Iterator[Result]:
    """Run cases in `jobs` workers; results come as they end.

    Args:
        target: The fuzzer.
        seeds: One for each case.
        prepared: What `in_child(target.prepare)` made.
        jobs: Workers at a time.
        until: Monotonic time after which no more are begun.
    """
    waiting = iter(seeds)
    workers: dict[int, _Worker] = {}

    def begin(old: _Worker | None) -> None:
        seed = None if until is not None and time.monotonic() > until else next(waiting, None)
        if old is not None and (seed is None or old.num_cases >= target.cases_per_worker):
            del workers[old.answers]
            old.finish()
            old = None
        if seed is None:
            return
        if old is None:
            old = _Worker(target, prepared, workers.values())
            workers[old.answers] = old
        old.give(seed)

    for _ in range(jobs):
        begin(None)
    while workers:
        patience_s = max(0.0, min(worker.deadline for worker in workers.values()) - time.monotonic())
        ready = select.select(list(workers), [], [], patience_s)[0]
        for fd in ready:
            worker = workers[fd]
            result = worker.hear()
            if result is None:
                continue
            died = worker.seed is not None
            if died:
                del workers[fd]
            yield result
            begin(None if died else worker)
        for worker in [worker for worker in workers.values() if time.monotonic() > worker.deadline]:
            del workers[worker.answers]
            yield worker.kill()
            begin(None)


def in_child(work: Callable[[], object]) -> None:
    """Do something in a process of its own, so that this one stays without threads."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"preparing failed: exit code {os.waitstatus_to_exitcode(status)}")


__all__ = ["Ending", "Fault", "Report", "Result", "Target", "describe_fault", "in_child", "note", "run_cases"]
