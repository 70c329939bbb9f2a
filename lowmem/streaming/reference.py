"""Policy and reference in one pass: a second forward over the same inputs shares the visits of a first one.

TRL's trainers run the same batch twice: with its adapters, and without them (or with a frozen copy) as the reference.
Which of the two comes first, and whether they come at all, differs from trainer to trainer; so it is learned. Where a
forward was followed by another one over the same inputs in another state, the next forward in the first state leads,
and the second follows: in each visit both run. When the second is then asked for, and all its arguments and weights are
the same by value, its results are replayed without a visit; otherwise it runs as if nothing had been.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowmem.internals.hooks import has_foreign_hooks
from lowmem.internals.peft import flags_set, weight_marks
from lowmem.internals.torch import TreeSpec, modules_in, tree_flatten, tree_unflatten
from lowmem.internals.transformers import collected_keys, collecting
from lowmem.models.absent import AbsentParameter
from lowmem.streaming.block import BlockFunction, RecordedCall, run_block, run_here
from lowmem.streaming.call import BlockCall, CallArguments
from lowmem.streaming.recompute import RandomState, capture, restore, same_state
from lowmem.streaming.runtime import Runtime
from lowmem.streaming.same_inputs import Correspondence, ForwardState, Inputs, Unsuitable, correspond


class CannotFollow(Exception):
    """The second forward has to have a pass of its own."""


@dataclass
class _Step:
    """What one block did in a forward that followed."""

    inputs: Inputs
    shape: torch.Size
    dtype: torch.dtype
    spec: TreeSpec
    leaves: list[object]
    call: RecordedCall | None

    def output(self, hidden: Tensor) -> object:
        return tree_unflatten([hidden if isinstance(leaf, _Hidden) else leaf for leaf in self.leaves], self.spec)


class _Hidden:
    """Where the hidden states belong in an output."""


@dataclass
class Follower:
    """The second forward: runs as the first one does, and then waits to be asked for."""

    state: ForwardState
    """What it runs in."""
    lead: ForwardState
    """What the forward runs in that it follows."""
    inputs: Inputs
    """The first block's arguments, those of both forwards."""
    marks: tuple[object, ...]
    """The adapters' weights."""
    hidden: Tensor = field(init=False)
    """Its hidden states, (batch, tokens, hidden): of the blocks so far, in the end the last block's."""
    steps: list[_Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hidden = self.inputs.hidden.detach()

    def run(self, runtime: Runtime, index: int, inputs: Inputs) -> None:
        """Run a block in the visit under way.

        Args:
            runtime: Has its weights bound.
            index: Number of the block.
            inputs: The first forward's arguments to it.

        Raises:
            CannotFollow: It draws random numbers (the first forward would draw others), or its output is no single
                tensor. The generators are put back.
        """
        random = capture(runtime.device)
        args, kwargs = inputs.with_hidden(self.hidden)
        recorded: RecordedCall | None = None
        with torch.no_grad(), collecting(None), flags_set(runtime.modules[index], self.state.flags[index]):
            if self.state.grad:
                call = BlockCall(args, kwargs)
                hidden = call.take_inputs()
                recorded = RecordedCall(runtime, index, call)
                output = recorded.rebuild(recorded.forward(hidden))
            else:
                output = run_here(runtime, index, args, kwargs)
        if not same_state(random, capture(runtime.device)):
            restore(random, runtime.device)
            raise CannotFollow
        self.hidden, leaves, spec = _single_tensor(output)
        if index:
            # For comparing the other arguments later: the hidden states need not live that long.
            inputs.drop_hidden()
        self.steps.append(_Step(inputs, self.hidden.shape, self.hidden.dtype, spec, leaves, recorded))

    def fits(self, runtime: Runtime) -> bool:
        """Whether the adapters still have the weights that it ran with."""
        return self.marks == weight_marks(runtime.modules, skip=AbsentParameter)


def _single_tensor(output: object) -> tuple[Tensor, list[object], TreeSpec]:
    """A block's output: its hidden states, and its structure with their place marked.

    Raises:
        CannotFollow: There are several tensors, or none.
    """
    leaves, spec = tree_flatten(output)
    found = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if len(found) != 1:
        raise CannotFollow
    hidden = leaves[found[0]]
    leaves[found[0]] = _Hidden()
    return hidden, leaves, spec


class Replay:
    """Gives a forward the results of one that followed an earlier forward, block by block, without a visit.

    Args:
        follower: What ran.
        order: How its sequences correspond with those of the forward that asks.
    """

    def __init__(self, follower: Follower, order: Correspondence) -> None:
        self._follower, self._order = follower, order
        self._given: Tensor | None = None
        self._asked: list[CallArguments] = []

    def next(self, runtime: Runtime, index: int, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """The output of the next block.

        Raises:
            CannotFollow: This call differs from the one that ran: `run_after_all` must take over.
        """
        if index != len(self._asked):
            raise CannotFollow
        step = self._follower.steps[index]
        try:
            inputs = Inputs(args, kwargs)
        except Unsuitable as error:
            raise CannotFollow from error
        if index and (inputs.hidden is not self._given or not self._order.holds(inputs, step.inputs)):
            raise CannotFollow
        self._asked.append((tuple(args), dict(kwargs)))
        last = index == runtime.num_blocks - 1
        # Nobody reads what lies between the blocks: one element of NaN stands for it, and would be noticed.
        value = self._follower.hidden if last else _placeholder(step.shape, step.dtype, runtime.device)
        hidden = (
            self._with_graph(runtime.modules[index], step, inputs.hidden, value) if torch.is_grad_enabled() else value
        )
        self._given = self._order.to_new(hidden) if last else hidden
        return step.output(self._given)

    def _with_graph(self, block: torch.nn.Module, step: _Step, hidden: Tensor, value: Tensor) -> Tensor:
        assert step.call is not None
        params = [param for param in block.parameters() if param.requires_grad]
        if not self._asked[1:]:
            hidden = self._order.to_old(hidden)
        if not params and not hidden.requires_grad:
            return value
        step.call.give_outputs((value,))
        (output,) = BlockFunction.apply(step.call, 1, hidden, *params)  # type: ignore[no-untyped-call]
        assert isinstance(output, Tensor)
        return output

    def run_after_all(
        self, runtime: Runtime, index: int, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> object:
        """Run the blocks whose results were replayed, then the one that is asked for now.

        Raises:
            RuntimeError: Something between the blocks has read what stood for hidden states.
        """
        calls = [*enumerate(self._asked), (index, (tuple(args), dict(kwargs)))]
        hidden: Tensor | None = None
        for number, (block, call) in enumerate(calls):
            if hidden is not None:
                call = _replaced(call, self._given if number == len(self._asked) else None, hidden)
            output = run_block(runtime, block, *call)
            hidden = _single_tensor(output)[0]
        return output


def _replaced(call: CallArguments, given: Tensor | None, hidden: Tensor) -> CallArguments:
    leaves, spec = tree_flatten(call)
    index = next(index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    if given is not None and leaves[index] is not given:
        raise RuntimeError(
            "the model changed its hidden states between two blocks in one forward and not in another over the same "
            "inputs; remove hooks that do, or call it under other inputs"
        )
    leaves[index] = hidden
    args, kwargs = tree_unflatten(leaves, spec)
    return args, kwargs


def _placeholder(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    memory = torch.full((1,), float("nan"), dtype=dtype, device=device)
    # Not a view: outputs of an autograd Function must not be views of what it made.
    return torch.empty(0, dtype=dtype, device=device).set_(memory.untyped_storage(), 0, shape, (0,) * len(shape))


_REMEMBERED = 4
"""Forwards among which one over the same inputs is looked for."""

_COLLECTED_BY_LEAD = frozenset({"router_logits"})
"""What a forward may collect and lead another one, which does not; replayed forwards collect nothing."""

_MOST_MISSED = 2
"""So often may a second forward run and not be asked for before it always has a pass of its own."""


class _Lead:
    """A forward under way that others follow."""

    def __init__(self, followers: list[Follower]) -> None:
        self.followers = followers
        self.num_blocks = 0
        self.output: Tensor | None = None
        self._random: RandomState | None = None

    def is_next(self, index: int, hidden: Tensor, device: torch.device) -> bool:
        """Whether a block follows the last one with nothing in between, not even a draw that decides on skipping it."""
        if index != self.num_blocks:
            return False
        return self._random is None or (hidden is self.output and same_state(self._random, capture(device)))

    def ran(self, output: Tensor, device: torch.device) -> None:
        """Note what a block gave."""
        self.num_blocks += 1
        self.output, self._random = output, capture(device)


class ReferencePass:
    """Knows which forwards come in twos, runs the second with the first, and keeps it until it is asked for.

    Args:
        expects_reference: Whether each training forward is followed by one with its adapters disabled.
    """

    def __init__(self, *, expects_reference: bool) -> None:
        self._expects_reference = expects_reference
        self._follows: dict[ForwardState, list[ForwardState]] = {}
        self._apart: set[tuple[ForwardState, ForwardState]] = set()
        self._missed: Counter[tuple[ForwardState, ForwardState]] = Counter()
        self._recent: deque[tuple[ForwardState, Tensor]] = deque(maxlen=_REMEMBERED)
        self._waiting: list[Follower] = []
        self._lead: _Lead | None = None
        self._replay: Replay | None = None

    def call(self, runtime: Runtime, index: int, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """Run one block, or replay its results.

        Args:
            runtime: Lends the blocks their weights.
            index: Number of the block.
            args: Positional arguments of its forward.
            kwargs: Keyword arguments.
        """
        if index == 0:
            self._begin(runtime, args, kwargs)
        try:
            if self._replay is not None:
                return self._replayed(runtime, self._replay, index, args, kwargs)
            if self._lead is not None:
                return self._leading(runtime, self._lead, index, args, kwargs)
        except BaseException:
            self.forget()
            raise
        return run_block(runtime, index, args, kwargs)

    def forget(self) -> None:
        """Drop what is under way and what waits; what was learned stays."""
        self._lead = self._replay = None
        self._waiting.clear()

    def _begin(self, runtime: Runtime, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        self._lead = self._replay = None
        try:
            inputs = Inputs(args, kwargs)
        except Unsuitable:
            return
        if _is_watched(runtime.modules) or collected_keys() - _COLLECTED_BY_LEAD:
            return
        state = ForwardState.now(runtime.modules, runtime.device)
        for follower in [] if collected_keys() else self._waiting:
            order = correspond(inputs, follower.inputs) if follower.state == state else None
            if order is not None and follower.fits(runtime):
                self._waiting.remove(follower)
                self._replay = Replay(follower, order)
                return
        self._drop_unasked(state)
        self._learn(state, inputs.hidden.detach())
        followers = [follower for follower in self._follows.get(state, ()) if (state, follower) not in self._apart]
        if followers:
            marks = weight_marks(runtime.modules, skip=AbsentParameter)
            self._lead = _Lead([Follower(follower, state, inputs, marks) for follower in followers])

    def _drop_unasked(self, first: ForwardState) -> None:
        """What followed the last forward in this state and was not asked for is not run again until learned anew."""
        for follower in [follower for follower in self._waiting if follower.lead == first]:
            self._waiting.remove(follower)
            self._follows[first].remove(follower.state)
            pair = (first, follower.state)
            self._missed[pair] += 1
            if self._missed[pair] >= _MOST_MISSED:
                self._apart.add(pair)

    def _learn(self, state: ForwardState, hidden: Tensor) -> None:
        sums = hidden.flatten(1).sum(1, dtype=torch.float64).sort().values
        for first, others in self._recent:
            if state.can_follow(first) and others.shape == sums.shape and torch.allclose(others, sums, rtol=1e-9):
                known = self._follows.setdefault(first, [])
                if state not in known:
                    known.append(state)
                break
        if self._expects_reference and state.grad and state.reference.can_follow(state):
            self._follows.setdefault(state, [state.reference])
        self._recent.append((state, sums))

    def _replayed(
        self, runtime: Runtime, replay: Replay, index: int, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> object:
        try:
            output = replay.next(runtime, index, args, kwargs)
        except CannotFollow:
            self._replay = None
            return replay.run_after_all(runtime, index, args, kwargs)
        if index == runtime.num_blocks - 1:
            self._replay = None
        return output

    def _leading(
        self, runtime: Runtime, lead: _Lead, index: int, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> object:
        try:
            inputs = Inputs(args, kwargs)
        except Unsuitable:
            inputs = None
        if inputs is None or not lead.is_next(index, inputs.hidden, runtime.device):
            # Something happens between this model's blocks that would have to happen to the other forward too.
            self._keep_apart(lead, list(lead.followers))
            return run_block(runtime, index, args, kwargs)
        output = run_block(
            runtime,
            index,
            args,
            kwargs,
            follow=lambda: self._run_followers(runtime, lead, index, inputs),
            phase="forward" if any(follower.state.grad for follower in lead.followers) else "no_grad",
        )
        try:
            lead.ran(_single_tensor(output)[0], runtime.device)
        except CannotFollow:
            self._keep_apart(lead, list(lead.followers))
        if index == runtime.num_blocks - 1:
            self._waiting += lead.followers
            self._lead = None
        return output

    def _run_followers(self, runtime: Runtime, lead: _Lead, index: int, inputs: Inputs) -> None:
        if not inputs.unchanged:
            self._keep_apart(lead, list(lead.followers))
        for follower in list(lead.followers):
            try:
                follower.run(runtime, index, inputs)
            except CannotFollow:
                self._keep_apart(lead, [follower])

    def _keep_apart(self, lead: _Lead, followers: list[Follower]) -> None:
        for follower in followers:
            self._apart.add((follower.lead, follower.state))
            lead.followers.remove(follower)
        if not lead.followers:
            self._lead = None


def _is_watched(blocks: Sequence[torch.nn.Module]) -> bool:
    """Whether hooks look at hidden states between the blocks or inside them."""
    return any(has_foreign_hooks(module) for block in blocks for module in modules_in(block))
