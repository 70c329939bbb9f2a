"""Which decoder blocks are trained in which steps.

Whole matrices in turn: BAdam, LISA, and FRUGAL by blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lowmem.optim.method import BlockOrder
from lowmem.optim.projected import DirectionRule, inner_direction, new_inner_state
from lowmem.optim.rule import Hyper, State, counter, generator, mix
from lowmem.optim.state import check_writable, new_writer_state

_CPU = torch.device("cpu")


@lru_cache(maxsize=64)
def active_blocks(order: BlockOrder, *, window: int, num_blocks: int, count: int, seed: int) -> frozenset[int]:
    """The blocks of one window of steps; a pure function, so that nothing has to be saved.

    Args:
        order: random goes through all blocks in a new random order each round (BAdam), sample draws `count` anew each
            time (LISA), ascending and descending go round, fixed stays with the first `count`.
        window: Number of the window, from 0.
        num_blocks: Blocks there are.
        count: Blocks at a time.
        seed: The same for all parameters of an optimizer.
    """
    if count >= num_blocks:
        return frozenset(range(num_blocks))
    if order == "fixed":
        return frozenset(range(count))
    if order == "sample":
        return frozenset(_permutation(num_blocks, mix(seed, window))[:count])
    positions = range(window * count, (window + 1) * count)
    if order == "random":
        rounds = {position // num_blocks for position in positions}
        orders = {number: _permutation(num_blocks, mix(seed, number)) for number in rounds}
        return frozenset(orders[position // num_blocks][position % num_blocks] for position in positions)
    ascending = [position % num_blocks for position in positions]
    return frozenset(ascending if order == "ascending" else [num_blocks - 1 - block for block in ascending])


def _permutation(count: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=generator(seed, _CPU)).tolist()
    return order


@dataclass(frozen=True, kw_only=True)
class BlockRule(DirectionRule):
    """A parameter of a decoder block that has moments only in the windows of steps in which its block is chosen.

    Without a residual the parameter is not touched in other windows and keeps nothing, not even an fp32 master.
    """

    def __post_init__(self) -> None:
        assert self.place.block is not None

    def is_active(self, clock: int) -> bool:
        """Always with a residual, otherwise while the block is chosen."""
        return self.method.residual != "none" or self.is_chosen(clock)

    def is_chosen(self, clock: int) -> bool:
        """Whether the block has moments in the step after `clock` completed ones."""
        num_blocks = self.place.num_blocks
        count = self.method.active_blocks or max(1, round(self.method.density * num_blocks))
        chosen = active_blocks(
            self.method.block_order,
            window=clock // self.method.update_gap,
            num_blocks=num_blocks,
            count=count,
            seed=self.place.seed,
        )
        return self.place.block in chosen

    def init(self, weight: Tensor) -> State:
        """The window of the last step, steps since the moments were zero, moments, and what the writer keeps."""
        check_writable(weight)
        state: State = {"window": counter(-1), "inner_step": counter()}
        state |= self._new_moments(weight)
        return state | self._limiter_state(weight) | new_writer_state(self.method.writer, weight)

    def direction(self, gradient: Tensor, state: State, hyper: Hyper) -> Tensor:
        """The inner direction if the block is chosen, the residual otherwise."""
        gradient = gradient.float()
        is_chosen = self.is_chosen(hyper.clock)
        self._enter_window(gradient, state, hyper, is_chosen=is_chosen)
        if is_chosen:
            state["inner_step"] += 1
            step = int(state["inner_step"])
            update = inner_direction(self.method.inner, gradient, state, hyper, step=step, seed=self._seed(hyper))
            return self._limit(update.mul_(self.method.scale), state)
        rest = gradient.sign() if self.method.residual == "sign" else gradient.clone()
        return self._limit(rest.mul_(self.method.residual_scale), state)

    def _enter_window(self, gradient: Tensor, state: State, hyper: Hyper, *, is_chosen: bool) -> None:
        """Bring the moments in line with the window of this step."""
        window = hyper.clock // self.method.update_gap
        has_moments = "exp_avg" in state
        is_new = int(state["window"]) != window
        if has_moments and (not is_chosen or (is_new and self.method.at_refresh == "reset")):
            for name in [name for name in state if name.startswith("exp_avg")]:
                del state[name]
            has_moments = False
        if is_chosen and not has_moments:
            state.update(self._new_moments(gradient))
            state["inner_step"].zero_()
        state["window"].fill_(window)

    def _new_moments(self, like: Tensor) -> State:
        return new_inner_state(self.method.inner, like.shape, state_dtype=self.method.state_dtype, device=like.device)
