"""What is known of a generation while it goes on: which rows are finished, how far it is, how long it will take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

_RECENT_TOKENS = 20


@dataclass(frozen=True, kw_only=True)
class TokenProgress:
    """Where a generation is, told after every token."""

    num_tokens: int
    """Tokens generated for each row that is not finished."""
    max_tokens: int
    """Most that will be."""
    num_rows: int
    """Rows of the batch."""
    num_unfinished: int
    """Rows that have not ended."""
    left_s: float | None
    """Seconds that the remaining tokens take at the present rate: what is left at most, as all rows may end sooner."""
    tokens_per_s: float
    """Tokens of all unfinished rows per second, of late."""

    @property
    def finished(self) -> bool:
        """Whether no row goes on."""
        return self.num_unfinished == 0


class Generation:
    """One call of `generate`.

    Args:
        num_rows: Rows of the batch.
        num_prompt_tokens: Tokens of the prompts, padding included.
        max_tokens: Most tokens that will be generated for a row.
        listeners: Told after every token.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        num_prompt_tokens: int,
        max_tokens: int,
        listeners: list[Callable[[TokenProgress], None]],
    ) -> None:
        self.num_rows, self.max_tokens = num_rows, max_tokens
        self._num_prompt_tokens = num_prompt_tokens
        self._listeners = listeners
        self._start_s = time.perf_counter()
        # The first token pays for the whole prompt: it says nothing about those that follow.
        self._times_s: deque[float] = deque(maxlen=_RECENT_TOKENS)
        self.unfinished: list[int] = list(range(num_rows))
        """Numbers of the rows that go on."""

    def note(self, num_all_tokens: int, unfinished: list[int]) -> bool:
        """Count a token.

        Args:
            num_all_tokens: Tokens of a row so far, prompt included.
            unfinished: Rows that go on.

        Returns:
            Whether rows have finished with it.
        """
        changed = len(unfinished) < len(self.unfinished)
        self.unfinished = unfinished
        self._times_s.append(time.perf_counter())
        if self._listeners:
            progress = self._progress(num_all_tokens - self._num_prompt_tokens)
            for listener in list(self._listeners):
                listener(progress)
        return changed

    def _progress(self, num_tokens: int) -> TokenProgress:
        now_s = self._times_s[-1]
        token_s = None
        if len(self._times_s) > 1:
            token_s = (now_s - self._times_s[0]) / (len(self._times_s) - 1)
        left = max(0, self.max_tokens - num_tokens) if self.unfinished else 0
        rate_s = token_s or (now_s - self._start_s)
        return TokenProgress(
            num_tokens=num_tokens,
            max_tokens=self.max_tokens,
            num_rows=self.num_rows,
            num_unfinished=len(self.unfinished),
            left_s=None if token_s is None else left * token_s,
            tokens_per_s=len(self.unfinished) / rate_s if rate_s > 0 else 0.0,
        )
