"""Sizes that the planner and the code that allocates share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HeadTiles:
    """How much of the head is computed at a time."""

    num_tokens: int = 256
    """Tokens of a tile. Fewer read the head's weight more often: it is read once per this many tokens and pass."""

    max_bytes: int = 32 * 1024**2
    """Bound of all buffers of a tile together. The vocabulary width is what it leaves room for, at least one word."""

    max_words: int = 16384
    """Upper bound of the vocabulary width: wider tiles are no faster."""

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
        fitting = self.max_bytes // (num_tokens * bytes_per_logit + bytes_per_word)
        return max(1, min(vocab, self.max_words, fitting))
