"""Writes memory to files of our own and reads it back, in threads that do not hold the interpreter lock meanwhile."""

from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self

from torch import Tensor

from offload.layout import PAGE_BYTES
from offload.own_file import OwnFile
from offload.transfer import IoThreads, Transfer, bytes_of


class Part(NamedTuple):
    """A stretch of a file, and where in a buffer it belongs."""

    file: OwnFile
    offset_bytes: int
    """First byte in the file."""
    start: int
    """Where that byte goes in the buffer."""
    nbytes: int
    """Length."""


class FileWriter:
    """Writes and reads back with a fixed number of requests in flight, served in the order of the calls.

    Requests bypass the page cache where the file system allows it and whole pages are asked for.

    Args:
        num_threads: Requests in flight.
        request_bytes: Largest request, a multiple of 4096; 1 to 16 MiB are sensible.
        at_end: Called by the last thread as it ends, to close files; must not refer to whoever owns this writer.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self, *, num_threads: int = 2, request_bytes: int = 4 << 20, at_end: Callable[[], None] | None = None
    ) -> None:
        if request_bytes < PAGE_BYTES or request_bytes % PAGE_BYTES:
            raise ValueError(f"request_bytes must be a positive multiple of {PAGE_BYTES}, got {request_bytes}")
        self._request_bytes = request_bytes
        self._threads = IoThreads(num_threads, name="offload-write", owner="writer", at_end=at_end or _nothing)

    def write(
        self,
        file: OwnFile,
        data: Tensor,
        *,
        offset_bytes: int,
        name: str,
        sync: bool = False,
        at_end: Callable[[Transfer], None] | None = None,
    ) -> Transfer:
        """Start writing a buffer to a file.

        Returns at once. Neither change `data` nor close `file` until `wait()` returns or raises; the caller keeps
        ownership of both.

        Args:
            file: Where to.
            data: Contiguous uint8 tensor of shape (n,) in host memory. Written directly if it begins on a page and has
                whole pages.
            offset_bytes: Where in the file its first byte goes; likewise.
            name: What is written, for errors and traces.
            sync: The transfer ends only when the bytes are on the disk.
            at_end: Called in a writing thread when the transfer has ended, whatever came of it; must not raise.

        Returns:
            The write. Errors of the file come from its `wait()`.

        Raises:
            Closed: The writer was closed.
            ValueError: `data` has the wrong type or place.
        """
        pieces: list[Callable[[], None]] = [
            partial(file.write, piece, offset_bytes=offset_bytes + start)
            for start, piece in self._cut(bytes_of(data, name=name))
        ]
        finish = file.sync if sync else None
        return self._start(data, pieces, name=name, nbytes=data.numel(), finish=finish, at_end=at_end)

    def read_back(
        self,
        file: OwnFile,
        into: Tensor,
        *,
        offset_bytes: int,
        name: str,
        at_end: Callable[[Transfer], None] | None = None,
    ) -> Transfer:
        """Start filling a buffer from a file; arguments, result and errors as for `write`.

        Leave `into` alone until `wait()` returns or raises.
        """
        parts = [Part(file=file, offset_bytes=offset_bytes, start=0, nbytes=into.numel())]
        return self.read_parts(parts, into, name=name, at_end=at_end)

    def read_parts(
        self,
        parts: Sequence[Part],
        into: Tensor,
        *,
        name: str,
        at_end: Callable[[Transfer], None] | None = None,
    ) -> Transfer:
        """Start reading stretches of several files into one buffer, as one transfer; else as `read_back`."""
        view = bytes_of(into, name=name)
        pieces: list[Callable[[], None]] = []
        for part in parts:
            for start, piece in self._cut(view[part.start : part.start + part.nbytes]):
                pieces.append(partial(part.file.read, piece, offset_bytes=part.offset_bytes + start))
        nbytes = sum(part.nbytes for part in parts)
        return self._start(into, pieces, name=name, nbytes=nbytes, finish=None, at_end=at_end)

    def close(self) -> None:
        """Fail what has not been begun, wait for requests in flight, stop the threads. May be called twice."""
        self._threads.close()

    def _cut(self, view: memoryview) -> list[tuple[int, memoryview]]:
        step = self._request_bytes
        return [(start, view[start : start + step]) for start in range(0, len(view), step)]

    def _start(
        self,
        memory: Tensor,
        pieces: list[Callable[[], None]],
        *,
        name: str,
        nbytes: int,
        finish: Callable[[], None] | None,
        at_end: Callable[[Transfer], None] | None,
    ) -> Transfer:
        transfer = Transfer(name, nbytes=nbytes, num_pieces=len(pieces), memory=memory, finish=finish, at_end=at_end)
        with self._threads.admitted(name):
            self._threads.submit(transfer, pieces)
        return transfer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _nothing() -> None:
    """The files are closed by whoever opened them."""


__all__ = ["FileWriter", "Part"]
