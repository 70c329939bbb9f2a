"""Which decoder blocks are trained in which steps."""

from functools import lru_cache

import torch

from lowmem.optim.method import BlockOrder
from lowmem.optim.randomness import generator, mix

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
