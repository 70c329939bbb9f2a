"""The side of full tuning that lowmem's optimizers talk to: runs their rules on weights that lie in a tier."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.full.adamw import ParamUpdate
from lowmem.full.disk_tier import DiskTier
from lowmem.full.engine import FullTuning, TunedParam
from lowmem.full.gradient import OffloadedGradient
from lowmem.full.saved_state import load_moments, save_moments
from lowmem.full.tier import EXP_AVG, EXP_AVG_SQ
from lowmem.optim.adamw import AdamWRule
from lowmem.streaming.own_memory import give_back_freed

if TYPE_CHECKING:
    from torch.optim.optimizer import StateDict

    from lowmem.optim.optimizer import RuleOptimizer
    from lowmem.optim.rule import Hyper, Rule, State

_ENTRY = "lowmem_full"


class OptimizerEngine:
    """Holds state of all parameters of a model opened with ``tuning="full"``, as `lowmem.optim` calls an engine.

    AdamW in fp32 runs on the tier's flat buffers, deferred where the tier defers. Any other rule runs at once, one
    parameter at a time, its state in RAM.

    A state dict stays small: AdamW's moments go to files beside the weights that `model.save_pretrained` wrote last, as
    the Trainer does before it saves the optimizer.
    """

    def __init__(self, full: FullTuning) -> None:
        """Serve the parameters of one model."""
        self._full = full
        self._optimizer: weakref.ref[RuleOptimizer] | None = None
        self._num_steps = 0
        self._steps: dict[str, int] = {}
        self._states: dict[str, State] = {}

    @property
    def num_steps(self) -> int:
        """Steps that have been taken."""
        return self._num_steps

    def adopt(self, optimizer: RuleOptimizer) -> None:
        """Take an optimizer on; a new one begins with state of its own."""
        for group in optimizer.param_groups:
            for param in group["params"]:
                self._full.key_of(param)
        if self._optimizer is not None:
            self._forget_moments(set(self._steps))
        self._optimizer = weakref.ref(optimizer)
        self._num_steps, self._steps, self._states = 0, {}, {}
        self._full.updates_now = None

    @torch.no_grad()
    def step(self, optimizer: RuleOptimizer) -> None:
        """Begin the update of every parameter that has a gradient.

        Raises:
            RuntimeError: Another optimizer has taken the model over.
        """
        if self._optimizer is None or self._optimizer() is not optimizer:
            raise RuntimeError("a later optimizer has taken over this model's weights; step that one")
        updates: dict[str, ParamUpdate] = {}
        others: list[_RuleCall] = []
        for group in optimizer.param_groups:
            hyper = optimizer.hyper(group)
            for param in group["params"]:
                key, rule = self._full.key_of(param), optimizer.rule_of(param)
                if not _is_flat(rule):
                    if self._takes_part(key, rule, hyper):
                        others.append(_RuleCall(key, rule, hyper))
                # A gradient that is used up has done its work in the backward.
                elif param.grad is not None and not getattr(param.grad, "is_used_up", False):
                    self._steps[key] = self._steps.get(key, 0) + 1
                    updates[key] = _update(hyper, step=self._steps[key])
        self._run_rules(others)
        self._num_steps += 1
        self._full.step(updates, number=self._num_steps, record=self._record(optimizer))

    def save(self, state_dict: StateDict) -> StateDict:
        """Complete pending updates and add what a resumed run needs.

        Raises:
            UnsupportedError: The weights have changed since `model.save_pretrained`, or were never saved.
        """
        self._full.finish()
        entry: dict[str, object] = {
            "num_steps": self._num_steps,
            "steps": dict(self._steps),
            "states": {key: dict(state) for key, state in self._states.items()},
        }
        if self._steps:
            entry["folder"] = save_moments(self._full)
        return {**state_dict, _ENTRY: entry}

    def load(self, state_dict: StateDict) -> None:
        """Take back what `save` gave.

        Raises:
            ValueError: It comes from an optimizer of a model that was not opened with ``tuning="full"``.
            FileNotFoundError: The files beside the saved weights are gone.
        """
        if _ENTRY not in state_dict:
            raise ValueError(
                "optimizer state: expected that of a model opened with tuning='full', got one without "
                f"{_ENTRY!r}; resume with the optimizer that saved it"
            )
        entry = cast("dict[str, object]", state_dict[_ENTRY])
        steps = cast("dict[str, int]", entry["steps"])
        if unknown := sorted(set(steps) - set(self._full.params)):
            raise ValueError(f"optimizer state: {unknown[0]} is not a parameter of this model")
        stale = set(self._steps) - set(steps)
        if steps:
            load_moments(self._full, Path(str(entry["folder"])), keys=steps, stale=stale)
        else:
            self._forget_moments(stale)
        states = cast("dict[str, State]", entry["states"])
        self._states = {key: {name: value.clone() for name, value in state.items()} for key, state in states.items()}
        self._steps, self._num_steps = dict(steps), cast(int, entry["num_steps"])

    def resume(self, optimizer: RuleOptimizer) -> int:
        """Go on from the last step whose state is on disk: weights, moments, settings of the groups.

        Returns:
            The number of steps that have been taken.

        Raises:
            UnsupportedError: State is in memory, or the optimizer keeps state there.
            SourceError: No step has been committed.
            ValueError: The optimizer has other groups.
        """
        flat = [_is_flat(optimizer.rule_of(param)) for group in optimizer.param_groups for param in group["params"]]
        if not all(flat):
            raise UnsupportedError(
                f"resuming {type(optimizer).__name__} from state on disk",
                reason="it keeps state in memory, which a killed run has lost",
                instead="a checkpoint of the Trainer, or optimizer.state_dict() after model.save_pretrained(folder)",
            )
        record = self._full.adopt()
        groups = cast("list[dict[str, object]]", record["groups"])
        if [group["keys"] for group in groups] != [self._group_keys(group) for group in optimizer.param_groups]:
            raise ValueError("the state on disk is of an optimizer with other parameter groups; make the same ones")
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            group.update({name: tuple(v) if isinstance(v, list) else v for name, v in saved.items() if name != "keys"})
        self._steps = cast("dict[str, int]", record["steps"])
        self._num_steps = cast(int, record["num_steps"])
        self._optimizer = weakref.ref(optimizer)
        return self._num_steps

    def update_in_backward(self, optimizer: RuleOptimizer) -> None:
        """Update each block within its backward from now on.

        Raises:
            UnsupportedError: State is in memory, or the optimizer is not AdamW in fp32.
            RuntimeError: Another optimizer has taken the model over.
        """
        if self._optimizer is None or self._optimizer() is not optimizer:
            raise RuntimeError("a later optimizer has taken over this model's weights")
        flat = [_is_flat(optimizer.rule_of(param)) for group in optimizer.param_groups for param in group["params"]]
        if not isinstance(self._full.tier, DiskTier) or not all(flat):
            raise UnsupportedError(
                "update_in_backward",
                reason="it saves the traffic of gradients to and from disk; there is none where state is in memory",
                instead="AdamW in fp32 with state on disk, or no update_in_backward",
            )
        self._full.updates_now = self._updates_now

    def _updates_now(self, keys: Sequence[str]) -> dict[str, ParamUpdate]:
        optimizer = self._optimizer() if self._optimizer is not None else None
        if optimizer is None:
            raise RuntimeError("update_in_backward: the optimizer is gone; make a new one")
        wanted = set(keys)
        updates: dict[str, ParamUpdate] = {}
        for group in optimizer.param_groups:
            hyper = optimizer.hyper(group)
            for key in wanted.intersection(self._group_keys(group)):
                self._steps[key] = self._steps.get(key, 0) + 1
                updates[key] = _update(hyper, step=self._steps[key])
        return updates

    def _takes_part(self, key: str, rule: Rule, hyper: Hyper) -> bool:
        """Whether a rule has something to do in this step; one that is not active lets go of its state."""
        if rule.is_active(hyper.clock):
            return self._full.params[key].param.grad is not None
        rule.retire(self._states.setdefault(key, {}))
        return False

    def _run_rules(self, calls: Sequence[_RuleCall]) -> None:
        unit = 0
        for number, call in enumerate(calls):
            entry = self._full.params[call.key]
            if entry.unit != unit:
                # State that a rule makes stays between its temporaries.
                give_back_freed()
                unit = entry.unit
            following = (later.key for later in calls[number + 1 :] if self._is_offloaded(later.key))
            self._full.change(
                call.key,
                partial(_run_rule, call.rule, self._states.setdefault(call.key, {}), call.hyper),
                gradient=None if self._is_offloaded(call.key) else entry.param.grad,
                upcoming=next(following, None),
            )

    def _is_offloaded(self, key: str) -> bool:
        return isinstance(self._full.params[key].param.grad, OffloadedGradient)

    def _record(self, optimizer: RuleOptimizer) -> dict[str, object]:
        """Plain data with which a run goes on from a step."""
        return {
            "num_steps": self._num_steps,
            "steps": dict(self._steps),
            "groups": [
                {name: _plain(value) for name, value in group.items() if name not in ("params", "param_names")}
                | {"clock": group["clock"] + 1, "keys": self._group_keys(group)}
                for group in optimizer.param_groups
            ],
        }

    def _group_keys(self, group: Mapping[str, Iterable[Tensor]]) -> list[str]:
        return [self._full.key_of(param) for param in group["params"]]

    def _forget_moments(self, keys: set[str]) -> None:
        for key in keys:
            entry: TunedParam = self._full.params[key]
            zero = torch.zeros(entry.place.shape)
            for field in (EXP_AVG, EXP_AVG_SQ):
                self._full.write(key, zero, field)


class _RuleCall(NamedTuple):
    key: str
    rule: Rule
    hyper: Hyper


def _run_rule(rule: Rule, state: State, hyper: Hyper, weight: Tensor, gradient: Tensor) -> None:
    if not state:
        state.update(rule.init(weight))
    payload = rule.reduce(gradient, state)
    rule.apply(weight, rule.solve(payload, state, hyper), state, hyper)


def _plain(value: object) -> object:
    return value.item() if isinstance(value, Tensor) else value


def _is_flat(rule: Rule) -> bool:
    """Whether the fused kernel on flat fp32 buffers does what a rule says."""
    return (
        isinstance(rule, AdamWRule)
        and rule.state_dtype in (None, "fp32")
        and rule.writer in ("nearest", "fp32")
        and rule.fused
    )


def _update(hyper: Hyper, *, step: int) -> ParamUpdate:
    return ParamUpdate(lr=hyper.lr, betas=hyper.betas, eps=hyper.eps, weight_decay=hyper.weight_decay, step=step)


__all__ = ["OptimizerEngine"]
