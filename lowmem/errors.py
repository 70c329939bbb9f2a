"""The refusal: what lowmem says before anything loads when an option cannot be honoured exactly."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version


class UnsupportedError(ValueError):
    """An option, architecture or file that is not supported, said before anything loads.

    Args:
        option: Name of the option or architecture, as the user wrote it, with its value.
        reason: Why it cannot be honoured exactly.
        instead: What to use or to do instead.
    """

    def __init__(self, option: str, *, reason: str, instead: str) -> None:
        super().__init__(f"{option} is not supported: {reason}. Instead: {instead}.")
        self.option = option
        self.reason = reason
        self.instead = instead


def untested(package: str, reason: str) -> UnsupportedError:
    """The refusal of another package's installed version, in which something that is needed is otherwise.

    Args:
        package: Its name on PyPI.
        reason: What is otherwise, and what would go wrong.
    """
    instead = f"a version of {package} that README names as tested"
    return UnsupportedError(f"{package} {version(package)}", reason=reason, instead=instead)


def some_of(names: Sequence[str]) -> str:
    """The first three names for a sentence, and how many others there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
