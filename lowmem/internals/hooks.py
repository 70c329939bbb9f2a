"""Hooks on the modules inside a block: a recomputation runs with those of its forward, whatever came in between.

`torch.nn.Module` keeps its hooks in dictionaries of its own. A block's forward runs twice: once without a graph, and
once more, in the backward, with one. Hooks that were removed or added since would make the second run another function
than the first (a steering hook removed before `backward`, the hooks that PEFT sets for the time of one forward with
`adapter_names`), so the dictionaries are noted when the block is called and are put back for the recomputation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from lowmem.errors import UnsupportedError
from lowmem.internals.torch import modules_in, tree_map_only

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OPTIONS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")

Hook = Callable[..., object]
HookTables = Mapping[str, "OrderedDict[int, Hook]"]
"""A module's dictionaries of hooks, and of their options, by attribute name."""


def is_output_capture(hook: Hook) -> bool:
    """Whether a hook is transformers' own, which is idle unless a forward collects what it looks at."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def has_foreign_hooks(module: nn.Module) -> bool:
    """Whether anybody but transformers looks at a module's inputs and outputs."""
    return any(
        not is_output_capture(hook)
        for table in (module._forward_hooks, module._forward_pre_hooks)
        for hook in table.values()
    )


class BlockHooks:
    """The hooks of a block's modules as they are when it is called.

    Args:
        block: The block. Hooks on itself run around the call and are not meant.
        name: Its module path, for messages.
    """

    def __init__(self, block: nn.Module, *, name: str) -> None:
        self._block, self._name = block, name
        self._tables = _tables_inside(block)

    @property
    def of_users(self) -> list[str]:
        """Each hook that is neither transformers' nor PEFT's, as "name on module path"."""
        return [
            f"{_name(hook)} on {self._path(module)}"
            for module, tables in self._tables.items()
            for kind in _HOOKS
            for hook in tables[kind].values()
            if not is_output_capture(hook) and _adapter_names(hook) is None
        ]

    def in_forward(self, rows: slice | None, *, guards: bool) -> AbstractContextManager[None]:
        """For the run without a graph.

        Args:
            rows: Which sequences of the batch are run; None for all.
            guards: Whether a backward will follow: what a hook keeps then refuses to be differentiated, by the hook's
                name.
        """
        if not self._tables:
            return nullcontext()
        return self._set(rows, guards=guards)

    def in_recomputation(self, rows: slice | None) -> AbstractContextManager[None]:
        """For a run with a graph: the very hooks of the forward.

        Args:
            rows: As in the forward.
        """
        if _tables_inside(self._block) == self._tables and (rows is None or not self._tables):
            return nullcontext()
        return self._set(rows, guards=False)

    @contextmanager
    def _set(self, rows: slice | None, *, guards: bool) -> Iterator[None]:
        with ExitStack() as stack:
            for module in _inner(self._block):
                before = {attribute: getattr(module, attribute) for attribute in (*_HOOKS, *_OPTIONS)}
                tables = self._tables.get(module, _NONE)
                if not any(before[kind] or tables[kind] for kind in _HOOKS):
                    continue
                # Dictionaries of our own: a hook that removes itself does so in the module's.
                stack.callback(module.__dict__.update, before)
                module.__dict__.update(self._adapted(module, tables, rows, guards=guards))
            yield

    def _adapted(
        self, module: nn.Module, tables: HookTables, rows: slice | None, *, guards: bool
    ) -> dict[str, OrderedDict[int, Hook]]:
        made = {attribute: OrderedDict(table) for attribute, table in tables.items()}
        for kind in _HOOKS[:2]:
            for number, hook in made[kind].items():
                names = _adapter_names(hook)
                if names is not None:
                    assert isinstance(hook, partial)
                    made[kind][number] = partial(hook.func, adapter_names=names if rows is None else names[rows])
                elif guards and not is_output_capture(hook):
                    made[kind][number] = partial(_guarded, hook, f"{_name(hook)} on {self._path(module)}")
        return made

    def _path(self, module: nn.Module) -> str:
        return next(f"{self._name}.{path}" for path, found in self._block.named_modules() if found is module)


def _inner(block: nn.Module) -> Iterator[nn.Module]:
    return (module for module in modules_in(block) if module is not block)


def _tables_inside(block: nn.Module) -> dict[nn.Module, HookTables]:
    """Copies of the dictionaries of each module that has a hook."""
    return {
        module: {attribute: OrderedDict(getattr(module, attribute)) for attribute in (*_HOOKS, *_OPTIONS)}
        for module in _inner(block)
        if _has_hooks(module)
    }


def _has_hooks(module: nn.Module) -> bool:
    own = module.__dict__
    before, after, backward_before, backward = _HOOKS
    return bool(own[before] or own[after] or own[backward_before] or own[backward])


_NONE: HookTables = {attribute: OrderedDict() for attribute in (*_HOOKS, *_OPTIONS)}


def _name(hook: Hook) -> str:
    inner = hook.func if isinstance(hook, partial) else hook
    return getattr(inner, "__qualname__", type(inner).__qualname__)


def _adapter_names(hook: Hook) -> list[str] | None:
    """One adapter for each sequence of the batch, where a hook is PEFT's that hands them to a layer."""
    if not isinstance(hook, partial) or getattr(hook.func, "__module__", "").split(".")[0] != "peft":
        return None
    names = hook.keywords.get("adapter_names")
    return list(names) if isinstance(names, (list, tuple)) else None


def _guarded(hook: Hook, name: str, module: nn.Module, *args: object) -> object:
    """Run a user's hook on tensors that can be read and written, and whose gradient is refused by name."""
    anchor = torch.zeros((), requires_grad=True)

    def seen(value: Tensor) -> object:
        if not value.is_floating_point():
            return value
        # .data: the same memory, so that a hook may write to it, and no view of what goes on.
        return _Ungraphed.apply(anchor, value.data, name)  # type: ignore[no-untyped-call]

    # With a graph: what the hook computes of it to keep is refused as well.
    with torch.enable_grad():
        found = hook(module, *tree_map_only(Tensor, seen, args))
    return tree_map_only(Tensor, torch.Tensor.detach, found)


class _Ungraphed(torch.autograd.Function):
    """An activation of a forward that is recomputed later: it has no graph, and a gradient must not get lost."""

    @staticmethod
    def forward(ctx: FunctionCtx, anchor: Tensor, value: Tensor, name: str) -> Tensor:
        ctx.name = name  # type: ignore[attr-defined]
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise UnsupportedError(
            f"a loss on what the hook {ctx.name} captured",  # type: ignore[attr-defined]
            reason="a streamed block keeps no graph of what happens inside it",
            instead="hidden states between the blocks (output_hidden_states=True, or a hook on the block itself)",
        )
