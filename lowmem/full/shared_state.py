"""State of full tuning that the ranks of a machine have in common: one copy in RAM, each rank changes its part of it.

ZeRO's partitioning of gradients and optimizer state (Rajbhandari et al., "ZeRO: Memory optimizations toward training
trillion parameter models", 2020), in a machine's shared memory: where ZeRO sends a block's new weights to every rank,
here all ranks compute from the same ones. Machines have a copy each, and only gradients go between them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.full.flat import ELEMENT_BYTES, PAGE_ELEMENTS, ParamPlace, UnitLayout, lay_out_moments
from lowmem.full.tier import GRADIENT, MOMENTS, WEIGHT, Contribution, StateMemory, view_of
from lowmem.processes.node_memory import NodeMemory
from lowmem.processes.ranks import agreement, ranks, refuse_full
from offload import PAGE_BYTES, PeerLost, ceil_div, register_host_memory, round_up, unregister_host_memory

_LANDING, _HAVE, _NORMS = "landing", "have", "norms"


class SharedState(StateMemory):
    """Memory that a machine's ranks share for weights, gradients and moments.

    A block's gradient is complete when its backward is: each rank leaves its own in shared memory, and adds those of
    all ranks up within its part of the block. State changes between two meetings only: in a step, and where all ranks
    call what sets values. So whoever computes from it or saves it needs no lock.

    All ranks of a run make one, in the same order among their other questions.

    Args:
        layouts: The units.
        num_blocks: How many of them, the first ones, are blocks.
        pin: Whether to page-lock what this rank uses of blocks' state.

    Raises:
        OffloadError: The ranks of the machine cannot share memory.
    """

    is_shared = True

    def __init__(self, layouts: Sequence[UnitLayout], *, num_blocks: int, pin: bool = False) -> None:
        found = ranks()
        self._rank, self._num_ranks, self._num_everywhere = found.local_rank, found.local_size, found.size
        self._layouts, self._num_blocks, self._pin = tuple(layouts), num_blocks, pin
        self._starts: dict[tuple[int, str], int] = {}
        end = 0
        for key, nbytes in self._regions().items():
            self._starts[key] = end
            end += round_up(nbytes, PAGE_BYTES)
        self._node = NodeMemory(end)
        self._used: dict[tuple[int, str], int] = {}
        self._pinned: list[Tensor] = []
        self._begun: set[str] = set()

    def _regions(self) -> dict[tuple[int, str], int]:
        """Bytes of what is shared: by rank what passes, by unit and field what stays."""
        blocks = self._layouts[: self._num_blocks]
        widest_bytes = ELEMENT_BYTES * max(layout.numel for layout in blocks)
        most_places = max(len(layout.places) for layout in blocks)
        regions: dict[tuple[int, str], int] = {}
        for rank in range(self._num_ranks):
            regions |= {(rank, _LANDING): widest_bytes, (rank, _HAVE): most_places}
        for index, layout in enumerate(self._layouts):
            regions[index, WEIGHT] = layout.weight_bytes
            regions[index, MOMENTS] = lay_out_moments("fp32", layout.numel, num_wide=layout.num_wide).nbytes
            if index < self._num_blocks:
                regions[index, GRADIENT] = ELEMENT_BYTES * layout.numel
                regions[index, _NORMS] = ELEMENT_BYTES * self._num_ranks * len(layout.places)
        return regions

    def room(self, index: int, field: str, nbytes: int) -> Tensor:
        place = self._shared(index, field, nbytes)
        if (index, field) not in self._used:
            self._used[index, field] = nbytes
            if self._pin and index < self._num_blocks and register_host_memory(place):
                self._pinned.append(place)
        return place

    def drop(self, index: int, field: str) -> None:
        raise AssertionError("moments are stored in one way, and others are refused")

    def sizes(self) -> dict[tuple[int, str], int]:
        """See `StateMemory.sizes`: its part of what there is once, and the room for a block's gradients of its own."""
        parts = {key: ceil_div(nbytes, self._num_ranks) for key, nbytes in self._used.items()}
        return {**parts, (self._rank, _LANDING): self._landing(self._rank).nbytes}

    def refuse_optimizer(self, optimizer: str, moments: Collection[str | None]) -> None:
        """See `StateTier.refuse_optimizer`: all but AdamW in fp32.

        Raises:
            UnsupportedError: It is another.
        """
        if set(moments) != {"fp32"}:
            refuse_full(ranks(), optimizer=f"lowmem.optim.{optimizer}")

    def fill(self, num_blocks: int, load: Callable[[int], None]) -> None:
        """See `StateMemory.fill`: each rank its part of the blocks."""
        for index in range(self._rank, num_blocks, self._num_ranks):
            load(index)
        # Whoever cannot read its blocks is heard of.
        agreement().of_all("weights", None)

    def part(self, index: int) -> slice:
        """See `StateMemory.part`: whole pages, as even as these are."""
        numel = self._layouts[index].numel
        size = round_up(ceil_div(numel, self._num_ranks), PAGE_ELEMENTS)
        return slice(min(self._rank * size, numel), min((self._rank + 1) * size, numel))

    def meet(self) -> None:
        self._node.meet()

    @contextmanager
    def changing(self, index: int, place: ParamPlace) -> Iterator[slice]:
        """See `StateMemory.changing`: nobody reads what was there any more, and then everybody what is new."""
        self._node.meet()
        yield self._within(index, place)
        self._node.meet()

    def adding(self, accumulated: Callable[[], Tensor]) -> Callable[[Contribution], None]:
        """See `StateMemory.adding`: beside what was accumulated, until `exchange`."""
        own = self._landing(self._rank)
        self._begun.clear()

        def keep(one: Contribution) -> None:
            is_first = one.place.key not in self._begun
            self._begun.add(one.place.key)
            replace(one, earlier_scales=None if is_first else ()).add_to(view_of(own, one.place))

        return keep

    def exchange(
        self,
        index: int,
        accumulated: Callable[[], Tensor],
        taken: Collection[str],
        earlier: Mapping[str, tuple[float, ...] | None],
    ) -> Collection[str]:
        """See `StateTier.exchange`. Returns when all ranks of the node have come, and their parts are complete."""
        places = self._layouts[index].places
        here = torch.tensor([place.key in taken for place in places], dtype=torch.uint8)
        self._shared(self._rank, _HAVE, len(places)).copy_(here)
        # Each rank's gradients are there, and nobody reads what was accumulated before.
        self._node.meet()
        have = torch.stack([self._shared(rank, _HAVE, len(places)) for rank in range(self._num_ranks)])
        anywhere = have.any(dim=0).float()
        self._node.sum_over_nodes(anywhere)
        given = [(number, place) for number, place in enumerate(places) if anywhere[number]]
        self._add_up(index, given, have)
        norms, own = self._norms(index), self._landing(self._rank)
        for number, place in given:
            part = self._within(index, place)
            if part.start < part.stop:
                mean, kept = own[part].div_(self._num_everywhere), accumulated()[part]
                Contribution(place=place, value=mean, earlier_scales=earlier[place.key]).add_to(kept)
                norms[self._rank, number] = torch.linalg.vector_norm(kept)
        # All parts are complete, and nobody reads another rank's gradients any more.
        self._node.meet()
        return [place.key for _, place in given]

    def _add_up(self, index: int, given: Sequence[tuple[int, ParamPlace]], have: Tensor) -> None:
        """Make this rank's part of its own gradients the sum over all ranks.

        Args:
            index: The block.
            given: Parameters that have had one, and their numbers.
            have: Which of the node's ranks has had one of which parameter, (ranks, parameters).
        """
        own = self._landing(self._rank)
        for number, place in given:
            part = self._within(index, place)
            total = own[part]
            if not have[self._rank, number]:
                total.zero_()
            for rank in range(self._num_ranks):
                if rank != self._rank and have[rank, number]:
                    total.add_(self._landing(rank)[part])
        whole = self.part(index)
        if whole.start < whole.stop:
            # What is of no parameter that has a gradient is summed too, and not looked at.
            self._node.sum_over_nodes(own[whole])

    def refuse_setting(self, key: str) -> None:
        """See `StateMemory.refuse_setting`.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            f"setting or changing the gradient of {key} in {self._num_everywhere} processes",
            reason="it is one for all of them, the mean of what each has computed",
            instead="the loss, torch.nn.utils.clip_grad_norm_, or multiplication with a number",
        )

    def norm(self, index: int, place: ParamPlace, accumulated: Tensor) -> Tensor:
        """See `StateMemory.norm`: the norm of the norms of all parts."""
        number = self._layouts[index].places.index(place)
        norm: Tensor = torch.linalg.vector_norm(self._norms(index)[:, number])
        return norm

    def cleared(self, index: int, place: ParamPlace) -> None:
        self._norms(index)[self._rank, self._layouts[index].places.index(place)] = 0.0

    def lost(self, wait_s: float) -> PeerLost | None:
        return self._node.lost(wait_s)

    def close(self) -> None:
        """Let go of it; the ranks need not do that at the same time."""
        for place in self._pinned:
            unregister_host_memory(place)
        self._pinned.clear()
        self._node.close()

    def _within(self, index: int, place: ParamPlace) -> slice:
        """Elements of a parameter that this rank changes; may be none."""
        part = self.part(index)
        start = max(part.start, place.start)
        return slice(start, max(start, min(part.stop, place.stop)))

    def _shared(self, index: int, field: str, nbytes: int) -> Tensor:
        return self._node.view(self._starts[index, field], nbytes)

    def _landing(self, rank: int) -> Tensor:
        """Room for one block's gradients of a rank's own, fp32."""
        widest = max(layout.numel for layout in self._layouts[: self._num_blocks])
        return self._shared(rank, _LANDING, ELEMENT_BYTES * widest).view(torch.float32)

    def _norms(self, index: int) -> Tensor:
        """Norms of a block's accumulated gradients, (ranks, parameters): of each rank's parts."""
        shape = (self._num_ranks, len(self._layouts[index].places))
        return self._shared(index, _NORMS, ELEMENT_BYTES * shape[0] * shape[1]).view(torch.float32).view(shape)
