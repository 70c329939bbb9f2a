"""The store: versions exact, steps whole, files used again but never a checkpoint's, folders for one run at a time."""

import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload.blocks import ObjectLayout, lay_out_object
from offload.buffers import StagingBuffer
from offload.errors import Closed, FolderInUse, SourceError
from offload.store.store import Store
from offload.store.store_files import StoreIo
from offload.trace import Trace

PAGE = 4096
ROOT = Path(__file__).resolve().parents[2]
LAYOUT = lay_out_object(
    {"weight": (torch.bfloat16, (70, 33)), "exp_avg": (torch.float32, (70, 33)), "step": (torch.int64, ())}
)


def contents(seed: int, layout: ObjectLayout = LAYOUT) -> Tensor:
    """A buffer that holds random tensors."""
    buffer = StagingBuffer(layout.nbytes).tensor
    generator = torch.Generator().manual_seed(seed)
    return buffer.copy_(torch.randint(0, 256, (layout.nbytes,), generator=generator, dtype=torch.uint8))


def loaded(store: Store, name: str) -> Tensor:
    into = StagingBuffer(store.layout(name).nbytes).tensor.fill_(0xA5)
    store.load(name, into).wait()
    return into


def commit(store: Store, step: int, **seeds: int) -> None:
    store.begin_step()
    for name, seed in seeds.items():
        store.write(name, LAYOUT, contents(seed))
    store.commit(step=step, extra={"seeds": seeds})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "disk" / "run"


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    with Store.create(folder, fingerprint="model A") as store:
        commit(store, 1, a=1, b=2)
        yield store


# ---- layout


def test_tensors_begin_on_pages_and_are_views_of_the_buffer() -> None:
    assert [tensor.offset_bytes for tensor in LAYOUT.tensors] == [0, 2 * PAGE, 5 * PAGE]
    assert LAYOUT.nbytes == 6 * PAGE
    buffer = contents(0)
    views = LAYOUT.views(buffer)
    assert {name: (view.dtype, tuple(view.shape)) for name, view in views.items()} == {
        "weight": (torch.bfloat16, (70, 33)),
        "exp_avg": (torch.float32, (70, 33)),
        "step": (torch.int64, ()),
    }
    views["step"].fill_(0)
    assert not buffer[5 * PAGE : 5 * PAGE + 8].any()
    with pytest.raises(ValueError, match="expected a buffer of at least 24576 bytes, got 100"):
        LAYOUT.views(buffer[:100])
    assert lay_out_object({}).nbytes == lay_out_object({"empty": (torch.float32, (0, 5))}).nbytes == 0


# ---- versions


def test_reads_give_the_newest_version_and_a_reopened_store_the_committed_one(store: Store, folder: Path) -> None:
    store.begin_step()
    write = store.write("b", LAYOUT, contents(3))
    assert torch.equal(loaded(store, "b"), contents(3))
    assert write.done()
    assert torch.equal(loaded(store, "a"), contents(1))
    store.close()
    with Store.open(folder, fingerprint="model A") as again:
        assert (again.step, again.extra, again.names()) == (1, {"seeds": {"a": 1, "b": 2}}, ("a", "b"))
        assert torch.equal(loaded(again, "b"), contents(2))
        commit(again, 2, b=3)
    with Store.open(folder) as again:
        assert (again.step, again.fingerprint) == (2, "model A")
        assert torch.equal(loaded(again, "b"), contents(3))
        assert torch.equal(loaded(again, "a"), contents(1)), "what a step does not write keeps its version"


def test_several_objects_are_read_one_after_another_step_after_step(store: Store) -> None:
    into = StagingBuffer(2 * LAYOUT.nbytes).tensor
    for step, (a, b) in enumerate([(1, 2), (5, 2), (5, 6)], start=2):
        if step > 2:
            commit(store, step, a=a, b=b)
        store.load(["b", "a"], into.fill_(0)).wait()
        assert torch.equal(into[: LAYOUT.nbytes], contents(b))
        assert torch.equal(into[LAYOUT.nbytes :], contents(a))


def test_a_second_write_in_a_step_replaces_the_first(store: Store) -> None:
    store.begin_step()
    for seed in range(10, 15):
        store.write("a", LAYOUT, contents(seed))
    store.commit(step=2, extra={})
    assert torch.equal(loaded(store, "a"), contents(14))


def test_aborted_steps_leave_nothing(store: Store) -> None:
    for seed in (7, 8):
        store.begin_step()
        store.write("a", LAYOUT, contents(seed))
        store.write("new", LAYOUT, contents(seed))
        store.abort_step()
        assert store.names() == ("a", "b")
        assert torch.equal(loaded(store, "a"), contents(1))
    store.abort_step()
    commit(store, 2, a=9)
    assert torch.equal(loaded(store, "a"), contents(9))


def test_objects_change_their_layout_and_go(store: Store, folder: Path) -> None:
    other = lay_out_object({"weight": (torch.float64, (1000,))})
    store.begin_step()
    store.write("a", other, contents(5, other))
    store.remove("b")
    assert store.names() == ("a",)
    with pytest.raises(KeyError, match="no object 'b'"):
        store.load(["a", "b"], contents(0))
    store.commit(step=2, extra={})
    assert torch.equal(loaded(store, "a"), contents(5, other))
    store.close()
    with Store.open(folder) as again:
        assert again.names() == ("a",)
        assert torch.equal(loaded(again, "a"), contents(5, other))


def test_names_may_be_any_text_and_objects_empty(store: Store, folder: Path) -> None:
    empty = lay_out_object({"nothing": (torch.float32, (0, 3))})
    names = ["../../etc/passwd", "block 3/state", "ü\n", "x" * 1000, ""]
    store.begin_step()
    for seed, name in enumerate(names):
        store.write(name, LAYOUT, contents(seed))
    store.write("empty", empty, torch.empty(0, dtype=torch.uint8))
    store.commit(step=2, extra={})
    store.close()
    with Store.open(folder) as again:
        for seed, name in enumerate(names):
            assert torch.equal(loaded(again, name), contents(seed))
        assert again.layout("empty") == empty
        assert loaded(again, "empty").numel() == 0


def test_transfers_are_counted_and_traced(folder: Path) -> None:
    trace = Trace()
    with Store.create(folder, fingerprint="", io=StoreIo(trace=trace)) as store:
        commit(store, 1, a=1)
        loaded(store, "a")
        assert store.disk_bytes == LAYOUT.nbytes
    assert [(span.lane, span.name, span.nbytes) for span in trace.spans()] == [
        ("disk write", "a", LAYOUT.nbytes),
        ("disk", "a", LAYOUT.nbytes),
    ]


def test_wrong_calls_are_refused(store: Store, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no step is under way; call begin_step first"):
        store.write("a", LAYOUT, contents(1))
    with pytest.raises(RuntimeError, match="no step is under way"):
        store.commit(step=1, extra={})
    store.begin_step()
    with pytest.raises(RuntimeError, match="a step is under way; commit or abort it first"):
        store.begin_step()
    with pytest.raises(ValueError, match="a: expected 24576 bytes, got 10"):
        store.write("a", LAYOUT, contents(1)[:10])
    with pytest.raises(ValueError, match="a: expected a contiguous one-dimensional uint8 tensor"):
        store.write("a", LAYOUT, torch.zeros(LAYOUT.nbytes))
    with pytest.raises(ValueError, match="step must be 0 or more, got -1"):
        store.commit(step=-1, extra={})
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.commit(step=2, extra={"x": object()})
    store.commit(step=2, extra={})
    with pytest.raises(KeyError, match="no object 'c'"):
        store.layout("c")
    with pytest.raises(ValueError, match="a: expected a buffer of 24576 bytes, got 10"):
        store.load("a", contents(1)[:10])
    other = Store.create(tmp_path / "other", fingerprint="")
    with pytest.raises(ValueError, match="nothing was committed yet; commit a step first"):
        other.save_to(tmp_path / "third")
    other.close()
    with pytest.raises(ValueError, match="is the store itself; give another folder"):
        store.save_to(folder)
    store.close()
    with pytest.raises(Closed, match="the store was closed; open it again"):
        store.load("a", contents(0))


# ---- files


def inodes(folder: Path) -> set[int]:
    return {path.stat().st_ino for path in (folder / "objects").iterdir()}


def test_files_are_written_again_in_place_also_after_reopening(store: Store, folder: Path) -> None:
    commit(store, 2, a=3, b=4)
    before = inodes(folder)
    assert len(before) == 4
    for step in range(3, 8):
        commit(store, step, a=step, b=-step % 7)
        assert inodes(folder) == before
    store.close()
    with Store.open(folder) as again:
        commit(again, 8, a=1, b=2)
        commit(again, 9, a=3)
        assert inodes(folder) == before
        assert again.disk_bytes == 4 * LAYOUT.nbytes
        assert torch.equal(loaded(again, "b"), contents(2))


def test_a_version_that_is_being_read_is_not_written_over(folder: Path) -> None:
    gate = threading.Event()

    def slow(fd: int, buffers: list[memoryview], offset: int) -> int:
        gate.wait(60)
        return os.preadv(fd, buffers, offset)

    with Store.create(folder, fingerprint="", io=StoreIo(pread=slow)) as store:
        commit(store, 1, a=1)
        into = contents(0)
        read = store.load("a", into)
        for step in range(2, 6):
            commit(store, step, a=step)
        gate.set()
        read.wait()
        assert torch.equal(into, contents(1))
        assert torch.equal(loaded(store, "a"), contents(5))
        assert len(inodes(folder)) == 3


def test_what_is_not_ours_in_the_folder_stays(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    (folder / "objects" / "9.bin").mkdir(parents=True)
    (folder / "objects" / "notes.txt").write_text("theirs")
    (folder / "objects" / "8.bin").symlink_to(folder / "objects" / "notes.txt")
    (folder / "objects" / "7.bin").write_bytes(b"perhaps theirs")
    for begin in (lambda: Store.create(folder, fingerprint=""), lambda: store.save_to(folder)):
        with pytest.raises(
            SourceError, match=r"7\.bin: name: it is named like a file of a store, and there was no store"
        ):
            begin()
    assert (folder / "objects" / "7.bin").read_bytes() == b"perhaps theirs"
    # Where a store was killed before its first commit, such files are its own.
    (folder / "store.lock").touch()
    with Store.create(folder, fingerprint="") as ours:
        for step in range(1, 15):
            commit(ours, step, a=step, b=step)
        assert torch.equal(loaded(ours, "a"), contents(14))
    assert (folder / "objects" / "9.bin").is_dir()
    assert (folder / "objects" / "notes.txt").read_text() == "theirs"
    assert (folder / "objects" / "8.bin").is_symlink()


# ---- checkpoints


@pytest.mark.parametrize("links", [True, False])
def test_checkpoints_keep_their_state_whatever_the_run_does(
    store: Store, tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:

        def refuse(*args: object, **kwargs: object) -> None:
            raise OSError(18, os.strerror(18))

        monkeypatch.setattr(os, "link", refuse)
    saved = tmp_path / "checkpoint-1" / "state"
    store.save_to(saved)
    assert all((path.stat().st_nlink == 2) == links for path in (saved / "objects").iterdir())
    for step in range(2, 6):
        commit(store, step, a=step, b=step)
    with Store.open(saved) as checkpoint:
        assert (checkpoint.step, checkpoint.extra) == (1, {"seeds": {"a": 1, "b": 2}})
        assert torch.equal(loaded(checkpoint, "a"), contents(1))
        assert torch.equal(loaded(checkpoint, "b"), contents(2))
    assert torch.equal(loaded(store, "a"), contents(5))


def test_a_run_goes_on_from_a_checkpoint_and_the_checkpoint_stays(store: Store, folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "checkpoint"
    store.save_to(saved)
    commit(store, 2, a=20, b=20)
    with pytest.raises(FolderInUse):
        Store.restore(saved, folder)
    store.close()
    for _ in range(2):
        Store.restore(saved, folder)
        with Store.open(folder) as again:
            assert again.step == 1
            assert torch.equal(loaded(again, "a"), contents(1))
            for step in range(2, 5):
                commit(again, step, a=step, b=step)
            assert torch.equal(loaded(again, "b"), contents(4))
    with Store.open(saved) as checkpoint:
        for name, seed in (("a", 1), ("b", 2)):
            assert torch.equal(loaded(checkpoint, name), contents(seed))


def test_a_checkpoint_is_replaced_and_its_old_files_go(store: Store, tmp_path: Path) -> None:
    saved = tmp_path / "checkpoint"
    for step in range(2, 5):
        commit(store, step, a=step)
        store.save_to(saved)
        assert len(list((saved / "objects").iterdir())) == 2
    with Store.open(saved) as checkpoint:
        assert torch.equal(loaded(checkpoint, "a"), contents(4))
        with pytest.raises(FolderInUse):
            store.save_to(saved)


def test_once_a_checkpoint_is_deleted_its_files_are_written_again(store: Store, folder: Path, tmp_path: Path) -> None:
    commit(store, 2, a=2, b=2)
    before = inodes(folder)
    store.save_to(tmp_path / "checkpoint")
    for path in sorted((tmp_path / "checkpoint").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    for step in range(3, 6):
        commit(store, step, a=step, b=step)
    assert inodes(folder) == before


# ---- one run at a time


def test_a_second_store_on_a_folder_is_refused(store: Store, folder: Path) -> None:
    own = rf"{folder} is in use by this process itself \(process {os.getpid()}\); delete what was opened there"
    with pytest.raises(FolderInUse, match=own) as caught:
        Store.open(folder)
    assert caught.value.is_own
    with pytest.raises(FolderInUse):
        Store.create(folder, fingerprint="")
    assert torch.equal(loaded(store, "a"), contents(1))


def test_a_folder_in_use_by_this_process_says_what_holds_it(folder: Path) -> None:
    with (
        Store.create(folder, fingerprint="", holder="the firsté " + "x" * 600),
        pytest.raises(FolderInUse, match=r"this process itself \(the firsté x{400,}[^x]?\)"),
    ):
        Store.create(folder, fingerprint="")


def test_a_second_process_on_a_folder_is_refused_until_the_first_is_gone(folder: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from offload import Store
store = Store.create(Path({str(folder)!r}), fingerprint="", holder="a child of tests")
store.begin_step()
store.commit(step=1, extra={{}})
print("held", flush=True)
sys.stdin.read()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    held = rf"by another run \(process {child.pid}: a child of tests\); wait until it has ended"
    with pytest.raises(FolderInUse, match=held) as caught:
        Store.open(folder)
    assert (caught.value.pid, caught.value.is_own) == (child.pid, False)
    # In two containers that share the folder, both may have the same number; and what is there may be anything.
    for found, words in (
        (f"{os.getpid()}\n", f"another run (process {os.getpid()});"),
        ("\x1b[31m\n\0", "another run"),
    ):
        (folder / "store.lock").write_text(found)
        with pytest.raises(FolderInUse, match=re.escape(words)) as caught:
            Store.open(folder)
        assert not caught.value.is_own
        assert str(caught.value).isprintable()
    child.kill()
    child.wait(60)
    child.stdin.close()
    child.stdout.close()
    with Store.open(folder) as store:
        assert store.step == 1


def test_workers_that_a_run_forked_do_not_hold_its_folder_longer_than_itself(folder: Path) -> None:
    program = f"""
import os, signal, time
from pathlib import Path
from offload import Store
store = Store.create(Path({str(folder)!r}), fingerprint="")
store.begin_step()
store.commit(step=1, extra={{}})
worker = os.fork()
if worker == 0:
    os.close(1)
    time.sleep(600)
    os._exit(0)
print(worker, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=300
    )
    worker = int(done.stdout)
    try:
        os.kill(worker, 0)
        Store.open(folder).close()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_store_that_is_dropped_lets_go_of_its_folder(folder: Path) -> None:
    store = Store.create(folder, fingerprint="")
    commit(store, 1, a=1)
    del store
    gc.collect()
    with Store.open(folder) as again:
        assert torch.equal(loaded(again, "a"), contents(1))


# ---- what the manifest says


def test_folders_without_or_with_the_wrong_state_are_refused(store: Store, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"store.json: file: it does not exist: nothing was committed here"):
        Store.open(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    store.close()
    with pytest.raises(SourceError, match="fingerprint: expected model B, got model A: the state of another run"):
        Store.open(folder, fingerprint="model B")
    with pytest.raises(SourceError, match="there is a committed state already; open it to go on"):
        Store.create(folder, fingerprint="model A")
    # None of that keeps the folder locked.
    Store.open(folder).close()


LIES = [
    (("format",), "zip", 'format: expected "offload-store", got .zip'),
    (("version",), 1, "version: expected 2, got 1: another version"),
    (("fingerprint",), 3, "fingerprint: expected text, got 3"),
    (("step",), -1, "step: expected a whole number, 0 or more, got -1"),
    (("step",), True, "step: expected a whole number"),
    (("extra",), [], r"extra: expected an object, got \[\]"),
    (("objects",), None, "objects: expected an object, got None"),
    (("objects", "a"), 1, "objects.a: expected an object, got 1"),
    (("objects", "a", "file"), "../../secret.bin", "objects.a.file: expected a name such as 12.bin, got"),
    (("objects", "a", "file"), "/etc/passwd", "objects.a.file: expected a name"),
    (("objects", "a", "file"), "99.bin", "objects.a.file: .*99.bin is not there"),
    (("objects", "a", "file"), "2.bin", "objects: 2.bin is the file of several objects"),
    (("objects", "a", "nbytes"), 4096, "objects.a.nbytes: its tensors take 24576 bytes, got 4096"),
    (("objects", "a", "nbytes"), 1e9, "objects.a.nbytes: expected a whole number"),
    (
        ("objects", "a", "tensors", "step", "dtype"),
        "float33",
        "objects.a.tensors.step.dtype: expected the name of a type",
    ),
    (("objects", "a", "tensors", "step", "dtype"), "load", "objects.a.tensors.step.dtype: expected the name of a type"),
    (("objects", "a", "tensors", "step", "shape"), 5, "step.shape: expected a list of whole numbers"),
    (
        ("objects", "a", "tensors", "step", "shape"),
        [-5],
        "step.shape: expected a list of whole numbers",
    ),
    (("objects", "a", "tensors", "step", "shape"), [10**6], "objects.a.nbytes: its tensors take"),
    (("objects", "a", "tensors", "step", "offset_bytes"), 4096, "step.offset_bytes: expected 20480 or more, got 4096"),
    (("objects", "a", "tensors", "step", "offset_bytes"), 20481, "expected a multiple of 4096, got 20481"),
    (("objects", "a", "tensors", "step", "offset_bytes"), 2**70, "expected a whole number"),
]


def seal(folder: Path, manifest: dict[str, object]) -> None:
    """Write a manifest with the right checksum, as somebody would who wants it to be believed."""
    said = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (folder / "store.json").write_text(json.dumps(manifest | {"sha256": digest}))


@pytest.mark.parametrize(("path", "value", "match"), LIES)
def test_lies_in_the_manifest_are_refused_with_file_and_field(
    store: Store, folder: Path, path: tuple[str, ...], value: object, match: str
) -> None:
    store.close()
    manifest = json.loads((folder / "store.json").read_text())
    entry = manifest
    for key in path[:-1]:
        entry = entry[key]
    assert path[-1] in entry
    entry[path[-1]] = value
    seal(folder, manifest)
    with pytest.raises(SourceError, match=match) as caught:
        Store.open(folder)
    assert caught.value.file == folder / "store.json"


def test_a_manifest_cut_anywhere_is_refused(store: Store, folder: Path) -> None:
    store.close()
    raw = (folder / "store.json").read_bytes()
    for length in random.sample(range(len(raw)), 40):
        (folder / "store.json").write_bytes(raw[:length])
        with pytest.raises(SourceError, match=r"store\.json: "):
            Store.open(folder)
    for damaged in (b"\xff\xfe", b"[" * 100_000, b"null", raw.replace(b'"step":1', b'"step":1,"step":2')):
        (folder / "store.json").write_bytes(damaged)
        with pytest.raises(SourceError, match=r"store\.json: file: "):
            Store.open(folder)
    (folder / "store.json").write_bytes(raw)
    Store.open(folder).close()


def test_files_that_are_not_what_the_manifest_says_are_refused(store: Store, folder: Path) -> None:
    store.close()
    file = folder / "objects" / json.loads((folder / "store.json").read_text())["objects"]["a"]["file"]
    whole = file.read_bytes()
    os.truncate(file, PAGE)
    with pytest.raises(SourceError, match=r"objects.a.file: expected .*\.bin to have 24576 bytes, it has 4096"):
        Store.open(folder)
    file.unlink()
    with pytest.raises(SourceError, match=r"objects.a.file: .* is not there"):
        Store.open(folder)
    (folder / "elsewhere").write_bytes(whole)
    file.symlink_to(folder / "elsewhere")
    with pytest.raises(SourceError, match=r"objects.a.file: .* is not a regular file"):
        Store.open(folder)
    file.unlink()
    file.write_bytes(whole)
    with Store.open(folder) as again:
        assert torch.equal(loaded(again, "a"), contents(1))
