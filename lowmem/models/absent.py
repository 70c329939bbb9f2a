"""The parameter of a streamed block: its shape is here, its values are in the checkpoint or in a master copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NoReturn

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.internals.stand_in import StandIn

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
        """The true values: a new tensor."""
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
        """Refuse to be pickled."""
        raise UnsupportedError(
            f"pickling {self.key}",
            reason="its values stay in the checkpoint",
            instead="save the adapter (trainer.save_model) and merge it with lowmem.merge, or model.save_pretrained",
        )

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"AbsentParameter({self.key}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"
