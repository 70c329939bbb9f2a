"""Large products that are left out until somebody reads them: a recomputation needs a graph, and not every value.

A block is recomputed for the values that its gradients are made of. What its last product gives is none of them: it is
added to the residual stream, and the derivative of a sum looks at neither part. Which values are read differs from
architecture to architecture, so nobody says beforehand: a large product is put off, sums, views and conversions of what
is put off are put off with it, and the first operator of any other kind has the values made, by the operators and in
the order in which they would have been. What nobody has read in the end is never made.

Autograd sees the same operators in the same order as without this. Of what is put off it keeps nothing: the derivatives
of sums, views, conversions and products with a number have no use for values, and products are put off only of values
that are there.

What is read need not be made a second time either: the forward may have kept large products, and what attention gives
(`Keeping`), which come back where the recomputation reads them. They are the same operators on the same values, so the
bits are the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload

from lowmem.internals.torch import TorchDispatchMode, tree_leaves, tree_map, tree_map_only

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: (0, 1), _aten.addmm.default: (1, 2)}
"""Operators that are put off, and which of their arguments are multiplied."""

_LONGEST_KERNEL = 8
"""Of a convolution along the sequence; matrices of experts are wider."""

_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu.default
"""Of queries, keys and values, each (sequences, heads, tokens, width): what heads give, and sums that its derivative
needs. Its derivative needs both as well, so it is not put off."""

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


_MIN_KEPT_WIDTH = 512
"""Fewest numbers that each value of a kept product is summed of, and fewest of them in a row: below, reading one back
takes no less time than computing it."""

_MIN_KEPT_KEYS = 128
"""Fewest keys of an attention that is kept: it takes several times as long as a product of as many operations."""

ProductForm = tuple[OpOverload, torch.Size, torch.Size, torch.dtype]
"""What a product is recognized by: its operator, the shapes of what is multiplied, and its type."""


class ProductStore(Protocol):
    """Keeps the large products of a forward for its recomputation, which asks for them in the same order."""

    def add(self, form: ProductForm, value: Tensor) -> None:
        """Keep the next one; its memory may be written to afterwards."""

    def next(self, form: ProductForm) -> Callable[[], Tensor] | None:
        """What gives the next one; None for one that was not kept."""


class UnreadTensor(Tensor):
    """Shape, type and device of a tensor that is made when it is read."""

    _make: Callable[[], Tensor]
    _value: Tensor | None

    @staticmethod
    def of(
        func: OpOverload,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        *,
        kept: Callable[[], Tensor] | None = None,
    ) -> UnreadTensor:
        """What an operator gives, which is not run yet; nor later, where it is `kept`."""
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
        made._make = kept or partial(_run, func, args, kwargs, [(one, one._version) for one in given])
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
    # What experts give is weighted and gathered, which reads it. A convolution's kernel is short.
    if device.type != "cpu" or any(len(shape) == 3 and shape[2] > _LONGEST_KERNEL for shape in shapes):
        return False
    return num_tokens * sum(shape.numel() for shape in shapes if len(shape) == 2) >= _MANY_OPERATIONS_OF_A_BLOCK


class PuttingOff(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Puts large products off while it is on; see the file.

    Args:
        kept: Has those that the forward has kept.
    """

    def __init__(self, kept: ProductStore | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._store = kept
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
            args = tree_map_only(UnreadTensor, UnreadTensor.read, args)
            form = None if self._store is None else _kept_form(func, args)
            kept = None if self._store is None or form is None else self._store.next(form)
            return self._later(func, args, kwargs, kept=kept)
        if func is _ATTENTION and self._store is not None:
            args = tree_map_only(UnreadTensor, UnreadTensor.read, args)
            attended = _kept_attention(self._store, func, args)
            return func(*args, **kwargs) if attended is None else attended
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

    def _later(
        self,
        func: OpOverload,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        *,
        kept: Callable[[], Tensor] | None = None,
    ) -> UnreadTensor:
        made = UnreadTensor.of(func, args, kwargs, kept=kept)
        self._put_off.append(weakref.ref(made))
        return made


class Keeping(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Has the large products of a forward kept while it is on.

    Args:
        store: Keeps them.
    """

    def __init__(self, store: ProductStore) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._store = store

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        made = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and _is_large(func, args) and (form := _kept_form(func, args)) is not None:
            self._store.add(form, made)
        elif func is _ATTENTION and (form := _attention_form(func, args)) is not None:
            for part in made:
                self._store.add(form, part)
        return made


def _kept_attention(store: ProductStore, func: OpOverload, args: tuple[object, ...]) -> tuple[Tensor, ...] | None:
    """What an attention has given in the forward; None where that was not kept."""
    form = _attention_form(func, args)
    if form is None:
        return None
    parts = [store.next(form) for _ in func._schema.returns]
    takes = [part for part in parts if part is not None]
    return tuple(take() for take in takes) if len(takes) == len(parts) else None


def _attention_form(func: OpOverload, args: tuple[object, ...]) -> ProductForm | None:
    queries, keys = args[:2]
    assert isinstance(queries, Tensor)
    assert isinstance(keys, Tensor)
    is_kept = is_attention_ever_kept(keys.shape[-2]) and queries.numel() * keys.shape[-2] >= _MANY_OPERATIONS
    return (func, queries.shape, keys.shape, queries.dtype) if is_kept else None


def is_attention_ever_kept(num_keys: int) -> bool:
    """Whether what attention to so many keys gives is worth keeping where products are kept."""
    return num_keys >= _MIN_KEPT_KEYS


def _kept_form(func: OpOverload, args: tuple[object, ...]) -> ProductForm | None:
    """What a product is recognized by; None for one that is never kept."""
    left, right = (args[number] for number in _PRODUCTS[func])
    assert isinstance(left, Tensor)
    assert isinstance(right, Tensor)
    return (func, left.shape, right.shape, left.dtype) if is_ever_kept(*right.shape) else None


def is_ever_kept(in_features: int, out_features: int) -> bool:
    """Whether a product with a matrix of this size is worth keeping where products are kept."""
    return min(in_features, out_features) >= _MIN_KEPT_WIDTH


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
