"""The transfers of a store: versions of objects from buffers to files and back."""

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from offload.file_writer import FileWriter, Part
from offload.layout import BlockLayout, round_up
from offload.opened_file import Pread
from offload.own_file import OwnFile, Pwrite
from offload.store_files import ObjectFile, ObjectFiles
from offload.trace import Trace
from offload.transfer import Transfer


@dataclass(frozen=True, kw_only=True)
class StoreIo:
    """How a store reads and writes."""

    num_readers: int = 4
    """Read requests in flight."""
    num_writers: int = 2
    """Write requests in flight."""
    request_bytes: int = 4 << 20
    """Largest request, a multiple of 4096; 1 to 16 MiB are sensible."""
    direct: bool = True
    """Bypass the page cache where the file system allows it."""
    trace: Trace | None = None
    """Where transfers are recorded: reads on the lane "disk", writes on the lane "disk write"."""
    pwrite: Pwrite = os.pwritev
    """Does the writing; called from several threads at once."""
    pread: Pread = os.preadv
    """Does the reading; likewise."""


class ObjectIo:
    """Reads and writes object files in threads of its own; each is open for as long as a transfer uses it.

    Args:
        files: The files.
        io: How.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(self, files: ObjectFiles, io: StoreIo) -> None:
        self._files, self._trace = files, io.trace
        self._writer = FileWriter(num_threads=io.num_writers, request_bytes=io.request_bytes)
        self._reader = FileWriter(num_threads=io.num_readers, request_bytes=io.request_bytes)
        # Not the store's: its owner waits for transfers with that one held.
        self._lock = threading.Lock()
        self._written_bytes = self._read_bytes = 0

    @property
    def written_bytes(self) -> int:
        """Bytes written so far."""
        return self._written_bytes

    @property
    def read_bytes(self) -> int:
        """Bytes read so far."""
        return self._read_bytes

    def write(self, name: str, file: ObjectFile, opened: OwnFile, data: Tensor) -> Transfer:
        """Start writing a whole file; it is on the disk when the transfer has ended.

        Args:
            name: Of the object, for errors and traces.
            file: The file.
            opened: The same; closed by this, also on errors.
            data: Its contents: tensor of shape (file.nbytes,), uint8, in host memory.

        Raises:
            Closed: This was closed.
            ValueError: `data` has the wrong type or place.
        """
        ended = partial(self._note, "disk write", (opened,))
        try:
            transfer = self._writer.write(opened, data, offset_bytes=0, name=name, sync=True, at_end=ended)
        except BaseException:
            opened.close()
            raise
        file.transfers.append(transfer)
        return transfer

    def read(self, layout: BlockLayout, into: Tensor, files: Mapping[Path, ObjectFile]) -> Transfer:
        """Start reading a block.

        Args:
            layout: What to read and where to put it.
            into: Tensor of shape (n,), uint8, n >= `layout.buffer_bytes`, in host memory.
            files: For each file that the layout speaks of, the one that stands for it.

        Raises:
            ReadError: A file cannot be opened.
            Closed: This was closed.
            ValueError: `into` has the wrong type or place.
        """
        opened: dict[Path, OwnFile] = {}
        try:
            for path, file in files.items():
                opened[path] = self._files.open(file)
            parts = [
                Part(
                    file=opened[extent.file],
                    offset_bytes=extent.file_offset_bytes,
                    start=extent.buffer_offset_bytes,
                    # Whole pages: that is what the files consist of.
                    nbytes=round_up(extent.nbytes, layout.page_bytes),
                )
                for extent in layout.extents
            ]
            ended = partial(self._note, "disk", tuple(opened.values()))
            transfer = self._reader.read_parts(parts, into, name=layout.name, at_end=ended)
        except BaseException:
            for own in opened.values():
                own.close()
            raise
        for file in files.values():
            file.transfers.append(transfer)
        return transfer

    def close(self) -> None:
        """Fail what has not been begun, wait for requests in flight, stop the threads. May be called twice."""
        self._writer.close()
        self._reader.close()

    def _note(self, lane: str, opened: tuple[OwnFile, ...], transfer: Transfer) -> None:
        for file in opened:
            file.close()
        if transfer.failed:
            return
        with self._lock:
            if lane == "disk":
                self._read_bytes += transfer.nbytes
            else:
                self._written_bytes += transfer.nbytes
        if self._trace is not None:
            self._trace.add(lane, transfer.name, transfer.start_ns, transfer.end_ns, nbytes=transfer.nbytes)


__all__ = ["ObjectIo", "StoreIo"]
