"""What an optimizer keeps of the parameters that it trains, found without a weight: by its name, or by its class.

And what a step moves of it, of gradients and of weights to and from a disk.

lowmem's optimizers say it themselves, rule by rule. One of torch's takes a step on parameters of the meta device, which
makes its state and computes nothing. The Trainer's names stand for what transformers makes of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import chain
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import lowmem.optim as own
from lowmem.errors import UnsupportedError
from lowmem.optim.optimizer import RuleOptimizer, block_name
from lowmem.optim.plain import AdamWRule
from lowmem.optim.projected import ProjectedRule
from lowmem.planning.shapes import ModelShapes, OptimizerShape, ReductionShape, itemsize

if TYPE_CHECKING:
    from lowmem.optim.rule import Rule
    from lowmem.planning.job import Job
    from lowmem.planning.step_memory import Choice

OptimizerChoice = str | type[torch.optim.Optimizer] | partial[torch.optim.Optimizer]
"""A name, a class, or a class with options."""


_Maker = Callable[..., torch.optim.Optimizer]


_LR = 1e-3
"""Any: sizes do not depend on it."""


_FP32_BYTES = 4


_OWN: dict[str, type[RuleOptimizer]] = {
    _plain.lower(): getattr(own, _plain) for _plain in own.__all__ if _plain not in ("Method", "Projected")
}


_ELEMENTWISE = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "sgd": 0,
    "adagrad": 1,
    "rmsprop": 1,
}
"""fp32 values that each parameter keeps, by the names that the Trainer has for an optimizer."""


_BITSANDBYTES = re.compile(
    r"(paged_)?(?:(?P<kind>adamw|lion|ademamix|rmsprop)(_bnb)?)(?:_(?P<bits>8bit|32bit))?|adamw_bnb_8bit"
)
_BITSANDBYTES_STATES = {"adamw": 2, "lion": 1, "ademamix": 3, "rmsprop": 1}
_SMALLEST_8BIT = 4096
"""bitsandbytes keeps smaller parameters' state in fp32 (min_8bit_size)."""


_WAYS = frozenset(("fused", "foreach", "capturable", "differentiable"))


_BLOCK_8BIT = 256
"""Values that share a scale there."""


def read_optimizer(optimizer: OptimizerChoice | None, shapes: ModelShapes, model: nn.Module) -> OptimizerShape | None:
    """What an optimizer keeps of a model's trained parameters; None where none is named, which means AdamW.

    Args:
        optimizer: A name ("galore", or as in `SFTConfig(optim=...)`), a class of `lowmem.optim` or `torch.optim`, or
            `functools.partial` of one with its options.
        shapes: The model with what trains in it.
        model: On the meta device; where every weight is trained, its parameters are looked at.

    Raises:
        UnsupportedError: What it keeps cannot be found out.
        TypeError: Neither a name nor an optimizer's class.
    """
    if optimizer is None:
        return None
    trained = model if shapes.trains_every_weight else _adapters(shapes)
    if not any(True for _ in trained.parameters()):
        return None
    # Methods that go by blocks turn the gradients of the others off.
    before = [(param, param.requires_grad) for param in trained.parameters()]
    try:
        return _read(optimizer, trained.requires_grad_(True))
    finally:
        for param, required in before:
            param.requires_grad_(required)


def _read(optimizer: OptimizerChoice, trained: nn.Module) -> OptimizerShape:
    if isinstance(optimizer, str):
        name = optimizer.lower().replace("-", "_")
        found = _OWN.get(name.replace("_", "")) if name != "adam" else None
        if found is None:
            return _by_name(optimizer, name, list(trained.parameters()), in_32_bits=_embedded(trained))
        optimizer = found
    made = optimizer.func if isinstance(optimizer, partial) else optimizer
    if not isinstance(made, type) or not issubclass(made, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer={optimizer!r}: expected a name, such as 'galore' or 'adamw_torch_fused', a class of "
            "lowmem.optim or torch.optim, or functools.partial of one with its options"
        )
    make: _Maker = optimizer
    if issubclass(made, RuleOptimizer):
        own_made = make(trained, lr=_LR)
        assert isinstance(own_made, RuleOptimizer)
        return sizes_of(own_made)
    return _by_one_step(made.__name__, make, list(trained.parameters()))


def sizes_in_training(
    optimizer: object, name: str, params: Sequence[Tensor], *, model: nn.Module
) -> OptimizerShape | None:
    """What the optimizer of a training loop keeps; None where that is not known.

    Args:
        optimizer: It, before its first step.
        name: The Trainer's name for it, if that made it.
        params: What it trains.
        model: What these belong to.
    """
    if isinstance(optimizer, RuleOptimizer):
        return sizes_of(optimizer)
    kind: type = type(optimizer)
    try:
        if kind.__module__.startswith(("bitsandbytes.", "transformers.")):
            return _by_name(name, name, params, in_32_bits=_embedded(model))
        if isinstance(optimizer, torch.optim.Optimizer) and kind.__module__.startswith("torch.optim."):
            known = signature(kind).parameters
            # How it goes about it says nothing of sizes, and some ways do not go without values.
            fields = optimizer.defaults.items()
            options = {field: value for field, value in fields if field in known and field not in _WAYS}
            make: _Maker = partial(kind, **options)
            return _by_one_step(kind.__name__, make, params)
    except UnsupportedError:
        pass
    # What somebody else's keeps cannot be asked for without running its code.
    return None


def sizes_of(optimizer: RuleOptimizer) -> OptimizerShape:
    """What one of lowmem's optimizers keeps, by what its rules say."""
    rules = list(_rules(optimizer))
    active = [(rule, param, name) for rule, param, name, clock in rules if rule.is_active(clock)]
    in_blocks = sum(param.numel() for _, param, name, _ in rules if block_name(name) is not None)
    updated = sum(param.numel() for _, param, name in active if block_name(name) is not None)
    num_updated = sum(param.numel() for _, param, _ in active)
    work = sum(param.numel() * rule.relative_time(param.dtype) for rule, param, _ in active)
    flat = {_flat_moments(rule, param) for rule, param, *_ in rules}
    is_flat = len(flat) == 1 and None not in flat
    values = (rule.temporary_values(param) for rule, param, _ in active)
    return OptimizerShape(
        name=optimizer.method_name,
        is_own=True,
        state_bytes=sum(_state_bytes(rule, param) for rule, param, _ in active),
        is_flat=is_flat,
        # On flat buffers, a piece at a time.
        temporary_bytes=0 if is_flat else max(values, default=0) * _FP32_BYTES,
        num_updated=num_updated,
        relative_time=work / num_updated if num_updated else 1.0,
        block_share=updated / in_blocks if in_blocks else 1.0,
        update_flops=sum(rule.num_flops() for rule, *_ in active),
        reduction=_reduction(rule for rule, _, name in active if block_name(name) is not None),
    )


def _reduction(rules: Iterable[Rule]) -> ReductionShape:
    reducing = [rule for rule in rules if isinstance(rule, ProjectedRule) and rule.reduces]
    return ReductionShape(
        num_params=sum(prod(rule.shape) for rule in reducing),
        # The norm goes with it.
        reduced_bytes=sum((prod(rule.reduced_shape) + 1) * _FP32_BYTES for rule in reducing),
        basis_bytes=sum(prod(rule.basis_shape) * _FP32_BYTES for rule in reducing),
    )


def _flat_moments(rule: Rule, param: Tensor) -> str | None:
    """How AdamW's moments are stored in flat buffers; None where the rule wants single parameters."""
    return rule.flat_moments(param.dtype) if isinstance(rule, AdamWRule) else None


def _rules(optimizer: RuleOptimizer) -> Iterable[tuple[Rule, Tensor, str, int]]:
    """Rule, parameter, its name and the steps taken."""
    for group in optimizer.param_groups:
        names = group.get("param_names", [""] * len(group["params"]))
        for name, param in zip(names, group["params"], strict=True):
            yield optimizer.rule_of(param), param, name, group["clock"]


def _state_bytes(rule: Rule, param: Tensor) -> int:
    state = rule.init(torch.empty(param.shape, dtype=param.dtype, device="meta"))
    return sum(value.nbytes for value in state.values() if value.device.type == "meta")


def _embedded(model: nn.Module) -> frozenset[int]:
    """Identities of embedding tables, whose state the Trainer has bitsandbytes keep in 32 bits."""
    return frozenset(id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding))


def _by_name(given: str, name: str, params: Sequence[Tensor], *, in_32_bits: Container[int]) -> OptimizerShape:
    if name in _ELEMENTWISE:
        return _elementwise(given, params, lambda param: _ELEMENTWISE[name] * param.numel() * _FP32_BYTES)
    if name == "adafactor":
        return _elementwise(given, params, _factored_bytes)
    found = _BITSANDBYTES.fullmatch(name)
    if found is not None and (found["bits"] or "bnb" in name or "ademamix" in name or found[1]):
        num_states = _BITSANDBYTES_STATES[found["kind"] or "adamw"]
        in_8_bits = found["bits"] == "8bit" or name == "adamw_bnb_8bit"

        def nbytes(param: Tensor) -> int:
            small = in_8_bits and id(param) not in in_32_bits
            return _quantised_bytes(param, num_states=num_states, in_8_bits=small)

        return _elementwise(given, params, nbytes)
    known = ", ".join(sorted((*_OWN, *_ELEMENTWISE, "adafactor")))
    raise UnsupportedError(
        f"optimizer={given!r}",
        reason="what it keeps is not known",
        instead=f"one of {known}, bitsandbytes' names as the Trainer has them, or the optimizer's class",
    )


def _elementwise(name: str, params: Sequence[Tensor], nbytes: Callable[[Tensor], int]) -> OptimizerShape:
    num = sum(param.numel() for param in params)
    return OptimizerShape(name=name, state_bytes=sum(map(nbytes, params)), num_updated=num)


def _factored_bytes(param: Tensor) -> int:
    """A second moment by rows and columns, of vectors whole; the Trainer's Adafactor has no first one."""
    if param.ndim < 2:
        return param.numel() * _FP32_BYTES
    return (param.shape[:-1].numel() + param.shape[:-2].numel() * param.shape[-1]) * _FP32_BYTES


def _quantised_bytes(param: Tensor, *, num_states: int, in_8_bits: bool) -> int:
    if not in_8_bits or param.numel() < _SMALLEST_8BIT:
        return num_states * param.numel() * _FP32_BYTES
    return num_states * (param.numel() + -(-param.numel() // _BLOCK_8BIT) * _FP32_BYTES)


def _by_one_step(name: str, make: _Maker, params: Sequence[Tensor]) -> OptimizerShape:
    """Have an optimizer make its state of parameters without values.

    Raises:
        UnsupportedError: It looks at values.
    """
    meta = [nn.Parameter(torch.empty(param.shape, dtype=param.dtype, device="meta")) for param in params]
    for param in meta:
        param.grad = torch.empty_like(param)
    try:
        optimizer = make(meta, lr=_LR)
        optimizer.step()
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"optimizer={name}",
            reason=f"what it keeps cannot be found out without weights: {error}",
            instead="its name, as in SFTConfig(optim=...), where it has one, or a class of lowmem.optim",
        ) from error
    num = sum(param.numel() for param in meta)
    state_bytes = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.device.type == "meta"
    )
    return OptimizerShape(name=name, state_bytes=state_bytes, num_updated=num)


def _adapters(shapes: ModelShapes) -> nn.Module:
    """Parameters as an adapter has them, by the widths of the layers that it is on; named as in a model's blocks."""
    layers = nn.ModuleList()
    for block in shapes.blocks:
        adapted = [linear for linear in block.linears if linear.rank]
        matrices = [((one.rank, one.in_features), (one.out_features, one.rank)) for one in adapted]
        layers.append(_parameters(chain.from_iterable(matrices), block.num_adapter_params, block.adapter_bytes))
    outer = _parameters((), shapes.num_outer_adapter_params, shapes.outer_adapter_bytes)
    return nn.ModuleDict({"layers": layers, "outer": outer})


def _parameters(matrices: Iterable[tuple[int, int]], num_params: int, nbytes: int) -> nn.ParameterList:
    """Some matrices, and one vector that makes as many parameters of them as there are."""
    width = nbytes // num_params if num_params else 0
    dtype = {itemsize("float32"): torch.float32, itemsize("float64"): torch.float64}.get(width, torch.bfloat16)
    shapes: list[tuple[int, ...]] = [*matrices]
    if sum(rows * columns for rows, columns in shapes) > num_params:
        # Layers that share an adapter, as VeRA's do.
        shapes = []
    if rest := num_params - sum(rows * columns for rows, columns in shapes):
        shapes.append((rest,))
    return nn.ParameterList(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)


@dataclass(frozen=True, kw_only=True)
class StateTraffic:
    """Bytes of one optimizer step, the weights that visits read left out."""

    update_bytes: int = 0
    """Read and written by the update: moments, gradients and weights."""
    gradient_bytes: int = 0
    """Written by the backwards: gradients, and those of earlier micro-steps read to be added to."""
    read_bytes: int = 0
    """All that is read."""
    written_bytes: int = 0
    """All that is written."""


def state_traffic(shapes: ModelShapes, job: Job, choice: Choice) -> StateTraffic:
    """What moves where state is on disk; nothing where it is in memory, or where adapters are trained.

    A block's weight is read with its visits; gradients outside the blocks stay in memory. An optimizer that keeps its
    state in RAM reads weights and gradients of the blocks that it changes, and writes the weights, within its step.
    """
    if job.tuning != "full" or choice.state_tier != "disk":
        return StateTraffic()
    optimizer, gradients = shapes.optimizer, shapes.fp32_bytes
    read = shapes.moments_bytes + gradients
    written = shapes.moments_bytes + shapes.stored_bytes + shapes.outer_bytes
    if optimizer is not None and not optimizer.is_flat:
        read = round((shapes.stored_bytes + gradients) * optimizer.block_share)
        written = round(shapes.stored_bytes * optimizer.block_share)
        gradients = round(gradients * optimizer.block_share)
    again = (job.num_backwards - 1) * gradients
    return StateTraffic(
        update_bytes=read + written,
        gradient_bytes=again + job.num_backwards * gradients,
        read_bytes=read + again,
        written_bytes=written + job.num_backwards * gradients,
    )
