"""Parameter groups of a model: what is projected, what decays, and which block a parameter belongs to.

The seam for parameters whose values live elsewhere: whoever holds them runs the rules.

A torch optimizer that runs a rule per parameter, and leaves offloaded parameters to their engine.
"""

from __future__ import annotations

import re
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from lowmem.errors import UnsupportedError
from lowmem.optim.rule import Hyper, Place, Rule, State

# "model.layers.3.": everything up to the first number in a parameter's name.
_BLOCK = re.compile(r"^(?:[^.]+\.)*?\d+\.")
Group = dict[str, object]


def is_matrix(param: Tensor) -> bool:
    """Whether a parameter is a matrix, or a stack of matrices such as experts, with two real sides."""
    return param.ndim in (2, 3) and min(param.shape[-2:]) > 1


def block_name(name: str) -> str | None:
    """The part of a parameter's name that names its decoder block, None outside blocks."""
    found = _BLOCK.match(name)
    return found.group() if found else None


def embedding_names(model: nn.Module) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the trainable parameters of embeddings, and of the head (tied ones are embeddings)."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    heads = {id(param) for param in head.parameters()} - embeddings if isinstance(head, nn.Module) else set()
    named = list(_trainable(model))
    return (
        frozenset(name for name, param in named if id(param) in embeddings),
        frozenset(name for name, param in named if id(param) in heads),
    )


def groups_of_module(model: nn.Module, *, project: Callable[[str, Tensor], bool] | None = None) -> list[Group]:
    """Group a model's trainable parameters, in the model's order within each group.

    Args:
        model: The model.
        project: Whether a parameter is updated by the method, rather than by plain AdamW; given its name. None: there
            is no such difference.

    Returns:
        Up to four groups of named parameters, with `project` if there is a difference; those of norms and biases have
        weight_decay 0.

    Raises:
        ValueError: Nothing is trainable.
    """
    undecayed = {
        id(param)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for param in module.parameters(recurse=False)
    }
    groups: dict[tuple[bool, bool], list[tuple[str, Tensor]]] = {}
    for name, param in _trainable(model):
        decays = param.ndim >= 2 and not name.endswith("bias") and id(param) not in undecayed
        groups.setdefault((project is not None and project(name, param), decays), []).append((name, param))
    if not groups:
        raise ValueError("the model has no trainable parameter; nothing would be optimized")
    return [
        {
            "params": groups[key],
            **({} if project is None else {"project": key[0]}),
            **({} if key[1] else {"weight_decay": 0.0}),
        }
        for key in sorted(groups, reverse=True)
    ]


def number_blocks(names: Iterable[str], *, single: bool) -> dict[str, int]:
    """Number the blocks in order of appearance: parameter name to block number.

    Args:
        names: Names of parameters.
        single: Whether a parameter outside the numbered blocks is a block of its own; otherwise it is left out.
    """
    numbers: dict[str, int] = {}
    found = {}
    for name in names:
        block = block_name(name) or (name if single else None)
        if block is not None:
            found[name] = numbers.setdefault(block, len(numbers))
    return found


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, param) for name, param in model.named_parameters() if param.requires_grad)


_ATTRIBUTE = "lowmem_engine"


class ParameterEngine(Protocol):
    """Holds weights, gradients and state of some parameters of an optimizer, and updates them when it sees fit.

    A parameter names its engine in an attribute `lowmem_engine`. The optimizer then leaves its gradient and state
    alone. Per parameter the engine calls `optimizer.rule_of(param)` and runs the phases described in
    `lowmem.optim.rule`, with `optimizer.hyper(group)` taken inside `step`: later the schedule has moved on.
    """

    def adopt(self, optimizer: RuleOptimizer) -> None:
        """Called once, when the optimizer has been built; may refuse it with `UnsupportedError`."""

    def step(self, optimizer: RuleOptimizer) -> None:
        """Called in `optimizer.step()`, after the ordinary parameters."""

    def save(self, state_dict: StateDict) -> StateDict:
        """Complete what is pending and add the state of the engine's parameters to the optimizer's state dict."""

    def load(self, state_dict: StateDict) -> None:
        """Take the state back; the parameter groups have been restored."""


def engine_of(param: Tensor) -> ParameterEngine | None:
    """The engine that holds a parameter, None for an ordinary one.

    Raises:
        RuntimeError: There was one, and the model that it belonged to is gone.
    """
    reference: weakref.ref[ParameterEngine] | None = getattr(param, _ATTRIBUTE, None)
    if reference is None:
        return None
    engine = reference()
    if engine is None:
        raise RuntimeError(
            "an optimizer of a model that is gone: open the model again, and make a new optimizer for it"
        )
    return engine


def give_to_engine(param: Tensor, engine: ParameterEngine) -> None:
    """Mark a parameter as held by an engine. Weakly: an engine refers to its parameters."""
    setattr(param, _ATTRIBUTE, weakref.ref(engine))


# What torch, its schedulers and accelerate put into a group beside the optimizer's own fields.
_TORCH_FIELDS = frozenset({"params", "param_names", "initial_lr"})


def arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor that is being called, from its `locals()`."""
    return {name: value for name, value in given.items() if name not in ("self", "__class__")}


class RuleOptimizer(Optimizer):
    """Base of lowmem's optimizers.

    Works wherever a torch optimizer does: lr, betas, eps and weight_decay are read from the group at every step,
    gradients are taken as they are (accumulated, clipped), and `state_dict()` holds tensors and plain numbers only, so
    that it loads with `weights_only=True`. State keeps its dtypes when it is loaded. A group field that the method
    does not have is refused.

    Args:
        params: A model, whose trainable parameters are grouped as the subclass says, or what torch's optimizers take:
            parameters, (name, parameter) pairs, or groups of either, which then say themselves what does not decay.
        defaults: The fields of a group and their values.

    Raises:
        UnsupportedError: A parameter, or a field of a group, that the method cannot honour.
        ValueError: A value out of range.
    """

    method_name: ClassVar[str]
    _rules: dict[int, Rule]
    _fields: list[dict[str, Any]]

    def __init__(self, params: nn.Module | ParamsT, defaults: dict[str, Any]) -> None:
        self._rules, self._fields = {}, []
        groups: ParamsT = self._groups_of(params) if isinstance(params, nn.Module) else params
        super().__init__(groups, {**defaults, "clock": 0, "method": self.method_name})
        for param in self._params():
            self.rule_of(param).init(_meta(param))
        mark_active(self)
        for engine in self._engines():
            engine.adopt(self)

    def _groups_of(self, model: nn.Module) -> ParamsT:
        """The groups of a model's trainable parameters."""
        return groups_of_module(model)

    @abstractmethod
    def _rule(self, group: Mapping[str, Any], place: Place, param: Tensor) -> Rule:
        """The rule for one parameter of a group."""

    def _blocks(self, groups: list[dict[str, Any]]) -> dict[str, int]:
        """Parameter name to number of its block, for methods that go by blocks."""
        del groups
        return {}

    def hyper(self, group: Mapping[str, Any]) -> Hyper:
        """The numbers of the coming step, as the group has them now."""
        return Hyper(
            lr=float(group["lr"]),
            betas=(float(group["betas"][0]), float(group["betas"][1])),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            clock=int(group["clock"]),
        )

    def rule_of(self, param: Tensor) -> Rule:
        """The rule of one of this optimizer's parameters."""
        if id(param) not in self._rules:
            self._follow_groups()
        return self._rules[id(param)]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow_groups()
        for group in self.param_groups:
            hyper = self.hyper(group)
            for param in group["params"]:
                if engine_of(param) is None:
                    self._update(param, hyper)
        for engine in self._engines():
            engine.step(self)
        for group in self.param_groups:
            group["clock"] += 1
        mark_active(self)
        return loss

    def _update(self, param: Tensor, hyper: Hyper) -> None:
        rule = self.rule_of(param)
        state: State = self.state[param]
        if not rule.is_active(hyper.clock):
            state.clear()
            return
        if param.grad is None:
            return
        if param.grad.is_sparse:
            raise UnsupportedError(
                "a sparse gradient", reason="its update is not defined row by row", instead="nn.Embedding(sparse=False)"
            )
        if not state:
            state.update(rule.init(param))
        rule.update(param, param.grad, state, hyper)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does.

        Raises:
            UnsupportedError: It has a field that this method does not know.
            ValueError: A value out of range.
        """
        for name in param_group:
            if name not in self.defaults and name not in _TORCH_FIELDS:
                raise UnsupportedError(
                    f"the parameter group field {name!r}",
                    reason=f"{self.method_name} has no such option and would ignore it",
                    instead=f"one of {', '.join(sorted(self.defaults))}",
                )
        super().add_param_group(param_group)
        _check_numbers(self.param_groups[-1])

    def state_dict(self) -> StateDict:
        """As torch's: tensors and plain numbers only."""
        state_dict = super().state_dict()
        for engine in self._engines():
            state_dict = engine.save(state_dict)
        return state_dict

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore state and groups; unlike torch's, without casting state to the parameter's dtype.

        Raises:
            ValueError: The state is of another optimizer, or of parameters of other shapes.
        """
        check_saved_state(self, state_dict)
        groups, states = state_dict["param_groups"], state_dict["state"]
        super().load_state_dict({**state_dict, "state": {}})
        self._follow_groups()
        saved_ids = chain.from_iterable(group["params"] for group in groups)
        for saved_id, param in zip(saved_ids, self._params(), strict=True):
            saved_state = states.get(saved_id)
            if saved_state and engine_of(param) is None:
                self.state[param] = restored_state(self.rule_of(param), param, saved_state)
        mark_active(self)
        for engine in self._engines():
            engine.load(state_dict)

    def _follow_groups(self) -> None:
        """Build the rules anew if a field that decides them has changed."""
        fields = [{key: group[key] for key in group if key not in _VOLATILE} for group in self.param_groups]
        if fields != self._fields or not self._rules:
            self._rules, self._fields = dict(self._build_rules()), fields

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore after copying or unpickling, where rules are not part of the state."""
        self._rules, self._fields = {}, []
        super().__setstate__(state)

    def _build_rules(self) -> Iterator[tuple[int, Rule]]:
        blocks = self._blocks(self.param_groups)
        num_blocks = len(set(blocks.values()))
        num_turns = max(1, sum(_takes_turns(group, param) for group in self.param_groups for param in group["params"]))
        index = turn = 0
        for group in self.param_groups:
            names = group.get("param_names", [""] * len(group["params"]))
            for name, param in zip(names, group["params"], strict=True):
                place = Place(
                    index=index,
                    turn=turn,
                    num_turns=num_turns,
                    seed=group["seed"],
                    block=blocks.get(name),
                    num_blocks=num_blocks,
                )
                yield id(param), self._rule(group, place, param)
                index += 1
                turn += _takes_turns(group, param)

    def _params(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _engines(self) -> list[ParameterEngine]:
        """The engines of this optimizer's parameters, each once, in order of appearance."""
        engines = {id(engine): engine for engine in map(engine_of, self._params()) if engine is not None}
        return list(engines.values())


def restored_state(rule: Rule, param: Tensor, saved: object, *, device: torch.device | None = None) -> State:
    """A copy of a parameter's saved state, where the rule wants its tensors.

    Args:
        rule: The parameter's.
        param: It.
        saved: Its state.
        device: Where the rule runs; the parameter's device if not given.

    Raises:
        ValueError: It is not what the rule makes of such a parameter.
    """
    what = f"state of a parameter of shape {tuple(param.shape)}"
    if not isinstance(saved, dict) or not all(map(torch.is_tensor, saved.values())):
        raise ValueError(f"{what}: expected tensors by name; the file is damaged")
    expected = rule.init(_meta(param))
    missing = {name for name in expected if name not in saved and not name.startswith("exp_avg")}
    if unknown := sorted(map(str, missing | (set(saved) - set(expected)))):
        raise ValueError(f"{what}: {unknown} do not belong together")
    for name, value in saved.items():
        if (value.shape, value.dtype) != (expected[name].shape, expected[name].dtype):
            raise ValueError(
                f"state {name!r} of a parameter of shape {tuple(param.shape)}: expected "
                f"{tuple(expected[name].shape)} {expected[name].dtype}, got {tuple(value.shape)} {value.dtype}"
            )
    # What is made on the CPU whatever the weight's device is a counter, and stays there.
    return {
        name: value.detach().to("cpu" if expected[name].device.type == "cpu" else device or param.device, copy=True)
        for name, value in saved.items()
    }


def check_saved_state(optimizer: RuleOptimizer, state_dict: StateDict) -> None:
    """Look at the groups of a state that an optimizer is to go on from; nothing is changed.

    Raises:
        ValueError: They are damaged, or another optimizer's.
    """
    groups, states = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ValueError("optimizer state: param_groups: expected a list of dictionaries; the file is damaged")
    if not isinstance(states, dict):
        raise ValueError("optimizer state: state: expected a dictionary; the file is damaged")
    for saved in groups:
        if saved.get("method") != optimizer.method_name:
            found = saved.get("method", "another optimizer")
            raise ValueError(f"the state dict was saved by {found}, this is {optimizer.method_name}")
        if not isinstance(saved.get("params"), list):
            raise ValueError("optimizer state: param_groups: field 'params': expected a list; the file is damaged")
    for group, saved in zip(optimizer.param_groups, groups, strict=False):
        check_saved_group(group, saved)


def check_saved_group(group: Mapping[str, Any], saved: Mapping[str, object]) -> None:
    """Check the fields of a saved group before they are taken over.

    Raises:
        ValueError: One is missing, or is of another kind than the group's own.
    """
    for name, own in group.items():
        if name in _TORCH_FIELDS:
            continue
        if name not in saved:
            raise ValueError(f"optimizer state: param_groups: field {name!r} is missing; the file is damaged")
        given = saved[name]
        if own is not None and given is not None and _kind(given) != _kind(own):
            raise ValueError(
                f"optimizer state: param_groups: field {name!r}: expected a value such as {own!r}, got {given!r}; the "
                "file is damaged"
            )
    _check_numbers(saved)


def _kind(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_kind(item) for item in value]
    is_number = isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
    return "number" if is_number and not isinstance(value, bool) else type(value)


def mark_active(optimizer: RuleOptimizer) -> None:
    """Let autograd skip the parameters that the next step leaves alone: no gradients, no memory for them."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            rule = optimizer.rule_of(param)
            if type(rule).is_active is not Rule.is_active:
                param.requires_grad_(rule.is_active(group["clock"]))
                if not param.requires_grad:
                    param.grad = None


# Fields that change from step to step or hold tensors; everything else decides the rules.
_VOLATILE = frozenset({"params", "lr", "initial_lr", "betas", "weight_decay", "clock"})


def _takes_turns(group: Mapping[str, Any], param: Tensor) -> bool:
    return bool(group.get("project")) and param.ndim >= 2


def _meta(param: Tensor) -> Tensor:
    return torch.empty(param.shape, dtype=param.dtype, device="meta")


def _check_numbers(group: Mapping[str, Any]) -> None:
    for name in ("lr", "weight_decay"):
        if not float(group[name]) >= 0:
            raise ValueError(f"{name}={group[name]}: expected at least 0")
    for beta in group.get("betas", ()):
        if not 0 <= float(beta) < 1:
            raise ValueError(f"betas={group['betas']}: expected each at least 0 and below 1")
    eps = group["eps"]
    if not all(float(value) >= 0 for value in (eps if isinstance(eps, tuple | list) else (eps,))):
        raise ValueError(f"eps={eps}: expected at least 0")
