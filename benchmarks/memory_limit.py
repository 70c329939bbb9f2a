"""A memory limit that the kernel enforces on a child process: control groups, version 1 or 2.

The limit covers everything the process holds: the interpreter, the frameworks, every buffer, and the page cache that
its file reads leave. A process that exceeds it is killed by the kernel, so a run that ends proves that it fitted.
"""

import os
import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_MOUNTS = Path("/proc/self/mounts")


class LimitUnavailable(RuntimeError):
    """No memory limit can be enforced here; the message says why and what would change that."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a child process.

    Attributes:
        returncode: Exit status; negative for a signal, as in `subprocess`.
        output: Its standard output; standard error goes to `stderr`'s destination.
        wall_s: From start to end.
        peak_rss_bytes: Largest resident set of the process itself, shared libraries included, as last seen before its
            end (it is looked at every 20 ms); 0 where there is no /proc.
        peak_bytes: Largest use of the group, page cache included; None without a group.
        num_oom_kills: How many processes the kernel killed for memory; None without a group.
    """

    returncode: int
    output: str
    wall_s: float
    peak_rss_bytes: int
    peak_bytes: int | None
    num_oom_kills: int | None


@dataclass(frozen=True, kw_only=True)
class _Names:
    """Files of one version of control groups."""

    limit: str
    swap_limit: str
    swap_is_a_sum: bool
    peak: str
    events: str


_V1 = _Names(
    limit="memory.limit_in_bytes",
    swap_limit="memory.memsw.limit_in_bytes",
    swap_is_a_sum=True,
    peak="memory.max_usage_in_bytes",
    events="memory.oom_control",
)
_V2 = _Names(
    limit="memory.max", swap_limit="memory.swap.max", swap_is_a_sum=False, peak="memory.peak", events="memory.events"
)


class MemoryLimit:
    """A control group with a memory limit; a context manager that removes the group at the end.

    Args:
        limit_bytes: Most that the processes of the group may hold together.

    Raises:
        LimitUnavailable: No memory controller is mounted, or this user may not make a group in it.
    """

    def __init__(self, limit_bytes: int) -> None:
        parent, self._names = _find_controller()
        self.limit_bytes = limit_bytes
        self._folder = parent / f"lowmem-{os.getpid()}-{time.monotonic_ns()}"
        try:
            self._folder.mkdir()
            (self._folder / self._names.limit).write_text(str(limit_bytes))
        except OSError as error:
            self.close()
            raise LimitUnavailable(f"cannot make a memory group under {parent}: {error}; it takes root") from error
        swap = self._folder / self._names.swap_limit
        if swap.exists():
            swap.write_text(str(limit_bytes if self._names.swap_is_a_sum else 0))

    def command(self, command: Sequence[str]) -> list[str]:
        """The command, started inside the group: it is limited from its first instruction on."""
        enter = 'echo $$ > "$0" && exec "$@"'
        return ["/bin/sh", "-c", enter, str(self._folder / "cgroup.procs"), *command]

    @property
    def peak_bytes(self) -> int | None:
        peak = self._folder / self._names.peak
        return int(peak.read_text()) if peak.exists() else None

    @property
    def num_oom_kills(self) -> int | None:
        for line in (self._folder / self._names.events).read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
        return None

    def close(self) -> None:
        # A group empties a moment after its last process was reaped.
        for _ in range(50):
            try:
                self._folder.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.02)
            else:
                return

    def __enter__(self) -> "MemoryLimit":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run_limited(
    command: Sequence[str],
    *,
    limit_bytes: int | None,
    env: Mapping[str, str] | None = None,
    stderr: int | None = None,
    echo: bool = False,
) -> Outcome:
    """Run a command to its end, inside a memory limit if one is given.

    Args:
        command: Program and arguments.
        limit_bytes: The limit, or None to run without one.
        env: The child's environment; None passes ours on.
        stderr: As in `subprocess.Popen`.
        echo: Also print the child's output as it comes.

    Raises:
        LimitUnavailable: A limit was asked for and cannot be had; nothing was started.
    """
    if limit_bytes is None:
        return _run(command, env=env, stderr=stderr, echo=echo, group=None)
    with MemoryLimit(limit_bytes) as group:
        return _run(group.command(command), env=env, stderr=stderr, echo=echo, group=group)


def _run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None,
    stderr: int | None,
    echo: bool,
    group: MemoryLimit | None,
) -> Outcome:
    start_s = time.perf_counter()
    lines: list[str] = []
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True)
    watch = _PeakWatch(child.pid)
    watch.start()
    try:
        assert child.stdout is not None
        for line in child.stdout:
            lines.append(line)
            if echo:
                print(line, end="", flush=True)
        returncode = child.wait()
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        watch.stop()
        if child.stdout is not None:
            child.stdout.close()
    return Outcome(
        returncode=returncode,
        output="".join(lines),
        wall_s=time.perf_counter() - start_s,
        peak_rss_bytes=watch.peak_bytes,
        peak_bytes=group.peak_bytes if group else None,
        num_oom_kills=group.num_oom_kills if group else None,
    )


class _PeakWatch(threading.Thread):
    """Looks at a process's high-water mark until told to stop.

    The kernel's account of a child that has ended (ru_maxrss) will not do: it begins with the resident set of whoever
    started it.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._pid = pid
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, peak_rss_bytes(self._pid))

    def stop(self) -> None:
        self._done.set()
        self.join()


def peak_rss_bytes(pid: int) -> int:
    """High-water mark of a process's resident set since its program started; 0 if it has ended, or not on Linux."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _find_controller() -> tuple[Path, _Names]:
    """The folder to make groups in: below our own group where that is visible, so that outer limits stay in force."""
    if not _MOUNTS.exists():
        raise LimitUnavailable(f"no {_MOUNTS}: control groups exist on Linux only")
    mounts = [line.split() for line in _MOUNTS.read_text().splitlines()]
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    for _, folder, kind, options, *_ in mounts:
        if kind == "cgroup" and "memory" in options.split(","):
            below = Path(folder) / own.get("memory", "/").lstrip("/")
            return (below if below.is_dir() else Path(folder)), _V1
    for _, folder, kind, *_ in mounts:
        if kind == "cgroup2" and "memory" in (Path(folder) / "cgroup.controllers").read_text().split():
            return _enable_v2(Path(folder)), _V2
    raise LimitUnavailable("no control group file system with a memory controller is mounted")


def _enable_v2(folder: Path) -> Path:
    """Version 2 forbids processes in a group whose children are controlled, so groups are made at the root."""
    control = folder / "cgroup.subtree_control"
    if "memory" not in control.read_text().split():
        try:
            control.write_text("+memory")
        except OSError as error:
            raise LimitUnavailable(
                f"cannot turn on the memory controller in {control}: {error}; it takes root"
            ) from error
    return folder
