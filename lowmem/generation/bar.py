"""A bar over the tokens of `generate`, for use outside of training; within it `lowmem.Monitor` shows the same."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lowmem.generation.session import TokenProgress
from lowmem.progress import token_words
from lowmem.streaming.runtime import runtime_of


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
        self._hooks = runtime_of(model).generation
        self._bar: tqdm | None = None
        self._stop = lambda: None

    def show(self, progress: TokenProgress) -> None:
        """Show one more token."""
        if self._bar is None:
            self._bar = tqdm(total=progress.max_tokens, leave=False, dynamic_ncols=True, bar_format="{desc} |{bar}|")
        self._bar.total, self._bar.n = progress.max_tokens, progress.num_tokens
        self._bar.set_description_str(token_words(progress))
        if progress.finished:
            self._close()

    def __enter__(self) -> Self:
        if self._hooks is not None:
            self._stop = self._hooks.listen(self.show)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()  # type: ignore[no-untyped-call]
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


__all__ = ["TokenBar"]
