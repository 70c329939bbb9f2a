"""Large products that are left out until somebody reads them: a recomputation needs a graph, and not every value.

A block is recomputed for the values that its gradients are made of. What its last product gives is none of them: it is
added to the residual stream, and the derivative of a sum looks at neither part. Which values are read differs from
architecture to architecture, so nobody says beforehand: a large product is put off, sums, views and conversions of what
is put off are put off with it, and the first operator of any other kind has the values made, by the operators and in
the order in which they would have been. What nobody has read in the end is never made.

Autograd sees the same operators in the same order as without this. Of what is put off it keeps nothing: the derivatives
of sums, views, conversions and products with a number have no use for values, and products are put off only of values
that are there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch._ops import OpOverload

from lowmem.internals.torch import TorchDispatchMode, tree_leaves, tree_map, tree_map_only

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: (0, 1), _aten.addmm.default: (1, 2)}
"""Operators that are put off, and which of their arguments are multiplied."""

_PUT_OFF_TOO = frozenset(
    (_aten.add.Tensor, _aten.mul.Tensor, _aten.view.default, _aten._unsafe_view.default, _aten._to_copy.default)
)
"""What is put off of values that are put off; of products those with a number."""

_READ_MEMORY = frozenset(("numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage"))
"""What looks at a tensor's memory without an operator."""

_MANY_OPERATIONS = 1 << 27
"""Multiplications of a product that is worth putting off, a millisecond of one core."""

_MANY_OPERATIONS_OF_A_BLOCK = 1 << 33
"""Multiplications of a forward, a tenth of a second of one core, from which on a few milliseconds for looking at all of
its operators are little."""


class UnreadTensor(Tensor):
    """Shape, type and device of a tensor that is made when it is read."""

    _make: Callable[[], Tensor]
    _value: Tensor | None

    @staticmethod
    def of(func: OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]) -> UnreadTensor:
        """What an operator gives, which is not run yet."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        options = {name: value for name, value in kwargs.items() if name != "device"}
        like = func(*tree_map_only(Tensor, _without_values, args), **options)
        made: UnreadTensor = torch.Tensor._make_wrapper_subclass(
            UnreadTensor,
            like.shape,
            strides=like.stride(),
            dtype=like.dtype,
            device=given[0].device,
        )
        made._value = None
        made._make = partial(_run, func, args, kwargs, [(one, one._version) for one in given])
        return made

    def read(self) -> Tensor:
        """The values."""
        if self._value is None:
            self._value = self._make()
            self._make = _gone
        return self._value

    def give_up(self) -> None:
        """Let go of what the values would be made of; nobody reads them."""
        if self._value is None:
            self._make = _gone

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        with torch._C.DisableTorchFunctionSubclass():
            if getattr(func, "__name__", "") in _READ_MEMORY and isinstance(args[0], UnreadTensor):
                args = (args[0].read(), *args[1:])
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func is _aten.is_same_size.default:
            # What autograd asks of an output and its gradient.
            return func(*tree_map_only(Tensor, _without_values, args))
        return _with_values(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"UnreadTensor(shape={tuple(self.shape)}, dtype={self.dtype})"


def is_worth_putting_off(device: torch.device, shapes: Iterable[torch.Size], *, num_tokens: int) -> bool:
    """Whether a block's recomputation takes long enough for `PuttingOff`; never on a GPU, where nobody has tried it.

    Args:
        device: Compute device.
        shapes: Of the block's weights.
        num_tokens: Tokens that go through the block.
    """
    shapes = list(shapes)
    # What experts give is weighted and gathered, which reads it.
    if device.type != "cpu" or any(len(shape) == 3 for shape in shapes):
        return False
    return num_tokens * sum(shape.numel() for shape in shapes if len(shape) == 2) >= _MANY_OPERATIONS_OF_A_BLOCK


class PuttingOff(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Puts large products off while it is on; see the file."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._put_off: list[weakref.ref[UnreadTensor]] = []

    def give_up(self, output: object) -> None:
        """Let go of what an output's values would be made of: it will only be differentiated."""
        for leaf in tree_leaves(output):
            if isinstance(leaf, UnreadTensor):
                leaf.give_up()

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func in _PRODUCTS and _is_large(func, args):
            # Of values that are there: a product's derivative looks at its factors.
            return self._later(func, tree_map_only(UnreadTensor, UnreadTensor.read, args), kwargs)
        if self._put_off and func._schema.is_mutable:
            # It may write to what something is to be made of.
            for unread in (ref() for ref in self._put_off):
                if unread is not None:
                    unread.read()
            self._put_off.clear()
        if UnreadTensor not in types:
            return func(*args, **kwargs)
        if func in _PUT_OFF_TOO and any(_is_unread(one) for one in args) and _keeps_no_values(func, args, kwargs):
            return self._later(func, args, kwargs)
        return _with_values(func, args, kwargs)

    def _later(self, func: OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]) -> UnreadTensor:
        made = UnreadTensor.of(func, args, kwargs)
        self._put_off.append(weakref.ref(made))
        return made


def _is_large(func: OpOverload, args: tuple[object, ...]) -> bool:
    left, right = (args[number] for number in _PRODUCTS[func])
    assert isinstance(left, Tensor)
    assert isinstance(right, Tensor)
    return left.device.type == "cpu" and left.numel() * right.shape[1] >= _MANY_OPERATIONS


def _is_unread(value: object) -> bool:
    return isinstance(value, UnreadTensor) and value._value is None


def _keeps_no_values(func: OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
    """Whether autograd has no use for the arguments' values, and the result is on the same device."""
    if func is _aten.mul.Tensor:
        return not isinstance(args[1], Tensor)
    return kwargs.get("device") in (None, torch.device("cpu"))


def _run(
    func: OpOverload,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    versions: list[tuple[Tensor, int]],
) -> Tensor:
    if any(given._version != version for given, version in versions):
        raise RuntimeError(f"{func}: a tensor that it was to be made of was written to before it was read")
    with torch.no_grad():
        made: Tensor = func(*tree_map_only(UnreadTensor, UnreadTensor.read, args), **kwargs)
    return made


def _gone() -> Tensor:
    raise RuntimeError("a block's output was read after its recomputation, which left out what no gradient needs")


def _without_values(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _with_values(func: OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    """Run an operator on values; what it writes to and returns keeps its name."""
    names: dict[int, UnreadTensor] = {}

    def value_of(unread: UnreadTensor) -> Tensor:
        value = unread.read()
        names[id(value)] = unread
        return value

    args, kwargs = tree_map_only(UnreadTensor, value_of, (tuple(args), dict(kwargs)))
    result = func(*args, **kwargs)
    return tree_map(lambda value: names.get(id(value), value), result) if func._schema.is_mutable else result
