"""What the disk itself delivers: plain O_DIRECT reads of the same files, with nothing of this project in between."""

import itertools
import mmap
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_MIB = 1 << 20
_HUGE_BYTES = 2 * _MIB


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How to read."""

    num_threads: int
    request_bytes: int


@dataclass(frozen=True, kw_only=True)
class RawRate:
    """What came of it."""

    setting: Setting
    nbytes: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        return self.nbytes / self.seconds


SETTINGS = tuple(
    Setting(num_threads=num_threads, request_bytes=request_bytes)
    for num_threads, request_bytes in itertools.product((1, 2, 4, 8), (1 * _MIB, 4 * _MIB, 16 * _MIB))
)


def read_raw(files: Sequence[Path], setting: Setting, *, max_bytes: int) -> RawRate:
    """Read up to `max_bytes` from the beginning of the files on, in order, each thread taking the next request.

    Raises:
        OSError: A file cannot be opened or read past the page cache.
    """
    requests = iter(list(_requests(files, setting.request_bytes, max_bytes=max_bytes)))
    descriptors = {file: os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files}
    lock = threading.Lock()
    nbytes = 0
    errors: list[OSError] = []
    memory = _huge_pages(setting.num_threads * setting.request_bytes)
    buffers = [
        memory[index * setting.request_bytes : (index + 1) * setting.request_bytes]
        for index in range(setting.num_threads)
    ]

    def work(buffer: memoryview) -> None:
        nonlocal nbytes
        while True:
            with lock:
                request = next(requests, None)
            if request is None:
                return
            try:
                num_read = os.preadv(descriptors[request[0]], [buffer], request[1])
            except OSError as error:
                errors.append(error)
                return
            with lock:
                nbytes += num_read

    threads = [threading.Thread(target=work, args=(buffer,)) for buffer in buffers]
    start_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start_s
    for descriptor in descriptors.values():
        os.close(descriptor)
    if errors:
        raise errors[0]
    return RawRate(setting=setting, nbytes=nbytes, seconds=seconds)


def write_raw(folder: Path, setting: Setting, *, nbytes: int) -> RawRate:
    """Write a preallocated file of `nbytes` past the page cache, sync it and remove it; threads share the requests.

    Raises:
        OSError: It cannot be written.
    """
    path = folder / "raw-write.bin"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
    try:
        os.posix_fallocate(fd, 0, nbytes)
        buffer = _huge_pages(setting.request_bytes)[: setting.request_bytes]
        buffer[:] = os.urandom(1 << 20) * (setting.request_bytes >> 20)

        def write(offset: int) -> None:
            os.pwritev(fd, [buffer], offset)

        offsets = range(0, nbytes - setting.request_bytes + 1, setting.request_bytes)
        with ThreadPoolExecutor(setting.num_threads) as pool:
            # Once without the clock: blocks that were never written to cost more.
            for _ in pool.map(write, offsets):
                pass
            start_s = time.perf_counter()
            for _ in pool.map(write, offsets):
                pass
            os.fsync(fd)
            seconds = time.perf_counter() - start_s
    finally:
        os.close(fd)
        path.unlink()
    return RawRate(setting=setting, nbytes=len(offsets) * setting.request_bytes, seconds=seconds)


def best_setting(files: Sequence[Path], *, max_bytes: int) -> Setting:
    """The fastest of `SETTINGS` for these files, each tried twice: single rates vary."""
    rates = [read_raw(files, setting, max_bytes=max_bytes) for _ in range(2) for setting in SETTINGS]
    return max(rates, key=lambda rate: rate.bytes_per_s).setting


def _huge_pages(nbytes: int) -> memoryview:
    """Memory in large pages where there are any: a direct read lists the pages that it fills, and many cost time."""
    # Private: what is shared, Python's default, is a file in memory to the kernel, and those rarely have large pages.
    nbytes = -(-nbytes // _HUGE_BYTES) * _HUGE_BYTES + _HUGE_BYTES
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    # Touched before the clock starts: the first touch of memory costs more than reading into it.
    memory[:] = bytes(len(memory))
    return memoryview(memory)


def _requests(files: Sequence[Path], request_bytes: int, *, max_bytes: int) -> list[tuple[Path, int]]:
    requests = [
        (file, offset) for file in files for offset in range(0, file.stat().st_size - request_bytes, request_bytes)
    ]
    return requests[: max(1, max_bytes // request_bytes)]
