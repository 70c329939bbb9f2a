"""Moves bytes between files and buffers, in threads that do not hold the interpreter lock meanwhile."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from offload.blocks import PAGE_BYTES, BlockLayout, Extent, round_up
from offload.errors import ClosedAfterwards, OffloadError
from offload.files.file import File, FileStamp, Pread, open_source
from offload.transfer import IoThreads, Transfer, bytes_of


class FilePart(NamedTuple):
    """A stretch of a file, and where in a buffer it belongs."""

    file: File
    offset_bytes: int
    """First byte in the file."""
    start: int
    """Where that byte goes in the buffer."""
    nbytes: int
    """Length."""
    room_bytes: int
    """Bytes of the buffer that a read may overwrite, `nbytes` or more: direct reads are of whole pages."""


class FileIO(ClosedAfterwards):
    """Reads and writes with a fixed number of requests in flight.

    Requests are served in the order of the calls: every thread works on the oldest transfer that still has requests to
    send. They bypass the page cache where the file system allows it and whole pages are asked for, and go through
    buffered descriptors, dropping the pages afterwards, where it does not.

    Args:
        num_threads: Requests in flight.
        request_bytes: Largest request, a multiple of 4096; 1 to 16 MiB are sensible.
        direct: Bypass the page cache where the file system allows it, for files that `read` opens.
        stamps: What each file was when it was checked (`SafetensorsSource.stamps`), for files that `read` opens. One
            that is not listed is taken as it is when it is first read.
        pread: Does the reading of files that `read` opens; called from several threads at once.

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
        self._stamps = dict(stamps or {})
        self._open_source = partial(open_source, direct=direct, pread=pread)
        self._files: dict[Path, File] = {}
        # Not a method: it would keep this object alive as long as its threads.
        self._threads = IoThreads(num_threads, name="offload-io", at_end=partial(_close_all, self._files))

    def adopt(self, file: File) -> None:
        """Close a file of the caller's when the threads have ended, also if nobody closes this object."""
        self._files[file.path] = file

    def read(self, layout: BlockLayout, into: Tensor) -> Transfer:
        """Start reading a block into a staging buffer.

        Returns at once. Leave `into` alone until `wait()` returns or raises; the caller keeps ownership of it. Bytes of
        the buffer that belong to no tensor are unspecified afterwards. Files stay open until `close`.

        Args:
            layout: What to read and where to put it.
            into: Contiguous uint8 tensor of shape (n,), n >= `layout.buffer_bytes`, in host memory; page-aligned, or
                the reads are not direct.

        Returns:
            The read. Errors of files, also on opening them, come from its `wait()`.

        Raises:
            Closed: This was closed.
            ValueError: `into` has the wrong type, place or size.
        """
        name = f"block {layout.name}"
        view = bytes_of(into, name=name)
        if into.numel() < layout.buffer_bytes:
            raise ValueError(f"{name}: expected a buffer of at least {layout.buffer_bytes} bytes, got {into.numel()}")
        # Held until the last piece is queued: two transfers do not mix their pieces, and close() comes before or after.
        with self._threads.admitted(name):
            try:
                files = {extent.file: self._opened(extent.file) for extent in layout.extents}
            except OffloadError as error:
                transfer = Transfer(layout.name, nbytes=layout.read_bytes, num_pieces=0, memory=into)
                self._threads.submit(transfer, [], failed=error)
                return transfer
            pieces = self._reads([_part_of(extent, files, layout.page_bytes) for extent in layout.extents], view)
            transfer = Transfer(
                layout.name,
                nbytes=layout.read_bytes,
                num_pieces=len(pieces),
                memory=into,
                finish=partial(_check_and_drop, layout.extents, files),
            )
            self._threads.submit(transfer, pieces)
        return transfer

    def read_parts(
        self, parts: Sequence[FilePart], into: Tensor, *, name: str, at_end: Callable[[Transfer], None] | None = None
    ) -> Transfer:
        """Start reading stretches of open files into one buffer, as one transfer.

        Args:
            parts: What to read and where to put it; the files stay open until the transfer has ended.
            into: Contiguous uint8 tensor of shape (n,) in host memory; left alone until then.
            name: What is read, for errors and traces.
            at_end: Called in a thread when the transfer has ended, whatever came of it; must not raise.

        Raises:
            Closed: This was closed.
            ValueError: `into` has the wrong type or place.
        """
        pieces = self._reads(parts, bytes_of(into, name=name))
        nbytes = sum(part.nbytes for part in parts)
        return self._start(Transfer(name, nbytes=nbytes, num_pieces=len(pieces), memory=into, at_end=at_end), pieces)

    def write(
        self,
        file: File,
        data: Tensor,
        *,
        offset_bytes: int,
        name: str,
        sync: bool = False,
        checksum: Callable[[int], None] | None = None,
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
            checksum: Called in a thread with the CRC-32 of `data`, which is computed while it is written.
            at_end: Called in a thread when the transfer has ended, whatever came of it; must not raise.

        Returns:
            The write. Errors of the file come from its `wait()`.

        Raises:
            Closed: This was closed.
            ValueError: `data` has the wrong type or place.
        """
        view, step = bytes_of(data, name=name), self._request_bytes
        pieces: list[Callable[[], None]] = [
            partial(file.write, view[start : start + step], offset_bytes=offset_bytes + start)
            for start in range(0, len(view), step)
        ]
        if checksum is not None:
            pieces.insert(0, lambda: checksum(zlib.crc32(view)))
        finish = file.sync if sync else None
        return self._start(
            Transfer(name, nbytes=len(view), num_pieces=len(pieces), memory=data, finish=finish, at_end=at_end), pieces
        )

    def close(self) -> None:
        """Fail what has not been begun, wait for requests in flight, stop the threads, close the files.

        Every `wait()` returns or raises. May be called twice.
        """
        self._threads.close()

    def _opened(self, path: Path) -> File:
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = self._open_source(path, stamp=self._stamps.get(path))
        return file

    def _reads(self, parts: Sequence[FilePart], view: memoryview) -> list[Callable[[], None]]:
        """Cut parts into requests."""
        pieces: list[Callable[[], None]] = []
        step = self._request_bytes
        for part in parts:
            for done in range(0, part.nbytes, step):
                room = view[part.start + done : part.start + min(done + step, part.room_bytes)]
                nbytes = min(step, part.nbytes - done)
                pieces.append(partial(part.file.read, room, offset_bytes=part.offset_bytes + done, nbytes=nbytes))
        return pieces

    def _start(self, transfer: Transfer, pieces: list[Callable[[], None]]) -> Transfer:
        with self._threads.admitted(transfer.name):
            self._threads.submit(transfer, pieces)
        return transfer


def _part_of(extent: Extent, files: Mapping[Path, File], page_bytes: int) -> FilePart:
    return FilePart(
        file=files[extent.file],
        offset_bytes=extent.file_offset_bytes,
        start=extent.buffer_offset_bytes,
        nbytes=extent.nbytes,
        room_bytes=round_up(extent.nbytes, page_bytes),
    )


def _check_and_drop(extents: tuple[Extent, ...], files: Mapping[Path, File]) -> None:
    # After the last byte, so that a file rewritten while it was being read is found out.
    for file in files.values():
        file.check_unchanged()
    for extent in extents:
        files[extent.file].drop_cached(extent.file_offset_bytes, nbytes=extent.nbytes)


def _close_all(files: Mapping[Path, File]) -> None:
    for file in files.values():
        file.close()
