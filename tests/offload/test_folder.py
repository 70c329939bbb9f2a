"""Folders on shared machines: links are not followed, foreign folders are refused, nothing is left half written."""

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offload import Folder, OffloadError, Scratch, SourceError, Store, Trace, WriteError
from offload.files import folder as folder_module
from tests.offload.not_files import NOT_FILES, put_in_place
from tests.offload.test_store import commit

ROOT = Path(__file__).resolve().parents[2]
SECRET = b"somebody else's"
NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file that must stay as it is, whatever links to it."""
    path = tmp_path / "victim"
    path.write_bytes(SECRET)
    before = path.stat()
    yield path
    after = path.stat()
    assert path.read_bytes() == SECRET
    assert (after.st_mode, after.st_nlink, after.st_mtime_ns) == (before.st_mode, before.st_nlink, before.st_mtime_ns)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


BEGIN: dict[str, Callable[[Path], object]] = {
    "create": lambda folder: Store.create(folder, fingerprint="").close(),
    "open": lambda folder: Store.open(folder).close(),
    "save_to": lambda folder: _saved_to(folder),
}


def _saved_to(folder: Path) -> None:
    with Store.create(folder.parent / "source", fingerprint="") as store:
        commit(store, 1, a=1)
        store.save_to(folder)


# ---- links and other things that are no files


@pytest.mark.parametrize("begin", BEGIN)
@pytest.mark.parametrize("name", ["store.lock", "store.json", "objects"])
def test_planted_links_are_not_followed(tmp_path: Path, victim: Path, begin: str, name: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    target = victim
    if name == "objects":
        target = tmp_path / "their folder"
        target.mkdir()
        if begin == "open":
            (folder / "store.json").write_text("{}")
    (folder / name).symlink_to(target)
    before = sorted(os.listdir(folder))
    if (begin, name) == ("save_to", "store.json"):
        # A state that is replaced: the link goes, what it leads to stays.
        BEGIN[begin](folder)
        assert (folder / name).is_file()
        assert not (folder / name).is_symlink()
        return
    with pytest.raises(OffloadError, match=r"link|committed state already|nothing was committed"):
        BEGIN[begin](folder)
    assert [left for left in sorted(os.listdir(folder)) if left not in ("objects", "store.lock")] == [
        left for left in before if left not in ("objects", "store.lock")
    ]
    if name == "objects":
        assert os.listdir(target) == []


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("begin", ["create", "save_to"])
def test_a_lock_that_is_no_file_is_refused_without_waiting(tmp_path: Path, kind: str, begin: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    put_in_place(folder / "store.lock", kind)
    with pytest.raises(WriteError, match=r"store.lock: .*(expected a regular file|Is a directory)"):
        BEGIN[begin](folder)


def test_a_link_in_place_of_the_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "theirs")
    for begin in ("create", "save_to"):
        with pytest.raises(SourceError, match="run: folder: expected a folder, got a link"):
            BEGIN[begin](tmp_path / "run")
    assert os.listdir(tmp_path / "theirs") == []
    # The way to it may lead through links: people link their disks.
    BEGIN["create"](tmp_path / "run" / "state")


def test_a_folder_that_is_swapped_for_a_link_changes_nothing_elsewhere(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    with Store.create(tmp_path / "run", fingerprint="") as store:
        commit(store, 1, a=1)
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").symlink_to(theirs)
        commit(store, 2, a=2, b=3)
    assert os.listdir(theirs) == []
    with Store.open(tmp_path / "moved") as store:
        assert store.step == 2


def test_a_saved_trace_follows_no_link(tmp_path: Path, victim: Path) -> None:
    for name in ("trace.json", f".trace.json.{os.getpid()}.tmp", ".trace.json.tmp"):
        (tmp_path / name).symlink_to(victim)
    Trace().save(tmp_path / "trace.json")
    assert not (tmp_path / "trace.json").is_symlink()


def test_scratch_follows_no_link(tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_TMPFILE")
    (tmp_path / ".offload-scratch-1-abc").symlink_to(victim)
    monkeypatch.setattr("offload.files.scratch.secrets.token_hex", lambda nbytes: "abc")
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(WriteError, match="File exists"):
        Scratch(tmp_path)


# ---- owners and modes


def test_a_folder_that_everybody_may_write_to_is_refused(tmp_path: Path) -> None:
    for inner in ("", "objects"):
        folder = tmp_path / f"run{inner}"
        (folder / inner).mkdir(parents=True)
        (folder / inner).chmod(0o777)
        with pytest.raises(SourceError, match=r"folder: everybody may write to it \(mode 777\); give a folder"):
            Store.create(folder, fingerprint="")
        assert [path.name for path in folder.rglob("*")] == ([inner] if inner else [])


def test_new_state_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with Store.create(tmp_path / "run", fingerprint="") as store:
            commit(store, 1, a=1)
            store.save_to(tmp_path / "saved")
    finally:
        os.umask(before)
    for folder in (tmp_path / "run", tmp_path / "saved"):
        assert mode_of(folder) == mode_of(folder / "objects") == 0o700
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) == 3
        assert {mode_of(file) for file in files} == {0o600}


def as_nobody(program: str, folder: Path) -> str:
    """Run as another user, who prints what was refused; the interpreter itself is started as root."""
    setup = f"""
import os, sys
from pathlib import Path
import torch
from offload import OffloadError, Scratch, StagingBuffer, Store, verify_store
from tests.offload.test_store import commit
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
folder = Path({str(folder)!r})
try:
"""
    body = "".join(f"    {line}\n" for line in program.strip().splitlines())
    end = "except OffloadError as error:\n    print(type(error).__name__, error)\n"
    command = [sys.executable, "-c", setup + body + end]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that everybody gets to, as /tmp is."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o1777)
        yield Path(name)


@needs_root
def test_a_folder_of_another_user_is_refused(shared: Path) -> None:
    folder = shared / "run"
    folder.mkdir()
    folder.chmod(0o777)
    program = """
for begin in (lambda: Store.create(folder, fingerprint=""), lambda: Store.restore(folder, folder)):
    try:
        begin()
    except OffloadError as error:
        print(error)
"""
    said = as_nobody(program, folder).splitlines()
    assert "run: folder: it belongs to user 0, and this process runs as user 65534" in said[0]
    assert "nothing was committed here" in said[1]
    assert os.listdir(folder) == []
    os.chown(folder, NOBODY, NOBODY)
    folder.chmod(0o755)
    with pytest.raises(SourceError, match="it belongs to user 65534, and this process runs as user 0"):
        Store.create(folder, fingerprint="")
    assert os.listdir(folder) == []


@needs_root
def test_another_user_cannot_plant_links_for_this_one(shared: Path, victim: Path) -> None:
    folder = shared / "run"
    folder.mkdir()
    for name in ("store.lock", "store.json.tmp", "store.json"):
        (folder / name).symlink_to(victim)
    (folder / "objects").symlink_to(victim.parent)
    for path in (folder, *folder.iterdir()):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    for begin in BEGIN.values():
        with pytest.raises(OffloadError, match=r"belongs to user 65534|committed state already"):
            begin(folder)


@needs_root
def test_a_user_works_beside_others_in_a_shared_folder(shared: Path) -> None:
    (shared / ".offload-scratch-1-abc").write_bytes(b"another user's run")
    with Store.create(shared / "run", fingerprint="") as store:
        commit(store, 4, a=1)
        store.save_to(shared / "theirs")
    # Whoever may read a checkpoint may go on from it.
    for path in (shared / "theirs", *(shared / "theirs").rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    program = """
with Scratch(folder), Store.create(folder / "mine", fingerprint="") as store:
    commit(store, 1, a=1)
print(verify_store(folder / "mine"))
Store.restore(folder / "theirs", folder / "taken")
print(Store.open(folder / "taken").step)
"""
    assert as_nobody(program, shared) == "()\n4\n"
    assert (shared / ".offload-scratch-1-abc").read_bytes() == b"another user's run"


# ---- files that appear whole


def test_what_a_crash_has_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    token = "0a" * 16
    names = [f".a.{token}.tmp", f".ab.{token}.tmp", ".a.tmp", f"a.{token}.tmp", f".a.{token}.tmpx"]
    for name in names:
        (tmp_path / name).touch()
    with Folder.open(tmp_path) as folder:
        folder.remove_unfinished("a")
    assert sorted(os.listdir(tmp_path)) == sorted(names[1:])


def test_a_file_that_cannot_be_finished_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(5, os.strerror(5))

    (tmp_path / "a").write_bytes(b"before")
    with Folder.open(tmp_path) as folder:
        monkeypatch.setattr(folder_module.os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output error"):
            folder.put("a", b"after")
        monkeypatch.undo()
        assert (os.listdir(tmp_path), (tmp_path / "a").read_bytes()) == (["a"], b"before")
        folder.put("a", b"after")
        folder.sync()
    assert (os.listdir(tmp_path), (tmp_path / "a").read_bytes(), mode_of(tmp_path / "a")) == (["a"], b"after", 0o600)
