"""Short measurements: how fast the user's own files can be read, and how fast the compute device multiplies."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch

from offload.blocks import PAGE_BYTES, BlockLayout, Extent
from offload.buffers import StagingBuffer
from offload.errors import SourceError
from offload.files.file_io import FileIO
from offload.files.scratch import Scratch
from offload.transfer import Transfer

_MIB = 1 << 20
_NUM_THREADS = (1, 2, 4, 8)
_FIRST_REQUEST_BYTES = 4 * _MIB
_OTHER_REQUEST_BYTES = (1 * _MIB, 16 * _MIB)
_BUFFER_BYTES = 32 * _MIB

# Bytes per setting: twice what is in flight, within these bounds. The largest settings get half of that.
_SLICE_BYTES = (16 * _MIB, 64 * _MIB)

# A setting that keeps more bytes in flight must be this much faster to be worth them.
_WORTH = 1.05


@dataclass(frozen=True, kw_only=True)
class DiskRate:
    """How fast files were read, and with which settings."""

    read_bytes_per_s: float
    """Rate with these settings."""
    num_threads: int
    """Requests in flight."""
    request_bytes: int
    """Size of a request."""
    measured: tuple[DiskRate, ...] = ()
    """All settings that were tried, in order; only on the one that was chosen."""


def probe_disk(files: Sequence[Path], *, max_s: float = 0.5, max_bytes: int = 256 * _MIB) -> DiskRate:
    """Find the number and the size of requests that read these files fastest.

    Tries 1, 2, 4 and 8 requests of 4 MiB in flight, then 1 and 16 MiB with the best number, never more than 64 MiB in
    flight. Reads past the page cache where the file system allows it; where it does not, pages that were cached before
    make the rates too good. Never writes. Needs 32 MiB of memory.

    Args:
        files: Files on the disk in question; the larger they are, the better the measurement.
        max_s: Time to spend. A setting that would not fit into what is left is not tried; the first one always is.
        max_bytes: Bytes to read; likewise.

    Returns:
        The fastest setting, or one with fewer bytes in flight that is within 5% of it.

    Raises:
        SourceError: A file is missing, or there are no bytes to read.
        ReadError: A file could not be read.
        SourceChanged: A file changed while it was read.
    """
    sizes = _sizes_of(files)
    deadline_s = time.perf_counter() + max_s
    measured: list[DiskRate] = []
    start_bytes = 0
    with StagingBuffer(_BUFFER_BYTES) as buffer:
        # The first touch of memory costs more than reading into it.
        buffer.tensor.zero_()
        for i in range(len(_NUM_THREADS) + len(_OTHER_REQUEST_BYTES)):
            if i < len(_NUM_THREADS):
                setting = DiskRate(read_bytes_per_s=0, num_threads=_NUM_THREADS[i], request_bytes=_FIRST_REQUEST_BYTES)
            else:
                setting = replace(_best(measured), request_bytes=_OTHER_REQUEST_BYTES[i - len(_NUM_THREADS)])
            nbytes = min(max(2 * setting.num_threads * setting.request_bytes, _SLICE_BYTES[0]), _SLICE_BYTES[1])
            left_s = deadline_s - time.perf_counter()
            if measured and (
                nbytes > left_s * measured[-1].read_bytes_per_s
                or start_bytes + nbytes > max_bytes
                or setting.num_threads * setting.request_bytes > nbytes
            ):
                continue
            measured.append(_measure(setting, sizes, buffer, start_bytes=start_bytes, nbytes=nbytes))
            start_bytes += nbytes
    return replace(_best(measured), measured=tuple(measured))


def probe_scratch(folder: Path, *, max_bytes: int = 512 * _MIB) -> float:
    """Measure how fast what was written in a folder is read back and written again, as state on disk is.

    What was just written may come slower than what has lain there: some drives keep it elsewhere for a while. Makes a
    file without a name that is gone afterwards. Needs 64 MiB of memory.

    Args:
        folder: On the disk in question; made if it is not there.
        max_bytes: Size of the file.

    Returns:
        Bytes per second, those read and those written added up.

    Raises:
        WriteError: The folder cannot be written, or is full.
        ReadError: It cannot be read.
    """
    num_slots = max(2, max_bytes // _BUFFER_BYTES)
    scratch = Scratch(folder)
    with closing(scratch), StagingBuffer(_BUFFER_BYTES) as one, StagingBuffer(_BUFFER_BYTES) as other:
        slots = [scratch.take(_BUFFER_BYTES) for _ in range(num_slots)]
        for buffer in (one, other):
            buffer.tensor.random_(0, 256)
        for slot in slots:
            # The file grows: what comes later is written over.
            scratch.write(slot, one.tensor, name="probe").wait()
        start_s = time.perf_counter()
        writing: Transfer | None = None
        for index, slot in enumerate(slots):
            buffer = (one, other)[index % 2]
            scratch.read(slot, buffer.tensor, name="probe").wait()
            if writing is not None:
                writing.wait()
            writing = scratch.write(slot, buffer.tensor, name="probe")
        assert writing is not None
        writing.wait()
        return 2 * num_slots * _BUFFER_BYTES / (time.perf_counter() - start_s)


def probe_compute(dtype: torch.dtype, device: torch.device | str, *, max_s: float = 0.3) -> float:
    """Measure how fast a device multiplies matrices.

    Args:
        dtype: Floating-point type of the factors and the product.
        device: Where to multiply.
        max_s: Time to spend; sizes grow from 256 while the next one fits.

    Returns:
        Floating-point operations per second of the fastest product, two per multiplication and addition.

    Raises:
        ValueError: `dtype` is not a floating-point type.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"expected a floating-point dtype, got {dtype}")
    deadline_s = time.perf_counter() + max_s
    # Its own generator: a measurement must not change the random numbers of the run.
    generator = torch.Generator(device).manual_seed(0)
    best = 0.0
    size = 256
    with torch.no_grad():
        while True:
            factor = torch.rand(size, size, dtype=torch.float32, device=device, generator=generator).to(dtype)
            (factor @ factor)[0, 0].item()
            took_s = []
            for _ in range(2):
                start_s = time.perf_counter()
                # Reading an element waits for the product, on any device.
                (factor @ factor)[0, 0].item()
                took_s.append(time.perf_counter() - start_s)
            best = max(best, 2 * size**3 / min(took_s))
            # The next size takes eight times as long, and runs three times.
            if time.perf_counter() + 3 * 8 * min(took_s) > deadline_s:
                return best
            size *= 2


def _sizes_of(files: Sequence[Path]) -> dict[Path, int]:
    try:
        sizes = {file: file.stat().st_size for file in files}
    except OSError as error:
        raise SourceError(
            Path(error.filename), field="file", problem=f"{error.strerror}", remedy="check the path"
        ) from error
    sizes = {file: size for file, size in sorted(sizes.items(), key=lambda item: -item[1]) if size > 0}
    if not sizes:
        where = files[0] if files else Path()
        raise SourceError(where, field="size", problem="there are no bytes to read", remedy="give a larger file")
    return sizes


def _measure(
    setting: DiskRate, sizes: dict[Path, int], buffer: StagingBuffer, *, start_bytes: int, nbytes: int
) -> DiskRate:
    layout = BlockLayout(
        name="probe",
        extents=_extents(sizes, start_bytes, nbytes=nbytes, request_bytes=setting.request_bytes),
        tensor_offsets={},
        buffer_bytes=buffer.nbytes,
    )
    with FileIO(num_threads=setting.num_threads, request_bytes=setting.request_bytes) as reader:
        transfer = reader.read(layout, buffer.tensor)
        transfer.wait()
    took_ns = max(transfer.end_ns - transfer.start_ns, 1)
    return replace(setting, read_bytes_per_s=transfer.nbytes * 1e9 / took_ns)


def _extents(sizes: dict[Path, int], start_bytes: int, *, nbytes: int, request_bytes: int) -> tuple[Extent, ...]:
    """Requests over the files laid end to end, from `start_bytes` on, beginning again at the end of the last.

    They share a small buffer and overwrite each other there: nobody looks at the bytes.
    """
    files, ends = list(sizes), list(accumulate(sizes.values()))
    num_slots = _BUFFER_BYTES // request_bytes
    extents = []
    for i in range(nbytes // request_bytes):
        position = (start_bytes + i * request_bytes) % ends[-1]
        file_index = bisect_right(ends, position)
        file = files[file_index]
        offset_bytes = (position - ends[file_index] + sizes[file]) // PAGE_BYTES * PAGE_BYTES
        extents.append(
            Extent(
                file=file,
                file_offset_bytes=offset_bytes,
                nbytes=min(request_bytes, sizes[file] - offset_bytes),
                buffer_offset_bytes=i % num_slots * request_bytes,
            )
        )
    return tuple(extents)


def _best(measured: list[DiskRate]) -> DiskRate:
    fastest = max(rate.read_bytes_per_s for rate in measured)
    good = [rate for rate in measured if rate.read_bytes_per_s * _WORTH >= fastest]
    return min(good, key=lambda rate: rate.num_threads * rate.request_bytes)
