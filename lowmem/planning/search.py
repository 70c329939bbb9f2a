"""The ways in which one step can be run, and which of them fit. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product

from lowmem.planning.job import Job
from lowmem.planning.shapes import ModelShapes
from lowmem.planning.step_memory import (
    STAGING_BUFFERS,
    Choice,
    RoleBytes,
    Tier,
    as_moved,
    boundary_bytes,
    can_keep_products,
    counted_host_bytes,
    key_value_bytes,
    peak_bytes,
    step_roles,
)
from lowmem.planning.step_time import Rates, StepTime, predict, update_bytes_each, update_s_each
from offload import BudgetError, Placement, PlacementPlan, ceil_div, place_blocks

_ENOUGH_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Tokens of a micro-batch from which on more of them make a block's products no faster."""


_MIN_RING, _MAX_RING = 2, 3
"""Buffers that master weights on disk are visited from."""


_PRICE_OF_KEPT = 1.02
"""Keeping keys and values takes memory, so it has to make a step shorter by more than this."""


_PRICE_OF_PRODUCTS, _PRICE_OF_WEAR = 1.05, 1.1
"""Keeping products takes more of it, and wears a drive where they are written to one."""


_SAME_STEP_S = 1e-3
"""Steps that differ by less are equally long: predictions are no better. Of these the first in order is taken."""


_CHUNK_TOKENS = (4096, 2048, 1024, 512, 256, 128)
"""Chunk lengths to try. Shorter ones are slower and save little: keys and values of the whole sequence stay."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """One way to run a step."""

    choice: Choice
    """Micro-batch and tiers."""
    placement: PlacementPlan
    """Where the blocks are."""
    roles: tuple[RoleBytes, ...]
    """Bytes of everything, blocks and their buffers included."""
    time: StepTime
    """Predicted step."""

    @property
    def priced_s(self) -> float:
        """Its step, with a price on memory that buys little time."""
        price = _PRICE_OF_KEPT if self.choice.keeps_keys_values else 1.0
        if self.choice.keeps_products:
            price = _PRICE_OF_WEAR if self.choice.boundary_tier == "disk" else _PRICE_OF_PRODUCTS
        return self.time.step_s * price

    @property
    def device_bytes(self) -> int:
        """Peak of the device."""
        return peak_bytes(self.roles, "device")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a machine has for one process: no budget beyond it is recommended."""

    device_bytes: int
    """Most of the device, with the host's budget as it was asked for."""
    host_bytes: int
    """Most of the host, with the device's budget as it is."""
    host_gives_way: bool = False
    """Whether both are one RAM, of which the host's budget is what the device's leaves."""


@dataclass(frozen=True)
class Room:
    """A model, a job and what they have to fit into."""

    shapes: ModelShapes
    job: Job
    rates: Rates
    device_bytes: int
    host_bytes: int
    has_disk: bool = False
    """Whether there is a folder for what must be written."""
    loaded: Choice | None = None
    """How a model was loaded: then its embedding and its state stay where they are."""
    placement: PlacementPlan | None = None
    """Where its blocks are, if they are to stay there too."""
    memory: Memory | None = None
    """What the machine has; None where nobody knows."""

    def may_have(self, *, device_bytes: int = 0, host_bytes: int = 0) -> bool:
        """Whether the machine has as much for one of the budgets, the other being what it is."""
        if self.memory is None:
            return True
        return device_bytes <= self.memory.device_bytes and host_bytes <= self.memory.host_bytes

    def best(self) -> Draft | None:
        """The draft to take, or None if none fits.

        The largest useful micro-batch that fits; with it, the shortest step; among equals, what moves least. A smaller
        one where products can be kept with it that are worth more. State of full tuning in memory, with whatever
        micro-batch, before state on disk.
        """
        for state_tier in self._state_tiers():
            found: list[Draft] = []
            for micro_batch, chunk_tokens in self._splits():
                if found and not self._can_keep(micro_batch, chunk_tokens):
                    break
                choices = (
                    choice
                    for choice in self._choices(micro_batch, chunk_tokens)
                    if choice.state_tier == state_tier and (choice.keeps_products or not found)
                )
                found += [draft for choice in choices if (draft := self._draft(choice)) is not None]
            if found:
                return self._widened(min(found, key=lambda draft: round(draft.priced_s / _SAME_STEP_S)))
        return None

    def _can_keep(self, micro_batch: int, chunk_tokens: int | None) -> bool:
        return chunk_tokens is None and can_keep_products(self.shapes, self.job, micro_batch=micro_batch)

    def _widened(self, draft: Draft) -> Draft:
        """The same with the largest micro-batch for which there is room: a run splits no more than it has to."""
        if self.job.micro_batch is not None or draft.choice.chunk_tokens is not None or not self.job.trains:
            return draft
        there = replace(self, placement=draft.placement)
        for size in _parts_of(self.job.num_sequences):
            if size <= draft.choice.micro_batch:
                return draft
            wider = there._draft(replace(draft.choice, micro_batch=size))
            if wider is not None:
                return wider
        return draft

    @cached_property
    def smallest(self) -> Draft:
        """The draft that takes the least device memory with this host budget, whether it fits or not.

        One that takes more of the host than there is counts only where all do.
        """
        *_, (micro_batch, chunk_tokens) = self._splits()
        choices = self._choices(micro_batch, chunk_tokens)
        drafts = [self._least(choice) for choice in choices if not (choice.keeps_keys_values or choice.keeps_products)]
        return min(drafts, key=lambda draft: (self._host_short(draft), draft.device_bytes))

    def with_budget(self, *, device_bytes: int | None = None, host_bytes: int | None = None) -> Room:
        """The same job with another budget; what is None stays, but for a host's that gives way to the device's."""
        if host_bytes is None and device_bytes is not None and self.memory is not None and self.memory.host_gives_way:
            host_bytes = max(0, self.device_bytes + self.host_bytes - device_bytes)
        return replace(
            self,
            device_bytes=self.device_bytes if device_bytes is None else device_bytes,
            host_bytes=self.host_bytes if host_bytes is None else host_bytes,
        )

    def with_batch_size(self, batch_size: int) -> Room:
        """The same budget with another batch size, the micro-batch free."""
        job = replace(self.job, batch_size=batch_size, micro_batch=None)
        return replace(self, job=job)

    def with_seq_len(self, seq_len: int) -> Room:
        """The same budget with other sequences; what is generated shrinks with them."""
        completion = min(self.job.num_decodes, seq_len)
        job = replace(self.job, seq_len=seq_len, completion_tokens=completion)
        return replace(self, job=job)

    def _micro_batches(self) -> Iterator[int]:
        """Sizes to try, largest first: the batch in equal parts, none of them larger than it takes to be fast."""
        if self.job.micro_batch is not None:
            yield min(self.job.micro_batch, self.job.num_sequences)
            return
        sizes = _parts_of(self.job.num_sequences)
        enough = _ENOUGH_TOKENS[self.job.device]
        largest = next((size for size in reversed(sizes) if size * self.job.seq_len >= enough), sizes[0])
        yield from (size for size in sizes if size <= largest)

    def _splits(self) -> Iterator[tuple[int, int | None]]:
        """Micro-batches and chunk lengths to try: whole sequences first, then ever shorter chunks of the fewest."""
        asked_for = None if self.shapes.unchunkable else self.job.chunk_tokens
        if asked_for is not None and asked_for < self.job.seq_len:
            yield from ((micro_batch, asked_for) for micro_batch in self._micro_batches())
            return
        micro_batch = 1
        for micro_batch in self._micro_batches():
            yield micro_batch, None
        if asked_for is None and self.job.trains and not self.shapes.unchunkable:
            yield from ((micro_batch, chunk) for chunk in _CHUNK_TOKENS if chunk < self.job.seq_len)

    def _choices(self, micro_batch: int, chunk_tokens: int | None) -> Iterator[Choice]:
        """Ways to place the embedding and the boundary activations, those that move least first."""
        boundary = boundary_bytes(self.shapes, self.job)
        tiers: list[Tier] = ["device"]
        if boundary and boundary <= self.host_bytes:
            tiers.append("host")
        if boundary and self.has_disk:
            tiers.append("disk")
        places: tuple[bool, ...] = (False, True) if self.shapes.embedding_gatherable else (False,)
        if self.loaded is not None:
            places = (self.loaded.embedding_on_disk,)
        keeps = (False, True) if chunk_tokens is not None and boundary else (False,)
        products = (False, True) if self._can_keep(micro_batch, chunk_tokens) else (False,)
        for state, tier, kept, multiplied, on_disk in product(self._state_tiers(), tiers, keeps, products, places):
            if kept and tier == "host" and boundary + key_value_bytes(self.shapes, self.job) > self.host_bytes:
                continue
            for share in self._shares(state):
                yield Choice(
                    micro_batch=micro_batch,
                    chunk_tokens=chunk_tokens,
                    boundary_tier=tier,
                    keeps_keys_values=kept,
                    keeps_products=multiplied,
                    embedding_on_disk=on_disk,
                    state_tier=state,
                    update_share=share,
                    reduces_gradients=self._takes_bases(state) and self._reduces_gradients(micro_batch, chunk_tokens),
                    takes_bases=self._takes_bases(state),
                )

    def _takes_bases(self, state_tier: Tier) -> bool:
        """Whether bases of projections are read off gradients on a GPU."""
        if self.loaded is not None:
            return self.loaded.takes_bases
        optimizer = self.shapes.optimizer
        on_gpu = self.job.tuning == "full" and self.job.device != "cpu" and state_tier == "host"
        return on_gpu and optimizer is not None and optimizer.reduction.num_params > 0

    def _reduces_gradients(self, micro_batch: int, chunk_tokens: int | None) -> bool:
        """Whether gradients that an optimizer wants projections of are reduced before they leave a GPU.

        Clipping wants the norm of the whole gradient, which is known where it is made in one piece.
        """
        if self.loaded is not None:
            return self.loaded.reduces_gradients
        return self.job.num_backwards == 1 and micro_batch >= self.job.num_sequences and chunk_tokens is None

    def _shares(self, state_tier: Tier) -> tuple[float, ...]:
        """Parts of the blocks' state, where it is in a tier, that a GPU may update."""
        if self.loaded is not None:
            return (self.loaded.update_share,)
        share = update_share(self.shapes, self.job, self.rates, tier=state_tier)
        return (share, 0.0) if share else (0.0,)

    def _state_tiers(self) -> tuple[Tier, ...]:
        """Where the state of full tuning can be, the fastest first."""
        if self.loaded is not None:
            return (self.loaded.state_tier,)
        if self.job.tuning != "full":
            return ("device",)
        # On a GPU, the state is never on the device.
        in_memory: tuple[Tier, ...] = ("device", "host") if self.job.device == "cpu" else ("host",)
        # From disk, weights come as they are.
        return (*in_memory, "disk") if self.has_disk and self.shapes.moved_dtype is None else in_memory

    def _draft(self, choice: Choice) -> Draft | None:
        """What a choice leads to if it fits."""
        roles = step_roles(self.shapes, self.job, choice)
        left_device = self.device_bytes - peak_bytes(roles, "device")
        left_host = self.host_bytes - self._counted_on_host(roles)
        if min(left_device, left_host) < 0:
            return None
        try:
            placement = self._place(choice, device_bytes=left_device, host_bytes=left_host)
        except BudgetError:
            return None
        draft = self._finish(choice, roles, placement)
        return draft if draft.device_bytes <= self.device_bytes and not self._host_short(draft) else None

    def _least(self, choice: Choice) -> Draft:
        """What a choice takes with as little device memory for blocks as possible."""
        roles = step_roles(self.shapes, self.job, choice)
        if self.placement is not None:
            return self._finish(choice, roles, self.placement)
        if self.job.tuning == "full":
            sizes = [block.buffer_bytes for block in self.shapes.blocks]
            return self._finish(
                choice, roles, place_masters(sizes, tier=choice.state_tier, ring=_MIN_RING, job=self.job)
            )
        left_host = max(0, self.host_bytes - self._counted_on_host(roles))
        try:
            placement = self._place(choice, device_bytes=0, host_bytes=left_host)
        except BudgetError as error:
            placement = self._place(choice, device_bytes=error.needed_bytes, host_bytes=left_host)
        return self._finish(choice, roles, placement)

    def _host_short(self, draft: Draft) -> int:
        return max(0, self._counted_on_host(draft.roles) - self.host_bytes)

    def _counted_on_host(self, roles: tuple[RoleBytes, ...]) -> int:
        return counted_host_bytes(roles, budget_bytes=self.host_bytes)

    def _place(self, choice: Choice, *, device_bytes: int, host_bytes: int) -> PlacementPlan:
        """Where blocks go; staging buffers of a GPU stay within the host's bytes if they can.

        Raises:
            BudgetError: The device has no room for what its blocks move through.
        """
        if self.placement is not None:
            return self.placement
        sizes = [block.buffer_bytes for block in self.shapes.blocks]
        if self.job.tuning == "full":
            ring = max(_MIN_RING, min(_MAX_RING, device_bytes // max(self.shapes.moved_bytes)))
            plan = place_masters(sizes, tier=choice.state_tier, ring=ring, job=self.job)
            moved = as_moved(self.shapes, plan)
            resident_bytes = moved.resident_bytes
            needed_bytes = moved.device_bytes - resident_bytes + _own_bytes(resident_bytes, self.job)
            if needed_bytes > device_bytes or cached_bytes(plan, self.job) > host_bytes:
                raise BudgetError("the master weights do not fit", needed_bytes=needed_bytes)
            return plan
        place = partial(
            place_blocks,
            sizes,
            device_bytes=device_bytes,
            device_is_host=self.job.device == "cpu",
            num_passes=self.job.num_passes,
        )
        # One copy of what is cached serves all ranks of a machine, whose parts of its memory add up.
        num_sharing = self.job.num_sharing
        placed = place(host_bytes=host_bytes * num_sharing)
        if not self.host_bytes or cached_bytes(placed, self.job) + placed.staging_bytes <= host_bytes:
            return placed
        for max_ring in (_MAX_RING, _MIN_RING):
            # Blocks that are cached need no staging: what is cached less may make the buffers larger.
            for reserved_bytes in (placed.staging_bytes, max_ring * max(sizes)):
                placed = place(host_bytes=max(0, host_bytes - reserved_bytes) * num_sharing, max_ring=max_ring)
                if cached_bytes(placed, self.job) + placed.staging_bytes <= host_bytes:
                    return placed
        return placed

    def _finish(self, choice: Choice, roles: tuple[RoleBytes, ...], placement: PlacementPlan) -> Draft:
        return Draft(
            choice=choice,
            placement=placement,
            roles=(*_block_roles(self.shapes, placement, self.job), *roles),
            time=predict(self.shapes, self.job, choice=choice, placement=placement, rates=self.rates),
        )


def _parts_of(num_sequences: int) -> list[int]:
    """Sizes of the equal parts that a batch can be cut into, the largest first."""
    return sorted({ceil_div(num_sequences, parts) for parts in range(1, num_sequences + 1)}, reverse=True)


def place_masters(sizes: Sequence[int], *, tier: Tier, ring: int, job: Job) -> PlacementPlan:
    """Where the master weights of all blocks are: together with the rest of their state.

    Args:
        sizes: Bytes of each block.
        tier: Where it is.
        ring: Buffers that blocks on disk are visited from.
        job: Kind of device, and passes.
    """
    place = {"device": Placement.RESIDENT, "host": Placement.HOST, "disk": Placement.STREAMED}[tier]
    return PlacementPlan(
        placements=(place,) * len(sizes),
        block_bytes=tuple(sizes),
        device_is_host=job.device == "cpu",
        num_staging=ring if tier == "disk" else 0,
        num_slots=0 if job.device == "cpu" else ring,
        num_passes=job.num_passes,
    )


def cached_bytes(placement: PlacementPlan, job: Job) -> int:
    """One process's part of the blocks cached in host memory."""
    return ceil_div(placement.host_bytes, job.num_sharing)


def _own_bytes(nbytes: int, job: Job) -> int:
    """One process's part of blocks that are kept where it computes: masters are shared, frozen weights are not."""
    return ceil_div(nbytes, job.num_sharing) if job.tuning == "full" else nbytes


def _block_roles(shapes: ModelShapes, placement: PlacementPlan, job: Job) -> tuple[RoleBytes, ...]:
    slot_bytes = as_moved(shapes, placement).slot_bytes
    roles = (
        RoleBytes(role="decoder blocks", tier="device", nbytes=_own_bytes(placement.resident_bytes, job)),
        RoleBytes(role="decoder blocks", tier="host", nbytes=cached_bytes(placement, job)),
        RoleBytes(role="decoder blocks", tier="disk", nbytes=placement.streamed_bytes),
        RoleBytes(role="block ring", tier="device", nbytes=placement.ring_size * slot_bytes),
        RoleBytes(role=STAGING_BUFFERS, tier="host", nbytes=placement.staging_bytes),
    )
    return tuple(role for role in roles if role.nbytes)


def update_share(shapes: ModelShapes, job: Job, rates: Rates, *, tier: Tier) -> float:
    """Which part of the blocks' state a GPU best updates: it is done when the processor is done with the rest.

    With state on disk the processor does as much as it can while the disk is busy.

    Args:
        shapes: The model.
        job: The step.
        rates: How fast a processor updates, and state goes up and comes down; both ways share what was measured of one.
        tier: Where the state is.
    """
    if job.tuning != "full" or job.device == "cpu" or not shapes.is_updated_flat:
        return 0.0
    on_host_s = update_s_each(shapes, rates, on_disk=tier == "disk")
    on_device_s = sum(update_bytes_each(shapes)) / rates.copy_bytes_per_s
    share = on_host_s / (on_host_s + on_device_s)
    if tier != "disk":
        return share
    disk_s = sum(update_bytes_each(shapes)) / rates.moved_bytes_per_s
    return min(share, max(0.0, 1 - disk_s / on_host_s))
