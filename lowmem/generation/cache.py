"""Keys and values of one block while tokens are generated: room made ahead, rows that can go, on device or host.

How many bytes keys and values may take, on the device and beyond it on the host. Pure arithmetic.

The K/V cache that a streamed model generates with: transformers' own, with layers that can drop rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lowmem.planning.step_memory import ALWAYS
from offload import BudgetError, CopyStream, StagingBuffer, format_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lowmem.planning.plan import Plan


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
        self._shown: tuple[Tensor | None, Tensor | None] = (None, None)
        self._num_given = 0
        self._pinned: _PinnedMemory | None = None
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
            self._num_given, self._window, self._num_in_window = self._num_in_window, None, 0

    def advance(self) -> None:
        """Count tokens that every row has been given through `rows`.

        As many as came: a model of several streams (prophetnet) keeps keys of one of them.
        """
        self._length += self._num_given
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
            if self._pinned is not None:
                found.append(self._pinned.appended(stored[rows, :, :end], states))
                continue
            stored[rows, :, start:end] = states
            found.append(stored[rows, :, :end].to(states.device))
        if self._window is None:
            self._length = end
            self._show()
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
            with self._memory_of_others():
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
        with self._memory_of_others():
            self._keys = self._values = torch.empty(0)
        super().reset()

    def _reserve(self, num_tokens: int, *, num_rows: int, like: tuple[Tensor, Tensor]) -> None:
        if not self.is_initialized:
            self.lazy_initialization(*like)
            if self.on_host and like[0].is_cuda:
                self._pinned = _PinnedMemory(like[0].device)
            self._keys, self._values = (self._allocate(states, num_rows, num_tokens) for states in like)
        elif num_tokens > self._keys.shape[-2]:
            with self._memory_of_others():
                self._keys, self._values = (self._grown(stored, num_tokens) for stored in (self._keys, self._values))

    def _allocate(self, states: Tensor, num_rows: int, num_tokens: int) -> Tensor:
        capacity = max(num_tokens, min(self._max_tokens, num_tokens + _FIRST_NEW_TOKENS))
        device = torch.device("cpu") if self.on_host else states.device
        return self._empty((num_rows, states.shape[1], capacity, states.shape[-1]), dtype=states.dtype, device=device)

    def _empty(self, shape: tuple[int, int, int, int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self._pinned is not None:
            return self._pinned.empty(shape, dtype=dtype)
        return torch.empty(shape, dtype=dtype, device=device)

    def _memory_of_others(self) -> AbstractContextManager[None]:
        """Inside it, other memory takes the place of what there is."""
        return nullcontext() if self._pinned is None else self._pinned.replacing()

    def _grown(self, stored: Tensor, num_tokens: int) -> Tensor:
        capacity = max(num_tokens, min(self._max_tokens, 2 * stored.shape[-2]))
        num_rows, num_heads, _, width = stored.shape
        larger = self._empty((num_rows, num_heads, capacity, width), dtype=stored.dtype, device=stored.device)
        num_kept = self._length + self._num_in_window
        larger[:, :, :num_kept] = stored[:, :, :num_kept]
        return larger

    def _selected(self, stored: Tensor, indices: Tensor) -> Tensor:
        chosen = indices.to(stored.device)
        _, num_heads, capacity, width = stored.shape
        kept = self._empty((len(chosen), num_heads, capacity, width), dtype=stored.dtype, device=stored.device)
        kept[:, :, : self._length] = stored[:, :, : self._length].index_select(0, chosen)
        return kept

    @property
    def keys(self) -> Tensor | None:
        """Where transformers and users look: a view of what is there, (rows, heads, tokens, width)."""
        if self._pinned is not None:
            self._pinned.wait()
        return self._shown[0]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._shown = (value, self._shown[1])

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        if self._pinned is not None:
            self._pinned.wait()
        return self._shown[1]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._shown = (self._shown[0], value)

    def _show(self) -> None:
        self.keys, self.values = self._keys[:, :, : self._length], self._values[:, :, : self._length]


class _PinnedMemory:
    """Page-locked host memory of one layer's keys and values, copied to and from a GPU while that computes.

    The host waits for no copy unless the memory is replaced, or looked at from outside. Tokens of a row lie behind each
    other, so that a row's first tokens, and its last ones, are one piece each.
    """

    def __init__(self, device: torch.device) -> None:
        self._copies = CopyStream(device)
        self._buffers: list[StagingBuffer] = []
        self._finalizer = weakref.finalize(self, _give_back, self._copies, self._buffers)

    def empty(self, shape: tuple[int, int, int, int], *, dtype: torch.dtype) -> Tensor:
        """Memory for (rows, heads, tokens, width)."""
        num_rows, num_heads, num_tokens, width = shape
        nbytes = num_rows * num_heads * num_tokens * width * dtype.itemsize
        buffer = StagingBuffer(nbytes, pin=True, in_children=False)
        self._buffers.append(buffer)
        return buffer.tensor.view(dtype).view(num_rows, num_tokens, num_heads, width).transpose(1, 2)

    def appended(self, stored: Tensor, states: Tensor) -> Tensor:
        """Everything of some rows on the device, the last tokens of which are new and are kept as well.

        Args:
            stored: A part of this memory, (rows, heads, tokens, width).
            states: The last tokens of it, on the device.
        """
        by_token = stored.transpose(1, 2)
        num_old = by_token.shape[1] - states.shape[2]
        self._copies.down(states.transpose(1, 2).contiguous(), by_token[:, num_old:])
        # On one stream: the new ones are there when they are brought back.
        return self._copies.up(by_token)[0].transpose(1, 2)

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Inside it, `empty` takes the place of what there is, which the host may read."""
        self.wait()
        old = list(self._buffers)
        self._buffers.clear()
        yield
        for buffer in old:
            buffer.close()

    def wait(self) -> None:
        """Let the host wait until what was appended is there."""
        self._copies.synchronize()


def _give_back(copies: CopyStream, buffers: list[StagingBuffer]) -> None:
    copies.synchronize()
    for buffer in buffers:
        buffer.close()


@dataclass(frozen=True, kw_only=True)
class KvRoom:
    """What a plan leaves for keys and values while tokens are generated."""

    device_bytes: int
    """On the device, next to the weights and what a block's forward holds."""
    host_bytes: int
    """In host RAM, next to the blocks that are cached there. On a CPU both are RAM."""
    prefill_tokens: int
    """Tokens that may go through a block at a time."""

    @classmethod
    def of(cls, plan: Plan) -> KvRoom:
        """Read a plan: made for generating, or for training, when nothing is recomputed."""
        always = sum(role.nbytes for role in plan.roles if role.tier == "device" and role.phase == ALWAYS)
        if plan.job.generates:
            transient = plan.bytes_of("block forward", tier="device") + plan.bytes_of("logits", tier="device")
        else:
            # A forward holds less than half of what recomputing and differentiating the same tokens does.
            transient = plan.bytes_of("block recomputation", tier="device") // 2
        whole = plan.job.num_generated * plan.seq_len
        kept_host_bytes = plan.host_bytes - plan.placement.staging_bytes
        return cls(
            device_bytes=max(0, plan.device_budget_bytes - always - transient),
            host_bytes=max(0, plan.host_budget_bytes - kept_host_bytes),
            prefill_tokens=max(whole, plan.micro_batch * plan.seq_len),
        )

    def num_on_device(self, layer_bytes: int, *, num_layers: int, what: str) -> int:
        """How many layers keep their keys and values on the device; those that follow keep them on the host.

        Args:
            layer_bytes: Bytes of one layer at its longest.
            num_layers: Number of layers.
            what: The batch, for the error.

        Raises:
            BudgetError: They do not fit on both together.
        """
        num_device = min(num_layers, self.device_bytes // max(1, layer_bytes))
        left_bytes = (num_layers - num_device) * layer_bytes
        if left_bytes > self.host_bytes:
            total = num_layers * layer_bytes
            raise BudgetError(
                f"keys and values of {what} take {format_bytes(total)}; the budget leaves "
                f"{format_bytes(self.device_bytes)} on the device and {format_bytes(self.host_bytes)} on the host; "
                "generate fewer sequences or fewer tokens at a time, or raise Budget.device or Budget.host",
                needed_bytes=total,
            )
        return num_device


class StreamedCache(DynamicCache):
    """Keys and values of a generation, and which of its rows are still being generated.

    Plain layers become `GrowingLayer`s; those of sliding windows and of linear attention stay transformers' own.

    Args:
        config: The model's configuration.
        max_tokens: Most tokens that a row will have, prompt included.
        num_on_device: Layers whose keys and values stay on the device; the others' wait on the host.
    """

    def __init__(self, config: PretrainedConfig, *, max_tokens: int, num_on_device: int | None = None) -> None:
        super().__init__(config=config)
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                on_host = num_on_device is not None and index >= num_on_device
                self.layers[index] = GrowingLayer(max_tokens=max_tokens, on_host=on_host)
        self.splittable: set[int] = set()
        """Blocks that have been run with this cache and can be run on some rows only."""
        self.rows: Tensor | None = None
        """Numbers of the rows that the layers still hold, shape (rows,), int64; None for all."""

    @property
    def can_drop_rows(self) -> bool:
        """Whether every layer can give up rows and every block can do without them."""
        return all(
            index in self.splittable and type(layer) in (GrowingLayer, DynamicSlidingWindowLayer)
            for index, layer in enumerate(self.layers)
        )

    def keep(self, rows: Sequence[int], *, device: torch.device | None = None) -> None:
        """Drop all rows but these, which are numbers in the batch that the generation began with, in order.

        Args:
            rows: The numbers.
            device: Where blocks compute, so that their inputs are cut by rows without waiting for it.
        """
        held = list(range(max(rows, default=0) + 1)) if self.rows is None else self.rows.tolist()
        places = {row: place for place, row in enumerate(held)}
        chosen = torch.tensor([places[row] for row in rows], dtype=torch.long)
        for layer in self.layers:
            if layer.is_initialized:
                layer.batch_select_indices(chosen.to(layer.keys.device))
        self.rows = torch.tensor(list(rows), dtype=torch.long, device=device)

    def allocated_bytes(self) -> dict[str, int]:
        """Bytes by tier. Sliding windows count as they are."""
        found = {"device": 0, "host": 0}
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                found["host" if layer.on_host else "device"] += layer.allocated_bytes
            elif isinstance(layer, DynamicLayer) and layer.is_initialized:
                found["device"] += layer.keys.nbytes + layer.values.nbytes
        return found
