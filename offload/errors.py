"""What can go wrong while bytes are moved: one small family of errors, each saying what failed and what to do."""

from __future__ import annotations

from pathlib import Path


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


class ReadError(OffloadError):
    """The operating system could not read a range of a file.

    Args:
        file: The file in question.
        offset_bytes: Where in the file the failing request began.
        nbytes: How many bytes it asked for.
        reason: What the operating system said.
    """

    def __init__(self, file: Path, *, offset_bytes: int, nbytes: int, reason: str) -> None:
        super().__init__(
            f"{file}: reading {nbytes} bytes at offset {offset_bytes} failed: {reason}; "
            "check the disk (dmesg, smartctl), then resume from the last checkpoint"
        )
        self.file = file
        self.offset_bytes = offset_bytes
        self.nbytes = nbytes


class WriteError(OffloadError):
    """The operating system could not write a range of a file, or could not bring it to the disk.

    Args:
        file: The file in question.
        offset_bytes: Where in the file the failing request began.
        nbytes: How many bytes it was to write.
        reason: What the operating system said.
    """

    def __init__(self, file: Path, *, offset_bytes: int, nbytes: int, reason: str) -> None:
        super().__init__(
            f"{file}: writing {nbytes} bytes at offset {offset_bytes} failed: {reason}; "
            "check the disk (dmesg, smartctl) or write to another one (Budget.disk)"
        )
        self.file = file
        self.offset_bytes = offset_bytes
        self.nbytes = nbytes


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
    """Another run works in a folder that only one may use.

    Args:
        folder: The folder in question.
        pid: The process that holds it, or None if that is not known.
    """

    def __init__(self, folder: Path, *, pid: int | None) -> None:
        holder = "another run" if pid is None else f"another run (process {pid})"
        super().__init__(f"{folder} is in use by {holder}; wait until it has ended, or give this run another folder")
        self.folder = folder
        self.pid = pid


class Closed(OffloadError):
    """The reader, scheduler or buffer was closed before or while this was asked of it."""
