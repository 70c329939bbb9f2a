"""Sizes that the planner and the code that allocates share."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.planning.job import DeviceKind
from offload import PAGE_BYTES, ceil_div


@dataclass(frozen=True, kw_only=True)
class HeadTiles:
    """How much of the head is computed at a time."""

    num_tokens: int = 256
    """Tokens of a tile. Fewer read the head's weight more often: it is read once per this many tokens and pass."""

    max_bytes: int = 32 * 1024**2
    """Bound of all buffers of a tile together. The vocabulary width is what it leaves room for, at least one word."""

    max_words: int = 16384
    """Upper bound of the vocabulary width: wider tiles are no faster."""

    @classmethod
    def on(cls, device: DeviceKind) -> HeadTiles:
        """The sizes for a kind of device: large tiles keep a GPU busy, small ones fit a processor's caches."""
        return cls() if device == "cpu" else cls(num_tokens=1024, max_bytes=128 * 1024**2)

    def __post_init__(self) -> None:
        for name in ("num_tokens", "max_bytes", "max_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"HeadTiles.{name} is {getattr(self, name)}; give a positive number")

    def num_words(self, *, num_tokens: int, vocab: int, bytes_per_logit: int, bytes_per_word: int) -> int:
        """Vocabulary width of a tile.

        Args:
            num_tokens: Tokens of the tile.
            vocab: Words of the head.
            bytes_per_logit: Bytes of all buffers per logit of the tile.
            bytes_per_word: Bytes of the buffer that holds converted weights, per word of the vocabulary.
        """
        fitting = min(self.max_words, self.max_bytes // (num_tokens * bytes_per_logit + bytes_per_word))
        if fitting >= vocab:
            return vocab
        # Rows of a tile that begin at odd places are multiplied by slow kernels.
        return max(1, fitting if fitting < _ALIGNED_WORDS else fitting // _ALIGNED_WORDS * _ALIGNED_WORDS)


_ALIGNED_WORDS = 64


DENSE_MASK_BYTES = 16 << 20
"""Dense masks that one attention rule keeps for the blocks after; those that are larger are evaluated in parts."""


PART_KEYS = 4096
"""Most keys that attention in chunks takes at a time."""


PART_BYTES: dict[DeviceKind, int] = {"cpu": 8 << 20, "cuda": 256 << 20}
"""Scores or a mask of one part of the keys, by kind of device: what fits a cache; enough to keep a GPU busy."""


NUM_CHUNK_BUFFERS = 4
"""Chunks of state on disk that are in memory: one is updated while others are read and written."""


PAGES_OF_SCALES = 8
"""Pages that moments of a chunk in 8 bits may take more than those in fp32: each part of them ends on one."""


NUM_MASTER_STAGING = 2
"""Page-locked buffers through which a block's master weights go to a GPU: one is filled while another is copied."""


NUM_LANDING_BLOCKS = 2
"""Blocks whose weights' gradients come down from a GPU at a time; a further one waits until some are added up."""


UPDATE_PIECE_BYTES = 1 << 20
"""Of each of weight, moments and gradient that a GPU updates at a time: a bus carries it at its full rate."""


NUM_UPDATE_PIECES = 2 * 4
"""Such pieces on the device: of two updates, one that comes and one that goes."""


NUM_CONVERTED_PIECES = 2 * 8
"""As many more where weights or moments are not fp32: each update makes them so, rounds them, and brings them back."""


NUM_BASIS_MATRICES = 8
"""Matrices as large as a weight in fp32 that a GPU holds while a new basis is read off that weight's gradient: weight,
gradient, state, and the factors and the workspace of a full decomposition."""


_LARGEST_STATE_CHUNK_BYTES = 16 << 20
"""Larger ones move no faster."""


_SMALLEST_STATE_CHUNK_BYTES = 4 * PAGE_BYTES
"""Each chunk is two files, and each file is brought to the disk for itself; in 8 bits it is one page."""


_PARTS_OF_A_UNIT = 8
"""A unit is cut into at least so many chunks, so that reading, updating and writing it overlap."""


def state_chunk_bytes(widest_bytes: int) -> int:
    """Bytes of one buffer of the largest chunk of state on disk, whole pages.

    Args:
        widest_bytes: Bytes of the widest unit's weights in fp32.
    """
    unit = _SMALLEST_STATE_CHUNK_BYTES
    share_bytes = ceil_div(widest_bytes, _PARTS_OF_A_UNIT * unit) * unit
    return min(_LARGEST_STATE_CHUNK_BYTES, max(_SMALLEST_STATE_CHUNK_BYTES, share_bytes))
