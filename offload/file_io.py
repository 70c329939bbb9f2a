"""Reads blocks from files into staging buffers, in threads that do not hold the interpreter lock while they read."""

import ctypes
import os
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from offload.errors import Closed, OffloadError
from offload.layout import PAGE_BYTES, BlockLayout, round_up
from offload.opened_file import OpenedFile, Pread
from offload.stamp import FileStamp


class Transfer:
    """A read in progress: a future without a value. Made by `FileReader.read`."""

    def __init__(self, layout: BlockLayout, into: Tensor, *, files: Mapping[Path, OpenedFile], num_pieces: int) -> None:
        self.name = layout.name
        """Name of the block that is read, for errors and traces."""
        self.nbytes = layout.read_bytes
        """Bytes asked of the files, alignment and merged gaps included."""
        self.start_ns = 0
        """When the first request was sent, on `time.perf_counter_ns`'s clock; 0 before that."""
        self.end_ns = 0
        """When the last request had been answered; 0 before that."""
        # Kept alive while requests write into it, whatever the caller does.
        self._into: Tensor | None = into
        self._extents = layout.extents
        self._files = files
        self._num_left = num_pieces
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Whether nothing writes into the buffer any more: all bytes are there, or the read has failed."""
        return self._finished.is_set()

    def wait(self) -> None:
        """Block until the bytes are there.

        Returns or raises only after the last request into the buffer has been answered. May be called repeatedly and
        from several threads.

        Raises:
            ReadError: The operating system could not read; names file, offset and bytes.
            SourceChanged: A file was shortened, rewritten, replaced or removed before the read ended.
            Closed: The reader was closed before the read ended.
        """
        self._finished.wait()
        if self._error is not None:
            raise self._error

    def finish_piece(self, error: BaseException | None = None, *, num_pieces: int = 1) -> None:
        """Count pieces as answered; the reader's threads call this once for each.

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
            if self._error is None:
                self._check_and_drop()
        except (OffloadError, OSError) as failure:
            self._error = failure
        finally:
            self.end_ns = time.perf_counter_ns()
            self.start_ns = self.start_ns or self.end_ns
            self._into = None
            self._finished.set()

    def _check_and_drop(self) -> None:
        # After the last byte, so that a file rewritten while it was being read is found out.
        for file in self._files.values():
            file.check_unchanged()
        for extent in self._extents:
            self._files[extent.file].drop_cached(extent.file_offset_bytes, nbytes=extent.nbytes)

    def begin_piece(self) -> bool:
        """Note that a piece is about to be read. False if it need not be, because another one has failed."""
        if self.start_ns == 0:
            self.start_ns = time.perf_counter_ns()
        return self._error is None


class _Piece(NamedTuple):
    """One request. `view` has room for `nbytes`, and up to the end of the last page where the piece ends an extent."""

    transfer: Transfer
    file: OpenedFile
    offset_bytes: int
    nbytes: int
    view: memoryview
    direct: bool


@dataclass(kw_only=True)
class _Service:
    """What the threads share with their reader. Does not refer to the reader, so that the reader can be collected."""

    queue: SimpleQueue[_Piece | None] = field(default_factory=SimpleQueue)
    lock: threading.Lock = field(default_factory=threading.Lock)
    files: dict[Path, OpenedFile] = field(default_factory=dict)
    threads: list[threading.Thread] = field(default_factory=list)
    num_running: int = 0
    closed: bool = False


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
        if num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, got {num_threads}")
        if request_bytes < PAGE_BYTES or request_bytes % PAGE_BYTES:
            raise ValueError(f"request_bytes must be a positive multiple of {PAGE_BYTES}, got {request_bytes}")
        self._request_bytes = request_bytes
        self._direct = direct
        self._stamps = dict(stamps or {})
        self._pread = pread
        self._service = service = _Service()
        # Daemons, stopped at exit by the finalizer: a reader that nobody closed must not keep the process from ending.
        for i in range(num_threads):
            thread = threading.Thread(target=_serve, args=(service,), name=f"offload-read-{i}", daemon=True)
            service.threads.append(thread)
            service.num_running += 1
            thread.start()
        self._finalizer = weakref.finalize(self, _shut_down, service)

    @property
    def num_threads(self) -> int:
        """Requests in flight."""
        return len(self._service.threads)

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
        with self._service.lock:
            if self._service.closed:
                raise Closed(f"block {layout.name}: the reader was closed; make a new one")
            try:
                files = {extent.file: self._open(extent.file) for extent in layout.extents}
            except OffloadError as error:
                files, failure = {}, error
            requests = _split(layout, self._request_bytes) if failure is None else []
            transfer = Transfer(layout, into, files=files, num_pieces=len(requests))
            for path, offset_bytes, nbytes, start, stop in requests:
                self._service.queue.put(_Piece(transfer, files[path], offset_bytes, nbytes, view[start:stop], direct))
        if not requests:
            transfer.finish_piece(failure, num_pieces=0)
        return transfer

    def close(self) -> None:
        """Fail what has not been read yet, wait for requests in flight, stop the threads, close the files.

        Every `wait()` returns or raises. May be called twice.
        """
        self._finalizer()

    def _open(self, path: Path) -> OpenedFile:
        file = self._service.files.get(path)
        if file is None:
            file = OpenedFile(path, stamp=self._stamps.get(path), direct=self._direct, pread=self._pread)
            self._service.files[path] = file
        return file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _view_of(into: Tensor, layout: BlockLayout) -> memoryview:
    if into.dtype != torch.uint8 or into.device.type != "cpu" or into.dim() != 1 or not into.is_contiguous():
        raise ValueError(
            f"block {layout.name}: expected a contiguous one-dimensional uint8 tensor in host memory, "
            f"got {into.dtype} of shape {list(into.shape)} on {into.device}"
        )
    if into.numel() < layout.buffer_bytes:
        raise ValueError(
            f"block {layout.name}: expected a buffer of at least {layout.buffer_bytes} bytes, got {into.numel()}"
        )
    # Keeps no reference to the tensor: the transfer does.
    return memoryview((ctypes.c_ubyte * into.numel()).from_address(into.data_ptr())).cast("B")


def _split(layout: BlockLayout, request_bytes: int) -> list[tuple[Path, int, int, int, int]]:
    """Cut extents into requests: (file, offset, bytes that must be there, start and stop in the buffer)."""
    pieces = []
    for extent in layout.extents:
        for done in range(0, extent.nbytes, request_bytes):
            nbytes = min(request_bytes, extent.nbytes - done)
            start = extent.buffer_offset_bytes + done
            stop = start + round_up(nbytes, layout.page_bytes)
            pieces.append((extent.file, extent.file_offset_bytes + done, nbytes, start, stop))
    return pieces


def _serve(service: _Service) -> None:
    """Body of a reading thread."""
    while (piece := service.queue.get()) is not None:
        transfer = piece.transfer
        error: BaseException | None = None
        try:
            if service.closed:
                error = Closed(f"block {transfer.name}: the reader was closed before it had been read")
            elif transfer.begin_piece():
                piece.file.read(piece.view, offset_bytes=piece.offset_bytes, nbytes=piece.nbytes, direct=piece.direct)
        # Whatever it is belongs to the thread that waits: wait() raises it there.
        except BaseException as caught:  # noqa: BLE001
            error = caught
        transfer.finish_piece(error)
        # Waiting for the next piece, this frame must not keep the last buffer and error alive.
        del piece, transfer, error
    with service.lock:
        service.num_running -= 1
        if service.num_running == 0:
            for file in service.files.values():
                file.close()


def _shut_down(service: _Service) -> None:
    with service.lock:
        service.closed = True
        for _ in service.threads:
            service.queue.put(None)
    for thread in service.threads:
        # The collector may run this in one of the threads themselves.
        if thread is not threading.current_thread():
            thread.join()
