"""Decides which blocks stay and which are streamed. Pure arithmetic: no device, no file, no model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from offload.errors import BudgetError
from offload.plan import Placement, PlacementPlan
from offload.units import format_bytes

MIN_RING = 2
"""One buffer that the block computes from, one that the next block arrives in."""


@dataclass(frozen=True, kw_only=True)
class _Room:
    """What the blocks have to fit into."""

    sizes: Sequence[int]
    device_bytes: int
    host_bytes: int

    def fits(self, resident: Iterable[int], host: Iterable[int]) -> bool:
        return self._sum(resident) <= self.device_bytes and self._sum(host) <= self.host_bytes

    def _sum(self, blocks: Iterable[int]) -> int:
        return sum(self.sizes[block] for block in blocks)


def place_blocks(
    block_bytes: Sequence[int],
    *,
    device_bytes: int,
    host_bytes: int,
    device_is_host: bool,
    num_passes: int = 2,
    max_ring: int = 3,
) -> PlacementPlan:
    """Keep as many blocks as the budgets allow, and spread the ones that are streamed evenly over the pass.

    Evenly, because a transfer hides behind the computation of the blocks before it: two streamed blocks are neighbours
    only where more than half of all blocks are streamed. The first and the last block are streamed before any other: a
    pass in the other direction begins with the blocks that the ring still holds, so there a transfer has two visits to
    hide behind.

    The ring gets `max_ring` buffers where they fit. One more buffer there saves as many reads as one more resident
    block, and lets transfers start earlier.

    Args:
        block_bytes: Bytes that each block takes in a buffer (`BlockLayout.buffer_bytes`), in the order of the forward
            pass.
        device_bytes: Device memory for resident blocks and the ring.
        host_bytes: Host memory for cached blocks; staging buffers come on top.
        device_is_host: The device computes from host memory (a CPU): staging buffers are the ring, and count as device.
        num_passes: Passes over all blocks in one optimizer step.
        max_ring: Buffers in the ring, and staging buffers, if there is room; at least 2.

    Raises:
        BudgetError: Not even a ring of two buffers fits; carries the smallest `device_bytes` that works.
        ValueError: No blocks, an empty block, a negative budget, or a ring of fewer than two.
    """
    _check(block_bytes, device_bytes=device_bytes, host_bytes=host_bytes, num_passes=num_passes, max_ring=max_ring)
    sizes = tuple(block_bytes)
    room = _Room(sizes=sizes, device_bytes=device_bytes, host_bytes=host_bytes)
    # Where nothing has to move, no ring is needed. A CPU computes from its host cache as from resident blocks.
    cached = _fill(range(len(sizes)), sizes, host_bytes) if device_is_host else set()
    still_bytes = sum(size for block, size in enumerate(sizes) if block not in cached)
    if sum(sizes) <= device_bytes:
        placements, ring = [Placement.RESIDENT] * len(sizes), 0
    elif still_bytes <= device_bytes:
        placements = [Placement.HOST if block in cached else Placement.RESIDENT for block in range(len(sizes))]
        ring = 0
    else:
        ring = min(max_ring, device_bytes // max(sizes))
        if ring < MIN_RING:
            raise _too_small(sizes, device_bytes=device_bytes, needed_bytes=min(MIN_RING * max(sizes), still_bytes))
        placements = _spread(room, ring_bytes=ring * max(sizes))
    return PlacementPlan(
        placements=tuple(placements),
        block_bytes=sizes,
        device_is_host=device_is_host,
        num_staging=_num_staging(placements, ring=ring, device_is_host=device_is_host),
        num_slots=0 if device_is_host else ring,
        num_passes=num_passes,
    )


def _check(block_bytes: Sequence[int], *, device_bytes: int, host_bytes: int, num_passes: int, max_ring: int) -> None:
    if not block_bytes or min(block_bytes) < 1:
        raise ValueError(f"block_bytes: expected one or more blocks of at least 1 byte, got {list(block_bytes)}")
    if min(device_bytes, host_bytes) < 0:
        raise ValueError(f"device_bytes and host_bytes must be 0 or more, got {device_bytes} and {host_bytes}")
    if max_ring < MIN_RING:
        raise ValueError(f"max_ring: expected at least {MIN_RING} buffers, got {max_ring}")
    if num_passes < 1:
        raise ValueError(f"num_passes: expected at least 1, got {num_passes}")


def _too_small(sizes: Sequence[int], *, device_bytes: int, needed_bytes: int) -> BudgetError:
    return BudgetError(
        f"device budget: {format_bytes(device_bytes)} are left for {len(sizes)} blocks of up to "
        f"{format_bytes(max(sizes))}; streaming them takes room for two, at least {format_bytes(needed_bytes)} "
        f"({needed_bytes} bytes): raise Budget.device by {format_bytes(needed_bytes - device_bytes)}",
        needed_bytes=needed_bytes,
    )


def _num_staging(placements: Sequence[Placement], *, ring: int, device_is_host: bool) -> int:
    if device_is_host:
        return ring
    if Placement.STREAMED in placements:
        return max(ring, MIN_RING)
    # Resident blocks are read through staging once; cached blocks are read into their own buffers.
    return MIN_RING if Placement.RESIDENT in placements else 0


def _spread(room: _Room, *, ring_bytes: int) -> list[Placement]:
    """Placements for what fits next to a ring: as few streamed blocks as possible, evenly spread."""
    beside = replace(room, device_bytes=room.device_bytes - ring_bytes)
    num_blocks = len(room.sizes)
    placements = [Placement.STREAMED] * num_blocks
    for num_streamed in range(num_blocks):
        streamed = _with_ends(num_blocks, num_streamed)
        kept = sorted(set(range(num_blocks)).difference(streamed))
        host = _host_share(beside, kept)
        if host is not None:
            for block in kept:
                placements[block] = Placement.HOST if block in host else Placement.RESIDENT
            break
    _use_leftover(beside, placements)
    return placements


def _host_share(room: _Room, kept: Sequence[int]) -> set[int] | None:
    """Which of the kept blocks go to the host: as few as possible, spread out. None if they do not all fit."""
    kept_bytes = sum(room.sizes[block] for block in kept)
    if kept_bytes > room.device_bytes + room.host_bytes:
        return None
    # No fewer than it takes if all were as large as the largest: for blocks of one size the first try fits.
    fewest = -(-max(0, kept_bytes - room.device_bytes) // max(room.sizes))
    for num_host in range(fewest, len(kept) + 1):
        # With nothing streamed, cached blocks are all that moves, and the ends are the best places for them too.
        spread = _with_ends if len(kept) == len(room.sizes) else _inside
        host = {kept[place] for place in spread(len(kept), num_host)}
        if room.fits((block for block in kept if block not in host), host):
            return host
    return None


def _use_leftover(room: _Room, placements: list[Placement]) -> None:
    """Move blocks up where unequal sizes have left a gap that an even spread could not use."""
    sizes = room.sizes
    free = {
        tier: nbytes - sum(size for size, place in zip(sizes, placements, strict=True) if place == tier)
        for tier, nbytes in ((Placement.RESIDENT, room.device_bytes), (Placement.HOST, room.host_bytes))
    }
    for block in sorted(range(len(sizes)), key=lambda block: -sizes[block]):
        if placements[block] == Placement.STREAMED:
            tier = next((tier for tier in free if sizes[block] <= free[tier]), None)
            if tier is not None:
                placements[block] = tier
                free[tier] -= sizes[block]


def _fill(blocks: Iterable[int], sizes: Sequence[int], nbytes: int) -> set[int]:
    """Blocks, largest first, that fit into `nbytes` one after the other."""
    chosen: set[int] = set()
    for block in sorted(blocks, key=lambda block: -sizes[block]):
        if sizes[block] <= nbytes:
            chosen.add(block)
            nbytes -= sizes[block]
    return chosen


def _with_ends(num_places: int, num_chosen: int) -> list[int]:
    """`num_chosen` of `num_places` places, evenly spread, the first and the last among them."""
    if num_chosen == 1:
        return [num_places - 1]
    # Half-up rounding in integers: steps differ by at most one.
    return [(2 * chosen * (num_places - 1) + num_chosen - 1) // (2 * (num_chosen - 1)) for chosen in range(num_chosen)]


def _inside(num_places: int, num_chosen: int) -> list[int]:
    """`num_chosen` of `num_places` places, evenly spread, with half a step before the first and after the last."""
    return [(2 * chosen + 1) * num_places // (2 * num_chosen) for chosen in range(num_chosen)]
