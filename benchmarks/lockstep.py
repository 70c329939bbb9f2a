"""Several training jobs in turn, one step each: what changes on the machine during a run changes all of them alike."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Protocol

from benchmarks.harness import ROOT, Value, child_environment, last_json
from benchmarks.sft_job import STEP_PREFIX


class AnyJob(Protocol):
    """A job that a module runs from its command line."""

    def arguments(self) -> list[str]:
        """The command line."""


class LockstepJob:
    """A job in a child process that takes one step per call; a context manager that ends the child.

    Between its turns the child is idle, but for reads that it had begun: at most as many blocks as its ring holds.
    """

    def __init__(self, job: AnyJob, *, module: str = "benchmarks.sft_job") -> None:
        # A file, since nobody empties a pipe while we wait for a step.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the child
        command = [sys.executable, "-m", module, *job.arguments(), "--lockstep"]
        self._child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def step(self) -> float:
        """Let the child take one step; its duration in seconds as the child measured it.

        Raises:
            RuntimeError: The child ended instead; the message has the end of what it wrote.
        """
        stdin = _require(self._child.stdin)
        try:
            stdin.write("go\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        for line in _require(self._child.stdout):
            if line.startswith(STEP_PREFIX):
                return float(line.removeprefix(STEP_PREFIX))
        raise self._failure()

    def finish(self) -> Mapping[str, Value]:
        """The child's report, after its last step.

        Raises:
            RuntimeError: It failed at the end.
        """
        output, _ = self._child.communicate()
        if self._child.returncode != 0:
            raise self._failure()
        return last_json(output)

    def _failure(self) -> RuntimeError:
        self._child.communicate()
        self._errors.seek(0)
        return RuntimeError(f"the job ended with status {self._child.returncode}: {self._errors.read()[-2000:]}")

    def __enter__(self) -> "LockstepJob":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child.poll() is None:
            self._child.kill()
        for stream in (self._child.stdin, self._child.stdout, self._errors):
            if stream is not None:
                stream.close()
        self._child.wait()


def _require(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
