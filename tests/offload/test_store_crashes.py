"""A store under fire: kills, disks that are full or fail, and power failures as far as the order of calls shows."""

import errno
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from offload.blocks import lay_out_object
from offload.errors import Closed, OffloadError, ReadError, TierFull, WriteError
from offload.files.folder import Folder
from offload.store.store import Store
from offload.store.store_files import StoreIo
from tests.offload.small_disk import fill, small_disk
from tests.offload.test_store import LAYOUT, commit, contents, loaded

UNFINISHED = re.compile(r"\.store\.json\.[0-9a-f]{32}\.tmp")
ROOT = Path(__file__).resolve().parents[2]
BIG = lay_out_object({"state": (torch.uint8, (1 << 20,))})


def survive(folder: Path, *, num_kills: int, seed: int) -> None:
    command = [sys.executable, "-m", "tests.offload.killed_runs", str(folder), str(num_kills), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout[:3]) == (0, "ok "), done.stdout + done.stderr
    assert int(done.stdout.split()[1]) > num_kills, "too few steps to mean anything"


def test_killed_at_random_instants_the_last_committed_step_is_there(tmp_path: Path) -> None:
    survive(tmp_path / "run", num_kills=20, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_killed_many_times_the_last_committed_step_is_there(tmp_path: Path, seed: int) -> None:
    survive(tmp_path / "run", num_kills=200, seed=seed)


# ---- full disks


def step_of_big(store: Store, step: int, names: str) -> None:
    store.begin_step()
    for name in names:
        store.write(name, BIG, contents(step, BIG))
    store.commit(step=step, extra={})


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_a_full_disk_leaves_the_last_step_and_the_next_one_runs_once_there_is_room(tmp_path: Path, kind: str) -> None:
    with small_disk(tmp_path / "disk", nbytes=16 << 20, kind=kind) as folder:
        run = folder / "run"
        with Store.create(run, fingerprint="") as store:
            step_of_big(store, 1, "abcd")
            filler = fill(folder, leave_bytes=2 << 20)
            store.begin_step()
            writes = [store.write(name, BIG, contents(2, BIG)) for name in "abcd"]
            errors = [write.outcome() for write in writes]
            assert any(isinstance(error, TierFull) for error in errors)
            for _ in range(2):
                with pytest.raises(TierFull, match=rf"{folder}.*no room for 1048576 bytes .*Budget\.disk"):
                    store.commit(step=2, extra={})
            store.abort_step()
            for name in "abcd":
                assert torch.equal(loaded(store, name), contents(1, BIG))
        with Store.open(run) as store:
            assert store.step == 1
            filler.unlink()
            step_of_big(store, 2, "abcd")
            for step in range(3, 6):
                step_of_big(store, step, "abcd")
            assert store.disk_bytes == 8 << 20
        with Store.open(run) as store:
            for name in "abcd":
                assert torch.equal(loaded(store, name), contents(5, BIG))


def test_what_failed_may_be_written_again_in_the_same_step(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as folder, Store.create(folder / "run", fingerprint="") as store:
        step_of_big(store, 1, "ab")
        filler = fill(folder, leave_bytes=3 << 19)
        store.begin_step()
        assert store.write("a", BIG, contents(2, BIG)).outcome() is None
        failed = store.write("b", BIG, contents(2, BIG))
        assert isinstance(failed.outcome(), TierFull)
        with pytest.raises(TierFull):
            loaded(store, "b")
        filler.unlink()
        store.write("b", BIG, contents(2, BIG))
        store.commit(step=2, extra={})
        assert torch.equal(loaded(store, "a"), contents(2, BIG))
        assert torch.equal(loaded(store, "b"), contents(2, BIG))


def test_a_manifest_that_has_no_room_leaves_the_last_step(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kind="tmpfs") as folder:
        store = Store.create(folder / "run", fingerprint="")
        step_of_big(store, 1, "a")
        step_of_big(store, 2, "a")
        filler = fill(folder)
        store.begin_step()
        store.write("a", BIG, contents(3, BIG)).wait()
        with pytest.raises(TierFull, match=r"store\.json: no room for 100\d\d\d bytes"):
            store.commit(step=3, extra={"text": "x" * 100_000})
        store.close()
        with Store.open(folder / "run") as again:
            assert again.step == 2
            assert torch.equal(loaded(again, "a"), contents(2, BIG))
            filler.unlink()
            step_of_big(again, 3, "a")


def test_a_checkpoint_that_has_no_room_leaves_the_one_before(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk") as folder,
        Store.create(tmp_path / "run", fingerprint="") as store,
    ):
        step_of_big(store, 1, "abc")
        store.save_to(folder / "checkpoint")
        step_of_big(store, 2, "abc")
        filler = fill(folder, leave_bytes=3 << 19)
        with pytest.raises(TierFull):
            store.save_to(folder / "checkpoint")
        with Store.open(folder / "checkpoint") as checkpoint:
            assert checkpoint.step == 1
            assert torch.equal(loaded(checkpoint, "c"), contents(1, BIG))
            assert checkpoint.disk_bytes == 3 << 20, "what was copied is gone again"
        filler.unlink()
        store.save_to(folder / "checkpoint")
        with Store.open(folder / "checkpoint") as checkpoint:
            assert torch.equal(loaded(checkpoint, "c"), contents(2, BIG))


# ---- disks that fail


def failing(
    move: Callable[[int, list[memoryview], int], int], broken: threading.Event
) -> Callable[[int, list[memoryview], int], int]:
    def moved(fd: int, buffers: list[memoryview], offset: int) -> int:
        if broken.is_set():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return move(fd, buffers, offset)

    return moved


def test_a_failed_write_leaves_the_last_step(tmp_path: Path) -> None:
    broken = threading.Event()
    with Store.create(tmp_path / "run", fingerprint="", io=StoreIo(pwrite=failing(os.pwritev, broken))) as store:
        commit(store, 1, a=1, b=2)
        broken.set()
        with pytest.raises(WriteError, match=r"\.bin: writing 24576 bytes at offset 0 failed: Input/output error"):
            commit(store, 2, a=3)
        assert isinstance(outcome_of_loading(store, "a"), WriteError)
        store.abort_step()
        assert torch.equal(loaded(store, "a"), contents(1))
        broken.clear()
        commit(store, 2, a=4)
    with Store.open(tmp_path / "run") as store:
        assert torch.equal(loaded(store, "a"), contents(4))
        assert torch.equal(loaded(store, "b"), contents(2))


def outcome_of_loading(store: Store, name: str) -> OffloadError | None:
    try:
        loaded(store, name)
    except OffloadError as error:
        return error
    return None


def test_a_failed_read_is_reported_and_harms_nothing(tmp_path: Path) -> None:
    broken = threading.Event()
    with Store.create(tmp_path / "run", fingerprint="", io=StoreIo(pread=failing(os.preadv, broken))) as store:
        commit(store, 1, a=1)
        broken.set()
        with pytest.raises(ReadError, match="reading 24576 bytes at offset 0 failed: Input/output error"):
            loaded(store, "a")
        broken.clear()
        assert torch.equal(loaded(store, "a"), contents(1))


@pytest.mark.parametrize("which", ["data", "manifest", "names of files"])
def test_a_disk_that_fails_at_the_last_moment_leaves_the_last_step(
    tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Store.create(tmp_path / "run", fingerprint="") as store:
        commit(store, 1, a=1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync" if which == "data" else "fsync", fail)
            if which == "manifest":
                patch.setattr(Folder, "sync", lambda self: None)
            with pytest.raises(WriteError, match="Input/output error"):
                commit(store, 2, a=2)
        store.abort_step()
        assert torch.equal(loaded(store, "a"), contents(1))
        commit(store, 3, a=3)
    with Store.open(tmp_path / "run") as store:
        assert (store.step, outcome_of_loading(store, "a")) == (3, None)


def test_a_commit_of_which_nobody_knows_whether_it_holds_is_not_built_upon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.create(tmp_path / "run", fingerprint="")
    commit(store, 1, a=1)

    sync = Folder.sync

    def fail(self: Folder) -> None:
        if self.path != tmp_path / "run":
            return sync(self)
        raise WriteError(self.path, offset_bytes=0, nbytes=0, reason="its entries: Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "sync", fail)
        with pytest.raises(WriteError):
            commit(store, 2, a=2)
    with pytest.raises(Closed, match=r"the last commit may have failed .* open the store again"):
        store.begin_step()
    with pytest.raises(Closed):
        store.load("a", contents(0))
    store.close()
    with Store.open(tmp_path / "run") as again:
        assert torch.equal(loaded(again, "a"), contents(again.step))
        commit(again, 3, a=3)


# ---- power failures


def test_data_is_on_the_disk_before_the_manifest_that_refers_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fdatasync, fsync, replace = os.fdatasync, os.fsync, os.replace

    def named(fd: int) -> str:
        return UNFINISHED.sub("unfinished", Path(os.readlink(f"/proc/self/fd/{fd}")).name)

    monkeypatch.setattr(os, "fdatasync", lambda fd: (calls.append(f"sync {named(fd)}"), fdatasync(fd)))
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(f"sync {named(fd)}"), fsync(fd)))

    def replaced(source: str, target: str, **folders: int) -> None:
        calls.append(f"{UNFINISHED.sub('unfinished', source)} -> {target}")
        replace(source, target, **folders)

    monkeypatch.setattr(os, "replace", replaced)
    with Store.create(tmp_path / "run", fingerprint="") as store:
        assert calls.pop() == f"sync {tmp_path.name}"
        end = ["sync unfinished", "unfinished -> store.json", "sync run"]
        commit(store, 1, a=1)
        assert calls == ["sync 1.bin", "sync objects", *end]
        calls.clear()
        commit(store, 2, a=2)
        assert calls == ["sync 2.bin", "sync objects", *end]
        calls.clear()
        commit(store, 3, a=3)
        assert calls == ["sync 1.bin", *end], "a file that is written again has its name already"
        calls.clear()
        store.save_to(tmp_path / "saved")
        assert calls == ["sync objects", *end[:2], "sync saved", f"sync {tmp_path.name}"]


def test_an_unfinished_manifest_means_nothing(tmp_path: Path) -> None:
    with Store.create(tmp_path / "run", fingerprint="") as store:
        commit(store, 1, a=1)
    left = tmp_path / "run" / f".store.json.{'0f' * 16}.tmp"
    left.write_text('{"format"')
    with Store.open(tmp_path / "run") as store:
        assert not left.exists()
        commit(store, 2, a=2)
        assert torch.equal(loaded(store, "a"), contents(2))
    assert LAYOUT.nbytes
