"""Reads blocks once for all processes of a machine: one thread knows who wants what and who is gone.

Each process asks for blocks as it needs them (`SharedReader`), so that they may differ in how often they visit them.
A block that one of them keeps is read to its own place; the others pass through a few slots, out of which each process
copies. A slot is given to another block when every process that still moves has taken it or has gone past it.
"""

from __future__ import annotations

import os
import selectors
import socket
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from offload.blocks import BlockLayout
from offload.errors import ClosedAfterwards
from offload.files.file_io import FileIO
from offload.sharing.arena import (
    ArenaLayout,
    Kind,
    Message,
    SharedArena,
    peer_of,
    receive,
    send,
)
from offload.transfer import Transfer, WorkerThread

MAX_READS = 2
"""Reads under way: one that the disk is busy with, one queued behind it (as in `Pipeline`)."""

NUM_SLOTS = 3
"""Blocks that pass through at a time: one being read, one being copied, one that a slower process has still to take."""

PATIENCE = 4.0
"""A process that has asked for nothing for so many times its usual pause is not waited for."""

PATIENCE_S = (3.0, 60.0)
"""Bounds of that wait: the end of a step is not taken for that of a run, and a rank that is done costs no minutes."""

_PREFETCHED = NUM_SLOTS + 1
"""Visits by which a process asks for a block sooner or later than another: as far as it reads ahead."""

_FORGETTING = 0.9
_BLOCKED_POLL_S = 0.05


@dataclass(eq=False, kw_only=True)
class _Client:
    """A process that asks for blocks."""

    connection: socket.socket
    number: int
    pid: int
    heard_s: float
    patience_bounds_s: tuple[float, float]
    """Least and most time that it is waited for."""
    usual_s: float = 0.0
    """Longest recent pause between two messages."""
    num_takes: Counter[int] = field(default_factory=Counter)
    """How often it has taken each block, or has gone past it."""
    progress: int = 0
    """Visits that it has begun: how far it has come."""
    num_pending: int = 0
    """Blocks that it waits for and that nobody reads yet."""
    said_bye: bool = False

    def is_behind(self, other: _Client) -> bool:
        """Whether it has not come as far: in visits, and where those are equal (before the first one) in blocks."""
        return (self.progress, self.num_takes.total()) < (other.progress, other.num_takes.total())

    def hear(self, now_s: float) -> None:
        pause_s = now_s - self.heard_s
        self.heard_s = now_s
        # No longer than it would be waited for: after a long one, the usual pause is soon known again.
        self.usual_s = max(min(pause_s, self.patience_bounds_s[1]), self.usual_s * _FORGETTING)

    def patience_s(self) -> float:
        least_s, most_s = self.patience_bounds_s
        return min(most_s, max(least_s, PATIENCE * self.usual_s))

    def is_moving(self, now_s: float) -> bool:
        return now_s - self.heard_s < self.patience_s()


@dataclass(eq=False, kw_only=True)
class _Held:
    """A block that is in shared memory, or is being read to it."""

    block: int
    start: int
    slot: int | None
    """Number of its slot; None in its own place."""
    number: int
    """Of its last leading take: those that no other process had made before."""
    position: int = 0
    """How far the process had come that made it."""
    transfer: Transfer
    ready: bool = False
    waiting: list[_Client] = field(default_factory=list)
    copying: list[_Client] = field(default_factory=list)
    keepers: set[_Client] = field(default_factory=set)
    payer: _Client | None = None
    """Who asked for it first, and counts its bytes."""
    failed: bool = False
    """Whether it could not be read. A place stays its keepers', which may have read the block there themselves."""

    @property
    def is_used(self) -> bool:
        return not self.ready or bool(self.waiting or self.copying or self.keepers)


class _Service:
    """The server's state and its thread. Does not refer to the server, so that this one can be collected."""

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        *,
        arena: SharedArena,
        places: ArenaLayout,
        reader: FileIO,
        listener: socket.socket,
        patience_s: tuple[float, float],
    ) -> None:
        self._patience_s = patience_s
        self._layouts, self._arena, self._places, self._reader = tuple(layouts), arena, places, reader
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._woken, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, lambda: self._woken.recv(4096))
        self._clients: list[_Client] = []
        self._kept: dict[int, _Held] = {}
        self._passing: dict[int, _Held] = {}
        self._free_slots = list(range(len(places.slots)))
        self._pending: deque[tuple[_Client, int]] = deque()
        self._reads: list[_Held] = []
        self._num_takes = 0
        self._most_takes: Counter[int] = Counter()
        self._num_clients = 0
        self._closing = False

    def wake(self) -> None:
        """Have the thread look again; from any thread."""
        try:
            self._wake.send(b"!")
        except OSError:
            return  # Its buffer is full, so it is awake; or it has ended.

    def stop(self) -> None:
        """Have the thread end, once its reads have."""
        self._closing = True
        self.wake()

    def add(self, connection: socket.socket) -> None:
        """Serve another process from now on."""
        pid, uid = peer_of(connection)
        if uid != os.geteuid():
            connection.close()
            return
        client = _Client(
            connection=connection,
            number=self._num_clients,
            pid=pid,
            heard_s=time.monotonic(),
            patience_bounds_s=self._patience_s,
        )
        self._num_clients += 1
        socket.send_fds(connection, [b"arena"], [self._arena.fd])
        self._clients.append(client)
        self._selector.register(connection, selectors.EVENT_READ, partial(self._hear, client))

    def run(self) -> None:
        """Body of the thread."""
        try:
            while not self._closing:
                blocked = bool(self._pending)
                for key, _ in self._selector.select(_BLOCKED_POLL_S if blocked else None):
                    key.data()
                self._collect()
                self._start()
        finally:
            for held in self._reads:
                held.transfer.outcome()
            for client in self._clients:
                self._tell(client, Message(Kind.CLOSING))
                client.connection.close()
            self._selector.close()
            for end in (self._listener, self._woken, self._wake):
                end.close()
            self._arena.close()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        self.add(connection)

    def _hear(self, client: _Client) -> None:
        message = receive(client.connection)
        if message is None:
            self._leave(client)
            return
        now_s = time.monotonic()
        if not client.is_moving(now_s):
            # It comes back from where it waited for the others: from a generation that ended sooner, say.
            client.progress = max(other.progress for other in self._clients)
            client.num_takes = self._most_takes.copy()
        client.hear(now_s)
        match message.kind:
            case Kind.WANT:
                self._want(client, message.block)
            case Kind.KEEP:
                self._keep(client, message.block)
            case Kind.TAKEN:
                self._give_back(client, message.block, message.value)
            case Kind.DROP:
                self._drop(client, message.block)
            case Kind.VISIT:
                client.progress += 1
            case Kind.BYE:
                client.said_bye = True

    def _leave(self, client: _Client) -> None:
        """A process has closed its end, or has died."""
        self._selector.unregister(client.connection)
        client.connection.close()
        self._clients.remove(client)
        self._pending = deque(one for one in self._pending if one[0] is not client)
        for held in (*self._kept.values(), *self._passing.values()):
            held.waiting = [one for one in held.waiting if one is not client]
            held.copying = [one for one in held.copying if one is not client]
            held.keepers.discard(client)
        for held in list(self._kept.values()):
            self._let_go(held)
        if not client.said_bye:
            for other in list(self._clients):
                self._tell(other, Message(Kind.LOST, client.number, client.pid))

    def _want(self, client: _Client, block: int) -> None:
        held = self._found(block)
        if held is not None:
            self._hand_out(held, client)
            return
        client.num_pending += 1
        self._pending.append((client, block))

    def _keep(self, client: _Client, block: int) -> None:
        held = self._kept.get(block)
        if held is None or held.failed:
            keepers = set() if held is None else held.keepers
            held = self._read(block, self._places.places[block], slot=None, payer=client)
            held.keepers = keepers
            self._kept[block] = held
        held.keepers.add(client)
        self._hand_out(held, client)

    def _found(self, block: int) -> _Held | None:
        """The block in shared memory, or on its way there."""
        held = self._kept.get(block)
        return held if held is not None and not held.failed else self._passing.get(block)

    def _hand_out(self, held: _Held, client: _Client) -> None:
        if not held.ready:
            held.waiting.append(client)
            return
        paid_bytes = self._layouts[held.block].read_bytes if held.payer is client else 0
        if held.payer is client:
            held.payer = None
        if client not in held.keepers:
            held.copying.append(client)
        client.num_takes[held.block] += 1
        if client.num_takes[held.block] > self._most_takes[held.block]:
            self._most_takes[held.block] = client.num_takes[held.block]
            held.number, held.position = self._next_number(), client.progress
        self._tell(client, Message(Kind.HAVE, held.block, held.start, paid_bytes))

    def _give_back(self, client: _Client, block: int, start: int) -> None:
        for held in (self._kept.get(block), self._passing.get(block)):
            if held is not None and held.start == start and client in held.copying:
                held.copying.remove(client)
                if held.slot is None:
                    self._let_go(held)
                return

    def _drop(self, client: _Client, block: int) -> None:
        held = self._kept.get(block)
        if held is not None:
            held.keepers.discard(client)
            self._let_go(held)

    def _let_go(self, held: _Held) -> None:
        """Free a place that nobody needs any more."""
        if not held.is_used and self._kept.get(held.block) is held:
            del self._kept[held.block]
            layout = self._layouts[held.block]
            if layout.buffer_bytes:
                self._arena.give_back(held.start, layout.buffer_bytes)

    def _read(self, block: int, start: int, *, slot: int | None, payer: _Client) -> _Held:
        layout = self._layouts[block]
        transfer = self._reader.read(layout, self._arena.view(start, layout.buffer_bytes))
        held = _Held(block=block, start=start, slot=slot, number=self._next_number(), transfer=transfer, payer=payer)
        self._reads.append(held)
        transfer.when_done(self.wake)
        return held

    def _next_number(self) -> int:
        self._num_takes += 1
        return self._num_takes

    def _collect(self) -> None:
        for held in [held for held in self._reads if held.transfer.done()]:
            self._reads.remove(held)
            waiting, held.waiting, held.ready = held.waiting, [], True
            if held.transfer.outcome() is None:
                for client in waiting:
                    self._hand_out(held, client)
                if held.slot is None:
                    self._let_go(held)
                continue
            # Whoever waits reads for itself, and has the error as it is if it comes again.
            held.failed = True
            for client in waiting:
                self._tell(client, Message(Kind.FAILED, held.block))
            if held.slot is None:
                self._let_go(held)
            else:
                self._evict(held)

    def _start(self) -> None:
        """Read what is asked for, in the order in which it was, as far as there is room."""
        while self._pending and len(self._reads) < MAX_READS:
            client, block = self._pending[0]
            held = self._found(block)
            slot = None if held is not None else self._room(client)
            if held is None and slot is None:
                return
            self._pending.popleft()
            client.num_pending -= 1
            if held is None:
                assert slot is not None
                self._free_slots.remove(slot)
                held = self._read(block, self._places.slots[slot], slot=slot, payer=client)
                self._passing[block] = held
            self._hand_out(held, client)

    def _room(self, client: _Client) -> int | None:
        """A free slot for a process, or that of the oldest block for which it need not wait for others to come.

        It waits for those that are behind it, never for those that are ahead: the slowest waits for nobody.
        """
        if self._free_slots:
            return self._free_slots[0]
        now_s = time.monotonic()
        behind = [other for other in self._clients if other.is_behind(client)]
        free = [
            held
            for held in self._passing.values()
            if not held.is_used and not any(self._may_come(other, held, now_s) for other in behind)
        ]
        if not free:
            return None
        # What it will not want itself, and of that the oldest.
        oldest = min(free, key=lambda held: (self._is_due(client, held), held.number))
        assert oldest.slot is not None
        self._evict(oldest)
        return oldest.slot

    def _evict(self, held: _Held) -> None:
        assert held.slot is not None
        for client in self._clients:
            if self._is_past(client, held):
                client.num_takes[held.block] = self._most_takes[held.block]
        del self._passing[held.block]
        self._free_slots.append(held.slot)

    def _may_come(self, client: _Client, held: _Held, now_s: float) -> bool:
        """Whether a process is likely to ask for a block soon.

        One that waits for another block asks for that first; one that has not been heard for long computes nothing.
        """
        return self._is_due(client, held) and not client.num_pending and client.is_moving(now_s)

    def _is_due(self, client: _Client, held: _Held) -> bool:
        """Whether another has taken a block more often, and this one has not gone past it."""
        return client.num_takes[held.block] < self._most_takes[held.block] and not self._is_past(client, held)

    @staticmethod
    def _is_past(client: _Client, held: _Held) -> bool:
        """Whether a process has come so far that it would have taken a block, and had it itself still."""
        return client.progress > held.position + _PREFETCHED

    @staticmethod
    def _tell(client: _Client, message: Message) -> None:
        try:
            send(client.connection, message)
        except OSError:
            return  # It is gone: its end of the connection says so.


class BlockServer(ClosedAfterwards):
    """Serves blocks to the processes of a machine, this one among them.

    Args:
        layouts: The blocks; every process has the same.
        reader: Reads them; stays the caller's, to be closed after this.
        patience_s: Least and most time that a process which is behind, and says nothing, is waited for.

    Raises:
        OSError: The system has no such memory or sockets.
    """

    def __init__(
        self, layouts: Sequence[BlockLayout], *, reader: FileIO, patience_s: tuple[float, float] = PATIENCE_S
    ) -> None:
        places = ArenaLayout.of(layouts, num_slots=NUM_SLOTS)
        arena = SharedArena.create(places.nbytes)
        try:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            # No file: a name that the kernel forgets with the socket, and that nobody guesses.
            self.address = f"lowmem-{os.getpid()}-{os.urandom(16).hex()}"
            """Where other processes of the same user connect."""
            listener.bind(f"\0{self.address}")
            listener.listen()
        except OSError:
            arena.close()
            raise
        service = _Service(
            layouts,
            arena=arena,
            places=places,
            reader=reader,
            listener=listener,
            patience_s=patience_s,
        )
        self._thread = WorkerThread(target=service.run, name="offload-share")
        self._thread.start()
        self._finalizer = weakref.finalize(self, _stop, service, self._thread)

    def close(self) -> None:
        """End the reads under way and tell the others, which read for themselves from then on. Twice is fine."""
        self._finalizer()


def _stop(service: _Service, thread: WorkerThread) -> None:
    service.stop()
    thread.join()
