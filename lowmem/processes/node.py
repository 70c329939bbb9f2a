"""One reader and one copy of the frozen blocks for all ranks of a node that open the same files.

The first rank of a node that gets here serves; all of them, itself included, ask it. Ranks that cannot share read for
themselves, and the plan says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from lowmem.processes.ranks import Ranks, agreement, ranks
from offload import (
    NUM_SLOTS,
    BlockLayout,
    BlockServer,
    BlockSpec,
    FileIO,
    KeptMemory,
    PeerLost,
    SharedReader,
    lay_out,
)


@dataclass(frozen=True, kw_only=True)
class NodeBlocks:
    """How this rank's blocks come."""

    reader: FileIO | SharedReader
    """Brings them."""
    note: str = ""
    """Why it does not share, where there are others on its node."""
    _owned: ExitStack = field(default_factory=ExitStack)

    @property
    def is_shared(self) -> bool:
        """Whether there is one copy of what is kept, for all ranks of the node."""
        return isinstance(self.reader, SharedReader)

    @property
    def keep(self) -> KeptMemory:
        """Where blocks that stay in host memory lie, as `Scheduler` takes it."""
        return self.reader.keep if isinstance(self.reader, SharedReader) else _keep_here

    def visited(self) -> None:
        """Say that this rank has begun to compute with another block, as `Scheduler` does."""
        if isinstance(self.reader, SharedReader):
            self.reader.visited()

    def lost(self, wait_s: float) -> PeerLost | None:
        """Which process of this node has died, if one has; waits so long for word of it."""
        return self.reader.lost(wait_s=wait_s) if isinstance(self.reader, SharedReader) else None

    def close(self) -> None:
        """Take leave of the others; the reader that was given stays open. May be called twice."""
        self._owned.close()


def _keep_here(layout: BlockLayout) -> None:
    """Keep a block in memory of this process."""


def shared_bytes(blocks: Sequence[BlockSpec], found: Ranks | None = None) -> int:
    """This rank's part of the memory through which its node's ranks pass blocks on; 0 where it is alone on its node.

    Args:
        blocks: The model's.
        found: Of this process.
    """
    num_ranks = (found or ranks()).local_size
    if num_ranks == 1:
        return 0
    return -(-NUM_SLOTS * max((lay_out(block).buffer_bytes for block in blocks), default=0) // num_ranks)


def share_blocks(blocks: Sequence[BlockSpec], *, reader: FileIO, files: Mapping[Path, object], pin: bool) -> NodeBlocks:
    """Have this rank's blocks brought together with those of the other ranks of its node.

    All ranks of a run call it, in the same order among their other questions.

    Args:
        blocks: The model's, in visiting order.
        reader: This rank's own: the node's, if this rank is its first; stays the caller's, to be closed afterwards.
        files: What each file was when it was opened: ranks share only what is the same files.
        pin: Whether what is kept is copied to a GPU from there.

    Raises:
        OffloadError: The first rank of the node says nothing.
    """
    found = ranks()
    if not found.are_several:
        return NodeBlocks(reader=reader)
    layouts = [lay_out(block) for block in blocks]
    owned = ExitStack()

    def serve() -> tuple[str, dict[Path, object], str]:
        if found.local_size == 1 or found.local_rank:
            return "", {}, ""
        try:
            server = BlockServer(layouts, reader=reader)
        except OSError as error:
            return "", dict(files), f"there is no shared memory ({error})"
        owned.callback(server.close)
        return server.address, dict(files), ""

    first = found.rank - found.local_rank
    address, theirs, problem = agreement().on(f"reader of node {found.node}", serve, rank=first)
    if found.local_size == 1:
        return NodeBlocks(reader=reader)
    if not problem and theirs != dict(files):
        problem = "the first rank of this machine has opened other files"
    if not problem:
        try:
            shared = SharedReader(address, layouts, reader=reader, pin=pin)
        except OSError as error:
            problem = str(error)
        else:
            owned.callback(shared.close)
            return NodeBlocks(reader=shared, _owned=owned)
    return NodeBlocks(
        reader=reader,
        note=f"{found} reads and keeps its blocks for itself, beside {found.local_size - 1} others: {problem}",
        _owned=owned,
    )
