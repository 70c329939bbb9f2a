"""An embedding table that stays on disk: only the rows of a batch are read."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from lowmem import host_memory
from lowmem.internals.torch import parameter_table, put_parameter
from lowmem.models.absent import AbsentParameter
from offload import BlockSpec, FileIO, StagingBuffer, TensorSpec, lay_out, view_tensor

ROWS_PER_READ = 1024
"""Rows in the staging buffer at a time: at most two pages more than their bytes each."""


class GatheredEmbedding:
    """Runs an embedding module on a table made of the rows that a batch uses.

    The module's own forward is run, with token ids renumbered, so that whatever the class does besides the look-up
    (scaling, for instance) stays as it is. Frozen tables only: the rows get no gradient.
    """

    def __init__(
        self, module: torch.nn.Module, *, spec: TensorSpec, reader: FileIO, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Take over a module's forward; reads nothing yet.

        Args:
            module: The embedding; its weight is absent.
            spec: The stored table, of shape (vocabulary, hidden).
            reader: Reads its file.
            dtype: Compute dtype.
            device: Compute device.
        """
        # Weakly: the module holds this, and must be freed without a cyclic collection when its model is dropped.
        self._module = weakref.ref(module)
        self._spec, self._reader = spec, reader
        self._dtype, self._device = dtype, device
        module.forward = self.forward

    def forward(self, input: Tensor) -> Tensor:
        """Look up token ids of any shape (...): (..., hidden) in the compute dtype.

        Raises:
            IndexError: An id lies outside the vocabulary.
            OffloadError: The rows cannot be read.
        """
        module = self._module()
        assert module is not None
        look_up: Callable[[torch.nn.Module, Tensor], Tensor] = type(module).forward
        weight, padding_idx = parameter_table(module)["weight"], getattr(module, "padding_idx", None)
        if not isinstance(weight, AbsentParameter):
            return look_up(module, input)
        ids, local = torch.unique(input, return_inverse=True)
        vocabulary = self._spec.shape[0]
        if ids.numel() and not (int(ids[0]) >= 0 and int(ids[-1]) < vocabulary):
            raise IndexError(
                f"{self._spec.name}: token ids {int(ids[0])} to {int(ids[-1])} do not lie within a "
                f"vocabulary of {vocabulary}; use the tokenizer that belongs to this checkpoint"
            )
        # The padding index only says which row gets no gradient; a frozen table has no gradients at all.
        module.padding_idx = None  # type: ignore[assignment]
        put_parameter(module, "weight", torch.nn.Parameter(self._rows(ids.tolist()), requires_grad=False))
        try:
            return look_up(module, local)
        finally:
            put_parameter(module, "weight", weight)
            module.padding_idx = padding_idx  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, object]) -> GatheredEmbedding:
        """What a copied module (`modules_to_save`) gets: its table is real, so it looks up as its class does."""
        copied = GatheredEmbedding.__new__(GatheredEmbedding)
        module = memo[id(self._module())]
        assert isinstance(module, torch.nn.Module)
        copied.__dict__.update(self.__dict__, _module=weakref.ref(module))
        return copied

    def _rows(self, ids: list[int]) -> Tensor:
        rows = host_memory.empty((len(ids), self._spec.shape[1]), dtype=self._dtype, device=torch.device("cpu"))
        for start in range(0, len(ids), ROWS_PER_READ):
            self._read(ids[start : start + ROWS_PER_READ], into=rows[start : start + ROWS_PER_READ])
        return rows.to(self._device)

    def _read(self, ids: list[int], *, into: Tensor) -> None:
        row_bytes = self._spec.nbytes // self._spec.shape[0]
        specs = [
            TensorSpec(
                name=f"{self._spec.name}[{row}]",
                dtype=self._spec.dtype,
                shape=self._spec.shape[1:],
                file=self._spec.file,
                offset_bytes=self._spec.offset_bytes + row * row_bytes,
                nbytes=row_bytes,
            )
            for row in ids
        ]
        # No merging across gaps: the rows in between are what is not to be read.
        layout = lay_out(BlockSpec(name=self._spec.name, tensors=tuple(specs)), max_gap_bytes=0)
        with StagingBuffer(layout.buffer_bytes) as staging:
            self._reader.read(layout, staging.tensor).wait()
            for index, spec in enumerate(specs):
                into[index].copy_(view_tensor(staging.tensor, layout.tensor_offsets[spec.name], spec=spec))


def read_now(block: BlockSpec, *, reader: FileIO, device: torch.device) -> dict[str, Tensor]:
    """Read stored tensors at once, into memory of their own on the compute device.

    Args:
        block: What to read.
        reader: Reads its files.
        device: Compute device.

    Returns:
        The tensors by stored name, in their stored dtype.
    """
    layout = lay_out(block)
    staging = StagingBuffer(layout.buffer_bytes)
    reader.read(layout, staging.tensor).wait()
    return {
        spec.name: view_tensor(staging.tensor, layout.tensor_offsets[spec.name], spec=spec).to(device)
        for spec in block.tensors
    }
