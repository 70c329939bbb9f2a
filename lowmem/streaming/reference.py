"""A second forward over the same inputs, run block by block in the visits of a first one, and asked for later.

Policy and reference in one pass: two forwards over the same inputs share the visits of the blocks.

TRL's trainers run the same batch twice: with its adapters, and without them (or with a frozen copy) as the reference.
Which of the two comes first, and whether they come at all, differs from trainer to trainer; so it is learned. Where a
forward was followed by another one over the same inputs in another state, the next forward in the first state takes the
second along: in each visit both run. When the second is then asked for, and all its arguments and weights are the
same by value, it is answered without a visit; otherwise it runs as if nothing had been.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lowmem.internals.peft import flags_set, weight_marks
from lowmem.internals.torch import TreeSpec, tree_flatten, tree_unflatten
from lowmem.internals.transformers import collected_keys, collecting
from lowmem.models.absent import AbsentParameter
from lowmem.streaming.block import BlockFunction
from lowmem.streaming.recompute import RandomState, capture, restore, same_state
from lowmem.streaming.same_inputs import Correspondence, ForwardState, Inputs, Unsuitable, correspond

Arguments = tuple[tuple[object, ...], dict[str, object]]


class Entry(Protocol):
    """A recorded call of a block."""

    def forward_here(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the forward in the visit that is under way."""

    def run_backward(
        self, grads: Sequence[Tensor | None], params: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Visit the block and run the backward."""

    def rebuild(self, tensors: Sequence[Tensor]) -> object:
        """The block's output from its tensors."""


class Blocks(Protocol):
    """What runs the blocks: the runtime."""

    device: torch.device

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""

    @property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        """The blocks' modules."""

    def run_here(self, index: int, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """Run a block without gradients in the visit that is under way."""

    def recorded_call(self, index: int, args: Sequence[object], kwargs: Mapping[str, object]) -> tuple[Entry, Tensor]:
        """A call that will have a backward, and its hidden states; part of the pass that is under way."""

    def run_block(self, index: int, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """Visit a block and run it, recorded where gradients will be asked for."""


class CannotFollow(Exception):
    """The second forward has to have a pass of its own."""


@dataclass
class _Step:
    """What one block did."""

    inputs: Inputs
    shape: torch.Size
    dtype: torch.dtype
    spec: TreeSpec
    leaves: list[object]
    entry: Entry | None

    def output(self, hidden: Tensor) -> object:
        return tree_unflatten([hidden if isinstance(leaf, _Hidden) else leaf for leaf in self.leaves], self.spec)


class _Hidden:
    """Where the hidden states belong in an output."""


@dataclass
class Beside:
    """The second forward: runs as the first one does, and then waits to be asked for."""

    state: ForwardState
    """What it runs in."""
    first: ForwardState
    """What the forward runs in that takes it along."""
    inputs: Inputs
    """The first block's arguments, those of both forwards."""
    marks: tuple[object, ...]
    """The adapters' weights."""
    hidden: Tensor = field(init=False)
    """Its hidden states: of the blocks so far, in the end the last block's."""
    steps: list[_Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hidden = self.inputs.hidden.detach()

    def run(self, blocks: Blocks, index: int, inputs: Inputs) -> None:
        """Run a block whose weights are bound now.

        Args:
            blocks: Runs it.
            index: Number of the block.
            inputs: The first forward's arguments to it.

        Raises:
            CannotFollow: It draws random numbers (the first forward would draw others), or its output is no single
                tensor. The generators are put back.
        """
        random = capture(blocks.device)
        args, kwargs = inputs.with_hidden(self.hidden)
        entry: Entry | None = None
        with torch.no_grad(), collecting(None), flags_set(blocks.modules[index], self.state.flags[index]):
            if self.state.grad:
                entry, hidden = blocks.recorded_call(index, args, kwargs)
                output = entry.rebuild(entry.forward_here([hidden]))
            else:
                output = blocks.run_here(index, args, kwargs)
        if not same_state(random, capture(blocks.device)):
            restore(random, blocks.device)
            raise CannotFollow
        self.hidden, leaves, spec = single_tensor(output)
        kept = inputs if index == 0 else without_hidden(inputs)
        self.steps.append(_Step(kept, self.hidden.shape, self.hidden.dtype, spec, leaves, entry))

    def fits(self, blocks: Blocks) -> bool:
        """Whether the adapters still have the weights that it ran with."""
        return self.marks == weight_marks(blocks.modules, skip=AbsentParameter)


def single_tensor(output: object) -> tuple[Tensor, list[object], TreeSpec]:
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


def without_hidden(inputs: Inputs) -> Inputs:
    """For comparing the other arguments later: the hidden states need not live that long."""
    inputs.drop_hidden()
    return inputs


class Answer:
    """Gives a forward what ran beside an earlier one, block by block, without visiting any block."""

    def __init__(self, beside: Beside, order: Correspondence) -> None:
        """Begin with the first block.

        Args:
            beside: What ran.
            order: How its sequences correspond with those of the forward that asks.
        """
        self._beside, self._order = beside, order
        self._given: Tensor | None = None
        self._asked: list[Arguments] = []

    def next(self, blocks: Blocks, index: int, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """The output of the next block.

        Raises:
            CannotFollow: This call differs from the one that ran: `run_after_all` must take over.
        """
        if index != len(self._asked):
            raise CannotFollow
        step = self._beside.steps[index]
        try:
            inputs = Inputs(args, kwargs)
        except Unsuitable as error:
            raise CannotFollow from error
        if index and (inputs.hidden is not self._given or not self._order.holds(inputs, step.inputs)):
            raise CannotFollow
        self._asked.append((tuple(args), dict(kwargs)))
        last = index == blocks.num_blocks - 1
        # Nobody reads what lies between the blocks: one element of NaN stands for it, and would be noticed.
        value = self._beside.hidden if last else _placeholder(step.shape, step.dtype, blocks.device)
        hidden = (
            self._with_graph(blocks.modules[index], step, inputs.hidden, value) if torch.is_grad_enabled() else value
        )
        self._given = self._order.to_new(hidden) if last else hidden
        return step.output(self._given)

    def _with_graph(self, block: torch.nn.Module, step: _Step, hidden: Tensor, value: Tensor) -> Tensor:
        assert step.entry is not None
        params = [param for param in block.parameters() if param.requires_grad]
        if not self._asked[1:]:
            hidden = self._order.to_old(hidden)
        if not params and not hidden.requires_grad:
            return value
        entry = _AlreadyRun(step.entry, value)
        (output,) = BlockFunction.apply(entry, 1, hidden, *params)  # type: ignore[no-untyped-call]
        assert isinstance(output, Tensor)
        return output

    def run_after_all(self, blocks: Blocks, index: int, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """Run the blocks that were answered, then the one that is asked for now.

        Raises:
            RuntimeError: Something between the blocks has read what stood for hidden states.
        """
        calls = [*enumerate(self._asked), (index, (tuple(args), dict(kwargs)))]
        hidden: Tensor | None = None
        for number, (block, call) in enumerate(calls):
            if hidden is not None:
                call = _replaced(call, self._given if number == len(self._asked) else None, hidden)
            output = blocks.run_block(block, *call)
            hidden = single_tensor(output)[0]
        return output


def _replaced(call: Arguments, given: Tensor | None, hidden: Tensor) -> Arguments:
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


class _AlreadyRun:
    """A recorded call whose forward lies behind."""

    def __init__(self, entry: Entry, output: Tensor) -> None:
        self._entry, self._outputs = entry, [output]

    def run_forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the forward gave, once."""
        return (self._outputs.pop(),)

    def run_backward(
        self, grads: Sequence[Tensor | None], params: Sequence[Tensor], wanted: Sequence[bool]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """As the recorded call does it."""
        return self._entry.run_backward(grads, params, wanted)


def _placeholder(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    memory = torch.full((1,), float("nan"), dtype=dtype, device=device)
    # Not a view: outputs of an autograd Function must not be views of what it made.
    return torch.empty(0, dtype=dtype, device=device).set_(memory.untyped_storage(), 0, shape, (0,) * len(shape))


_REMEMBERED = 4
"""Forwards among which one over the same inputs is looked for."""


_COLLECTED_BY_LEAD = frozenset({"router_logits"})
"""What a forward may collect and take another one along, which does not; answered forwards collect nothing."""


_MOST_MISSED = 2
"""So often may a second forward run and not be asked for before it always has a pass of its own."""


class Visitor(Blocks, Protocol):
    """What runs the blocks: the runtime."""

    def run_block(
        self,
        index: int,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        *,
        beside: Callable[[], None] | None = None,
        recorded_beside: bool = False,
    ) -> object:
        """Visit a block and run it, recorded where gradients will be asked for.

        Args:
            index: Number of the block.
            args: Positional arguments of its forward.
            kwargs: Keyword arguments.
            beside: What to run in the same visit after it.
            recorded_beside: Whether that will have a backward.
        """


class _Lead:
    """A forward under way that takes others along."""

    def __init__(self, followers: list[Beside]) -> None:
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


class Twins:
    """Knows which forwards come in twos, runs the second beside the first, and keeps it until it is asked for."""

    def __init__(self, *, expects_reference: bool) -> None:
        """Begin with nothing learned.

        Args:
            expects_reference: Whether each training forward is followed by one with its adapters disabled.
        """
        self._expects_reference = expects_reference
        self._follows: dict[ForwardState, list[ForwardState]] = {}
        self._apart: set[tuple[ForwardState, ForwardState]] = set()
        self._missed: Counter[tuple[ForwardState, ForwardState]] = Counter()
        self._recent: deque[tuple[ForwardState, Tensor]] = deque(maxlen=_REMEMBERED)
        self._waiting: list[Beside] = []
        self._lead: _Lead | None = None
        self._answer: Answer | None = None

    def call(self, blocks: Visitor, index: int, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """Run or answer one block.

        Args:
            blocks: Runs it.
            index: Number of the block.
            args: Positional arguments of its forward.
            kwargs: Keyword arguments.
        """
        if index == 0:
            self._begin(blocks, args, kwargs)
        try:
            if self._answer is not None:
                return self._answered(blocks, self._answer, index, args, kwargs)
            if self._lead is not None:
                return self._leading(blocks, self._lead, index, args, kwargs)
        except BaseException:
            self.forget()
            raise
        return blocks.run_block(index, args, kwargs)

    def forget(self) -> None:
        """Drop what is under way and what waits; what was learned stays."""
        self._lead = self._answer = None
        self._waiting.clear()

    def _begin(self, blocks: Visitor, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        self._lead = self._answer = None
        try:
            inputs = Inputs(args, kwargs)
        except Unsuitable:
            return
        watched = _is_watched(blocks.modules) or collected_keys() - _COLLECTED_BY_LEAD
        if watched:
            return
        state = ForwardState.now(blocks.modules, blocks.device)
        for beside in [] if collected_keys() else self._waiting:
            order = correspond(inputs, beside.inputs) if beside.state == state else None
            if order is not None and beside.fits(blocks):
                self._waiting.remove(beside)
                self._answer = Answer(beside, order)
                return
        self._drop_unasked(state)
        self._learn(state, inputs.hidden.detach())
        followers = [follower for follower in self._follows.get(state, ()) if (state, follower) not in self._apart]
        if followers:
            marks = weight_marks(blocks.modules, skip=AbsentParameter)
            self._lead = _Lead([Beside(follower, state, inputs, marks) for follower in followers])

    def _drop_unasked(self, first: ForwardState) -> None:
        """What ran beside the last forward in this state and was not asked for is not run again until learned anew."""
        for beside in [beside for beside in self._waiting if beside.first == first]:
            self._waiting.remove(beside)
            self._follows[first].remove(beside.state)
            pair = (first, beside.state)
            self._missed[pair] += 1
            if self._missed[pair] >= _MOST_MISSED:
                self._apart.add(pair)

    def _learn(self, state: ForwardState, hidden: Tensor) -> None:
        sums = hidden.flatten(1).sum(1, dtype=torch.float64).sort().values
        for first, others in self._recent:
            if state.can_run_beside(first) and others.shape == sums.shape and torch.allclose(others, sums, rtol=1e-9):
                known = self._follows.setdefault(first, [])
                if state not in known:
                    known.append(state)
                break
        if self._expects_reference and state.grad and state.reference.can_run_beside(state):
            self._follows.setdefault(state, [state.reference])
        self._recent.append((state, sums))

    def _answered(
        self, blocks: Visitor, answer: Answer, index: int, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> object:
        try:
            output = answer.next(blocks, index, args, kwargs)
        except CannotFollow:
            self._answer = None
            return answer.run_after_all(blocks, index, args, kwargs)
        if index == blocks.num_blocks - 1:
            self._answer = None
        return output

    def _leading(
        self, blocks: Visitor, lead: _Lead, index: int, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> object:
        try:
            inputs = Inputs(args, kwargs)
        except Unsuitable:
            inputs = None
        if inputs is None or not lead.is_next(index, inputs.hidden, blocks.device):
            # Something happens between this model's blocks that would have to happen to the other forward too.
            self._keep_apart(lead, list(lead.followers))
            return blocks.run_block(index, args, kwargs)
        output = blocks.run_block(
            index,
            args,
            kwargs,
            beside=lambda: self._run_beside(blocks, lead, index, inputs),
            recorded_beside=any(follower.state.grad for follower in lead.followers),
        )
        try:
            lead.ran(single_tensor(output)[0], blocks.device)
        except CannotFollow:
            self._keep_apart(lead, list(lead.followers))
        if index == blocks.num_blocks - 1:
            self._waiting += lead.followers
            self._lead = None
        return output

    def _run_beside(self, blocks: Visitor, lead: _Lead, index: int, inputs: Inputs) -> None:
        if not inputs.unchanged:
            self._keep_apart(lead, list(lead.followers))
        for follower in list(lead.followers):
            try:
                follower.run(blocks, index, inputs)
            except CannotFollow:
                self._keep_apart(lead, [follower])

    def _keep_apart(self, lead: _Lead, followers: list[Beside]) -> None:
        for follower in followers:
            self._apart.add((follower.first, follower.state))
            lead.followers.remove(follower)
        if not lead.followers:
            self._lead = None


def _is_watched(blocks: Sequence[torch.nn.Module]) -> bool:
    """Whether hooks look at hidden states between the blocks; transformers' own are idle unless they collect."""
    hooks = (hook for block in blocks for hook in (*block._forward_hooks.values(), *block._forward_pre_hooks.values()))
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)
