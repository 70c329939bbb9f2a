"""Private names of torch: trees of values, tables of tensors, reference counts, what a processor can, shapes alone.

And what `torch.save` writes: an archive whose records have checksums, which `torch.load` does not look at.
"""

from __future__ import annotations

import logging
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

# One place to change where torch makes these modules public; `as` says that others import them from here.
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import TreeSpec as TreeSpec
from torch.utils._pytree import register_pytree_node as register_pytree_node
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils._pytree import tree_unflatten as tree_unflatten

from lowmem.errors import untested
from offload import PAGE_BYTES, open_regular

# The tensor itself, and the storage object that asking for the count makes.
_OWN_REFERENCES = 2


def parameter_table(module: nn.Module) -> dict[str, Any]:
    """A module's own parameters by attribute, to be written: assigning through it passes `Module.__setattr__` by."""
    return module._parameters


def buffer_table(module: nn.Module) -> dict[str, Any]:
    """A module's own buffers by attribute, to be written."""
    return module._buffers


def modules_in(module: nn.Module) -> list[nn.Module]:
    """What `module.modules()` gives, in the same order; ten times as fast, as no name is made for each."""
    found: dict[nn.Module | None, None] = {None: None}
    waiting: list[nn.Module | None] = [module]
    while waiting:
        inner = waiting.pop()
        if inner not in found:
            found[inner] = None
            children = inner._modules  # type: ignore[union-attr]  # None is found already
            if children:
                waiting.extend(reversed(children.values()))
    del found[None]
    return list(found)  # type: ignore[arg-type]


def parameters_in(module: nn.Module) -> list[nn.Parameter]:
    """What `module.parameters()` gives, in the same order, without a name for each."""
    tables = [inner._parameters for inner in modules_in(module)]
    own = {id(param): param for table in tables if table for param in table.values() if param is not None}
    return list(own.values())


class _HeldParameters(dict[str, nn.Parameter | None]):
    """A module's own dictionary of parameters; those that are held stay what they are, as long as they are here."""

    def __init__(self, params: dict[str, nn.Parameter | None]) -> None:
        super().__init__(params)
        self.held: dict[str, tuple[nn.Parameter, Callable[[], NoReturn]]] = {}

    def _check(self, name: str, value: object) -> None:
        for held, (param, refuse) in self.held.items():
            # Nor does it get a second name: pruning renames it before it puts something else in its place.
            if self.get(held) is param and (name == held) != (value is param):
                refuse()

    def __setitem__(self, name: str, value: nn.Parameter | None) -> None:
        self._check(name, value)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self._check(name, None)
        super().__delitem__(name)

    def pop(self, name: str, *default: object) -> nn.Parameter | None:
        self._check(name, None)
        return super().pop(name, *default)

    def __deepcopy__(self, memo: dict[int, object]) -> dict[str, nn.Parameter | None]:
        # A copied module's parameters are its own.
        return {name: deepcopy(param, memo) for name, param in self.items()}


def put_parameter(module: nn.Module, name: str, value: torch.Tensor | None) -> None:
    """Set a parameter of the module itself, held or not; neither hooks nor `__setattr__` are called."""
    params: dict[str, Any] = module._parameters
    dict.__setitem__(params, name, value)


def hold_parameter(module: nn.Module, name: str, refuse: Callable[[], NoReturn]) -> None:
    """Keep a parameter from being replaced or removed, whoever tries; `put_parameter` still can.

    `module.weight = ...`, `load_state_dict(assign=True)`, pruning and parametrizations all come to this dictionary.

    Args:
        module: Has it.
        name: Its name in the module.
        refuse: Called instead.
    """
    table = module._parameters
    if not isinstance(table, _HeldParameters):
        table = _HeldParameters(table)
        module.__dict__["_parameters"] = table
    param = table[name]
    assert param is not None, name
    table.held[name] = param, refuse


def call_before_apply(module: nn.Module, check: Callable[[nn.Module, Callable[[Tensor], Tensor]], None]) -> None:
    """Call a check before `module.to()`, `.half()` and all else that changes every tensor of a module.

    Args:
        module: The module; those around it and below it are not concerned.
        check: Called with the module and what each tensor would become; may refuse by raising.
    """
    own = weakref.ref(module)

    def apply(change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        module = own()
        assert module is not None, "the module holds this"
        check(module, change)
        changed: nn.Module = type(module)._apply(module, change, recurse)  # type: ignore[no-untyped-call]
        return changed

    vars(module)["_apply"] = apply


_LEFT_OUT = "_ddp_params_and_buffers_to_ignore"


class _LeftOut:
    """Names of some parameters of a module, as they are when DDP asks, by whichever wrapper it wraps."""

    def __init__(self, module: nn.Module, prefixes: tuple[str, ...], is_left_out: Callable[[Tensor], bool]) -> None:
        self._module = weakref.ref(module)
        self._prefixes, self._is_left_out = prefixes, is_left_out

    def __iter__(self) -> Iterator[str]:
        module = self._module()
        assert module is not None, "the module holds this"
        for name, param in module.named_parameters(remove_duplicate=False):
            if self._is_left_out(param):
                yield from (prefix + name for prefix in self._prefixes)


def leave_out_of_ddp(module: nn.Module, *, prefixes: tuple[str, ...], is_left_out: Callable[[Tensor], bool]) -> None:
    """Have DistributedDataParallel neither send nor check some parameters when it wraps a module.

    Args:
        module: What is wrapped, or what a wrapper hands unknown attributes on to.
        prefixes: What stands before the module's names in those of wrappers; "" for none.
        is_left_out: Whether a parameter is left out; asked when DDP is made.

    Raises:
        UnsupportedError: This torch does not look for the names there.
    """
    from torch.nn.parallel import DistributedDataParallel

    if _LEFT_OUT not in DistributedDataParallel.__init__.__code__.co_names:
        raise untested("torch", "its DistributedDataParallel would send weights that are streamed")
    vars(module)[_LEFT_OUT] = _LeftOut(module, prefixes, is_left_out)


def is_sole_owner(grad: Tensor, *, like: Tensor) -> bool:
    """Whether nothing but the caller sees a gradient's memory, and it can hold a tensor like another.

    Autograd keeps further references where a gradient also goes elsewhere: to another consumer, or to whom
    `torch.autograd.grad` captures it for. Then it must stay as it is. Where this torch counts in another way than it
    did when this was written, no gradient counts as owned: memory is lost, and never a value.

    Args:
        grad: A gradient that a Function's backward was called with.
        like: What is to be written into it.
    """
    if grad.shape != like.shape or grad.dtype != like.dtype or not grad.is_contiguous():
        return False
    storage = grad.untyped_storage()
    if storage.nbytes() - grad.nbytes >= PAGE_BYTES:
        return False
    del storage
    return _counts_as_expected() and _reference_counts(grad) == (1, _OWN_REFERENCES)


def _reference_counts(tensor: Tensor) -> tuple[int, int]:
    """References from C++ to the tensor, and to its storage."""
    storage = tensor.untyped_storage()
    num_owners: int = tensor._use_count()  # type: ignore[attr-defined]
    return num_owners, torch._C._storage_Use_Count(storage._cdata)


@cache
def _counts_as_expected() -> bool:
    """Whether the counts tell a tensor that is alone from one with a view and one that a graph holds."""
    try:
        alone, viewed, held = (torch.zeros(1) for _ in range(3))
        view = viewed.view(1)
        graph = held.requires_grad_().expand(1)
        counts = [_reference_counts(tensor) for tensor in (alone, viewed, held)]
        del view, graph
    except (AttributeError, TypeError, RuntimeError):
        return False
    expected = (1, _OWN_REFERENCES)
    return counts[0] == expected and counts[1][1] > _OWN_REFERENCES and counts[2][0] > 1


def version_of(tensor: Tensor) -> int:
    """How often a tensor's values were written in place, as autograd counts it."""
    return tensor._version


@contextmanager
def without_gradient_hooks(params: Iterable[Tensor]) -> Iterator[None]:
    """Keep the hooks of `Tensor.register_hook` from acting on gradients that are parts of a sum.

    A hook acts on the whole gradient, once; `torch.autograd.grad` runs it for each part. The hooks, their order and
    their handles are as before after the ``with``.
    """
    hooked = [(param, param._backward_hooks) for param in params if param._backward_hooks]
    for param, _ in hooked:
        param._backward_hooks = None
    try:
        yield
    finally:
        for param, hooks in hooked:
            param._backward_hooks = hooks


def change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Make a module an instance of a subclass of its class; copies of it are of that class too."""
    module.__class__ = kind


def cpu_attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Torch's fused attention on a CPU, together with the log-sum-exp of the scores.

    Args:
        query: (sequences, heads, queries, head).
        key: (sequences, key heads, keys, head).
        value: As `key`.
        causal: Whether each query sees the keys up to its own number only.
        mask: What is added to the scores, or None.
        scale: Multiplies the scores.

    Returns:
        The output, as `query`, and (sequences, heads, queries). A query that sees no key gets 0 in both.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )
    return out, lse


def cpu_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; `out` and `lse` may be those of more keys than are given here."""
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out,
        query,
        key,
        value,
        out,
        lse.transpose(1, 2).contiguous().transpose(1, 2),
        0.0,
        causal,
        attn_mask=mask,
        scale=scale,
    )
    return grads


def has_fast_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices with instructions of its own."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def storage_key(storage: torch.UntypedStorage) -> int:
    """The same number for all Python objects that stand for one storage."""
    return int(storage._cdata)


def is_grouped_product(operator: object) -> bool:
    """Whether an operator that a dispatch mode sees is the product of stacked experts."""
    return operator is torch.ops.aten._grouped_mm.default


@contextmanager
def quiet_fake_tensors() -> Iterator[None]:
    """Keep torch from logging an operator that fake tensors have not: whoever asks for shapes is told by the error."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def damage_of_saved(file: Path, *, reads_records: bool = True) -> str | None:
    """What is wrong with a file that `torch.save` wrote, by the checksums in it; None where it is whole.

    The list of records at its end has no checksum, so that what is whole may still not be what is expected. A record
    that it marks as a folder is read as nothing by `torch.load`, which then returns whatever was in memory.

    Args:
        file: The file; anything but a regular one is damaged.
        reads_records: False to look at that list alone, which a file that was cut off does not have.
    """
    try:
        with open(open_regular(file), "rb") as opened, zipfile.ZipFile(opened) as archive:
            if marked := [record.filename for record in archive.infolist() if record.external_attr]:
                return f"{marked[0]} in it is not marked as a file"
            damaged = archive.testzip() if reads_records else None
            return None if damaged is None else f"{damaged} in it differs from its checksum"
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, zlib.error) as error:
        return str(error).partition(". ")[0]
