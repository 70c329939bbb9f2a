"""Which experts the next block will be asked for, guessed while this one computes, so that their reads begin early.

The next block's router scores the hidden states that this block's experts work on. A residual stream changes little
from block to block, so that most of the experts with the largest scores are those that the router then takes; but it is
a guess, and nothing is computed from it. Reading is all that it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lowmem.experts.reading import ExpertReader
from lowmem.experts.stacks import RoutedExperts

_KEPT_DTYPE = torch.bfloat16
"""For a guess it does, and takes half of what the compute dtype would."""


def routers_bytes(experts: Sequence[RoutedExperts | None]) -> int:
    """What the routers of some blocks take, kept for guesses."""
    routers = (own.router for own in experts if own is not None)
    return sum(router.shape.numel() * _KEPT_DTYPE.itemsize for router in routers if router is not None)


class Foresight:
    """Keeps the routers of visited blocks, and has a reader begin with what they are likely to choose."""

    def __init__(self, experts: Sequence[RoutedExperts | None], *, reader: ExpertReader, num_per_token: int) -> None:
        """Keep nothing yet.

        Args:
            experts: Of each block, what is taken one by one.
            reader: Reads single experts; stays the caller's.
            num_per_token: Experts that a token is sent to.
        """
        self._experts, self._reader, self._num_per_token = tuple(experts), reader, num_per_token
        self._kept: dict[int, Tensor] = {}
        self._alone: Collection[int] = ()

    @property
    def nbytes(self) -> int:
        """Memory that it takes now."""
        return sum(router.nbytes for router in self._kept.values())

    def guess_for(self, blocks: Collection[int]) -> None:
        """Say of which blocks experts may be read one by one."""
        self._alone = blocks

    def over(
        self, block: int, values: Mapping[str, Tensor], *, is_unpacked: Callable[[int, int], bool]
    ) -> Callable[[Tensor], None] | None:
        """What is to see the hidden states of a visit.

        Args:
            block: Number of the block.
            values: Its dense parameters by model name; of them its router is kept.
            is_unpacked: Whether an expert of a block need not be read, as it is still there from an earlier visit.

        Returns:
            Starts reads for the next block; None where nothing can be guessed.
        """
        own = self._experts[block]
        if block not in self._kept and own is not None and own.router is not None and own.router.key in values:
            self._kept[block] = values[own.router.key].detach().to(_KEPT_DTYPE, copy=True)
        following = block + 1
        if following not in self._alone or following not in self._kept or not self._reader.foresees:
            return None
        return partial(self._guess, following, is_unpacked)

    def _guess(self, block: int, is_unpacked: Callable[[int, int], bool], hidden: Tensor) -> None:
        router = self._kept[block]
        rows = hidden.detach().reshape(-1, router.shape[1])
        scores = torch.mm(rows, router.t().to(rows.dtype))
        best = scores.topk(min(self._num_per_token, router.shape[0]), dim=1).indices.flatten()
        # Of several tokens those experts first that most of them are sent to.
        numbers, counts = torch.unique(best, return_counts=True)
        likeliest = numbers[counts.argsort(descending=True, stable=True)].tolist()
        self._reader.foresee(block, [number for number in likeliest if not is_unpacked(block, number)])

    def close(self) -> None:
        """Release what is kept."""
        self._kept.clear()
