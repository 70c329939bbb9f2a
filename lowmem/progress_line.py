"""Where a run shows how far it is: a bar in a terminal, a bar in a notebook's cell, plain lines in a log file."""

from __future__ import annotations

import builtins
import html
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

from tqdm.std import tqdm  # type: ignore[import-untyped]

from offload import format_bytes

EVERY_S_IN_FILES = 30.0
"""A log file keeps every line."""

_EVERY_S_IN_NOTEBOOKS = 0.5
"""Each change of a cell is a message to the browser."""


def runs_in_notebook() -> bool:
    """Whether this is the kernel of a notebook, whose cells can show pages."""
    # IPython adds the name while it runs a cell; outside of it, importing IPython to ask would take long.
    get_shell = getattr(builtins, "get_ipython", None)
    return get_shell is not None and "IPKernelApp" in get_shell().config


def writes_to_file() -> bool:
    """Whether what is shown goes to a file or a pipe, where a bar would leave control characters and stale lines."""
    return not runs_in_notebook() and not sys.stderr.isatty()


class ProgressLine:
    """A line that changes: a tqdm bar in a terminal, a bar in a notebook's cell; in a log file, one line after another.

    Nothing is shown before the first `show`.
    """

    def __init__(self) -> None:
        self._cell: Any = None
        self._bar: tqdm | None = None

    def show(self, words: str, done: int, total: int, *, after: str = "") -> None:
        """Show words, how much is done, and the words after it."""
        total = max(total, 1)
        together = ", ".join(filter(None, (words, after)))
        if writes_to_file():
            # On a line of its own, also where the Trainer's bar has one.
            tqdm.write(f"lowmem: {together}", file=sys.stderr)
        elif runs_in_notebook():
            self._show_page(
                f'<progress max="1" value="{done / total:.4f}" style="width:12em"></progress> '
                f"<code>{html.escape(together)}</code>"
            )
        elif self._bar is None:
            # Not `leave`d, and made after the Trainer's bar: tqdm gives it the line below and takes it away again.
            layout = f"{words} |{{bar}}| {after}"
            self._bar = tqdm(total=total, initial=done, leave=False, dynamic_ncols=True, bar_format=layout)
        else:
            self._bar.total, self._bar.n, self._bar.bar_format = total, done, f"{words} |{{bar}}| {after}"
            self._bar.refresh()

    def close(self) -> None:
        """Take the line away."""
        if self._cell is not None:
            self._show_page("")
            self._cell = None
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show_page(self, page: str) -> None:
        from IPython.display import HTML, display

        if self._cell is None:
            self._cell = display(HTML(page), display_id=True)
        else:
            self._cell.update(HTML(page))


@contextmanager
def showing_bytes(what: str, num_bytes: int, *, done: int = 0, delay_s: float) -> Iterator[Callable[[int], object]]:
    """Show how far something long is: a bar in a terminal or a notebook, in a log file plain lines now and then.

    Args:
        what: What goes on.
        num_bytes: Of all of it.
        done: Bytes that are done already.
        delay_s: Seconds until there is anything to see.

    Returns:
        What to call with the number of bytes that have been done since.
    """
    if not writes_to_file() and not runs_in_notebook():
        options = {"unit": "B", "unit_scale": True, "leave": False, "delay": delay_s}
        with tqdm(total=num_bytes, initial=done, desc=what, **options) as bar:
            yield bar.update
        return
    # tqdm's bar would go to stderr, which notebooks show as they show errors.
    cell = ProgressLine() if runs_in_notebook() else None
    next_s = monotonic() + delay_s

    def tell(nbytes: int) -> None:
        nonlocal done, next_s
        done += nbytes
        if monotonic() < next_s:
            return
        words = f"{what}, {format_bytes(done)} of {format_bytes(num_bytes)}"
        if cell is not None:
            next_s = monotonic() + _EVERY_S_IN_NOTEBOOKS
            cell.show(words, done, num_bytes)
        else:
            next_s = monotonic() + EVERY_S_IN_FILES
            sys.stderr.write(f"lowmem: {words}\n")

    try:
        yield tell
    finally:
        if cell is not None:
            cell.close()


def say(words: str) -> None:
    """Write a line beside bars: to stderr, but in a notebook, which would show it as it shows errors."""
    tqdm.write(f"lowmem: {words}", file=sys.stdout if runs_in_notebook() else sys.stderr)


def show_in_notebook(words: str, picture: Path | None) -> None:
    """Show in the cell that is running what a run came to."""
    from IPython.display import HTML, Image, display

    display(HTML(f"<code>{html.escape(words)}</code>"))
    if picture is not None and picture.is_file():
        display(Image(str(picture)))
