"""Watching decoder blocks during a real forward: what goes in, what comes out, what is carried past them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Identity = dict[str, tuple[object, ...]]


@dataclass(kw_only=True)
class BlockCallFacts:
    """What one call of one block showed."""

    index: int
    """Number of the block."""
    num_positional: int
    """Positional arguments after the module itself."""
    keywords: tuple[str, ...]
    """Names of keyword arguments that were not None."""
    hidden_shape: tuple[int, ...]
    """Shape of the first tensor."""
    with_grad: set[str] = field(default_factory=set)
    """Arguments other than the hidden states with tensors that need gradients."""
    from_other_blocks: set[str] = field(default_factory=set)
    """Arguments other than the hidden states with tensors that an earlier block made."""
    mutated: set[str] = field(default_factory=set)
    """Arguments that the block changed in place."""
    attributes: set[str] = field(default_factory=set)
    """Attributes of modules in the block that the call changed."""
    objects: set[str] = field(default_factory=set)
    """Arguments that are neither tensors nor plain values, with their class."""
    output: str = ""
    """Structure of the result."""


class BlockSpy:
    """Wraps the blocks' `forward` on the instances while entered, and records each call."""

    def __init__(self, layers: list[torch.nn.Module]) -> None:
        """Watch `layers`, the blocks in order."""
        self.calls: list[BlockCallFacts] = []
        self._layers = layers
        self._made: dict[int, Tensor] = {}
        self._hidden: set[int] = set()

    def __enter__(self) -> BlockSpy:
        for index, layer in enumerate(self._layers):
            layer.forward = self._wrap(index, layer, layer.forward)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self._layers:
            del layer.forward
        self._made.clear()

    def _wrap(self, index: int, layer: torch.nn.Module, forward: Callable[..., object]) -> Callable[..., object]:
        def watched(*args: object, **kwargs: object) -> object:
            named = {f"arg{i}": value for i, value in enumerate(args)} | kwargs
            hidden_name = next(key for key, value in named.items() if isinstance(value, Tensor))
            hidden = named.pop(hidden_name)
            assert isinstance(hidden, Tensor)
            facts = BlockCallFacts(
                index=index,
                num_positional=len(args),
                keywords=tuple(key for key, value in kwargs.items() if value is not None),
                hidden_shape=tuple(hidden.shape),
            )
            self._describe(named, facts)
            before, attributes = _identities(named), _attributes(layer)
            output = forward(*args, **kwargs)
            facts.mutated = {key for key, value in _identities(named).items() if before[key] != value}
            facts.attributes = {k for k, v in _attributes(layer).items() if attributes.get(k) != v}
            facts.output = _structure(output)
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor):
                    self._made[id(leaf)] = leaf
            self.calls.append(facts)
            return output

        return watched

    def _describe(self, named: dict[str, object], facts: BlockCallFacts) -> None:
        for key, value in named.items():
            leaves = _reach(value)
            if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
                facts.with_grad.add(key)
            if any(id(leaf) in self._made for leaf in leaves):
                facts.from_other_blocks.add(key)
            kind = type(value)
            if not isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device, type(None))):
                facts.objects.add(f"{key}: {kind.__name__}")


class ParameterWatch(TorchDispatchMode):
    """Notes every operation on a block's parameters that runs while none of that block's code does.

    The backward is not looked at: autograd keeps what it needs.
    """

    def __init__(self, layers: list[torch.nn.Module]) -> None:
        """Watch the parameters of `layers`."""
        super().__init__()
        self.read_outside: set[str] = set()
        self._owner: dict[int, tuple[int, str]] = {}
        self._running: list[int] = []
        for index, layer in enumerate(layers):
            for name, parameter in layer.named_parameters():
                self._owner[parameter.untyped_storage().data_ptr()] = (index, name)
            layer.register_forward_pre_hook(functools.partial(self._enter_block, index))
            layer.register_forward_hook(self._leave_block, always_call=True)

    def _enter_block(self, index: int, *_: object) -> None:
        self._running.append(index)

    def _leave_block(self, *_: object) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() in self._owner:
                    index, name = self._owner[leaf.untyped_storage().data_ptr()]
                    if not self._running or self._running[-1] != index:
                        self.read_outside.add(f"{name} by {func}")
        return func(*args, **(kwargs or {}))


def _reach(value: object) -> list[object]:
    """Leaves of containers, and the tensors that an object holds in its attributes, one level down."""
    leaves = tree_leaves(value)
    for leaf in list(leaves):
        if not isinstance(leaf, (Tensor, torch.nn.Module)) and hasattr(leaf, "__dict__"):
            leaves += tree_leaves(list(vars(leaf).values()))
    return leaves


def _identities(named: dict[str, object]) -> Identity:
    """What each argument holds: changes when the argument is written to."""
    return {
        key: tuple((id(leaf), leaf._version) if isinstance(leaf, Tensor) else repr(leaf)[:80] for leaf in _reach(value))
        for key, value in named.items()
    }


def _attributes(layer: torch.nn.Module) -> dict[str, object]:
    """Plain attributes of every module in a block, by path; hooks and registries left out."""
    found: dict[str, object] = {}
    for path, module in layer.named_modules():
        for key, value in vars(module).items():
            if not key.startswith("_") and key != "forward" and not isinstance(value, torch.nn.Module):
                found[f"{path}.{key}"] = id(value)
    return found


def _structure(output: object) -> str:
    if isinstance(output, Tensor):
        return "tensor"
    if isinstance(output, (tuple, list)):
        inner = ", ".join(_structure(part) for part in output)
        return f"{type(output).__name__}({inner})"
    return type(output).__name__
