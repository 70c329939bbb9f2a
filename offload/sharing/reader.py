"""Asks a machine's `BlockServer` for blocks, in the place of reading them: a process's side of it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from offload.blocks import BlockLayout
from offload.errors import Closed, ClosedAfterwards, PeerLost
from offload.files.file_io import FileIO
from offload.sharing.arena import (
    ArenaLayout,
    Kind,
    Message,
    SharedArena,
    SharedPlace,
    peer_of,
    receive,
    send,
)
from offload.sharing.server import NUM_SLOTS
from offload.transfer import Transfer, WorkerThread, bytes_of


@dataclass(eq=False, kw_only=True)
class _Asked:
    """A block that this process waits for."""

    layout: BlockLayout
    into: Tensor
    transfer: Transfer


@dataclass(eq=False, kw_only=True)
class _Connection:
    """What the reader shares with its thread, which does not refer to it."""

    socket: socket.socket
    arena: SharedArena
    reader: FileIO
    """Reads what the server does not."""
    server_pid: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    asked: dict[int, list[_Asked]] = field(default_factory=dict)
    ended: bool = False
    """Whether the server has said that it closes: from then on this process reads for itself."""
    lost: PeerLost | None = None
    heard_of_loss: threading.Event = field(default_factory=threading.Event)
    closing: bool = False

    def listen(self) -> None:
        """Body of the thread."""
        while (message := receive(self.socket)) is not None:
            if message.kind == Kind.HAVE:
                self._arrive(message)
            elif message.kind == Kind.FAILED:
                self._read_alone(self._take(message.block))
            elif message.kind == Kind.LOST:
                self._fail(PeerLost(f"process {message.value}"))
            elif message.kind == Kind.CLOSING:
                break
        if message is None and not self.closing:
            self._fail(PeerLost(f"process {self.server_pid}, which reads for this machine"))
        with self.lock:
            self.ended = True
            left = [one for waiting in self.asked.values() for one in waiting]
            self.asked.clear()
        for one in left:
            self._read_alone(one)

    def _take(self, block: int) -> _Asked | None:
        with self.lock:
            waiting = self.asked.get(block)
            if not waiting:
                return None
            one = waiting.pop(0)
            if not waiting:
                del self.asked[block]
            return one

    def _arrive(self, message: Message) -> None:
        """A block is in shared memory: take it from there, unless that is where it is wanted."""
        one = self._take(message.block)
        if one is None:
            return
        one.transfer.nbytes = message.nbytes
        source = self.arena.view(message.value, one.layout.buffer_bytes)
        if source.numel() and source.data_ptr() != one.into.data_ptr():
            # Releases the interpreter lock meanwhile.
            ctypes.memmove(one.into.data_ptr(), source.data_ptr(), source.numel())
        with contextlib.suppress(OSError):
            send(self.socket, Message(Kind.TAKEN, message.block, message.value))
        one.transfer.finish_piece()

    def _read_alone(self, one: _Asked | None) -> None:
        """Read a block without the server, and end the transfer as that read ends."""
        if one is None:
            return
        try:
            own = self.reader.read(one.layout, one.into)
        except Closed as error:
            one.transfer.finish_piece(error)
            return
        own.when_done(lambda: one.transfer.finish_piece(own.outcome()))

    def _fail(self, error: PeerLost) -> None:
        with self.lock:
            self.lost = self.lost or error
            self.heard_of_loss.set()
            left = [one for waiting in self.asked.values() for one in waiting]
            self.asked.clear()
        for one in left:
            one.transfer.finish_piece(error)


class SharedReader(ClosedAfterwards):
    """Brings blocks as a `FileIO` does, by way of memory that the processes of a machine share.

    What the server has closed, or could not read, and blocks that it does not know are read by this process itself.

    Args:
        address: The server's (`BlockServer.address`).
        layouts: The blocks, as the server has them.
        reader: This process's own; stays the caller's, to be closed after this.
        pin: Page-lock what is kept, for copies to a GPU.

    Raises:
        OSError: The server cannot be reached: it runs as another user, or in another network namespace.
    """

    def __init__(self, address: str, layouts: Sequence[BlockLayout], *, reader: FileIO, pin: bool) -> None:
        self._numbers = {layout.name: number for number, layout in enumerate(layouts)}
        self._layouts = tuple(layouts)
        self._places = ArenaLayout.of(layouts, num_slots=NUM_SLOTS)
        self._pin = pin
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(f"\0{address}")
            pid, uid = peer_of(connection)
            if uid != os.geteuid():
                raise PermissionError(f"the server at {address} is another user's")
            _, fds, _, _ = socket.recv_fds(connection, 16, 1)
            if not fds:
                raise ConnectionError(f"the server at {address} handed on no memory")
            arena = SharedArena(fds[0], self._places.nbytes)
        except (OSError, ValueError) as error:
            connection.close()
            raise OSError(f"the reader of this machine cannot be used: {error}") from error
        self._connection = _Connection(socket=connection, arena=arena, reader=reader, server_pid=pid)
        self._thread = WorkerThread(target=self._connection.listen, name="offload-shared")
        self._thread.start()
        self._finalizer = weakref.finalize(self, _part, self._connection, self._thread)

    def read(self, layout: BlockLayout, into: Tensor) -> Transfer:
        """Start bringing a block into a buffer, as `FileIO.read` does; its bytes count where they were read for this.

        Raises:
            PeerLost: A process of this run has died.
            Closed: This was closed.
        """
        number = self._numbers.get(layout.name)
        if number is None or self._layouts[number] != layout:
            return self._connection.reader.read(layout, into)
        bytes_of(into, name=f"block {layout.name}")
        connection = self._connection
        transfer = Transfer(layout.name, nbytes=0, num_pieces=1, memory=into)
        transfer.start_ns = time.perf_counter_ns()
        place = self._places.places[number]
        is_kept = into.data_ptr() == connection.arena.view(place, layout.buffer_bytes).data_ptr()
        with connection.lock:
            if connection.closing:
                raise Closed(f"block {layout.name}: the shared reader was closed; open it again")
            if connection.lost is not None:
                raise connection.lost
            if not connection.ended:
                connection.asked.setdefault(number, []).append(_Asked(layout=layout, into=into, transfer=transfer))
                # Where the server is gone, the thread finds that out, and what to do with this.
                with contextlib.suppress(OSError):
                    send(connection.socket, Message(Kind.KEEP if is_kept else Kind.WANT, number))
                return transfer
        return connection.reader.read(layout, into)

    def visited(self) -> None:
        """Say that this process has begun to compute with another block: whoever is ahead waits for those behind."""
        if not (self._connection.ended or self._connection.closing):
            with contextlib.suppress(OSError):
                send(self._connection.socket, Message(Kind.VISIT))

    def keep(self, layout: BlockLayout) -> SharedPlace | None:
        """The place in shared memory where a block is kept, for all processes; None for one that it does not know.

        `read` brings the block there. Closing the place says that this process needs it no longer.
        """
        number = self._numbers.get(layout.name)
        if number is None or self._layouts[number] != layout or self._connection.ended:
            return None
        memory = self._connection.arena.view(self._places.places[number], layout.buffer_bytes)
        return SharedPlace(memory, pin=self._pin, on_close=partial(_drop, self._connection, number))

    def lost(self, *, wait_s: float = 0.0) -> PeerLost | None:
        """Which process of this run on this machine has died, if one has.

        Args:
            wait_s: Longest wait for word of it, after something else has failed that its death may explain.
        """
        self._connection.heard_of_loss.wait(wait_s)
        return self._connection.lost

    def close(self) -> None:
        """Take leave of the server; what is asked for still gets `Closed`. May be called twice."""
        self._finalizer()


def _drop(connection: _Connection, number: int) -> None:
    with contextlib.suppress(OSError):
        send(connection.socket, Message(Kind.DROP, number))


def _part(connection: _Connection, thread: WorkerThread) -> None:
    with connection.lock:
        connection.closing = True
        left = [one for waiting in connection.asked.values() for one in waiting]
        connection.asked.clear()
    for one in left:
        one.transfer.finish_piece(Closed(f"{one.transfer.name}: the shared reader was closed"))
    with contextlib.suppress(OSError):
        send(connection.socket, Message(Kind.BYE))
        connection.socket.shutdown(socket.SHUT_RDWR)
    thread.join()
    connection.socket.close()
    connection.arena.close()
