"""The `.grad` of a weight whose gradient is accumulated elsewhere: its norm is known, its scale is noted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.internals.torch import tree_map_only

_FREE_PROPERTIES = frozenset(
    """
    shape dtype device layout ndim requires_grad grad grad_fn is_leaf is_cuda is_cpu is_meta is_sparse is_quantized
    is_mkldnn is_nested is_xpu is_mps names itemsize nbytes is_sparse_csr _version is_complex _backward_hooks _base
    output_nr retains_grad
    """.split()  # noqa: SIM905 - a table is easier to read than 30 quoted lines
)


_FREE_FUNCTIONS = frozenset(
    """
    size dim numel nelement stride element_size is_floating_point is_complex is_contiguous get_device __len__ __hash__
    is_same_size is_tensor __format__ ndimension storage_offset untyped_storage data_ptr zeros_like empty_like
    """.split()  # noqa: SIM905 - a table is easier to read than 20 quoted lines
)


_ITSELF = frozenset(("detach", "detach_", "requires_grad_", "contiguous"))


_NORMS = frozenset(("linalg_vector_norm", "vector_norm"))


class GradientPlace(Protocol):
    """Where one parameter's gradient is accumulated."""

    key: str

    def read(self) -> Tensor:
        """The gradient as accumulated, unscaled: a new tensor of the parameter's shape, fp32."""

    def norm(self) -> Tensor | None:
        """Its 2-norm as `torch.linalg.vector_norm` gives it, if that is known without reading it."""

    def clear(self) -> None:
        """Make it zero."""


class OffloadedGradient(Tensor):
    """Stands for a gradient that lies in its tier; one element of storage.

    Clipping needs its norm, which is known, and multiplies it, which is noted and done when the weight is updated.
    Every other reader gets the true gradient, one tensor at a time. Other changes in place are refused by name.
    """

    _place: GradientPlace
    scales: list[float]
    """What it has been multiplied with since it was accumulated."""
    is_used_up: bool
    """Whether the weight has been updated with it already, within the backward."""

    @staticmethod
    def of(param: Tensor, place: GradientPlace) -> OffloadedGradient:
        """Make the gradient of one parameter.

        Args:
            param: Whose gradient it is: shape, dtype and device are taken from it.
            place: Where it is accumulated.
        """
        stand_in = torch.zeros((), dtype=param.dtype, device=param.device).expand(tuple(param.shape))
        made = torch.Tensor._make_subclass(OffloadedGradient, stand_in, False)
        made._place, made.scales, made.is_used_up = place, [], False
        return made

    def materialise(self) -> Tensor:
        """The true gradient with its scales: a new tensor in the parameter's dtype, on its device."""
        value = self._place.read()
        for scale in self.scales:
            value.mul_(scale)
        return value.to(device=self.device, dtype=self.dtype)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            name, accessor = _name_of(func)
            own = args[0] if args and isinstance(args[0], OffloadedGradient) else None
            if accessor == "get" and name in _FREE_PROPERTIES:
                return func(*args, **kwargs)
            if accessor == "get" and name == "data":
                return own
            if accessor == "" and name in _FREE_FUNCTIONS:
                return func(*args, **kwargs)
            if own is not None and name in _ITSELF:
                return own
            if own is not None and name in _NORMS and _is_two_norm(args[1:], kwargs) and not own.scales:
                norm = own._place.norm()
                if norm is not None:
                    return norm.to(device=own.device, dtype=own.dtype)
            if own is not None and accessor == "" and name.endswith("_") and not name.endswith("__"):
                return _change(own, name, args[1:], kwargs)
            args, kwargs = tree_map_only(OffloadedGradient, lambda grad: grad.materialise(), (args, kwargs))
            return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"OffloadedGradient({self._place.key}, shape={tuple(self.shape)}, dtype={self.dtype})"


def _name_of(func: Callable[..., object]) -> tuple[str, str]:
    """A torch function's name, and "get" or "set" where it is a property's accessor."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return getattr(getattr(func, "__self__", None), "__name__", ""), "get" if name == "__get__" else "set"
    return name, ""


def _is_two_norm(args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
    order = args[0] if args else kwargs.get("ord", 2)
    return order == 2 and len(args) <= 1 and not set(kwargs) - {"ord"}


def _change(own: OffloadedGradient, name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor:
    """Multiply with a number, or make zero; refuse anything else."""
    if name == "zero_":
        own._place.clear()
        own.scales.clear()
        return own
    factor = args[0] if args else kwargs.get("other")
    is_number = isinstance(factor, int | float) or (isinstance(factor, Tensor) and factor.numel() == 1)
    if name != "mul_" or not is_number:
        raise UnsupportedError(
            f"torch's {name} on the gradient of {own._place.key}",
            reason="the gradients of offloaded weights lie in their tier and can only be scaled by a number",
            instead="max_grad_norm or torch.nn.utils.clip_grad_norm_",
        )
    scale = float(factor)  # type: ignore[arg-type]
    if scale != 1.0:
        if own.is_used_up:
            raise UnsupportedError(
                "gradient clipping (max_grad_norm) with updates in the backward",
                reason=f"{own._place.key} was updated before the norm of all gradients was known",
                instead="max_grad_norm=0, or no update_in_backward",
            )
        own.scales.append(scale)
    return own


__all__ = ["GradientPlace", "OffloadedGradient"]
