import ctypes
import errno
import fcntl
import gc
import mmap
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from offload.blocks import BlockLayout, BlockSpec, TensorSpec, lay_out
from offload.buffers import StagingBuffer, view_tensor
from offload.errors import Closed, OffloadError, ReadError, SourceChanged
from offload.files.file_io import FileIO
from offload.files.safetensors import SafetensorsSource
from offload.transfer import Transfer
from tests.offload.own_threads import own_threads

PAGE = 4096
POISON = 0xA5


def write_bytes(file: Path, nbytes: int, *, seed: int = 0) -> bytes:
    data = random.Random(seed).randbytes(nbytes)
    file.write_bytes(data)
    return data


def layout_of(file: Path, nbytes: int, *, offset: int = 0, name: str = "block") -> BlockLayout:
    spec = TensorSpec(name="w", dtype=torch.uint8, shape=(nbytes,), file=file, offset_bytes=offset, nbytes=nbytes)
    return lay_out(BlockSpec(name=name, tensors=(spec,)))


def poisoned(layout: BlockLayout) -> Tensor:
    """A staging buffer full of bytes that nobody read; its memory lives as long as the tensor."""
    return StagingBuffer(layout.buffer_bytes).tensor.fill_(POISON)


def contents(buffer: Tensor, layout: BlockLayout, nbytes: int) -> bytes:
    start = layout.tensor_offsets["w"]
    return bytes(buffer[start : start + nbytes].tolist())


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def waited(transfer: Transfer, *, timeout_s: float = 60) -> BaseException | None:
    """What `wait` raises, if anything. A hang fails the test instead of stopping the session."""
    errors: list[BaseException | None] = []

    def wait() -> None:
        try:
            transfer.wait()
        except OffloadError as error:
            errors.append(error)
        else:
            errors.append(None)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(timeout_s)
    assert errors, "wait() hangs"
    return errors[0]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data.bin"


@pytest.fixture
def direct_file(file: Path) -> Path:
    file.write_bytes(bytes(PAGE))
    try:
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except (AttributeError, OSError):
        pytest.skip("the system or its temporary folder has no direct reads")
    os.close(fd)
    return file


# ---- bytes


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, 4097])
@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097])
def test_bytes_across_page_boundaries_are_equal(file: Path, nbytes: int, offset: int, direct: bool) -> None:
    for tail in (0, 1, 5000):
        data = write_bytes(file, offset + nbytes + tail)
        layout = layout_of(file, nbytes, offset=offset)
        buffer = poisoned(layout)
        with FileIO(num_threads=2, request_bytes=PAGE, direct=direct) as reader:
            reader.read(layout, buffer).wait()
        assert contents(buffer, layout, nbytes) == data[offset : offset + nbytes]


def write_shards(folder: Path, rng: random.Random) -> dict[str, Tensor]:
    """Random tensors of every width in up to four files, headers of any length."""
    dtypes = [torch.float32, torch.bfloat16, torch.uint8, torch.float64, torch.int16, torch.bool]
    tensors: dict[str, Tensor] = {}
    for i in range(rng.randrange(1, 5)):
        shard = {}
        for j in range(rng.randrange(1, 12)):
            size = rng.choice([0, 1, 3, 511, 4095, 4096, 4097, 30_000])
            shard[f"layer.{i}.{'x' * rng.randrange(9)}{j}"] = torch.randint(0, 2, (size,)).to(rng.choice(dtypes))
        save_file(shard, folder / f"shard-{i}.safetensors")
        shift_header(folder / f"shard-{i}.safetensors", rng.randrange(8))
        tensors |= load_file(folder / f"shard-{i}.safetensors")
    return tensors


def shift_header(file: Path, pad: int) -> None:
    """Lengthen the header, so that tensors lie at odd positions."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    file.write_bytes((length + pad).to_bytes(8, "little") + raw[8 : 8 + length] + b" " * pad + raw[8 + length :])


@pytest.mark.parametrize("seed", range(12))
def test_random_blocks_over_random_shards_are_bitwise_what_safetensors_loads(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tensors = write_shards(tmp_path, rng)
    with (
        SafetensorsSource(tmp_path) as source,
        FileIO(
            num_threads=rng.randrange(1, 5),
            request_bytes=PAGE * rng.randrange(1, 5),
            direct=rng.random() < 0.7,
            stamps=source.stamps,
        ) as reader,
    ):
        for _ in range(4):
            names = rng.sample(list(tensors), rng.randrange(1, len(tensors) + 1))
            block = BlockSpec(name="block", tensors=tuple(source.tensors[name] for name in names))
            layout = lay_out(block, max_gap_bytes=rng.choice([0, PAGE, 65536]))
            buffer = poisoned(layout)
            reader.read(layout, buffer).wait()
            for name in names:
                tensor = view_tensor(buffer, layout.tensor_offsets[name], spec=source.tensors[name])
                assert tensor.dtype == tensors[name].dtype
                assert torch.equal(tensor, tensors[name])


def test_transfer_knows_its_bytes_and_times(file: Path) -> None:
    write_bytes(file, 10_000)
    layout = layout_of(file, 5000, offset=4100, name="layer.7")
    before_ns = time.perf_counter_ns()
    with FileIO(num_threads=2, request_bytes=PAGE) as reader:
        transfer = reader.read(layout, poisoned(layout))
        transfer.wait()
    assert transfer.done()
    assert (transfer.name, transfer.nbytes) == ("layer.7", 5004)
    assert before_ns <= transfer.start_ns <= transfer.end_ns <= time.perf_counter_ns()


def test_empty_block_is_read_at_once(file: Path) -> None:
    layout = layout_of(file, 0)
    with FileIO() as reader:
        transfer = reader.read(layout, poisoned(layout))
        assert transfer.done()
        assert waited(transfer) is None


# ---- what the operating system may do


@pytest.mark.parametrize("limit", [1, 511, 4095, 4096, 5000])
@pytest.mark.parametrize("direct", [True, False])
def test_short_reads_are_continued(file: Path, limit: int, direct: bool) -> None:
    data = write_bytes(file, 30_001 if limit > 1 else 8200)
    layout = layout_of(file, len(data) - 100, offset=100)
    buffer = poisoned(layout)

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        scratch = bytearray(os.pread(buffered, min(limit, len(buffers[0])), offset))
        buffers[0][: len(scratch)] = scratch
        return len(scratch)

    buffered = os.open(file, os.O_RDONLY)
    with FileIO(num_threads=2, request_bytes=4 * PAGE, direct=direct, pread=short) as reader:
        reader.read(layout, buffer).wait()
    os.close(buffered)
    assert contents(buffer, layout, len(data) - 100) == data[100:]


def test_read_cut_short_inside_a_page_is_continued_buffered_and_the_next_one_is_direct_again(
    direct_file: Path,
) -> None:
    file = direct_file
    data = write_bytes(file, 8 * PAGE)
    layout = layout_of(file, 8 * PAGE)
    buffer = poisoned(layout)
    calls: list[tuple[int, bool]] = []

    def pread(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append((offset, is_direct(fd)))
        num_read = os.preadv(fd, buffers, offset)
        return 5000 if offset == 0 else num_read

    with FileIO(num_threads=1, request_bytes=4 * PAGE, pread=pread) as reader:
        reader.read(layout, buffer).wait()
    assert calls == [(0, True), (5000, False), (4 * PAGE, True)]
    assert contents(buffer, layout, 8 * PAGE) == data


def test_interrupted_reads_are_repeated(file: Path) -> None:
    data = write_bytes(file, 50_000)
    layout = layout_of(file, 50_000)
    buffer = poisoned(layout)
    calls: list[int] = []

    def interrupted(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        if len(calls) % 2:
            raise InterruptedError(errno.EINTR, "Interrupted system call")
        return os.preadv(fd, buffers, offset)

    with FileIO(num_threads=1, request_bytes=PAGE, pread=interrupted) as reader:
        reader.read(layout, buffer).wait()
    assert len(calls) == 2 * 13
    assert contents(buffer, layout, 50_000) == data


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_refused_direct_reads_fall_back_to_buffered_ones(direct_file: Path, code: int) -> None:
    file = direct_file
    data = write_bytes(file, 50_000)
    layout = layout_of(file, 50_000)
    refused: list[int] = []

    def refuse_direct(fd: int, buffers: list[memoryview], offset: int) -> int:
        if is_direct(fd):
            refused.append(offset)
            raise OSError(code, os.strerror(code))
        return os.preadv(fd, buffers, offset)

    with FileIO(num_threads=1, request_bytes=PAGE, pread=refuse_direct) as reader:
        for _ in range(2):
            buffer = poisoned(layout)
            reader.read(layout, buffer).wait()
            assert contents(buffer, layout, 50_000) == data
    assert len(refused) == 1, "a file that refused once is not asked again"


def test_buffer_that_is_not_page_aligned_is_read_into_without_direct_reads(
    direct_file: Path,
) -> None:
    file = direct_file
    data = write_bytes(file, 50_000)
    layout = layout_of(file, 50_000)
    modes: list[bool] = []

    def watch(fd: int, buffers: list[memoryview], offset: int) -> int:
        modes.append(is_direct(fd))
        return os.preadv(fd, buffers, offset)

    with FileIO(num_threads=1, pread=watch) as reader:
        odd = StagingBuffer(layout.buffer_bytes + 1).tensor[1:]
        reader.read(layout, odd).wait()
        assert contents(odd, layout, 50_000) == data
        reader.read(layout, poisoned(layout)).wait()
    assert modes == [False, True]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs at /dev/shm")
def test_files_on_tmpfs_are_read() -> None:
    file = Path(f"/dev/shm/offload-test-{os.getpid()}")
    try:
        data = write_bytes(file, 70_001)
        layout = layout_of(file, 70_001)
        buffer = poisoned(layout)
        with FileIO(request_bytes=PAGE) as reader:
            reader.read(layout, buffer).wait()
        assert contents(buffer, layout, 70_001) == data
    finally:
        file.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are cached")
def test_buffered_reads_do_not_fill_the_page_cache(file: Path) -> None:
    nbytes = (1 << 20) + 1
    write_bytes(file, nbytes)
    with open(file, "rb") as opened:
        # Only clean pages can be dropped.
        os.fsync(opened.fileno())
    assert num_cached_pages(file) == 257
    layout = layout_of(file, nbytes)
    with FileIO(request_bytes=1 << 18, direct=False) as reader:
        reader.read(layout, poisoned(layout)).wait()
    assert num_cached_pages(file) == 0


def num_cached_pages(file: Path) -> int:
    with open(file, "r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        states = (ctypes.c_ubyte * -(-len(mapped) // PAGE))()
        start = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        size = ctypes.c_size_t(len(mapped))
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), size, states) == 0
        del start
    return sum(state & 1 for state in states)


# ---- errors


def failing_at(bad_offset: int) -> Callable[[int, list[memoryview], int], int]:
    def pread(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == bad_offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(fd, buffers, offset)

    return pread


def test_read_error_names_file_offset_and_bytes_and_spares_other_blocks(file: Path) -> None:
    data = write_bytes(file, 100_000)
    bad, good = layout_of(file, 40_000), layout_of(file, 40_000, offset=50_000)
    buffer = poisoned(good)
    with FileIO(num_threads=2, request_bytes=PAGE, pread=failing_at(2 * PAGE)) as reader:
        failed, fine = reader.read(bad, poisoned(bad)), reader.read(good, buffer)
        match = rf"{file}: reading 4096 bytes at offset 8192 failed: Input/output error \(EIO\); check the disk"
        for _ in range(2):
            with pytest.raises(ReadError, match=match) as caught:
                failed.wait()
        assert (caught.value.file, caught.value.offset_bytes, caught.value.nbytes) == (file, 8192, 4096)
        fine.wait()
    assert contents(buffer, good, 40_000) == data[50_000:90_000]


def test_error_after_a_short_read_names_where_it_happened(file: Path) -> None:
    write_bytes(file, 3 * PAGE)

    def pread(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(fd, [buffers[0][:PAGE]], offset)

    layout = layout_of(file, 3 * PAGE)
    with FileIO(num_threads=1, pread=pread) as reader, pytest.raises(ReadError, match="8192 bytes at offset 4096"):
        reader.read(layout, poisoned(layout)).wait()


def test_end_of_file_where_there_is_none_is_a_read_error(file: Path) -> None:
    write_bytes(file, 100)
    layout = layout_of(file, 100)
    with (
        FileIO(pread=lambda fd, buffers, offset: 0) as reader,
        pytest.raises(ReadError, match="reported the end of the file, which has 100 bytes"),
    ):
        reader.read(layout, poisoned(layout)).wait()


def test_error_of_any_kind_reaches_the_thread_that_waits(file: Path) -> None:
    def broken(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise ZeroDivisionError("from a reading thread")

    write_bytes(file, 3 * PAGE)
    layout = layout_of(file, 3 * PAGE)
    with FileIO(request_bytes=PAGE, pread=broken) as reader:
        for _ in range(3):
            with pytest.raises(ZeroDivisionError, match="from a reading thread"):
                reader.read(layout, poisoned(layout)).wait()


def test_nothing_writes_into_the_buffer_after_a_failed_wait(file: Path) -> None:
    write_bytes(file, 2 * PAGE)
    layout = layout_of(file, 2 * PAGE)
    buffer = poisoned(layout)
    begun, release = threading.Event(), threading.Event()

    def pread(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == 0:
            begun.wait(60)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        begun.set()
        release.wait(60)
        return os.preadv(fd, buffers, offset)

    with FileIO(num_threads=2, request_bytes=PAGE, pread=pread) as reader:
        transfer = reader.read(layout, buffer)
        assert begun.wait(60)
        time.sleep(0.05)
        assert not transfer.done(), "one request is still in flight"
        release.set()
        assert isinstance(waited(transfer), ReadError)
        buffer.fill_(POISON)
        time.sleep(0.05)
        assert bool((buffer == POISON).all())


def rewrite(file: Path) -> None:
    with open(file, "r+b") as opened:
        opened.write(b"other bytes")
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


def rewrite_and_set_the_time_back(file: Path) -> None:
    status = file.stat()
    time.sleep(0.02)  # a coarse clock
    rewrite(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(file: Path) -> None:
    status = file.stat()
    new = file.with_name("new")
    new.write_bytes(bytes(status.st_size))
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.rename(file)


CHANGES = [
    (lambda file: os.truncate(file, 3 * PAGE), "data.bin changed while .*: expected .* bytes, got 12288"),
    (lambda file: os.truncate(file, 10**6), "expected 40960 bytes, got 1000000"),
    (rewrite, "it was written to"),
    (rewrite_and_set_the_time_back, "it was written to and its time set back"),
    (replace, "the path was replaced"),
    (Path.unlink, "it is no longer there"),
]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(("change", "match"), CHANGES)
def test_file_that_changes_during_a_read_is_found_out(
    file: Path, change: Callable[[Path], None], match: str, direct: bool
) -> None:
    write_bytes(file, 10 * PAGE)
    layout = layout_of(file, 10 * PAGE)
    changed = threading.Event()

    def pread(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == 5 * PAGE and not changed.is_set():
            change(file)
            changed.set()
        return os.preadv(fd, buffers, offset)

    with FileIO(num_threads=1, request_bytes=PAGE, direct=direct, pread=pread) as reader:
        with pytest.raises(SourceChanged, match=match):
            reader.read(layout, poisoned(layout)).wait()
        # And it stays found out.
        with pytest.raises(SourceChanged, match=match):
            reader.read(layout, poisoned(layout)).wait()


@pytest.mark.parametrize(("change", "match"), CHANGES)
def test_file_that_changes_between_check_and_first_read_is_found_out(
    file: Path, change: Callable[[Path], None], match: str
) -> None:
    save_file({"w": torch.zeros(40_960 - 72, dtype=torch.uint8)}, file)
    assert file.stat().st_size == 40_960
    with SafetensorsSource([file]) as source, FileIO(stamps=source.stamps) as reader:
        layout = lay_out(BlockSpec(name="b", tensors=tuple(source.tensors.values())))
        change(file)
        with pytest.raises(SourceChanged, match=match):
            reader.read(layout, poisoned(layout)).wait()


def test_a_file_of_which_only_names_and_mode_change_stays_the_same(file: Path) -> None:
    write_bytes(file, 10 * PAGE)
    layout = layout_of(file, 10 * PAGE)
    with FileIO() as reader:
        reader.read(layout, poisoned(layout)).wait()
        time.sleep(0.02)
        os.link(file, file.with_name("other"))
        reader.read(layout, poisoned(layout)).wait()
        file.chmod(0o600)
        reader.read(layout, poisoned(layout)).wait()


def test_file_that_cannot_be_opened_fails_the_wait_not_the_call(file: Path) -> None:
    layout = layout_of(file, 10)
    with FileIO() as reader:
        transfer = reader.read(layout, poisoned(layout))
        assert transfer.done()
        with pytest.raises(SourceChanged, match="it is no longer there"):
            transfer.wait()


def test_wrong_buffers_and_settings_are_refused(file: Path) -> None:
    write_bytes(file, 5000)
    layout = layout_of(file, 5000)
    with FileIO() as reader:
        with pytest.raises(ValueError, match="block block: expected a buffer of at least 8192 bytes, got 8191"):
            reader.read(layout, torch.zeros(8191, dtype=torch.uint8))
        for buffer in (torch.zeros(8192), torch.zeros(2, 8192, dtype=torch.uint8), torch.zeros(1 << 15).byte()[::2]):
            with pytest.raises(ValueError, match="expected a contiguous one-dimensional uint8 tensor in host memory"):
                reader.read(layout, buffer)
    with pytest.raises(ValueError, match="num_threads must be at least 1, got 0"):
        FileIO(num_threads=0)
    for request_bytes in (0, 4095, -4096):
        with pytest.raises(ValueError, match=f"request_bytes must be a positive multiple of 4096, got {request_bytes}"):
            FileIO(request_bytes=request_bytes)


# ---- order, closing, races


def test_blocks_are_served_in_the_order_they_were_asked_for(file: Path) -> None:
    write_bytes(file, 64 * PAGE)
    order: list[int] = []
    gate = threading.Event()

    def pread(fd: int, buffers: list[memoryview], offset: int) -> int:
        gate.wait(60)
        order.append(offset)
        return os.preadv(fd, buffers, offset)

    layouts = [layout_of(file, 16 * PAGE, offset=start * PAGE) for start in (32, 0, 48, 16)]
    for num_threads in (1, 3):
        order.clear()
        gate.clear()
        with FileIO(num_threads=num_threads, request_bytes=PAGE, pread=pread) as reader:
            transfers = [reader.read(layout, poisoned(layout)) for layout in layouts]
            gate.set()
            for transfer in transfers:
                transfer.wait()
        asked = [(start + i) * PAGE for start in (32, 0, 48, 16) for i in range(16)]
        ranks = [asked.index(offset) for offset in order]
        # Whoever sends a request has left behind only requests that the other threads hold.
        assert all(sum(later < rank for later in ranks[i:]) < num_threads for i, rank in enumerate(ranks))


@pytest.fixture
def stuck(file: Path) -> Iterator[tuple[FileIO, list[Transfer], threading.Event]]:
    """A reader of one thread whose first request does not return until the event is set, and four reads."""
    write_bytes(file, 64 * PAGE)
    begun, release = threading.Event(), threading.Event()

    def pread(fd: int, buffers: list[memoryview], offset: int) -> int:
        begun.set()
        release.wait(60)
        return os.preadv(fd, buffers, offset)

    reader = FileIO(num_threads=1, request_bytes=PAGE, pread=pread)
    layout = layout_of(file, 2 * PAGE)
    transfers = [reader.read(layout, poisoned(layout)) for _ in range(4)]
    assert begun.wait(60)
    yield reader, transfers, release
    release.set()
    reader.close()


def test_close_fails_what_is_waiting_and_waits_for_what_is_in_flight(
    stuck: tuple[FileIO, list[Transfer], threading.Event], file: Path
) -> None:
    reader, transfers, release = stuck
    closing = threading.Thread(target=reader.close, daemon=True)
    closing.start()
    while not is_refused(reader, file):
        time.sleep(0.001)
    time.sleep(0.05)
    assert closing.is_alive(), "close() waits for the request in flight"
    release.set()
    closing.join(60)
    assert not closing.is_alive()
    for transfer in transfers:
        assert isinstance(waited(transfer), Closed)
    with pytest.raises(Closed, match="block late: the reader or writer was closed"):
        reader.read(layout := layout_of(file, 1, name="late"), poisoned(layout))
    reader.close()
    assert not any(str(file) in os.readlink(f"/proc/self/fd/{fd}") for fd in open_fds())


def is_refused(reader: FileIO, file: Path) -> bool:
    """Whether a reader takes no read any more."""
    layout = layout_of(file, PAGE)
    try:
        reader.read(layout, poisoned(layout))
    except Closed:
        return True
    return False


def open_fds() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")]


def test_reader_that_is_dropped_ends_its_threads(file: Path) -> None:
    write_bytes(file, 10 * PAGE)
    reader = FileIO(num_threads=3)
    layout = layout_of(file, 10 * PAGE)
    reader.read(layout, poisoned(layout)).wait()
    threads = own_threads("offload-io-")
    assert len(threads) == 3
    dropped = weakref.ref(reader)
    del reader
    gc.collect()
    assert dropped() is None
    assert not any(thread.is_alive() for thread in threads)


def test_buffer_is_let_go_of_when_its_read_is_done(file: Path) -> None:
    write_bytes(file, PAGE)
    layout = layout_of(file, PAGE)
    with FileIO(num_threads=1) as reader:
        buffer = poisoned(layout)
        storage = weakref.ref(buffer)
        transfer = reader.read(layout, buffer)
        transfer.wait()
        del buffer
        assert storage() is None


def test_process_ends_although_nobody_closed_the_reader(file: Path) -> None:
    write_bytes(file, 100 * PAGE)
    program = f"""
from pathlib import Path
import torch
from offload.buffers import StagingBuffer
from offload.files.file_io import FileIO
from offload.blocks import BlockLayout, Extent
extent = Extent(file=Path({str(file)!r}), file_offset_bytes=0, nbytes={100 * PAGE}, buffer_offset_bytes=0)
layout = BlockLayout(name="b", extents=(extent,), tensor_offsets={{}}, buffer_bytes={100 * PAGE})
reader = FileIO(request_bytes=4096)
buffer = StagingBuffer({100 * PAGE})
transfers = [reader.read(layout, buffer.tensor) for _ in range(50)]
print("begun")
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "begun\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_refused_reads_that_nobody_would_do(file: Path) -> None:
    write_bytes(file, 4 * PAGE)
    layout = layout_of(file, 4 * PAGE)
    with FileIO() as reader:
        assert waited(reader.read(layout, poisoned(layout))) is None
        # As where another thread of the parent's is reading just then.
        with reader._threads._service.lock:
            child = os.fork()
            if child == 0:
                try:
                    reader.read(layout, poisoned(layout))
                except OffloadError as error:
                    reader.close()
                    os._exit(7 if "made in process" in str(error) else 8)
                finally:
                    os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert waited(reader.read(layout, poisoned(layout))) is None


def test_many_slow_reads_from_many_threads_each_get_their_own_bytes(file: Path) -> None:
    data = write_bytes(file, 200_000)
    whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    failures: list[str] = []

    def slow(fd: int, buffers: list[memoryview], offset: int) -> int:
        time.sleep(random.random() * 5e-4)
        # Never more than a few pages, so that reads are continued as well.
        return os.preadv(fd, [buffers[0][: 3 * PAGE]], offset)

    def work(seed: int, reader: FileIO) -> None:
        rng = random.Random(seed)
        buffers = [StagingBuffer(200_000 + 2 * PAGE).tensor for _ in range(2)]
        pending: list[tuple[Transfer, Tensor, BlockLayout, int, int]] = []
        for step in range(24):
            # A buffer is poisoned and read into again as soon as its previous read has been looked at.
            if len(pending) == 2:
                transfer, buffer, layout, offset, nbytes = pending.pop(0)
                transfer.wait()
                start = layout.tensor_offsets["w"]
                if not torch.equal(buffer[start : start + nbytes], whole[offset : offset + nbytes]):
                    failures.append(f"thread {seed} read {step} offset {offset}")
            offset = rng.randrange(199_000)
            nbytes = rng.randrange(1, 200_000 - offset)
            layout = layout_of(file, nbytes, offset=offset)
            buffer = buffers[step % 2].fill_(POISON)
            pending.append((reader.read(layout, buffer), buffer, layout, offset, nbytes))
        for transfer, *_ in pending:
            transfer.wait()

    with FileIO(num_threads=4, request_bytes=4 * PAGE, pread=slow) as reader:
        threads = [threading.Thread(target=work, args=(seed, reader)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
