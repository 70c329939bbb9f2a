"""Reads blocks from files into staging buffers, in threads that do not hold the interpreter lock while they read.

Writes memory to files of our own and reads it back, in threads that do not hold the interpreter lock meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from torch import Tensor

from offload.blocks import PAGE_BYTES, BlockLayout, Extent, round_up
from offload.errors import OffloadError
from offload.files.file import FileStamp, OpenedFile, OwnFile, Pread
from offload.transfer import IoThreads, Transfer, bytes_of


class FileReader:
    """Reads block layouts with a fixed number of requests in flight.

    Requests are served in the order of the `read` calls, in the order of the layout: every thread works on the oldest
    read that still has requests to send. Reads bypass the page cache where the file system allows it and go through
    buffered descriptors, dropping the pages afterwards, where it does not. Files stay open until `close`.

    Args:
        num_threads: Requests in flight.
        request_bytes: Largest request, a multiple of 4096; 1 to 16 MiB are sensible.
        direct: Bypass the page cache where the file system allows it.
        stamps: What each file was when it was checked (`SafetensorsSource.stamps`). A file that is not listed is taken
            as it is when it is first read.
        pread: Does the reading; called from several threads at once.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        *,
        num_threads: int = 4,
        request_bytes: int = 4 << 20,
        direct: bool = True,
        stamps: Mapping[Path, FileStamp] | None = None,
        pread: Pread = os.preadv,
    ) -> None:
        if request_bytes < PAGE_BYTES or request_bytes % PAGE_BYTES:
            raise ValueError(f"request_bytes must be a positive multiple of {PAGE_BYTES}, got {request_bytes}")
        self._request_bytes = request_bytes
        self._direct = direct
        self._stamps = dict(stamps or {})
        self._pread = pread
        self._files: dict[Path, OpenedFile] = {}
        # Not a method: it would keep the reader alive as long as its threads.
        self._threads = IoThreads(
            num_threads, name="offload-read", owner="reader", at_end=partial(_close_all, self._files)
        )

    @property
    def num_threads(self) -> int:
        """Requests in flight."""
        return len(self._threads)

    @property
    def request_bytes(self) -> int:
        """Largest request."""
        return self._request_bytes

    def read(self, layout: BlockLayout, into: Tensor) -> Transfer:
        """Start reading a block into a staging buffer.

        Returns at once. Leave `into` alone until `wait()` returns or raises; the caller keeps ownership of it. Bytes of
        the buffer that belong to no tensor are unspecified afterwards.

        Args:
            layout: What to read and where to put it.
            into: Contiguous uint8 tensor of shape (n,), n >= `layout.buffer_bytes`, in host memory; page-aligned, or
                the reads are not direct.

        Returns:
            The read. Errors of files, also on opening them, come from its `wait()`.

        Raises:
            Closed: The reader was closed.
            ValueError: `into` has the wrong type, place or size.
        """
        view = _view_of(into, layout)
        direct = into.data_ptr() % PAGE_BYTES == 0 and layout.page_bytes % PAGE_BYTES == 0
        failure: OffloadError | None = None
        # Held until the last piece is queued: two reads do not mix their pieces, and close() comes before or after all.
        with self._threads.admitted(f"block {layout.name}"):
            try:
                files = {extent.file: self._open(extent.file) for extent in layout.extents}
            except OffloadError as error:
                files, failure = {}, error
            pieces = _split(layout, files, view, self._request_bytes, direct) if failure is None else []
            transfer = Transfer(
                layout.name,
                nbytes=layout.read_bytes,
                num_pieces=len(pieces),
                memory=into,
                finish=partial(_check_and_drop, layout.extents, files),
            )
            self._threads.submit(transfer, pieces, failed=failure)
        return transfer

    def close(self) -> None:
        """Fail what has not been read yet, wait for requests in flight, stop the threads, close the files.

        Every `wait()` returns or raises. May be called twice.
        """
        self._threads.close()

    def _open(self, path: Path) -> OpenedFile:
        file = self._files.get(path)
        if file is None:
            file = OpenedFile(path, stamp=self._stamps.get(path), direct=self._direct, pread=self._pread)
            self._files[path] = file
        return file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _view_of(into: Tensor, layout: BlockLayout) -> memoryview:
    view = bytes_of(into, name=f"block {layout.name}")
    if into.numel() < layout.buffer_bytes:
        raise ValueError(
            f"block {layout.name}: expected a buffer of at least {layout.buffer_bytes} bytes, got {into.numel()}"
        )
    return view


def _split(
    layout: BlockLayout, files: Mapping[Path, OpenedFile], view: memoryview, request_bytes: int, direct: bool
) -> list[Callable[[], None]]:
    """Cut extents into requests.

    Each has room for its bytes, and up to the end of the last page where it ends an extent.
    """
    pieces: list[Callable[[], None]] = []
    for extent in layout.extents:
        for done in range(0, extent.nbytes, request_bytes):
            nbytes = min(request_bytes, extent.nbytes - done)
            start = extent.buffer_offset_bytes + done
            room = view[start : start + round_up(nbytes, layout.page_bytes)]
            offset_bytes = extent.file_offset_bytes + done
            pieces.append(
                partial(files[extent.file].read, room, offset_bytes=offset_bytes, nbytes=nbytes, direct=direct)
            )
    return pieces


def _check_and_drop(extents: tuple[Extent, ...], files: Mapping[Path, OpenedFile]) -> None:
    # After the last byte, so that a file rewritten while it was being read is found out.
    for file in files.values():
        file.check_unchanged()
    for extent in extents:
        files[extent.file].drop_cached(extent.file_offset_bytes, nbytes=extent.nbytes)


def _close_all(files: Mapping[Path, OpenedFile]) -> None:
    for file in files.values():
        file.close()


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
