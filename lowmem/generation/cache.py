"""The K/V cache that a streamed model generates with: transformers' own, with layers that can drop rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lowmem.generation.kv_layer import GrowingLayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig


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

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, which are numbers in the batch that the generation began with, in order."""
        held = list(range(max(rows, default=0) + 1)) if self.rows is None else self.rows.tolist()
        places = {row: place for place, row in enumerate(held)}
        chosen = torch.tensor([places[row] for row in rows], dtype=torch.long)
        for layer in self.layers:
            if layer.is_initialized:
                layer.batch_select_indices(chosen.to(layer.keys.device))
        self.rows = torch.tensor(list(rows), dtype=torch.long)

    def allocated_bytes(self) -> dict[str, int]:
        """Bytes by tier. Sliding windows count as they are."""
        found = {"device": 0, "host": 0}
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                found["host" if layer.on_host else "device"] += layer.allocated_bytes
            elif isinstance(layer, DynamicLayer) and layer.is_initialized:
                found["device"] += layer.keys.nbytes + layer.values.nbytes
        return found


__all__ = ["StreamedCache"]
