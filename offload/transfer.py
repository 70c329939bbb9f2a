"""Transfers between memory and files, and the threads that carry them out without holding the interpreter lock."""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from offload.errors import Closed, OffloadError

_CLOSED = "the reader or writer was closed"


def refuse_in_child(what: str, made_in: int) -> None:
    """Raise where threads are asked for something in a forked child, which has none: it would wait for ever.

    Args:
        what: What has the threads.
        made_in: Number of the process that they were started in.

    Raises:
        OffloadError: That is another one.
    """
    if os.getpid() != made_in:
        raise OffloadError(
            f"a {what} made in process {made_in} was used in its forked child {os.getpid()}, which has not "
            "its threads; make a new one in the child, or start it with the spawn method"
        )


class WorkerThread(threading.Thread):
    """A thread whose work others wait for. It must never wait for that itself, as a finalizer run in it might.

    A daemon: if nobody has closed its owner, it must not keep the process from ending.
    """

    def __init__(self, *, target: Callable[..., None], args: tuple[object, ...] = (), name: str) -> None:
        super().__init__(target=target, args=args, name=name, daemon=True)


class SerialThread:
    """A thread that does one thing after another, in the order in which they are given to it.

    It does not keep its owner alive, unless by what waits to be done.

    Args:
        name: The thread's name.
    """

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = WorkerThread(target=_do_all, args=(self._queue,), name=name)
        self._thread.start()
        self._finalizer = weakref.finalize(self, self._queue.put, None)

    def run(self, task: Callable[[], None]) -> None:
        """Have something done, which must not raise; returns at once."""
        self._queue.put(task)

    def close(self) -> None:
        """End the thread once everything has been done. Twice is fine."""
        self._finalizer()
        # The collector runs finalizers in any thread.
        if threading.current_thread() is not self._thread:
            self._thread.join()


def _do_all(queue: SimpleQueue[Callable[[], None] | None]) -> None:
    """Body of a `SerialThread`."""
    while (task := queue.get()) is not None:
        task()
        # Waiting for the next one, this frame must not keep a buffer alive.
        del task


class Transfer:
    """A read or write in progress: a future without a value.

    Args:
        name: What is moved, such as a block's name; for errors and traces.
        nbytes: Bytes asked of the files, alignment and merged gaps included.
        num_pieces: Requests that it consists of.
        memory: What is read into or written from. Kept alive while requests use it, whatever the caller does.
        finish: Called after the last request, in its thread, if none has failed; its error fails the transfer.
        at_end: Called at the very end, whatever came of it, in the thread of the last request; must not raise.
    """

    def __init__(
        self,
        name: str,
        *,
        nbytes: int,
        num_pieces: int,
        memory: Tensor,
        finish: Callable[[], None] | None = None,
        at_end: Callable[[Transfer], None] | None = None,
    ) -> None:
        self.name = name
        self.nbytes = nbytes
        self.start_ns = 0
        """When the first request was sent, on `time.perf_counter_ns`'s clock; 0 before that."""
        self.end_ns = 0
        """When the last request had been answered; 0 before that."""
        self._memory: Tensor | None = memory
        self._finish, self._at_end = finish, at_end
        self._when_done: list[Callable[[], None]] = []
        self._num_left = num_pieces
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Whether nothing uses the memory any more: all bytes have been moved, or the transfer has failed."""
        return self._finished.is_set()

    def outcome(self) -> BaseException | None:
        """Block until the transfer has ended; what `wait` raises, or None if all bytes have been moved."""
        self._finished.wait()
        return self._error

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the transfer is `done`: in the thread of the last request, or now. It must not raise."""
        self._when_done.append(callback)
        if self.done():
            self._call_back()

    def _call_back(self) -> None:
        # Without a lock: a finalizer that runs here may wait for a thread that has just called `when_done`. Each
        # callback is taken by whichever thread pops it.
        while self._when_done:
            try:
                callback = self._when_done.pop()
            except IndexError:
                return
            callback()

    @property
    def failed(self) -> bool:
        """Whether a request has failed: `wait` will raise, or has raised."""
        return self._error is not None

    def wait(self) -> None:
        """Block until the bytes have been moved.

        Returns or raises only after the last request has been answered. May be called repeatedly and from several
        threads.

        Raises:
            ReadError: The operating system could not read; names file, offset and bytes.
            WriteError: The operating system could not write; likewise.
            TierFull: The file system has no room for what was to be written.
            SourceChanged: A file was shortened, rewritten, replaced or removed before the read ended.
            Closed: The reader or writer was closed before the transfer ended.
        """
        if (error := self.outcome()) is not None:
            raise error

    def begin_piece(self) -> bool:
        """Note that a piece is about to be moved. False if it need not be, because another one has failed."""
        if self.start_ns == 0:
            self.start_ns = time.perf_counter_ns()
        return self._error is None

    def finish_piece(self, error: BaseException | None = None, *, num_pieces: int = 1) -> None:
        """Count pieces as answered; the threads call this once for each.

        Args:
            error: Why the piece failed, or None. The first error is the one that `wait` raises.
            num_pieces: How many pieces this answers.
        """
        with self._lock:
            self._error = self._error or error
            self._num_left -= num_pieces
            if self._num_left > 0:
                return
        try:
            if self._error is None and self._finish is not None:
                self._finish()
        except (OffloadError, OSError) as failure:
            self._error = failure
        finally:
            self.end_ns = time.perf_counter_ns()
            self.start_ns = self.start_ns or self.end_ns
            at_end, self._at_end, self._finish, self._memory = self._at_end, None, None, None
            if at_end is not None:
                at_end(self)
            self._finished.set()
            self._call_back()


class _Piece(NamedTuple):
    transfer: Transfer
    move: Callable[[], None]


@dataclass(kw_only=True)
class _Service:
    """What the threads share with their owner. Does not refer to the owner, so that the owner can be collected."""

    at_end: Callable[[], None]
    queue: SimpleQueue[_Piece | None] = field(default_factory=SimpleQueue)
    lock: threading.Lock = field(default_factory=threading.Lock)
    threads: list[threading.Thread] = field(default_factory=list)
    num_running: int = 0
    closed: bool = False
    pid: int = field(default_factory=os.getpid)


class IoThreads:
    """A fixed number of threads that serve requests in the order in which they were submitted.

    Args:
        num_threads: Requests in flight.
        name: Beginning of the threads' names.
        at_end: Called by the last thread as it ends; must not refer to whoever owns these threads.

    Raises:
        ValueError: `num_threads` is less than 1.
    """

    def __init__(self, num_threads: int, *, name: str, at_end: Callable[[], None]) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, got {num_threads}")
        self._service = service = _Service(at_end=at_end)
        # Stopped at exit by the finalizer.
        for i in range(num_threads):
            thread = WorkerThread(target=_serve, args=(service,), name=f"{name}-{i}")
            service.threads.append(thread)
            service.num_running += 1
            thread.start()
        self._finalizer = weakref.finalize(self, _shut_down, service)

    @contextmanager
    def admitted(self, what: str) -> Iterator[None]:
        """Have the right to `submit` inside the ``with``: two transfers do not mix their pieces, and closing waits.

        Raises:
            Closed: The threads were stopped.
            OffloadError: This is a forked child, which has not these threads.
        """
        # Before the lock, which a thread of the parent may have held.
        refuse_in_child("reader or writer", self._service.pid)
        with self._service.lock:
            if self._service.closed:
                raise Closed(f"{what}: {_CLOSED}; open it again")
            yield

    def submit(
        self, transfer: Transfer, pieces: Sequence[Callable[[], None]], *, failed: OffloadError | None = None
    ) -> None:
        """Queue a transfer's pieces; call it inside `admitted`.

        Args:
            transfer: Made for as many pieces.
            pieces: What the threads call, each once, in this order.
            failed: Why there is nothing to be done, if that is known already; there are no pieces then.
        """
        for piece in pieces:
            self._service.queue.put(_Piece(transfer, piece))
        if not pieces:
            transfer.finish_piece(failed, num_pieces=0)

    def close(self) -> None:
        """Fail what has not been begun, wait for requests in flight, stop the threads. May be called twice."""
        self._finalizer()


def bytes_of(memory: Tensor, *, name: str) -> memoryview:
    """A tensor's bytes. Keeps no reference to the tensor: the transfer does.

    Raises:
        ValueError: It is not a contiguous uint8 tensor of one dimension in host memory.
    """
    if memory.dtype != torch.uint8 or memory.device.type != "cpu" or memory.dim() != 1 or not memory.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous one-dimensional uint8 tensor in host memory, "
            f"got {memory.dtype} of shape {list(memory.shape)} on {memory.device}"
        )
    return memoryview((ctypes.c_ubyte * memory.numel()).from_address(memory.data_ptr())).cast("B")


def _serve(service: _Service) -> None:
    """Body of a thread."""
    while (piece := service.queue.get()) is not None:
        transfer = piece.transfer
        error: BaseException | None = None
        try:
            if service.closed:
                error = Closed(f"{transfer.name}: {_CLOSED} before the transfer ended")
            elif transfer.begin_piece():
                piece.move()
        # Whatever it is belongs to the thread that waits: wait() raises it there.
        except BaseException as caught:  # noqa: BLE001
            error = caught
        transfer.finish_piece(error)
        # Waiting for the next piece, this frame must not keep the last buffer and error alive.
        del piece, transfer, error
    with service.lock:
        service.num_running -= 1
        if service.num_running == 0:
            service.at_end()


def _shut_down(service: _Service) -> None:
    if os.getpid() != service.pid:
        return  # A forked child has not the threads.
    with service.lock:
        service.closed = True
        for _ in service.threads:
            service.queue.put(None)
    for thread in service.threads:
        # The collector may run this in one of the threads themselves.
        if thread is not threading.current_thread():
            thread.join()
