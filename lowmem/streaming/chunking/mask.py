"""Which keys each query sees, as a rule and the few tiles in which it matters, instead of a T x T tensor.

transformers describes a mask as a function of (batch, head, query, key) indices before it evaluates it over all of
them. A `CausalMask` keeps that function and evaluates it for one tile at a time. It travels through the model in place
of the mask tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from lowmem.internals.torch import register_pytree_node
from lowmem.planning.limits import DENSE_MASK_BYTES

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Queries of a tile where the rule has to be evaluated: few enough that a tile is skipped or whole more often than not.
_QUERY_TOKENS = 512


class PartKind(Enum):
    """How the queries of a tile see the keys of a part."""

    FULL = "every query sees every key"
    CAUSAL = "the keys are the queries' own tokens, and each query sees those up to itself"
    MASKED = "as the rule says"


@dataclass(frozen=True, kw_only=True)
class KeyPart:
    """A range of keys."""

    start: int
    end: int
    kind: PartKind


@dataclass(frozen=True, kw_only=True)
class QueryTile:
    """A range of queries and all the keys that any of them sees."""

    start: int
    end: int
    parts: tuple[KeyPart, ...]


@dataclass(eq=False, kw_only=True)
class MaskRule:
    """The rule of one mask of one forward pass: shared by all blocks and micro-batches."""

    allowed: MaskFunction
    """transformers' function of index tensors, without padding."""

    padding: Tensor | None
    """bool, (batch, tokens): which keys are tokens; None if all are."""

    window: int | None
    """A query sees no key that is this many tokens or more before it; None if it may."""

    num_tokens: int
    plain: bool
    """Whether this is nothing but a causal mask."""

    device: torch.device
    rows: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    """Numbers of sequences on the device, (sequences, 1, 1, 1)."""
    tiles: dict[tuple[tuple[int, ...], int, int], tuple[QueryTile, ...]] = field(default_factory=dict)
    dense: dict[tuple[int, ...], Tensor] = field(default_factory=dict)


class CausalMask:
    """A rule for some sequences of a batch.

    The mask of a query must not see later keys, and what it sees must be monotone: a key that a query sees is seen by
    all queries between the two. Causal masks, windows, chunks, packed documents and padding are.

    Args:
        rule: The rule for the whole batch.
        rows: (sequences, 1), on the CPU: which sequences of the batch these are.
    """

    def __init__(self, rule: MaskRule, rows: Tensor) -> None:
        self.rule = rule
        self.rows = rows

    @property
    def num_tokens(self) -> int:
        """Tokens of each sequence."""
        return self.rule.num_tokens

    def evaluate(self, queries: range, keys: range) -> Tensor:
        """The mask of a tile: bool, (sequences, 1, queries, keys), True where a query sees a key."""
        device = self.rule.device
        batch = self.rows_on_device()
        query = torch.arange(queries.start, queries.stop, device=device).view(1, 1, -1, 1)
        key = torch.arange(keys.start, keys.stop, device=device).view(1, 1, 1, -1)
        seen = self.rule.allowed(batch, torch.zeros_like(batch[:1]), query, key)
        if self.rule.padding is not None:
            seen = seen & self.rule.padding[batch, key]
        return seen.expand(self.rows.shape[0], 1, len(queries), len(keys))

    def dense(self) -> Tensor:
        """The whole mask, (sequences, 1, T, T); for short sequences only. Shared by the blocks of a pass."""
        key, kept = self._rows_key(), self.rule.dense
        if key not in kept:
            tokens = range(self.num_tokens)
            dense = self.evaluate(tokens, tokens).contiguous()
            if dense.nbytes + sum(mask.nbytes for mask in kept.values()) > DENSE_MASK_BYTES:
                return dense
            kept[key] = dense
        return kept[key]

    def tiles(self, start: int, end: int) -> tuple[QueryTile, ...]:
        """The queries [start, end) in tiles with the keys they see. Found once for all blocks of a pass."""
        key = (self._rows_key(), start, end)
        if key not in self.rule.tiles:
            find_tiles([(self, start, end)])
        return self.rule.tiles[key]

    def has_tiles(self, start: int, end: int) -> bool:
        """Whether the tiles of these queries have been found."""
        return (self._rows_key(), start, end) in self.rule.tiles

    def note_tiles(self, start: int, end: int, tiles: tuple[QueryTile, ...]) -> None:
        """Keep the tiles of some queries."""
        self.rule.tiles[self._rows_key(), start, end] = tiles

    def lowest_key(self, query: int) -> int:
        """No query from this one on sees a key before it, whatever the rule says of those after."""
        return 0 if self.rule.window is None else max(0, query - self.rule.window + 1)

    def _rows_key(self) -> tuple[int, ...]:
        return tuple(self.rows.flatten().tolist())

    def rows_on_device(self) -> Tensor:
        """Numbers of its sequences on the device, (sequences, 1, 1, 1); the host does not wait for it."""
        key, kept = self._rows_key(), self.rule.rows
        if key not in kept:
            rows = self.rows.flatten()
            if self.rule.device.type == "cuda":
                # Page-locked, so that the host does not wait for the copy; torch keeps it until that is over.
                rows = rows.pin_memory().to(self.rule.device, non_blocking=True)
            kept[key] = rows.to(self.rule.device).view(-1, 1, 1, 1)
        return kept[key]


def find_tiles(wanted: Iterable[tuple[CausalMask, int, int]]) -> None:
    """Find the tiles of queries [start, end) of masks whose rules are on one device; its answer is waited for once."""
    bounds: list[tuple[CausalMask, int, int, list[tuple[int, int]]]] = []
    seen: list[Tensor] = []
    for mask, start, end in wanted:
        step = end - start if mask.rule.plain else _QUERY_TOKENS
        tiles = [(first, min(first + step, end)) for first in range(start, end, step)]
        bounds.append((mask, start, end, tiles))
        for first, last in () if mask.rule.plain else tiles:
            lowest = mask.lowest_key(first)
            # Monotone: no query of the tile sees a key before the first that its first query sees, and all of them see
            # a key if the last one does.
            seen.append(mask.evaluate(range(first, first + 1), range(lowest, first)).any(0).flatten())
            seen.append(mask.evaluate(range(last - 1, last), range(lowest, last)).all(0).flatten())
    lengths = [row.numel() for row in seen]
    rows = iter(torch.split(torch.cat(seen).cpu(), lengths) if seen else ())
    for mask, start, end, tiles in bounds:
        if mask.rule.plain:
            mask.note_tiles(start, end, (_plain_tile(start, end),))
            continue
        found = [_tile(first, last, mask.lowest_key(first), next(rows), next(rows)) for first, last in tiles]
        mask.note_tiles(start, end, tuple(found))


def _plain_tile(start: int, end: int) -> QueryTile:
    prefix = (KeyPart(start=0, end=start, kind=PartKind.FULL),) if start else ()
    return QueryTile(start=start, end=end, parts=(*prefix, KeyPart(start=start, end=end, kind=PartKind.CAUSAL)))


def _tile(start: int, end: int, lowest: int, first_row: Tensor, last_row: Tensor) -> QueryTile:
    """A tile from what its first query sees before itself, from `lowest` on, and its last one up to itself."""
    first = lowest + int(first_row.int().argmax()) if bool(first_row.any()) else start
    last_row = last_row[first - lowest :]
    hidden = (~last_row[: start - first]).nonzero()
    full = first + (int(hidden[-1]) + 1 if hidden.numel() else 0)
    parts = [KeyPart(start=first, end=full, kind=PartKind.MASKED)] if full > first else []
    if start > full:
        parts.append(KeyPart(start=full, end=start, kind=PartKind.FULL))
    causal = bool(last_row[start - first :].all())
    parts.append(KeyPart(start=start, end=end, kind=PartKind.CAUSAL if causal else PartKind.MASKED))
    return QueryTile(start=start, end=end, parts=tuple(parts))


def split_part(part: KeyPart, *, at: int, num_keys: int) -> Iterator[KeyPart]:
    """A part in pieces of at most `num_keys` keys, none of which has keys on both sides of `at`.

    A causal part stays whole: its keys are its queries.
    """
    if part.kind is PartKind.CAUSAL:
        yield part
        return
    start = part.start
    while start < part.end:
        end = min(start + num_keys, part.end)
        if start < at < end:
            end = at
        yield KeyPart(start=start, end=end, kind=part.kind)
        start = end


def is_causal(mask: CausalMask) -> bool:
    """Whether no query sees the key after it: false for bidirectional masks and for bidirectional blocks in others."""
    if mask.num_tokens < 2:
        return True
    device = mask.rule.device
    query = torch.arange(mask.num_tokens - 1, device=device).view(1, 1, -1, 1)
    batch = mask.rows_on_device()
    return not bool(mask.rule.allowed(batch, torch.zeros_like(batch[:1]), query, query + 1).any())


# A block's arguments are cut along the batch leaf by leaf: the rows are the leaf of a mask.
register_pytree_node(
    CausalMask,
    lambda mask: ([mask.rows], mask.rule),
    lambda rows, rule: CausalMask(rule, next(iter(rows))),
    serialized_type_name="lowmem.CausalMask",
)
