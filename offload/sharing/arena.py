"""Memory that several processes of a machine see, and messages between them.

The memory has no name: it is handed on as a descriptor, and the kernel frees it with the last process that has it,
however that ends. Nothing can be left of it in /dev/shm.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from offload.blocks import BlockLayout, round_up
from offload.buffers import register_host_memory, unregister_host_memory
from offload.errors import Closed, ClosedAfterwards

_PLACE_BYTES = 2 << 20
"""Alignment of a block's place: a huge page, where the system gives such to shared memory."""


@dataclass(frozen=True, kw_only=True)
class ArenaLayout:
    """Where blocks lie in shared memory: each has a place of its own, and behind them are slots to pass through.

    A place takes memory only while a block is kept there, so that processes may keep different ones.
    """

    places: tuple[int, ...]
    """First byte of each block's own place."""
    slots: tuple[int, ...]
    """First byte of each slot."""
    slot_bytes: int
    """Bytes of a slot: those of the largest block."""
    nbytes: int
    """Address space that all of it takes."""

    @staticmethod
    def of(layouts: Sequence[BlockLayout], *, num_slots: int) -> ArenaLayout:
        """Lay out some blocks."""
        places: list[int] = []
        end = 0
        for layout in layouts:
            places.append(end)
            end += round_up(max(1, layout.buffer_bytes), _PLACE_BYTES)
        slot_bytes = round_up(max((layout.buffer_bytes for layout in layouts), default=1), _PLACE_BYTES)
        slots = tuple(end + index * slot_bytes for index in range(num_slots))
        return ArenaLayout(
            places=tuple(places), slots=slots, slot_bytes=slot_bytes, nbytes=end + num_slots * slot_bytes
        )


class SharedArena(ClosedAfterwards):
    """A piece of memory without a name, mapped by this process.

    Args:
        fd: Its descriptor, this object's from now on.
        nbytes: Its size.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self._fd: int | None = fd
        self._memory = mmap.mmap(fd, nbytes)
        # A child made by fork must not share pages that reads are writing to (open(2), O_DIRECT).
        self._memory.madvise(mmap.MADV_DONTFORK)
        self._tensor: Tensor | None = torch.frombuffer(self._memory, dtype=torch.uint8)

    @staticmethod
    def create(nbytes: int) -> SharedArena:
        """Make one; no memory is taken before it is written to.

        Raises:
            OSError: The system has no such memory.
        """
        fd = os.memfd_create("lowmem-blocks", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            # Nobody can make it shorter: another process would die of reading behind its end.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return SharedArena(fd, nbytes)
        except OSError:
            os.close(fd)
            raise

    @staticmethod
    def received(address: str, nbytes: int) -> SharedArena:
        """What another process of this user hands on.

        Args:
            address: Its `HandingOn.address`.
            nbytes: The memory's size.

        Raises:
            OSError: There is nobody, or another user, or nothing was handed on.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(f"\0{address}")
            if peer_of(connection)[1] != os.geteuid():
                raise PermissionError(f"the memory at {address} is another user's")
            _, fds, _, _ = socket.recv_fds(connection, 16, 1)
        if not fds:
            raise ConnectionError(f"{address} handed on no memory")
        return SharedArena(fds[0], nbytes)

    @property
    def fd(self) -> int:
        """The descriptor, to be handed on.

        Raises:
            Closed: This was closed.
        """
        if self._fd is None:
            raise Closed("the shared memory was closed")
        return self._fd

    def view(self, start: int, nbytes: int) -> Tensor:
        """Some of its bytes: uint8 of shape (nbytes,)."""
        if self._tensor is None:
            raise Closed("the shared memory was closed")
        return self._tensor[start : start + nbytes]

    def give_back(self, start: int, nbytes: int) -> None:
        """Give the memory of some bytes, from a page's beginning, back to the system, for all processes."""
        self._memory.madvise(mmap.MADV_REMOVE, start, nbytes)

    def close(self) -> None:
        """Let go of it; views that are still held keep it mapped."""
        self._tensor = None
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class HandingOn(ClosedAfterwards):
    """Hands a piece of memory on to other processes of this user (`SharedArena.received`).

    Args:
        arena: The memory; stays the caller's.
    """

    def __init__(self, arena: SharedArena) -> None:
        self._arena = arena
        self.address = f"lowmem-{os.getpid()}-{os.urandom(16).hex()}"
        """Where they ask for it."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.bind(f"\0{self.address}")
            self._listener.listen()
        except OSError:
            self._listener.close()
            raise

    def to(self, num: int, *, wait_s: float) -> None:
        """Hand it on to so many processes.

        Args:
            num: How many.
            wait_s: Longest wait for each.

        Raises:
            OSError: One did not come in time.
        """
        self._listener.settimeout(wait_s)
        served = 0
        while served < num:
            connection, _ = self._listener.accept()
            with connection:
                # An abstract address has no owner: anybody may connect.
                if peer_of(connection)[1] == os.geteuid():
                    socket.send_fds(connection, [b"memory"], [self._arena.fd])
                    served += 1

    def close(self) -> None:
        """Hand nothing on any more. May be called twice."""
        self._listener.close()


class SharedPlace(ClosedAfterwards):
    """A block's own place in shared memory, as one process uses it: page-locked by each for itself.

    Args:
        memory: The place, uint8.
        pin: Register it with CUDA, where that is possible.
        on_close: Called once, when this process needs the block there no longer.
    """

    def __init__(self, memory: Tensor, *, pin: bool, on_close: Callable[[], None]) -> None:
        self.tensor = memory
        """The memory."""
        self._pinned = pin and register_host_memory(memory)
        self._on_close: Callable[[], None] | None = on_close

    def close(self) -> None:
        """Unpin it and let go of it. No transfer may be running. Twice is fine."""
        if self._pinned:
            self._pinned = False
            unregister_host_memory(self.tensor)
        told, self._on_close = self._on_close, None
        if told is not None:
            told()


class Kind(IntEnum):
    """What a message says."""

    WANT = 1
    """To the server: this process wants a block, to copy it from where it is."""
    KEEP = 2
    """To the server: it wants it in the block's own place, until it says `DROP`."""
    TAKEN = 3
    """To the server: it has copied the block from where it was."""
    DROP = 4
    """To the server: it needs the block's own place no longer."""
    VISIT = 10
    """To the server: it has begun to compute with a block."""
    BYE = 5
    """To the server: it is about to leave."""
    HAVE = 6
    """From the server: the block is at a position, and so many bytes were read for it on this one's account."""
    FAILED = 7
    """From the server: the block could not be read."""
    LOST = 8
    """From the server: a process has left without a word."""
    CLOSING = 9
    """From the server: it ends."""


class Message(NamedTuple):
    """What two processes tell each other."""

    kind: int
    """A `Kind`."""
    block: int = 0
    """Number of a block; of a process in `LOST`."""
    value: int = 0
    """Position in the shared memory; process id in `LOST`."""
    nbytes: int = 0
    """Bytes read."""


_FORMAT = struct.Struct("<Bqqq")


def send(connection: socket.socket, message: Message) -> None:
    """Send a message; what a reader has asked for fits the socket's buffer, so that nobody waits here.

    Raises:
        OSError: The other one is gone.
    """
    connection.send(_FORMAT.pack(*message))


def receive(connection: socket.socket) -> Message | None:
    """Wait for a message; None if the other one is gone."""
    try:
        data = connection.recv(_FORMAT.size)
    except OSError:
        return None
    return Message(*_FORMAT.unpack(data)) if len(data) == _FORMAT.size else None


_CREDENTIALS = struct.Struct("3i")


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """The process and the user at the other end of a local socket."""
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid
