"""The side of full tuning that lowmem's optimizers talk to: runs their rules on weights that lie in a tier.

What a training loop can ask of full tuning: to go on from the last step on disk, to update within the backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from lowmem.errors import UnsupportedError
from lowmem.full.disk_tier import DiskTier
from lowmem.full.engine import FullTuning, OffloadedGradient, Reduction, TunedParam
from lowmem.full.flat import EXP_AVG, EXP_AVG_SQ, ParamUpdate
from lowmem.full.gpu_tier import GpuMemoryTier
from lowmem.full.rules import DiskStates, MemoryStates, RuleStates
from lowmem.full.saving import (
    FOLDER,
    SavedMoments,
    SavedState,
    check_state,
    current_digest,
    find_moments,
    load_moments,
    read_state,
    save_moments,
    steps_of,
)
from lowmem.full.tier import weakly
from lowmem.host_memory import give_back_freed
from lowmem.optim.optimizer import (
    RuleOptimizer,
    check_saved_group,
    check_saved_state,
    engine_of,
    mark_active,
    restored_state,
)
from lowmem.optim.plain import AdamWRule
from lowmem.optim.projected import ProjectedRule
from lowmem.planning.optimizer_sizes import sizes_of
from offload import Store

if TYPE_CHECKING:
    from torch.optim.optimizer import StateDict

    from lowmem.optim.rule import Hyper, Rule, State


_ENTRY = "lowmem_full"


class _AsItIs:
    """What a state dict has in place of moments that lie beside no weights: the optimizer's own, at this step.

    accelerate takes a state dict and gives it back when it prepares an optimizer, whatever that has seen before. Loaded
    by its own optimizer before the next step it changes nothing; it cannot be written.
    """

    def __init__(self, engine: OptimizerEngine, step: tuple[int, int]) -> None:
        self._engine, self._step = weakref.ref(engine), step

    def check(self, engine: OptimizerEngine, step: tuple[int, int]) -> None:
        """Raise unless the optimizer is still as it was."""
        if self._engine() is not engine or self._step != step:
            raise UnsupportedError(
                "loading optimizer state of an earlier step that was not saved",
                reason="the state dict had no copy of the moments, which are too large for a dictionary",
                instead="model.save_pretrained(folder) before optimizer.state_dict(), which then keeps them there",
            )

    def __deepcopy__(self, memo: object) -> _AsItIs:
        return self

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            "writing optimizer.state_dict() of a model whose weights are not saved",
            reason="the moments are too large for a dictionary, and are kept beside the weights of the same step",
            instead="model.save_pretrained(folder) before optimizer.state_dict(), as the Trainer does",
        )


class OptimizerEngine:
    """Holds state of all parameters of a model opened with ``tuning="full"``, as `lowmem.optim` calls an engine.

    AdamW runs on the tier's flat buffers, with moments in fp32, bf16 or 8 bits, deferred where the tier defers. Any
    other rule runs at once, one parameter at a time, its state in RAM, or on disk where that was asked for.

    A state dict stays small: AdamW's moments go to files beside the weights that `model.save_pretrained` wrote last, as
    the Trainer does before it saves the optimizer. Where these are not the weights as they are now, a state dict stands
    for the optimizer as it is, and cannot be written.

    Args:
        full: Owns them.
        opened_from: Folder of the checkpoint that the model was opened from.
    """

    def __init__(self, full: FullTuning, *, opened_from: Path) -> None:
        self._full, self._opened_from = full, opened_from
        self._resumed: Path | None = None
        self._optimizer: weakref.ref[RuleOptimizer] | None = None
        self._num_steps = 0
        self._steps: dict[str, int] = {}
        self._states: RuleStates = MemoryStates()
        self._kept: tuple[Path, tuple[int, int], SavedMoments] | None = None

    def adopt(self, optimizer: RuleOptimizer) -> None:
        """Take an optimizer on; a new one begins with state of its own."""
        for group in optimizer.param_groups:
            for param in group["params"]:
                self._full.key_of(param)
        self._full.tier.refuse_optimizer(type(optimizer).__name__, self._kinds_of_moments(optimizer))
        if self._optimizer is not None:
            self._forget_moments(set(self._steps))
        self._optimizer = weakref.ref(optimizer)
        self._num_steps, self._steps, self._kept = 0, {}, None
        self._states.clear()
        self._full.updates_now = None
        tier = self._full.tier
        reduces = isinstance(tier, GpuMemoryTier) and tier.reduces
        self._full.reductions = weakly(self._reductions) if reduces else None
        self._full.optimizer = sizes_of(optimizer)
        self._choose_moments(optimizer)

    def _choose_moments(self, optimizer: RuleOptimizer) -> None:
        """Have the tier store moments as the optimizer wants them, where all of it wants the same."""
        found = [moments for moments in self._kinds_of_moments(optimizer) if moments is not None]
        self._full.tier.store_moments_as(found[0] if len(found) == 1 else "fp32")

    def _kinds_of_moments(self, optimizer: RuleOptimizer) -> set[str | None]:
        """How flat moments are stored, and None where a rule has others."""
        params = (param for group in optimizer.param_groups for param in group["params"])
        return {self._flat_moments(optimizer.rule_of(param), param) for param in params}

    @staticmethod
    def _flat_moments(rule: Rule, param: Tensor) -> str | None:
        return rule.flat_moments(param.dtype) if isinstance(rule, AdamWRule) else None

    def _is_flat(self, rule: Rule, param: Tensor) -> bool:
        """Whether the fused kernel on the tier's flat buffers does what a rule says."""
        return self._flat_moments(rule, param) == self._full.tier.state_dtype

    def _are_flat(self, optimizer: RuleOptimizer) -> bool:
        params = (param for group in optimizer.param_groups for param in group["params"])
        return all(self._is_flat(optimizer.rule_of(param), param) for param in params)

    def _update_of(self, key: str, rule: Rule, hyper: Hyper) -> ParamUpdate:
        """The settings of a parameter's next update, which is counted."""
        self._steps[key] = self._steps.get(key, 0) + 1
        entry = self._full.params[key]
        layout = self._full.tier.layouts[entry.unit]
        is_plain = self._full.tier.state_dtype == "fp32" and layout.weight_dtype == torch.float32
        seed = rule.seed if isinstance(rule, AdamWRule) and not is_plain else None
        return ParamUpdate(hyper=hyper, step=self._steps[key], seed=seed)

    @torch.no_grad()
    def step(self, optimizer: RuleOptimizer) -> None:
        """Begin the update of every parameter that has a gradient.

        Raises:
            RuntimeError: Another optimizer has taken the model over.
        """
        self._check_serves(optimizer)
        updates: dict[str, ParamUpdate] = {}
        others: list[_RuleCall] = []
        for group in optimizer.param_groups:
            hyper = optimizer.hyper(group)
            for param in group["params"]:
                key, rule = self._full.key_of(param), optimizer.rule_of(param)
                if not self._is_flat(rule, param):
                    if self._takes_part(key, rule, hyper):
                        others.append(_RuleCall(key, rule, hyper))
                # A gradient that is used up has done its work in the backward.
                elif param.grad is not None and not getattr(param.grad, "is_used_up", False):
                    updates[key] = self._update_of(key, rule, hyper)
        self._run_rules(others)
        self._num_steps += 1
        self._full.step(updates, number=self._num_steps, record=self._record(optimizer))

    def _check_serves(self, optimizer: RuleOptimizer) -> None:
        if self._optimizer is None or self._optimizer() is not optimizer:
            raise RuntimeError("a later optimizer has taken over this model's weights; step that one")

    def save(self, state_dict: StateDict) -> StateDict:
        """Complete pending updates and add what a resumed run needs.

        Where the weights have changed since `model.save_pretrained`, or were never saved, that is the state itself.
        """
        self._full.finish()
        saved, has_moments = self._full.saved, bool(self._steps) or self._states.go_with_weights
        if saved is not None and saved.version != self._full.version:
            saved = None
        if has_moments and saved is None:
            return {**state_dict, _ENTRY: _AsItIs(self, self._at_step)}
        entry: dict[str, object] = {
            "num_steps": self._num_steps,
            "steps": dict(self._steps),
            "states": self._states.saved(),
            "states_on_disk": self._states.go_with_weights,
        }
        if saved is not None:
            entry["weights"] = saved.digest
            if has_moments:
                moments = self._moments_beside(saved.folder)
                entry["moments"] = {"identifier": moments.identifier, "checksums": dict(moments.checksums)}
        return {**state_dict, _ENTRY: entry}

    def _moments_beside(self, folder: Path) -> SavedMoments:
        """Keep the moments beside weights of the same step, where they are not there already.

        accelerate asks for a state dict once more when the next training begins.
        """
        if self._kept is not None:
            where, step, moments = self._kept
            if (where, step) == (folder, self._at_step) and (folder / FOLDER / moments.identifier).is_dir():
                return moments
        moments = save_moments(self._full, folder)
        self._kept = folder, self._at_step, moments
        return moments

    @property
    def _at_step(self) -> tuple[int, int]:
        """Which weights, and which moments: those of another optimizer begin anew."""
        return self._full.version, self._num_steps

    def load(self, state_dict: StateDict) -> None:
        """Take back what `save` gave.

        Raises:
            ValueError: It comes from an optimizer of a model that was not opened with ``tuning="full"``, belongs to
                other weights than the model has, or is damaged.
            FileNotFoundError: The moments are not where they can be found.
            UnsupportedError: It was never written, and is of another step.
        """
        if _ENTRY not in state_dict:
            raise ValueError(
                "optimizer state: expected that of a model opened with tuning='full', got one without "
                f"{_ENTRY!r}; resume with the optimizer that saved it"
            )
        if isinstance(as_it_is := state_dict[_ENTRY], _AsItIs):
            self._full.finish()
            as_it_is.check(self, self._at_step)
            return
        saved = SavedState.read(state_dict[_ENTRY], self._resumed, params=self._full.params)
        kept = None if self._kept is None else self._kept[1:]
        are_as_kept = kept == (self._at_step, saved.moments) and saved.steps == self._steps
        states = self._checked_states(saved.states)
        if saved.states_on_disk != self._keeps_states_on_disk and (saved.states_on_disk or saved.states):
            was, now = ("on disk", "in memory") if saved.states_on_disk else ("in memory", "on disk")
            raise UnsupportedError(
                f"loading optimizer state that was kept {was}",
                reason=f"this optimizer keeps it {now}",
                instead=f"{'' if saved.states_on_disk else 'no '}lowmem.full.state_on_disk(optimizer), as it was then",
            )
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is not None:
            self._choose_moments(optimizer)
        stale = set(self._steps) - set(saved.steps)
        folder = None if saved.moments is None else find_moments(saved.moments, self._folders(saved))
        brings_weights = folder is not None and Store.exists(folder)
        if saved.weights is not None and not brings_weights and saved.weights != current_digest(self._full):
            where = "optimizer state" if self._resumed is None else self._resumed / "optimizer.pt"
            raise ValueError(
                f"{where}: it belongs to other weights than the model has now; load the weights of the same checkpoint "
                "first, as the Trainer does"
            )
        if not are_as_kept:
            self._kept = None
            if saved.moments is not None and folder is not None:
                load_moments(self._full, folder, saved.moments, keys=saved.steps, stale=stale)
            else:
                self._forget_moments(stale)
                self._states.clear()
        # Those on disk came with the folder.
        if isinstance(self._states, MemoryStates):
            if optimizer is not None:
                for key, state in states.items():
                    self._keep_basis(key, optimizer.rule_of(self._full.params[key].param), state)
            self._states.load(states)
        self._steps, self._num_steps = dict(saved.steps), saved.num_steps
        self._resumed = None

    def _checked_states(self, saved: Mapping[str, State]) -> dict[str, State]:
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is None:
            raise RuntimeError("a later optimizer has taken over this model's weights; load its state")
        params, host = {key: self._full.params[key].param for key in saved}, torch.device("cpu")
        return {
            key: restored_state(optimizer.rule_of(params[key]), params[key], state, device=host)
            for key, state in saved.items()
        }

    def will_resume_from(self, folder: Path) -> None:
        """Note the checkpoint whose optimizer state is loaded next."""
        self._resumed = folder

    def check_saved(self, folder: Path) -> None:
        """Read what lies in a Trainer's checkpoint for this optimizer, before anything of the checkpoint is loaded.

        Raises:
            SourceError: It is damaged; names file and field.
            ValueError: It is another optimizer's.
        """
        optimizer = None if self._optimizer is None else self._optimizer()
        state = read_state(folder)
        if state is None:
            return
        if optimizer is not None:
            check_saved_state(optimizer, state)
        # The moments may be elsewhere, which loading finds out.
        with suppress(FileNotFoundError):
            check_state(state, folder, self._full)

    def _folders(self, saved: SavedState) -> list[Path]:
        """Where the moments may be, the likeliest first."""
        if saved.folder is not None:
            return [saved.folder]
        last = None if self._full.saved is None else self._full.saved.folder
        return [found / FOLDER for found in (self._resumed, last, self._opened_from) if found is not None]

    def resume(self, optimizer: RuleOptimizer) -> int:
        """As `resume_last_step`."""
        if not self._are_flat(optimizer) and not self._keeps_states_on_disk:
            raise UnsupportedError(
                f"resuming {type(optimizer).__name__} from state on disk",
                reason="it keeps state in memory, which a killed run has lost",
                instead="lowmem.full.state_on_disk(optimizer) in both runs, or a checkpoint of the Trainer",
            )
        record = self._full.adopt()
        steps, num_steps = steps_of(record, params=self._full.params)
        groups = record.members.get("groups")
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            record.refuse("groups", "expected a list of objects")
        if [group.get("keys") for group in groups] != [self._group_keys(group) for group in optimizer.param_groups]:
            raise ValueError("the state on disk is of an optimizer with other parameter groups; make the same ones")
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            values = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items() if name != "keys"}
            check_saved_group(group, values)
            group.update(values)
        self._steps, self._num_steps = steps, num_steps
        self._optimizer = weakref.ref(optimizer)
        mark_active(optimizer)
        return self._num_steps

    def state_on_disk(self, optimizer: RuleOptimizer) -> None:
        """As the function of this name."""
        self._check_serves(optimizer)
        tier = self._full.tier
        if not isinstance(tier, DiskTier):
            raise UnsupportedError(
                "state_on_disk",
                reason="this run keeps the weights themselves in memory",
                instead="a budget with Budget.disk that puts them on disk",
            )
        if self._num_steps:
            raise RuntimeError("state_on_disk: call it before the first step")
        if not self._keeps_states_on_disk:
            self._states = DiskStates(tier.files, begin=tier.begin_updates)
            tier.keeps_live = True
            if not self._are_flat(optimizer):
                self._full.optimizer = replace(sizes_of(optimizer), state_bytes=0)

    @property
    def _keeps_states_on_disk(self) -> bool:
        return isinstance(self._states, DiskStates)

    def update_in_backward(self, optimizer: RuleOptimizer) -> None:
        """As the function of this name."""
        self._check_serves(optimizer)
        if not isinstance(self._full.tier, DiskTier) or not self._are_flat(optimizer):
            raise UnsupportedError(
                "update_in_backward",
                reason="it saves the traffic of gradients to and from disk; there is none where state is in memory",
                instead="lowmem.optim.AdamW with state on disk, or no update_in_backward",
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
            for param in group["params"]:
                if (key := self._full.key_of(param)) in wanted:
                    updates[key] = self._update_of(key, optimizer.rule_of(param), hyper)
        return updates

    def _takes_part(self, key: str, rule: Rule, hyper: Hyper) -> bool:
        """Whether a rule has something to do in this step; one that is not active lets go of its state."""
        if rule.is_active(hyper.clock):
            return self._full.params[key].param.grad is not None
        self._states.drop(key)
        return False

    def _run_rules(self, calls: Sequence[_RuleCall]) -> None:
        unit = 0
        try:
            for number, call in enumerate(calls):
                if self._full.params[call.key].unit != unit:
                    # State that a rule makes stays between its temporaries.
                    give_back_freed()
                    unit = self._full.params[call.key].unit
                self._change(call, calls[number + 1 :])
        finally:
            self._states.forget_expected()

    def _change(self, call: _RuleCall, later: Sequence[_RuleCall]) -> None:
        """Run a rule on its parameter, while what the next needs is read."""
        for expected in (call, *later[:1]):
            self._states.expect(expected.key)
        following = (other.key for other in later if self._is_offloaded(other.key))
        self._full.change(
            call.key,
            partial(self._run_rule, call),
            gradient=None if self._is_offloaded(call.key) else self._full.params[call.key].param.grad,
            upcoming=next(following, None),
        )

    def _run_rule(self, call: _RuleCall, weight: Tensor, gradient: Tensor) -> None:
        with self._states.lend(call.key) as state:
            if not state:
                state.update(call.rule.init(weight))
                self._keep_basis(call.key, call.rule, state)
            rule, tier = call.rule, self._full.tier
            if not isinstance(rule, ProjectedRule) or not isinstance(tier, GpuMemoryTier):
                rule.update(weight, gradient, state, call.hyper)
            elif gradient.shape != weight.shape:
                # Behind it is the whole one's norm.
                rule.update_reduced(weight, gradient[:-1].view(rule.reduced_shape), state, call.hyper)
            elif tier.takes_bases and rule.reduces and rule.refreshes(state) and self._is_offloaded(call.key):
                _update_there(rule, weight, gradient, state, call.hyper, device=tier.device)
            else:
                rule.update(weight, gradient, state, call.hyper)

    def _keep_basis(self, key: str, rule: Rule, state: State) -> None:
        """Have the basis of a rule's state lie where a GPU fetches it, where it does."""
        tier = self._full.tier
        if isinstance(tier, GpuMemoryTier) and tier.reduces and isinstance(rule, ProjectedRule) and rule.reduces:
            state["basis"] = tier.keep_basis(key, state["basis"])

    def _reductions(self, keys: Sequence[str]) -> dict[str, Reduction]:
        """How gradients of some parameters are reduced on a GPU: with the bases that the next step uses as they are."""
        optimizer = None if self._optimizer is None else self._optimizer()
        tier, states = self._full.tier, self._states
        if optimizer is None or not isinstance(tier, GpuMemoryTier) or not isinstance(states, MemoryStates):
            return {}
        found: dict[str, Reduction] = {}
        for key in keys:
            rule, state = optimizer.rule_of(self._full.params[key].param), states.get(key)
            if state and isinstance(rule, ProjectedRule) and rule.reduces and not rule.refreshes(state):
                run = partial(rule.reduce, basis=tier.bring_basis(state["basis"]))
                found[key] = Reduction(run=run, numel=prod(rule.reduced_shape))
        return found

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


def tell_engine(model: nn.Module, folder: str) -> None:
    """Tell the engine of a model, if it has one, that a Trainer loads the optimizer's state from a checkpoint."""
    if (engine := _engine_of_model(model)) is not None:
        engine.will_resume_from(Path(folder))


def check_before_loading(model: nn.Module, folder: Path) -> None:
    """See `OptimizerEngine.check_saved`; nothing is done for a model without one."""
    if (engine := _engine_of_model(model)) is not None:
        engine.check_saved(folder)


def _engine_of_model(model: nn.Module) -> OptimizerEngine | None:
    engines = (engine_of(param) for param in model.parameters())
    return next((engine for engine in engines if isinstance(engine, OptimizerEngine)), None)


class _RuleCall(NamedTuple):
    key: str
    rule: Rule
    hyper: Hyper


def _update_there(
    rule: Rule, weight: Tensor, gradient: Tensor, state: State, hyper: Hyper, *, device: torch.device
) -> None:
    """Run a rule on a GPU, on copies: a new basis keeps a processor busy for longer than they take."""
    # Counters stay on the CPU.
    there = {name: value.to(device) if value.ndim else value for name, value in state.items()}
    changed = weight.to(device)
    rule.update(changed, gradient.to(device), there, hyper)
    weight.copy_(changed)
    for name, value in state.items():
        if value.ndim:
            value.copy_(there[name])


def _plain(value: object) -> object:
    return value.item() if isinstance(value, Tensor) else value


def resume_last_step(optimizer: torch.optim.Optimizer) -> int:
    """Bring weights, moments and the optimizer's settings to the last whole step that `Budget.disk` holds.

    Data order, random numbers and learning-rate schedulers are the caller's: a Trainer that is given the optimizer then
    counts its steps from 0. What it resumes from is its checkpoints.

    Args:
        optimizer: Of `lowmem.optim`, made as in the run that was killed, on a model opened in the same way with the
            same folder.

    Returns:
        The number of steps that have been taken.

    Raises:
        ValueError: The optimizer is not one of a model opened with ``tuning="full"``, or has other groups.
        UnsupportedError: State was kept in memory (`state_on_disk` for optimizers other than AdamW).
        SourceError: No step has been committed in the folder.
    """
    engine, own = _engine(optimizer)
    return engine.resume(own)


def state_on_disk(optimizer: torch.optim.Optimizer) -> None:
    """Keep the state of an optimizer that is not AdamW on disk, beside the weights, instead of in RAM.

    GaLore and its kin, and AdamW that writes bf16 masters in another way than stochastically. Their state is then
    committed with each step as AdamW's is: a killed run goes on with `resume_last_step`, and `state_dict()` stays
    small. Each step reads and writes it.

    Args:
        optimizer: Of `lowmem.optim`, before its first step, on a model opened with ``tuning="full"`` and state on disk.

    Raises:
        ValueError: The optimizer is not one of a model opened with ``tuning="full"``.
        UnsupportedError: The weights are in memory.
        RuntimeError: A step has been taken.
    """
    engine, own = _engine(optimizer)
    engine.state_on_disk(own)


def update_in_backward(optimizer: torch.optim.Optimizer) -> None:
    """Update each block with state on disk within its backward, which saves writing and reading its gradient.

    The norm of all gradients is not known then: clipping is refused when it would change something, and so is gradient
    accumulation. The logged norm is right all the same. Settings are those that the groups have during the backward.

    Args:
        optimizer: `lowmem.optim.AdamW` on a model opened with ``tuning="full"`` and state on disk.

    Raises:
        ValueError: The optimizer is not one of a model opened with ``tuning="full"``.
        UnsupportedError: State is in memory, or the optimizer is not AdamW.
    """
    engine, own = _engine(optimizer)
    engine.update_in_backward(own)


def _engine(optimizer: torch.optim.Optimizer) -> tuple[OptimizerEngine, RuleOptimizer]:
    engine = engine_of(optimizer.param_groups[0]["params"][0])
    if not isinstance(engine, OptimizerEngine) or not isinstance(optimizer, RuleOptimizer):
        raise ValueError("expected an optimizer of lowmem.optim on a model opened with tuning='full'")
    return engine, optimizer
