"""Where each block's stored bytes live during a run. Frozen, pure data: it can be printed, compared and tested."""

import enum
from dataclasses import dataclass


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
        if len(self.moving) <= self.ring_size:
            return 0
        saved = 0
        if self.num_passes % 2 == 0 and self.ring_size:
            ends = self.moving[: self.ring_size] + self.moving[-self.ring_size :]
            saved = sum(self.block_bytes[block] for block in ends if self.placements[block] == Placement.STREAMED)
        return self.num_passes * self.streamed_bytes - self.num_passes // 2 * saved

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON: the fields, and the bytes by tier."""
        return {
            "placements": [placement.value for placement in self.placements],
            "block_bytes": list(self.block_bytes),
            "device_is_host": self.device_is_host,
            "num_staging": self.num_staging,
            "num_slots": self.num_slots,
            "num_passes": self.num_passes,
            "resident_bytes": self.resident_bytes,
            "host_bytes": self.host_bytes,
            "streamed_bytes": self.streamed_bytes,
            "slot_bytes": self.slot_bytes,
            "device_bytes": self.device_bytes,
            "staging_bytes": self.staging_bytes,
            "step_read_bytes": self.step_read_bytes,
        }

    def _bytes_of(self, placement: Placement) -> int:
        return sum(size for size, place in zip(self.block_bytes, self.placements, strict=True) if place == placement)
