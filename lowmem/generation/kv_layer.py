"""Keys and values of one block while tokens are generated: room made ahead, rows that can go, on device or host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

_FIRST_NEW_TOKENS = 256
"""Tokens beyond the prompt for which there is room from the start; more is made by doubling."""


class GrowingLayer(DynamicLayer):
    """transformers' dynamic layer without its copy of everything at every token.

    Keys and values, of shape (rows, heads, tokens, width), are written in place into memory that is allocated ahead.
    The values that attention gets are those that `DynamicLayer` gives.

    Args:
        max_tokens: Most tokens that a row will have.
        on_host: Keep them in host memory between visits, where the device has memory of its own.
    """

    def __init__(self, *, max_tokens: int, on_host: bool = False) -> None:
        super().__init__()
        self.on_host = on_host
        self._max_tokens = max_tokens
        self._length = 0
        self._keys = self._values = torch.empty(0)
        self._window: tuple[slice, int] | None = None
        self._num_in_window = 0

    @property
    def allocated_bytes(self) -> int:
        """Bytes allocated; on a CPU the system counts a page once it has been written to."""
        return self._keys.nbytes + self._values.nbytes

    @contextmanager
    def rows(self, window: slice, *, num_rows: int) -> Iterator[None]:
        """Update only some rows of a batch, as often as need be; the length stays until `advance`."""
        self._window, self._num_in_window = (window, num_rows), 0
        try:
            yield
        finally:
            self._window, self._num_in_window = None, 0

    def advance(self, num_tokens: int) -> None:
        """Count tokens that every row has been given through `rows`."""
        self._length += num_tokens
        self._show()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append tokens and return all keys and values so far, on the device of what was appended."""
        rows, num_rows = self._window or (slice(None), key_states.shape[0])
        start = self._length + self._num_in_window
        end = start + key_states.shape[-2]
        self._reserve(end, num_rows=num_rows, like=(key_states, value_states))
        found = []
        for stored, states in ((self._keys, key_states), (self._values, value_states)):
            stored[rows, :, start:end] = states
            found.append(stored[rows, :, :end].to(states.device))
        if self._window is None:
            self.advance(key_states.shape[-2])
        else:
            self._num_in_window += key_states.shape[-2]
        return found[0], found[1]

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number is given as a negative one."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: expected a number of tokens below 0, got {tokens_to_remove}")
        self._length = max(0, self._length + tokens_to_remove)
        self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some rows, in the order given, and give the memory of the others back."""
        if self._length:
            self._keys, self._values = (self._selected(stored, indices) for stored in (self._keys, self._values))
            self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As `batch_select_indices`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.batch_select_indices(torch.arange(self._keys.shape[0]).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        self._length = 0
        self._keys = self._values = torch.empty(0)
        super().reset()

    def _reserve(self, num_tokens: int, *, num_rows: int, like: tuple[Tensor, Tensor]) -> None:
        if not self.is_initialized:
            self.lazy_initialization(*like)
            self._keys, self._values = (self._allocate(states, num_rows, num_tokens) for states in like)
        elif num_tokens > self._keys.shape[-2]:
            self._keys, self._values = (self._grown(stored, num_tokens) for stored in (self._keys, self._values))

    def _allocate(self, states: Tensor, num_rows: int, num_tokens: int) -> Tensor:
        capacity = max(num_tokens, min(self._max_tokens, num_tokens + _FIRST_NEW_TOKENS))
        device = torch.device("cpu") if self.on_host else states.device
        return torch.empty(num_rows, states.shape[1], capacity, states.shape[-1], dtype=states.dtype, device=device)

    def _grown(self, stored: Tensor, num_tokens: int) -> Tensor:
        capacity = max(num_tokens, min(self._max_tokens, 2 * stored.shape[-2]))
        larger = stored.new_empty(*stored.shape[:-2], capacity, stored.shape[-1])
        num_kept = self._length + self._num_in_window
        larger[:, :, :num_kept] = stored[:, :, :num_kept]
        return larger

    def _selected(self, stored: Tensor, indices: Tensor) -> Tensor:
        chosen = indices.to(stored.device)
        kept = stored.new_empty(len(chosen), *stored.shape[1:])
        kept[:, :, : self._length] = stored[:, :, : self._length].index_select(0, chosen)
        return kept

    def _show(self) -> None:
        """Where transformers looks: views of what is there."""
        self.keys, self.values = self._keys[:, :, : self._length], self._values[:, :, : self._length]


__all__ = ["GrowingLayer"]
