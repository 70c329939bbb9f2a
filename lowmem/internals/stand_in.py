"""Tensors that stand for values which lie elsewhere: every read sees the true values, every write reaches them.

torch calls `__torch_dispatch__` with the operator itself, below autograd and below everything that is composed of other
operators. The operator's schema says which arguments it writes to and which results are views of an argument, so no
operator is known by name here but those that need no values at all. `__torch_function__` catches what never comes to
the dispatcher: property setters, hooks, and ways to a tensor's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor
from torch._ops import OpOverload

from lowmem.internals.torch import tree_leaves, tree_map, tree_map_only

Operator = OpOverload
"""One overload of one of torch's operators, with its schema."""

# Their results have the first argument's shape and dtype, and none of its values.
_NEEDS_NO_VALUES = frozenset(
    """
    empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty new_zeros new_ones new_full
    new_empty_strided
    """.split()  # noqa: SIM905 - a table is easier to read than 12 quoted lines
)

# They read a tensor's memory, or would hand it out as it is, without the dispatcher.
_READS_MEMORY = frozenset(("numpy", "tolist", "__array__", "__dlpack__", "contiguous"))

# Of one element of memory that each tensor has to itself.
_ASKED_OF_REAL_MEMORY = frozenset(("data_ptr", "storage", "is_pinned"))


class Step(NamedTuple):
    """One operator that makes a view, and which of its results."""

    func: Operator
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    result: int | None

    def __call__(self, value: Tensor) -> Tensor:
        """The view of a tensor."""
        made = self.func(value, *self.args, **self.kwargs)
        return made if self.result is None else made[self.result]  # type: ignore[no-any-return]


def _replayed(value: Tensor, steps: Iterable[Step]) -> Tensor:
    for step in steps:
        value = step(value)
    return value


class StandIn(Tensor):
    """Has the shape, strides, dtype and device of a tensor that lies elsewhere, and no memory.

    A subclass says how that tensor is read and written. Views of a stand-in (`View`) are stand-ins too: an operator
    that reads one reads the whole tensor and takes the view of it; one that writes to it writes the whole tensor back.
    """

    _identity: Tensor

    @classmethod
    def make(
        cls, shape: Iterable[int], *, dtype: torch.dtype, device: torch.device, requires_grad: bool = False
    ) -> StandIn:
        """A stand-in of a contiguous tensor."""
        return cls._like(torch.empty(tuple(shape), dtype=dtype, device="meta"), device, requires_grad=requires_grad)

    @classmethod
    def _like(cls, like: Tensor, device: torch.device, *, requires_grad: bool = False) -> StandIn:
        # As a view of a parameter is an ordinary tensor, also where it is taken in inference mode.
        with torch.inference_mode(False):
            made: StandIn = torch.Tensor._make_wrapper_subclass(
                cls,
                like.shape,
                strides=like.stride(),
                storage_offset=like.storage_offset(),
                dtype=like.dtype,
                device=device,
                requires_grad=requires_grad,
            )
            made._identity = torch.empty((), dtype=like.dtype)
        return made

    @property
    def root(self) -> StandIn:
        """The stand-in that this is a view of, or itself."""
        return self

    @property
    def steps(self) -> tuple[Step, ...]:
        """What makes this view of the root; none where it is the whole tensor."""
        return ()

    def read(self) -> Tensor:
        """The true values: a new tensor of this shape, dtype and device, the caller's own."""
        raise NotImplementedError

    def write(self, value: Tensor, by: str) -> None:
        """Take new values.

        Args:
            value: Of this shape; the caller may change it afterwards.
            by: The operator that made them.
        """
        raise NotImplementedError

    def check_write(self, by: str) -> None:
        """Refuse an operator that would write, before anything is read."""

    def run_without_values(self, func: Operator, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """The result of an operator on the whole tensor that needs no values; NotImplemented if it does.

        Args:
            func: The operator, for one tensor or for a list of this one.
            args: Its arguments after the first.
            kwargs: Its arguments by name.
        """
        return NotImplemented

    def set_property(self, name: str, value: object) -> bool:
        """Set "data", "grad" or "requires_grad"; False for torch's own way."""
        return False

    def check_hook(self, name: str) -> None:
        """Refuse a hook that autograd would never call."""

    def after_accumulating(self, hook: Callable[[Tensor], None]) -> None:
        """Call a hook when autograd has accumulated a gradient in `.grad`, and `check_hook` refuses users' own."""
        with torch._C.DisableTorchFunctionSubclass():
            self.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def materialise(self) -> Tensor:
        """The true values: a new tensor of this shape, dtype and device, the caller's own."""
        with torch.no_grad():
            return _replayed(_read_root(self.root), self.steps)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            own, name = args[0] if args else None, getattr(func, "__name__", "")
            if isinstance(own, StandIn):
                descriptor = getattr(func, "__self__", None)
                if name == "__set__" and own.set_property(getattr(descriptor, "__name__", ""), args[1]):
                    return None
                if name == "requires_grad_":
                    wanted = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
                    if own.set_property("requires_grad", wanted):
                        return own
                if name in ("register_hook", "register_post_accumulate_grad_hook"):
                    own.check_hook(name)
                if name == "to":
                    args = tuple(_without_number(value) for value in args)
                    kwargs = {key: _without_number(value) for key, value in kwargs.items()}
                # Never contiguous: what asks goes on to take the memory.
                if name == "is_contiguous":
                    return False
                if name == "untyped_storage":
                    return StorageIdentity(own)
                if name in _ASKED_OF_REAL_MEMORY:
                    return func(own._identity, *args[1:], **kwargs)
                if name in _READS_MEMORY:
                    return func(own.materialise(), *args[1:], **kwargs)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Operator,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        # In inference mode composed operators come here whole.
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            return func.decompose(*args, **kwargs)
        name = func.overloadpacket.__name__
        own = args[0] if args else None
        if name in _NEEDS_NO_VALUES and isinstance(own, StandIn):
            like = torch.empty(own.shape, dtype=own.dtype, device="meta")
            return func(like, *args[1:], **{"device": own.device, **kwargs})
        elements = _one_by_one(func, args, kwargs)
        if elements is not None:
            results = [_run(func, *element) for element in elements]
            return list(chain.from_iterable(results)) if func._schema.returns else None  # type: ignore[arg-type]
        return _run(func, args, kwargs)

    def __deepcopy__(self, memo: dict[int, object]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = self.materialise()
        return memo[id(self)]  # type: ignore[return-value]

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[object, ...]:
        self.root.check_pickling()
        return self.materialise().__reduce_ex__(protocol)  # type: ignore[no-any-return, no-untyped-call]

    def check_pickling(self) -> None:
        """Refuse to be pickled; else a stand-in is pickled as its true values."""


def _without_number(value: object) -> object:
    """One name for the CPU: a process among several calls it cpu:1, and moving there would read every weight."""
    is_numbered = isinstance(value, torch.device) and value.type == "cpu" and value.index is not None
    return torch.device("cpu") if is_numbered else value


class StorageIdentity:
    """What a stand-in has for a storage: whoever saves tensors asks which of them share one, and how large it is."""

    def __init__(self, tensor: StandIn) -> None:
        self.device = tensor.device
        self._identity, self._nbytes = tensor._identity, tensor.nbytes

    def data_ptr(self) -> int:
        """The same for all names of one tensor, and for nothing else."""
        return self._identity.data_ptr()

    def nbytes(self) -> int:
        """Bytes of the tensor that lies elsewhere."""
        return self._nbytes

    def __len__(self) -> int:
        return self._nbytes


class View(StandIn):
    """A part of a stand-in's tensor, or all of it under another shape or without its graph."""

    _root: StandIn
    _steps: tuple[Step, ...]

    @staticmethod
    def through(base: StandIn, steps: tuple[Step, ...]) -> View:
        """The view that some operators make of a stand-in."""
        root, steps = base.root, base.steps + steps
        made = View._like(_replayed(torch.empty(root.shape, dtype=root.dtype, device="meta"), steps), root.device)
        assert isinstance(made, View)
        if not steps:
            made._identity = root._identity
        made._root, made._steps = root, steps
        return made

    @property
    def root(self) -> StandIn:
        return self._root

    @property
    def steps(self) -> tuple[Step, ...]:
        return self._steps

    def set_property(self, name: str, value: object) -> bool:
        """See `StandIn.set_property`: what is set on a view's whole tensor is set on the tensor."""
        return name == "data" and not self._steps and self._root.set_property(name, value)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"View(of {self._root!r}, shape={tuple(self.shape)})"


class _Values:
    """The true values of one call's stand-ins: each tensor is read once, whatever views of it are among them."""

    def __init__(self) -> None:
        self._roots: dict[int, tuple[StandIn, Tensor]] = {}
        self._stand_ins: dict[int, StandIn] = {}
        self._kept: list[Tensor] = []

    def of(self, stand_in: StandIn) -> Tensor:
        root = stand_in.root
        if id(root) not in self._roots:
            self._roots[id(root)] = root, _read_root(root)
        value = _replayed(self._roots[id(root)][1], stand_in.steps)
        self._stand_ins[id(value)] = stand_in
        self._kept.append(value)
        return value

    def overwrite(self, root: StandIn) -> None:
        """Do not read a tensor: all of its values are about to be set."""
        self._roots[id(root)] = root, torch.empty(root.shape, dtype=root.dtype, device=root.device)

    def write_back(self, written: Iterable[StandIn], by: str) -> None:
        for root in {id(stand_in.root): stand_in.root for stand_in in written}.values():
            root.write(self._roots[id(root)][1], by)

    def hand_out(self, result: object) -> object:
        """Stand-ins again where an operator returns an argument."""
        return tree_map(lambda value: self._stand_ins.get(id(value), value), result)


_last_read: ContextVar[list[tuple[StandIn, Tensor]] | None] = ContextVar("_last_read", default=None)


@contextmanager
def keeping_last_read() -> Iterator[None]:
    """Keep the tensor read last while this lasts: for code that takes many views of one, and writes to none."""
    token = _last_read.set([])
    try:
        yield
    finally:
        _last_read.reset(token)


def _read_root(root: StandIn) -> Tensor:
    kept = _last_read.get()
    if kept is None:
        return root.read()
    if not kept or kept[0][0] is not root:
        # Not two of them at a time.
        kept.clear()
        kept.append((root, root.read()))
    return kept[0][1]


def _run(func: Operator, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
    own, by = args[0] if args else None, f"torch's {func.overloadpacket.__name__}"
    written = _written(func, args, kwargs)
    one = own[0] if isinstance(own, list | tuple) and len(own) == 1 else own
    if isinstance(one, StandIn) and not one.steps:
        found = one.root.run_without_values(func, tuple(args[1:]), kwargs)
        if found is not NotImplemented:
            return (found if one is own else [found]) if not written else own
    if not written and isinstance(own, StandIn) and _is_view(func):
        return _views(func, own, args[1:], kwargs)
    for stand_in in written:
        stand_in.root.check_write(by)
    values = _Values()
    if func is torch.ops.aten.copy_.default and isinstance(own, StandIn) and not own.steps:
        source = args[1]
        if not (isinstance(source, StandIn) and source.root is own.root):
            values.overwrite(own.root)
    args, kwargs = tree_map_only(StandIn, values.of, (tuple(args), dict(kwargs)))
    result = func(*args, **kwargs)
    if not written:
        return result
    values.write_back(written, by)
    return values.hand_out(result)


def _written(func: Operator, args: Sequence[object], kwargs: Mapping[str, object]) -> list[StandIn]:
    """The stand-ins under the arguments that the operator writes to."""
    written: list[StandIn] = []
    for position, argument in enumerate(func._schema.arguments):
        alias = argument.alias_info
        if alias is None or not alias.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        # torch's fused optimizers are declared to write to gradients, and do only to unscale them.
        if argument.name == "grads" and "_fused_" in func._schema.name and kwargs.get("grad_scale") is None:
            continue
        written += [leaf for leaf in tree_leaves(value) if isinstance(leaf, StandIn)]
    return written


def _is_view(func: Operator) -> bool:
    alias = func._schema.arguments[0].alias_info
    return alias is not None and not alias.is_write


def _views(func: Operator, own: StandIn, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
    if func.overloadpacket.__name__ in ("detach", "alias"):
        return View.through(own, ())
    like = torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device="meta")
    made = func(like, *args, **kwargs)
    if isinstance(made, Tensor):
        return View.through(own, (Step(func, tuple(args), kwargs, None),))
    return [View.through(own, (Step(func, tuple(args), kwargs, index),)) for index in range(len(made))]


_Arguments = tuple[tuple[object, ...], dict[str, object]]


def _one_by_one(func: Operator, args: Sequence[object], kwargs: Mapping[str, object]) -> list[_Arguments] | None:
    """A call on lists of tensors (`_foreach_`, `_fused_`) as calls on lists of one, so that one is in memory at a time.

    None for every other operator.
    """
    schema = func._schema
    if not schema.name.startswith(("aten::_foreach_", "aten::_fused_")) or not isinstance(args[0], list | tuple):
        return None
    num, names = len(args[0]), [argument.name for argument in schema.arguments]
    by_name = dict(zip(names, args, strict=False)) | dict(kwargs)
    lists = {name for name, value in by_name.items() if isinstance(value, list | tuple)}
    if any(len(by_name[name]) not in (0, num) for name in lists):  # type: ignore[arg-type]
        return None

    def element(name: str, value: object, index: int) -> object:
        if name in lists:
            return value[index : index + 1]  # type: ignore[index]
        is_one_each = name == "scalars" and isinstance(value, Tensor)
        return value[index : index + 1] if is_one_each else value  # type: ignore[index]

    return [
        (
            tuple(element(name, value, index) for name, value in zip(names, args, strict=False)),
            {name: element(name, value, index) for name, value in kwargs.items()},
        )
        for index in range(num)
    ]
