"""Writing files of our own: content, what the operating system may do, errors, order and closing."""

import errno
import fcntl
import gc
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload.buffers import StagingBuffer
from offload.errors import Closed, OffloadError, ReadError, TierFull, WriteError
from offload.files.file import File, Pwrite
from offload.files.file_io import FileIO, FilePart
from offload.transfer import Transfer
from tests.offload.own_threads import own_threads
from tests.offload.small_disk import fill, small_disk

PAGE = 4096


def open_file(path: Path, *, direct: bool = True, pwrite: Pwrite = os.pwritev, pread: Pwrite = os.preadv) -> File:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    return File(fd, path, direct=direct, pwrite=pwrite, pread=pread)


def read_back(io: FileIO, file: File, into: Tensor, *, offset_bytes: int) -> Transfer:
    nbytes = into.numel()
    return io.read_parts([FilePart(file, offset_bytes, 0, nbytes, nbytes)], into, name="w")


def random_bytes(nbytes: int, *, seed: int = 0) -> Tensor:
    buffer = StagingBuffer(nbytes).tensor
    return buffer.copy_(torch.randint(0, 256, (nbytes,), generator=torch.Generator().manual_seed(seed)).byte())


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.bin"


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("offset", [0, 1, 4096, 4097])
@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 50_000])
def test_bytes_are_written_where_they_belong_and_read_back(path: Path, nbytes: int, offset: int, direct: bool) -> None:
    path.write_bytes(b"\xa5" * 60_000)
    data = random_bytes(nbytes)
    file = open_file(path, direct=direct)
    with FileIO(request_bytes=2 * PAGE) as writer:
        writer.write(file, data, offset_bytes=offset, name="w").wait()
        back = StagingBuffer(nbytes).tensor
        read_back(writer, file, back, offset_bytes=offset).wait()
    file.close()
    assert torch.equal(back, data)
    expected = bytearray(b"\xa5" * 60_000)
    expected[offset : offset + nbytes] = data.numpy().tobytes()
    assert path.read_bytes() == bytes(expected)


def test_a_file_without_a_name_is_written_directly_too(tmp_path: Path) -> None:
    path = tmp_path / "gone"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    path.unlink()
    modes: list[bool] = []

    def watch(fd: int, buffers: list[memoryview], offset: int) -> int:
        modes.append(is_direct(fd))
        return os.pwritev(fd, buffers, offset)

    file = File(fd, path, pwrite=watch)
    if not file.direct:
        pytest.skip("the system or its temporary folder has no direct writes")
    with FileIO() as writer:
        writer.write(file, random_bytes(3 * PAGE), offset_bytes=PAGE, name="w").wait()
        writer.write(file, random_bytes(100), offset_bytes=PAGE, name="w").wait()
        writer.write(file, random_bytes(PAGE + 1)[1:], offset_bytes=0, name="w").wait()
    file.close()
    # Not whole pages; whole pages from an odd address, which the system may refuse.
    assert modes[:2] == [True, False]
    assert modes[-1] is False or len(modes) == 3


@pytest.mark.parametrize("limit", [1, 511, 4095, 4096, 5000])
@pytest.mark.parametrize("direct", [True, False])
def test_short_writes_and_reads_are_continued(path: Path, limit: int, direct: bool) -> None:
    path.touch()
    other = os.open(path, os.O_RDWR)

    def short_write(fd: int, buffers: list[memoryview], offset: int) -> int:
        return os.pwrite(other, bytes(buffers[0][:limit]), offset)

    def short_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        part = os.pread(other, min(limit, len(buffers[0])), offset)
        buffers[0][: len(part)] = part
        return len(part)

    data = random_bytes(8192 if limit == 1 else 40_960)
    file = open_file(path, direct=direct, pwrite=short_write, pread=short_read)
    with FileIO(request_bytes=4 * PAGE) as writer:
        writer.write(file, data, offset_bytes=0, name="w").wait()
        back = StagingBuffer(data.numel()).tensor
        read_back(writer, file, back, offset_bytes=0).wait()
    os.close(other)
    file.close()
    assert torch.equal(back, data)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.EINTR])
def test_refused_direct_and_interrupted_writes_are_done_the_other_way_or_again(path: Path, code: int) -> None:
    refused: list[int] = []

    def refuse(fd: int, buffers: list[memoryview], offset: int) -> int:
        if is_direct(fd) and not (code == errno.EINTR and refused):
            refused.append(offset)
            raise OSError(code, os.strerror(code))
        return os.pwritev(fd, buffers, offset)

    data = random_bytes(10 * PAGE)
    file = open_file(path, pwrite=refuse)
    if not file.direct:
        pytest.skip("the system or its temporary folder has no direct writes")
    with FileIO(num_threads=1, request_bytes=PAGE) as writer:
        for _ in range(2):
            writer.write(file, data, offset_bytes=0, name="w").wait()
    file.close()
    assert len(refused) == 1, "a file that refused once is not asked again"
    assert path.read_bytes() == data.numpy().tobytes()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs at /dev/shm")
def test_files_on_tmpfs_are_written() -> None:
    path = Path(f"/dev/shm/offload-write-{os.getpid()}")
    try:
        data = random_bytes(5 * PAGE)
        file = open_file(path)
        with FileIO() as writer:
            writer.write(file, data, offset_bytes=0, name="w", sync=True).wait()
        file.close()
        assert path.read_bytes() == data.numpy().tobytes()
    finally:
        path.unlink()


# ---- errors


def failing_at(bad_offset: int, code: int) -> Pwrite:
    def pwrite(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == bad_offset:
            raise OSError(code, os.strerror(code))
        return os.pwritev(fd, buffers, offset)

    return pwrite


def test_write_error_names_file_offset_and_bytes_and_spares_other_writes(path: Path) -> None:
    file = open_file(path, pwrite=failing_at(2 * PAGE, errno.EIO))
    match = rf"{path}: writing 4096 bytes at offset 8192 failed: Input/output error \(EIO\); check the disk"
    with FileIO(request_bytes=PAGE) as writer:
        bad = writer.write(file, random_bytes(4 * PAGE), offset_bytes=0, name="bad")
        good = writer.write(file, random_bytes(4 * PAGE), offset_bytes=8 * PAGE, name="good")
        for _ in range(2):
            with pytest.raises(WriteError, match=match) as caught:
                bad.wait()
        assert (caught.value.file, caught.value.offset_bytes, caught.value.nbytes) == (path, 8192, 4096)
        assert bad.failed
        good.wait()
    file.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_says_where_how_much_and_what_to_do(path: Path, code: int) -> None:
    file = open_file(path, pwrite=failing_at(PAGE, code))
    match = rf"{path}: no room for 4096 bytes at offset 4096: .* free; free space there, or write to another disk"
    with FileIO(request_bytes=PAGE) as writer, pytest.raises(TierFull, match=match):
        writer.write(file, random_bytes(2 * PAGE), offset_bytes=0, name="w").wait()
    file.close()


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
@pytest.mark.parametrize("direct", [True, False])
def test_a_disk_that_is_really_full(tmp_path: Path, kind: str, direct: bool) -> None:
    with small_disk(tmp_path / "disk", kind=kind) as folder:
        data = random_bytes(1 << 20)
        file = open_file(folder / "data", direct=direct)
        with FileIO() as writer:
            errors = [writer.write(file, data, offset_bytes=i << 20, name="w", sync=True).outcome() for i in range(10)]
            assert isinstance(errors[-1], TierFull)
            assert "No space left on device" in str(errors[-1])
            os.truncate(file.path, 0)
            writer.write(file, data, offset_bytes=0, name="w", sync=True).wait()
        file.close()
        assert (folder / "data").read_bytes() == data.numpy().tobytes()


def test_a_full_disk_that_is_found_out_in_the_end(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as folder:
        file = open_file(folder / "data")
        filler = fill(folder, leave_bytes=64 * PAGE)
        with FileIO() as writer:
            with pytest.raises(TierFull):
                writer.write(file, random_bytes(1 << 20), offset_bytes=0, name="w", sync=True).wait()
            filler.unlink()
            writer.write(file, random_bytes(1 << 20), offset_bytes=0, name="w", sync=True).wait()
        file.close()


def test_an_error_of_the_final_sync_fails_the_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_sync(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = open_file(path)
    monkeypatch.setattr(os, "fdatasync", no_sync)
    with FileIO() as writer:
        writer.write(file, random_bytes(PAGE), offset_bytes=0, name="w").wait()
        with pytest.raises(WriteError, match="EIO"):
            writer.write(file, random_bytes(PAGE), offset_bytes=0, name="w", sync=True).wait()
    file.close()


def test_reading_back_what_is_not_there_or_not_readable(path: Path) -> None:
    def no_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with FileIO() as writer:
        file = open_file(path)
        with pytest.raises(ReadError, match="the system reported the end of the file, which has 0 bytes"):
            read_back(writer, file, random_bytes(PAGE), offset_bytes=0).wait()
        file.close()
        file = open_file(path, pread=no_read)
        with pytest.raises(ReadError, match="reading 4096 bytes at offset 12288 failed: Input/output error"):
            read_back(writer, file, random_bytes(PAGE), offset_bytes=3 * PAGE).wait()
        file.close()


def test_a_write_that_goes_nowhere_is_an_error(path: Path) -> None:
    file = open_file(path, pwrite=lambda fd, buffers, offset: 0)
    with FileIO() as writer, pytest.raises(WriteError, match="wrote nothing"):
        writer.write(file, random_bytes(PAGE), offset_bytes=0, name="w").wait()
    file.close()


def test_wrong_memory_and_settings_are_refused(path: Path) -> None:
    file = open_file(path)
    with FileIO() as writer:
        for data in (torch.zeros(8), torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(64).byte()[::2]):
            with pytest.raises(ValueError, match="w: expected a contiguous one-dimensional uint8 tensor"):
                writer.write(file, data, offset_bytes=0, name="w")
    file.close()
    with pytest.raises(ValueError, match="num_threads must be at least 1, got 0"):
        FileIO(num_threads=0)
    with pytest.raises(ValueError, match="request_bytes must be a positive multiple of 4096, got 100"):
        FileIO(request_bytes=100)


# ---- closing, races


@pytest.fixture
def gated(path: Path) -> Iterator[tuple[File, threading.Event, threading.Event]]:
    """A file, an event when a write to it has begun, and one that lets it go on."""
    begun, release = threading.Event(), threading.Event()

    def pwrite(fd: int, buffers: list[memoryview], offset: int) -> int:
        begun.set()
        release.wait(60)
        return os.pwritev(fd, buffers, offset)

    file = open_file(path, pwrite=pwrite)
    yield file, begun, release
    release.set()
    file.close()


def test_close_fails_what_is_waiting_and_waits_for_what_is_in_flight(
    gated: tuple[File, threading.Event, threading.Event],
) -> None:
    file, begun, release = gated
    writer = FileIO(num_threads=1, request_bytes=PAGE)
    writes = [writer.write(file, random_bytes(4 * PAGE), offset_bytes=0, name="w") for _ in range(3)]
    assert begun.wait(60)
    closing = threading.Thread(target=writer.close, daemon=True)
    closing.start()

    def write_until_refused() -> None:
        while True:
            writes.append(writer.write(file, random_bytes(PAGE), offset_bytes=0, name="late"))
            time.sleep(0.001)

    with pytest.raises(Closed, match="late: the reader or writer was closed; open it again"):
        write_until_refused()
    assert closing.is_alive()
    assert not any(write.done() for write in writes)
    release.set()
    closing.join(60)
    assert not closing.is_alive()
    for write in writes:
        with pytest.raises(Closed, match=r"(w|late): the reader or writer was closed before the transfer ended"):
            write.wait()
    writer.close()


def test_memory_is_kept_while_it_is_written_and_let_go_of_then(
    gated: tuple[File, threading.Event, threading.Event],
) -> None:
    file, _, release = gated
    data = random_bytes(PAGE)
    expected = data.numpy().tobytes()
    with FileIO() as writer:
        memory = weakref.ref(data)
        write = writer.write(file, data, offset_bytes=0, name="w")
        del data
        assert memory() is not None
        release.set()
        write.wait()
        assert memory() is None
    assert file.path.read_bytes() == expected


def test_a_writer_that_is_dropped_ends_its_threads_and_its_files(path: Path) -> None:
    file = open_file(path)
    writer = FileIO(num_threads=3)
    writer.adopt(file)
    writer.write(file, random_bytes(10 * PAGE), offset_bytes=0, name="w").wait()
    threads = own_threads("offload-io-")
    assert len(threads) == 3
    del writer
    gc.collect()
    assert not any(thread.is_alive() for thread in threads)
    with pytest.raises(OSError, match="Bad file descriptor"):
        _ = file.size_bytes


def test_many_slow_writes_and_reads_each_move_their_own_bytes(path: Path) -> None:
    def slow(move: Callable[[int, list[memoryview], int], int]) -> Pwrite:
        def moved(fd: int, buffers: list[memoryview], offset: int) -> int:
            time.sleep(random.random() * 5e-4)
            return move(fd, [buffers[0][: 3 * PAGE]], offset)

        return moved

    file = open_file(path, pwrite=slow(os.pwritev), pread=slow(os.preadv))
    failures: list[str] = []

    def work(seed: int, writer: FileIO) -> None:
        rng = random.Random(seed)
        for i in range(12):
            data = random_bytes(PAGE * rng.randrange(1, 12), seed=100 * seed + i)
            back = StagingBuffer(data.numel()).tensor
            offset = 20 * seed * PAGE
            try:
                writer.write(file, data, offset_bytes=offset, name="w").wait()
                read_back(writer, file, back, offset_bytes=offset).wait()
            except OffloadError as error:
                failures.append(str(error))
            if not torch.equal(data, back):
                failures.append(f"thread {seed}, write {i}")

    with FileIO(num_threads=4, request_bytes=4 * PAGE) as writer:
        threads = [threading.Thread(target=work, args=(seed, writer)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    file.close()
    assert not failures
