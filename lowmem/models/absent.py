"""The parameter of a streamed block: its shape is here, its values are in the checkpoint or in a master copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.internals.torch import tree_map_only

# Facts of a tensor that need no values. Everything that is not listed here reads the weight.
_FREE_PROPERTIES = frozenset(
    """
    shape dtype device layout ndim requires_grad grad grad_fn is_leaf is_cuda is_cpu is_meta is_sparse
    is_quantized is_mkldnn is_nested is_xpu is_mps names output_nr retains_grad _version itemsize nbytes
    is_sparse_csr _backward_hooks _post_accumulate_grad_hooks _grad _base is_vulkan is_ipu is_xla is_hpu is_maia
    is_mtia grad_dtype _cdata
    """.split()  # noqa: SIM905 - a table is easier to read than 40 quoted lines
)


_FREE_FUNCTIONS = frozenset(
    """
    size dim numel nelement stride element_size is_floating_point is_complex is_contiguous is_inference
    is_signed storage_offset untyped_storage data_ptr get_device __len__ __hash__ is_pinned is_same_size
    _is_view _has_compatible_shallow_copy_type is_tensor __format__ ndimension is_conj is_neg has_names
    is_distributed register_hook register_post_accumulate_grad_hook _is_zerotensor type empty_like zeros_like
    ones_like rand_like randn_like full_like new_empty new_zeros new_ones new_full new_tensor
    """.split()  # noqa: SIM905 - a table is easier to read than 40 quoted lines
)


_SAME_VALUES = frozenset(
    """
    detach to float half bfloat16 double cpu cuda contiguous requires_grad_ pin_memory
    """.split()  # noqa: SIM905 - a table is easier to read than 40 quoted lines
)


_HOOKS = frozenset(("register_hook", "register_post_accumulate_grad_hook"))


_REFUSED_INSTEAD = "train adapters (peft_config), or give tuning='full' where every weight is to change"


class AbsentParameter(torch.nn.Parameter):
    """A weight that lies elsewhere and is read when its values are needed: in the checkpoint where it is frozen.

    Shape, dtype, device and `numel()` are those of the weight in the compute dtype; the storage is one element.
    An operation that needs the values reads them, one tensor at a time, so that code which looks at a base weight
    (an adapter's initialisation, a copy for `modules_to_save`) sees the true weight and never a placeholder's zeros.
    Writing is refused where frozen: those bytes are never written back. A weight that is trained can be written to.
    """

    _load: Callable[[], Tensor]
    _key: str
    _store: Callable[[Tensor], None] | None

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
            dtype: Compute dtype, the one `load` answers in.
            device: Compute device.
            key: Fully qualified name in the model.
            load: Reads the true values; called each time they are needed.
            store: Takes new values; None for a frozen weight.
        """
        placeholder = torch.zeros((), dtype=dtype, device=device).expand(tuple(shape))
        param = torch.Tensor._make_subclass(AbsentParameter, placeholder, store is not None)
        param._load, param._key, param._store = load, key, store
        # transformers initialises every parameter that does not carry this mark.
        param._is_hf_initialized = True  # type: ignore[attr-defined]
        return param

    def materialise(self) -> Tensor:
        """Read the true values: a new tensor of the parameter's shape, dtype and device."""
        return self._load()

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
            if accessor == "get" and name in _FREE_PROPERTIES:
                return func(*args, **kwargs)
            if accessor == "get" and name == "data":
                return args[0]
            if accessor == "set":
                _set_property(name, args, func)
                return None
            if name in _HOOKS and isinstance(args[0], AbsentParameter) and args[0]._store is not None:
                _refuse_hook(args[0], name)
            if accessor == "" and name in _FREE_FUNCTIONS:
                return func(*args, **kwargs)
            if accessor == "" and name in _SAME_VALUES and isinstance(args[0], AbsentParameter):
                return _same_values(args[0], name, func, args, kwargs)
            if _writes(name, args, kwargs):
                if isinstance(args[0], AbsentParameter) and args[0]._store is not None and kwargs.get("out") is None:
                    return _write(args[0], name, func, args[1:], kwargs)
                _refuse_write((*args, kwargs.get("out")), f"torch's {name}")
            args, kwargs = tree_map_only(AbsentParameter, lambda param: param.materialise(), (args, kwargs))
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, object]) -> torch.nn.Parameter:
        """A copy is a real parameter with the true values: it is what a copied module trains."""
        if id(self) not in memo:
            memo[id(self)] = torch.nn.Parameter(self.materialise(), requires_grad=False)
        return memo[id(self)]  # type: ignore[return-value]

    def __copy__(self) -> AbsentParameter:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UnsupportedError(
            f"pickling {self._key}",
            reason="its values stay in the checkpoint",
            instead="save the adapter (trainer.save_model) and merge it with lowmem.merge",
        )

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"AbsentParameter({self._key}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def _name_of(func: Callable[..., object]) -> tuple[str, str]:
    """A torch function's name, and "get" or "set" where it is a property's accessor."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return getattr(getattr(func, "__self__", None), "__name__", ""), "get" if name == "__get__" else "set"
    return name, ""


def _same_values(
    param: AbsentParameter, name: str, func: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
) -> object:
    """`to`, `detach` and their kin: the same absent weight while dtype and device stay as they are."""
    if name == "requires_grad_":
        if param._store is not None:
            return func(*args, **kwargs)
        if (args[1:] or (kwargs.get("requires_grad", True),))[0]:
            _refuse_write((param,), "requires_grad_(True)")
        return param
    if kwargs.get("copy"):
        return param.materialise()
    target = func(torch.empty(0, dtype=param.dtype, device=param.device), *args[1:], **kwargs)
    assert isinstance(target, Tensor)
    if target.dtype == param.dtype and target.device == param.device:
        return param
    return func(param.materialise(), *args[1:], **kwargs)


def _set_property(name: str, args: tuple[object, ...], func: Callable[..., object]) -> None:
    param, value = args[0], args[1] if len(args) > 1 else None
    if name == "data" and value is param:
        return
    store = param._store if isinstance(param, AbsentParameter) else None
    if name == "data" and store is not None and isinstance(value, Tensor):
        store(value)
        return
    if name in ("data", "requires_grad") and value is not False and store is None:
        _refuse_write(args, f"setting .{name}")
    func(*args)


def _write(
    param: AbsentParameter,
    name: str,
    func: Callable[..., object],
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> AbsentParameter:
    """An operation in place on a trained weight: on a copy, which then becomes the weight."""
    assert param._store is not None
    if torch.is_grad_enabled() and param.requires_grad:
        raise RuntimeError(f"a leaf that requires grad, {param._key}, is changed in place; use torch.no_grad()")
    args, kwargs = tree_map_only(AbsentParameter, lambda other: other.materialise(), (args, kwargs))
    value = torch.empty(param.shape, dtype=param.dtype, device=param.device) if name == "copy_" else param.materialise()
    func(value, *args, **kwargs)
    param._store(value)
    return param


def _refuse_hook(param: AbsentParameter, name: str) -> NoReturn:
    raise UnsupportedError(
        f"{name} on {param._key}",
        reason="its gradient goes to its tier past autograd's accumulation, so the hook would never be called",
        instead="a Trainer callback, or param.grad after the backward",
    )


def _writes(name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
    in_place = (name.endswith("_") and not name.endswith("__")) or name in (
        "__setitem__",
        "__iadd__",
        "__imul__",
        "__isub__",
        "__itruediv__",
    )
    return (in_place and isinstance(args[0], AbsentParameter)) or isinstance(kwargs.get("out"), AbsentParameter)


def _refuse_write(args: tuple[object, ...], what: str) -> NoReturn:
    key = next((arg._key for arg in args if isinstance(arg, AbsentParameter)), "a streamed weight")
    raise UnsupportedError(
        f"{what} on {key}",
        reason="the base weights of a streamed model are frozen and are read "
        "from the checkpoint at each visit, so the change would be lost",
        instead=_REFUSED_INSTEAD,
    )


def refuse_copy(module: torch.nn.Module, *, what: str, reason: str, instead: str) -> None:
    """Make `copy.deepcopy(module)` a clear refusal.

    Args:
        module: The module; the refusal hangs on this instance.
        what: The copy, or the option that asks for it, as the user knows it.
        reason: Why it cannot be.
        instead: What to do.
    """

    def refuse(memo: dict[int, object]) -> NoReturn:
        raise UnsupportedError(what, reason=reason, instead=instead)

    module.__dict__["__deepcopy__"] = refuse


__all__ = ["AbsentParameter", "refuse_copy"]
