"""Policy and reference in one pass: two forwards over the same inputs share the visits of the blocks.

TRL's trainers run the same batch twice: with its adapters, and without them (or with a frozen copy) as the reference.
Which of the two comes first, and whether they come at all, differs from trainer to trainer; so it is learned. Where a
forward was followed by another one over the same inputs in another state, the next forward in the first state takes the
second along: in each visit both run. When the second is then asked for, and all its arguments and weights are the
same by value, it is answered without a visit; otherwise it runs as if nothing had been.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lowmem.streaming.adapter_flags import weight_marks
from lowmem.streaming.beside import Answer, Beside, Blocks, CannotFollow, single_tensor
from lowmem.streaming.forward_state import ForwardState
from lowmem.streaming.random_state import RandomState, capture, same_state
from lowmem.streaming.router_logits import collected_keys
from lowmem.streaming.same_inputs import Inputs, Unsuitable, correspond

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
            marks = weight_marks(blocks.modules)
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


__all__ = ["Twins", "Visitor"]
