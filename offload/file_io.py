"""Reads blocks from files into staging buffers, in threads that do not hold the interpreter lock while they read."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from offload.errors import OffloadError
from offload.layout import PAGE_BYTES, BlockLayout, Extent, round_up
from offload.opened_file import OpenedFile, Pread
from offload.stamp import FileStamp
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
