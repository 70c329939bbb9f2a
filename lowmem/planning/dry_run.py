"""A block run without memory: forward and backward on fake tensors, with what they would have held counted.

The formula in `lowmem.planning.block_memory` knows the parts that most decoder blocks are made of. A dry run knows
nothing and sees everything: state-space mixers, attention written out in Python, activations of an architecture's own.
It follows the real code operator by operator, on tensors that have shapes and no values. Code that looks at values (a
router's loop over the experts that were hit) cannot be followed; there the formula stands alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from lowmem.internals.attention import attention_implementation
from lowmem.internals.experts import experts_implementation
from lowmem.internals.torch import (
    FakeTensorMode,
    TorchDispatchMode,
    is_grouped_product,
    quiet_fake_tensors,
    storage_key,
    tree_leaves,
    tree_map_only,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowmem.models.build import Skeleton


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made while it is on, and remembers the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now_bytes = 0
        self.peak_bytes = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run an operator and count what it made."""
        if is_grouped_product(func):
            result: object = _grouped_product(*args)  # type: ignore[arg-type]
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Do not count these: they are there before and after."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._alive[storage_key(storage)] = weakref.ref(storage)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage_key(storage)
        known = self._alive.get(key)
        if known is not None and known() is not None:
            return
        nbytes = storage.nbytes()
        self._alive[key] = weakref.ref(storage, lambda _: self._release(key, nbytes))
        self.now_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def _release(self, key: int, nbytes: int) -> None:
        self._alive.pop(key, None)
        self.now_bytes -= nbytes


def _grouped_product(left: Tensor, right: Tensor, offsets: Tensor, *_: object) -> Tensor:
    """The shape of a grouped product of 2-d with 3-d (the forward) or 2-d (a weight's gradient) factors.

    torch 2.13 computes it in every dtype, but its shape-only version takes bf16 only.
    """
    shape = (left.shape[0], right.shape[-1])
    return left.new_empty(shape if right.dim() == 3 else (offsets.shape[0], *shape))


def dry_run(
    built: Skeleton, *, num_sequences: int, seq_len: int, adapted: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Count what recomputing and differentiating each block would hold at most, its weights and input aside.

    Blocks of the same kind are run once, in training mode and without a padding mask. Loads nothing and leaves the
    model as it was.

    Args:
        built: A model on meta, with or without an adapter's modules in it; only what requires gradients gets them.
        num_sequences: Sequences that go through a block together.
        seq_len: Tokens of each.
        adapted: For each block the one that has its adapter and stands for it; None where each has its own.

    Returns:
        Bytes, one number for each block.

    Raises:
        NotImplementedError: The model's code looks at values, or at something else that is not there.
    """
    stand_ins = range(len(built.blocks)) if adapted is None else adapted
    asked = (_told_of(built.model), num_sequences, seq_len, tuple(stand_ins))
    if asked in _counted:
        return _counted[asked]
    run = BlockWalk(built, stand_ins=stand_ins, measure=_count_peak)
    model, was_training = built.model, built.model.training
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"), quiet_fake_tensors(), run.watching():
            tokens = torch.zeros(num_sequences, seq_len, dtype=torch.long)
            arguments = {"input_ids": tokens, "use_cache": False}
            with torch.no_grad():
                torch.func.functional_call(model.train(), _fake_state(model, run.idle), kwargs=arguments, strict=False)
    except _NOT_FOLLOWED as error:
        raise NotImplementedError(f"{type(model).__name__} cannot be run on fake tensors: {error}") from error
    finally:
        model.train(was_training)
    while len(_counted) >= _MOST_COUNTED:
        del _counted[next(iter(_counted))]
    return _counted.setdefault(asked, tuple(run.results))


_counted: dict[object, tuple[int, ...]] = {}
"""What was counted, by what it follows from: a plan and the opening after it ask for the same."""

_MOST_COUNTED = 32


def _told_of(model: PreTrainedModel) -> object:
    """All that a dry run follows from: the code, its settings, and what each tensor is."""
    modules = tuple((name, type(module)) for name, module in model.named_modules())
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    first = {id(tensor): name for name, tensor in reversed(tensors)}
    kinds = tuple((name, first[id(one)], one.shape, one.dtype, one.requires_grad) for name, one in tensors)
    ways = attention_implementation(model), experts_implementation(model)
    return type(model), model.config.to_json_string(use_diff=False), ways, modules, kinds


# What fake tensors cannot follow is told by errors of many kinds: unknown values, missing kernels, odd devices.
_NOT_FOLLOWED = (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


def _fake_state(model: torch.nn.Module, idle: frozenset[int]) -> dict[str, Tensor]:
    """A fake tensor on the CPU for every parameter and buffer but idle ones; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        if id(tensor) in idle:
            continue
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)
        state[name] = made[id(tensor)]
    return state


@dataclass(frozen=True)
class BlockRun:
    """Runs one block on another input of the same shape, with the other arguments that the model gave it."""

    raw_forward: Callable[..., object]
    """The block class's forward without wrappers."""
    module: torch.nn.Module
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    hidden: Tensor
    """The input, among the arguments."""

    def with_input(self, given: Tensor) -> tuple[tuple[object, ...], dict[str, object]]:
        """The arguments with another input in that one's place."""
        call = tree_map_only(
            Tensor, lambda tensor: given if tensor is self.hidden else tensor, (self.args, dict(self.kwargs))
        )
        return call[0], call[1]

    def __call__(self, given: Tensor) -> object:
        """The block's output."""
        args, kwargs = self.with_input(given)
        return self.raw_forward(self.module, *args, **kwargs)


Result = TypeVar("Result")


class BlockWalk(Generic[Result]):
    """One forward of a model in which the first block of each kind is looked at and the others are skipped.

    Args:
        built: The model.
        stand_ins: For each block the one that runs in its place.
        measure: Gets what runs the block, its input and its module; returns what was found and the block's output.
    """

    def __init__(
        self,
        built: Skeleton,
        *,
        stand_ins: Sequence[int],
        measure: Callable[[BlockRun, Tensor, torch.nn.Module], tuple[Result, object]],
    ) -> None:
        self.results: list[Result] = []
        self._modules = [streamed.block.module for streamed in built.blocks]
        self._raw_forwards = [built.blocks[index].block.raw_forward for index in stand_ins]
        self._stand_ins, self._measure = stand_ins, measure
        self._known: dict[object, tuple[Result, object]] = {}

    @property
    def idle(self) -> frozenset[int]:
        """Identities of parameters and buffers that only blocks have that never run."""
        used = set(self._stand_ins)
        return frozenset(
            id(tensor)
            for index, module in enumerate(self._modules)
            if index not in used
            for tensor in (*module.parameters(), *module.buffers())
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Have the blocks' forwards come here."""
        for index, module in enumerate(self._modules):
            module.forward = partial(self._forward, index)
        try:
            yield
        finally:
            for module in self._modules:
                del module.forward

    def _forward(self, index: int, *args: object, **kwargs: object) -> object:
        module = self._modules[self._stand_ins[index]]
        kind = _kind_of(module, (args, kwargs))
        if kind not in self._known:
            self._known[kind] = self._look_at(index, module, args, kwargs)
        result, output = self._known[kind]
        self.results.append(result)
        return output

    def _look_at(
        self, index: int, module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[Result, object]:
        hidden = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        # A model that is followed on fake tensors makes the causal mask that it leaves out where tensors are real.
        if isinstance(kwargs.get("attention_mask"), Tensor):
            kwargs["attention_mask"] = None
        run = BlockRun(self._raw_forwards[index], module, args, kwargs, hidden)
        result, output = self._measure(run, hidden, module)
        return result, tree_map_only(Tensor, Tensor.detach, output)


def _count_peak(run: BlockRun, hidden: Tensor, module: torch.nn.Module) -> tuple[int, object]:
    leaf = hidden.detach().requires_grad_()
    params = [param for param in module.parameters() if param.requires_grad]
    gradient = torch.empty_like(leaf)
    with PeakBytes() as peak, torch.enable_grad():
        peak.ignore([leaf, gradient, *module.parameters(), *module.buffers()])
        output = run(leaf)
        result = next(value for value in tree_leaves(output) if isinstance(value, Tensor))
        grads = torch.autograd.grad(result, [leaf, *params], gradient, allow_unused=True)
    del grads
    return peak.peak_bytes, output


def _kind_of(module: torch.nn.Module, call: object) -> object:
    """Equal for blocks that hold the same: their modules' types and shapes, and their arguments' shapes."""
    types = tuple(type(child).__name__ for child in module.modules())
    shapes = tuple((param.shape, param.requires_grad) for param in module.parameters())
    leaves = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else None for leaf in tree_leaves(call))
    return types, shapes, leaves
