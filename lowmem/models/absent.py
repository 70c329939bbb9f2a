"""Weights that lie elsewhere: the parameters of streamed blocks, and an embedding table whose rows are gathered.

A parameter's shape is here, its values are in the checkpoint or in a master copy. Of a table that stays on disk only
the rows of a batch are read.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import NoReturn

import torch
from torch import Tensor

from lowmem import host_memory
from lowmem.errors import UnsupportedError
from lowmem.internals.stand_in import StandIn
from lowmem.internals.torch import parameter_table, put_parameter
from offload import BlockSpec, FileIO, StagingBuffer, TensorSpec, lay_out, view_tensor

_REFUSED_INSTEAD = "train adapters (peft_config), or give tuning='full' where every weight is to change"


class AbsentParameter(StandIn, torch.nn.Parameter):
    """A weight that lies elsewhere and is read when its values are needed: in the checkpoint where it is frozen.

    Code that looks at a base weight (an adapter's initialisation, a copy for `modules_to_save`) sees the true weight
    and never a placeholder's zeros. Writing is refused where frozen: those bytes are never written back. A weight that
    is trained can be written to.
    """

    _load: Callable[[], Tensor]
    _store: Callable[[Tensor], None] | None
    key: str
    """Fully qualified name in the model."""
    take_gradient: Callable[[Tensor], None] | None
    """Takes a gradient that somebody sets or that autograd accumulates; None for torch's own `.grad`."""

    @staticmethod
    def of(
        shape: Iterable[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        key: str,
        load: Callable[[], Tensor],
        store: Callable[[Tensor], None] | None = None,
    ) -> AbsentParameter:
        """Make the placeholder of one weight.

        Args:
            shape: Shape of the weight as the model has it.
            dtype: Compute dtype, the one that `load` returns.
            device: Compute device.
            key: Fully qualified name in the model.
            load: Reads the true values; called each time they are needed.
            store: Takes new values; None for a frozen weight.
        """
        param = AbsentParameter.make(shape, dtype=dtype, device=device, requires_grad=store is not None)
        assert isinstance(param, AbsentParameter)
        param._load, param.key, param._store, param.take_gradient = load, key, store, None
        return param

    def read(self) -> Tensor:
        if self._store is None and self.device.type == "cpu":
            host_memory.weight_is_read(self.numel() * self.dtype.itemsize)
        return self._load()

    def check_write(self, by: str) -> None:
        """Refuse all writes to a frozen weight but copies, which may bring what it holds already."""
        if self._store is None and by != "torch's copy_":
            self._refuse(by)

    def write(self, value: Tensor, by: str) -> None:
        """Take new values; a frozen weight takes those it has (a checkpoint that is loaded again)."""
        if self._store is not None:
            self._store(value)
        elif not torch.equal(value, self._load()):
            self._refuse(by)

    def set_property(self, name: str, value: object) -> bool:
        """Write through `.data`, keep a frozen weight frozen, hand on a gradient."""
        if name == "data":
            is_itself = isinstance(value, StandIn) and value.root is self and not value.steps
            if not is_itself:
                self.check_write("setting .data")
                assert isinstance(value, Tensor)
                self.write(value, "setting .data")
            return True
        if name == "requires_grad" and self._store is None:
            if value:
                self._refuse("setting requires_grad")
            return True
        if name == "grad" and isinstance(value, Tensor) and not isinstance(value, StandIn):
            if self.take_gradient is None:
                return False
            self.take_gradient(value)
            return True
        return False

    def check_hook(self, name: str) -> None:
        """Refuse hooks on the gradient of a trained weight."""
        if self._store is not None:
            raise UnsupportedError(
                f"{name} on {self.key}",
                reason="its gradient goes to its tier past autograd's accumulation, so the hook would never be called",
                instead="a Trainer callback, or param.grad after the backward",
            )

    def refuse_replacing(self) -> NoReturn:
        """Refuse to put another parameter in this one's place.

        Raises:
            UnsupportedError: Always.
        """
        if self._store is None:
            self._refuse("replacing or removing the parameter")
        raise UnsupportedError(
            f"replacing or removing the parameter {self.key}",
            reason="its master weight lies in its tier, and a visit reads it from there",
            instead="param.copy_(value) under torch.no_grad(), or load_state_dict without assign",
        )

    def _refuse(self, what: str) -> NoReturn:
        raise UnsupportedError(
            f"{what} on {self.key}",
            reason="the base weights of a streamed model are frozen and are read "
            "from the checkpoint at each visit, so the change would be lost",
            instead=_REFUSED_INSTEAD,
        )

    def __deepcopy__(self, memo: dict[int, object]) -> torch.nn.Parameter:
        """A copy is a real parameter with the true values: it is what a copied module trains."""
        if id(self) not in memo:
            memo[id(self)] = torch.nn.Parameter(self.materialise(), requires_grad=False)
        return memo[id(self)]  # type: ignore[return-value]

    def __copy__(self) -> AbsentParameter:
        return self

    def check_pickling(self) -> None:
        raise UnsupportedError(
            f"pickling {self.key}",
            reason="its values stay in the checkpoint",
            instead="save the adapter (trainer.save_model) and merge it with lowmem.merge, or model.save_pretrained",
        )

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"AbsentParameter({self.key}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


ROWS_PER_READ = 1024
"""Rows in the staging buffer at a time: at most two pages more than their bytes each."""


class GatheredEmbedding:
    """Runs an embedding module on a table made of the rows that a batch uses.

    The module's own forward is run, with token ids renumbered, so that whatever the class does besides the look-up
    (scaling, for instance) stays as it is. Frozen tables only: the rows get no gradient.

    Args:
        module: The embedding; its weight is absent.
        spec: The stored table, of shape (vocabulary, hidden).
        reader: Reads its file.
        dtype: Compute dtype.
        device: Compute device.
    """

    def __init__(
        self, module: torch.nn.Module, *, spec: TensorSpec, reader: FileIO, dtype: torch.dtype, device: torch.device
    ) -> None:
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
