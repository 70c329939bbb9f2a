"""The seam for parameters whose values live elsewhere: whoever holds them runs the rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from torch.optim.optimizer import StateDict

    from lowmem.optim.optimizer import RuleOptimizer

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
    """The engine that holds a parameter, None for an ordinary one."""
    engine: ParameterEngine | None = getattr(param, _ATTRIBUTE, None)
    return engine


def give_to_engine(param: Tensor, engine: ParameterEngine) -> None:
    """Mark a parameter as held by an engine."""
    setattr(param, _ATTRIBUTE, engine)
