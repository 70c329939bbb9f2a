"""Which blocks stay and which are streamed. Pure arithmetic and frozen data: no device, no file, no model."""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from offload.blocks import ceil_div
from offload.budget import format_bytes
from offload.errors import BudgetError


class Placement(enum.Enum):
    """Where a block's stored bytes stay between visits."""

    RESIDENT = "resident"
    """On the compute device: read once, kept."""
    HOST = "host"
    """In a host buffer of its own: read once, kept; copied for each visit where the device has memory of its own."""
    STREAMED = "streamed"
    """On disk only: read for each visit that does not find it in a slot still."""


@dataclass(frozen=True, kw_only=True)
class PlacementPlan:
    """Which block lives where, and the buffers through which the others move."""

    placements: tuple[Placement, ...]
    """One per block, in the order of the forward pass."""
    block_bytes: tuple[int, ...]
    """Bytes that each block takes in a buffer."""
    device_is_host: bool
    """Whether the device computes from host memory, so that staging buffers are its slots (a CPU)."""
    num_staging: int
    """Host buffers that reads land in, each as large as the largest block that needs one."""
    num_slots: int
    """Buffers of the device's ring; 0 where `device_is_host`, or where nothing moves."""
    num_passes: int
    """Passes over all blocks in one optimizer step: 2 for a forward and a backward."""

    def __post_init__(self) -> None:
        if len(self.placements) != len(self.block_bytes) or not self.placements:
            raise ValueError(
                f"expected one placement for each block, got {len(self.placements)} for {len(self.block_bytes)} blocks"
            )
        if min(self.num_staging, self.num_slots) < 0 or self.num_passes < 1:
            raise ValueError(
                f"num_staging, num_slots must be 0 or more and num_passes 1 or more, got {self.num_staging}, "
                f"{self.num_slots}, {self.num_passes}"
            )

    @property
    def resident_bytes(self) -> int:
        """Bytes of all blocks kept on the device."""
        return self._bytes_of(Placement.RESIDENT)

    @property
    def host_bytes(self) -> int:
        """Bytes of all blocks cached in host RAM, without staging buffers."""
        return self._bytes_of(Placement.HOST)

    @property
    def streamed_bytes(self) -> int:
        """Bytes of all blocks that are on disk only: what one pass reads, but for what is in a slot still."""
        return self._bytes_of(Placement.STREAMED)

    @property
    def slot_bytes(self) -> int:
        """Size of one slot of the ring from which visits are served: the largest block that moves through it."""
        return max((self.block_bytes[block] for block in self.moving), default=0)

    @property
    def ring_size(self) -> int:
        """Number of blocks that can be on the device besides the resident ones."""
        return self.num_staging if self.device_is_host else self.num_slots

    @property
    def device_bytes(self) -> int:
        """Device memory for stored bytes: resident blocks and the ring."""
        return self.resident_bytes + self.ring_size * self.slot_bytes

    @property
    def staging_bytes(self) -> int:
        """Host memory for all staging buffers; 0 where they are the device's slots."""
        if self.device_is_host:
            return 0
        blocks = zip(self.block_bytes, self.placements, strict=True)
        return self.num_staging * max((size for size, place in blocks if place != Placement.HOST), default=0)

    @property
    def moving(self) -> tuple[int, ...]:
        """Blocks that pass through the ring, in the order of the forward pass."""
        still = {Placement.RESIDENT, Placement.HOST} if self.device_is_host else {Placement.RESIDENT}
        return tuple(block for block, place in enumerate(self.placements) if place not in still)

    @property
    def step_read_bytes(self) -> int:
        """Bytes read from disk in one step once the run is under way.

        After a pass the ring still holds its last blocks, and a pass in the other direction begins with them: each turn
        saves as many blocks as the ring has slots. An upper bound for an odd number of passes.
        """
        return self._step_bytes([block for block in self.moving if self.placements[block] == Placement.STREAMED])

    def step_copied_bytes(self, *, changes: bool = False) -> int:
        """Bytes copied to a device in one step once the run is under way; 0 where the device is the host.

        Args:
            changes: Whether every block changes with the step: then the first pass of the next begins with none of
                them in the ring, and copies all.
        """
        if self.device_is_host:
            return 0
        if not changes:
            return self._step_bytes(self.moving)
        first = self.moving[: self.ring_size]
        again = self.num_passes % 2 == 0 or len(self.moving) <= self.ring_size
        return self._step_bytes(self.moving) + (sum(self.block_bytes[block] for block in first) if again else 0)

    def _step_bytes(self, blocks: Collection[int]) -> int:
        """Bytes of those of some blocks that no visit of a step finds in the ring still."""
        if len(self.moving) <= self.ring_size:
            return 0
        saved = 0
        if self.num_passes % 2 == 0 and self.ring_size:
            ends = self.moving[: self.ring_size] + self.moving[-self.ring_size :]
            saved = sum(self.block_bytes[block] for block in ends if block in blocks)
        return self.num_passes * sum(self.block_bytes[block] for block in blocks) - self.num_passes // 2 * saved

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON: the fields, and the bytes by tier."""
        fields = asdict(self) | {
            "placements": [placement.value for placement in self.placements],
            "block_bytes": list(self.block_bytes),
        }
        derived = ("resident_bytes", "host_bytes", "streamed_bytes", "slot_bytes", "device_bytes", "staging_bytes")
        return fields | {name: getattr(self, name) for name in (*derived, "step_read_bytes")}

    def _bytes_of(self, placement: Placement) -> int:
        return sum(size for size, place in zip(self.block_bytes, self.placements, strict=True) if place == placement)


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
    fewest = ceil_div(max(0, kept_bytes - room.device_bytes), max(room.sizes))
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
