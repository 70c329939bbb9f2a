"""What can go wrong while bytes are moved: one small family of errors, each saying what failed and what to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Self


class OffloadError(RuntimeError):
    """A resource failed at run time: a file, a tier, a budget."""


class SourceError(OffloadError, ValueError):
    """A checkpoint file is missing, damaged or describes itself wrongly.

    Args:
        file: The file in question.
        field: Which part of it: a header field, a tensor's name, an index entry.
        problem: What is wrong, expected against got, with units.
        remedy: What to do about it.
    """

    def __init__(self, file: Path, *, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{file}: {field}: {problem}; {remedy}")
        self.file = file
        self.field = field


class SourceChanged(OffloadError):
    """A checkpoint file was shortened, rewritten, replaced or removed after it had been opened and checked.

    Args:
        file: The file in question.
        problem: What differs, expected against got, with units.
    """

    def __init__(self, file: Path, *, problem: str) -> None:
        super().__init__(
            f"{file} changed while it was in use: {problem}; put the original file back and resume from the last "
            "checkpoint, or start again with the new one"
        )
        self.file = file


class _RangeError(OffloadError):
    """The operating system refused a range of a file."""

    _doing = _remedy = ""

    def __init__(self, file: Path, *, offset_bytes: int, nbytes: int, reason: str) -> None:
        what = f"{self._doing} {nbytes} bytes at offset {offset_bytes} failed"
        super().__init__(f"{file}: {what}: {reason}; check the disk (dmesg, smartctl){self._remedy}")
        self.file = file
        self.offset_bytes = offset_bytes
        self.nbytes = nbytes


class ReadError(_RangeError):
    """The operating system could not read a range of a file; arguments as `WriteError`."""

    _doing, _remedy = "reading", ", then resume from the last checkpoint"


class WriteError(_RangeError):
    """The operating system could not write a range of a file, or could not bring it to the disk.

    Args:
        file: The file in question.
        offset_bytes: Where in the file the failing request began.
        nbytes: How many bytes it was to write.
        reason: What the operating system said.
    """

    _doing, _remedy = "writing", " or write to another one (Budget.disk)"


class BudgetError(OffloadError):
    """A budget is too small for the job.

    Args:
        message: What does not fit, needed against given with units, and which field to raise.
        needed_bytes: The smallest budget that works.
    """

    def __init__(self, message: str, *, needed_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class TierFull(OffloadError):
    """A tier has no room left for what was to be put there."""


class FolderInUse(OffloadError):
    """Another run, or something else in this process, works in a folder that only one may use.

    Args:
        folder: The folder in question.
        pid: The process that holds it, or None if that is not known.
        holder: What in that process holds it, in the words that it left; empty if that is not known.
        is_own: Whether that process is this one.
    """

    def __init__(self, folder: Path, *, pid: int | None, holder: str = "", is_own: bool = False) -> None:
        if is_own:
            who = f"this process itself ({holder or f'process {pid}'})"
            remedy = "delete what was opened there, with all that refers to it, such as an optimizer or a Trainer"
        else:
            words = ": ".join(filter(None, ("" if pid is None else f"process {pid}", holder)))
            who = f"another run ({words})" if words else "another run"
            remedy = "wait until it has ended"
        super().__init__(f"{folder} is in use by {who}; {remedy}, or give this run another folder")
        self.folder = folder
        self.pid = pid
        self.is_own = is_own


class PeerLost(OffloadError):
    """A process of this run on this machine has ended without a word.

    Args:
        who: Which one.
    """

    def __init__(self, who: str) -> None:
        super().__init__(
            f"{who}, which streams the same weights on this machine, has ended without a word (killed, or out of "
            "memory: look at dmesg and at what the launcher says of it); start all ranks again, from the last "
            "checkpoint"
        )


class Closed(OffloadError):
    """The reader, scheduler or buffer was closed before or while this was asked of it."""


class ClosedAfterwards(ABC):
    """Something that is closed at the end of its ``with``."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back; whoever waits for it gets `Closed`. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
