"""Damage that leaves everything plausible: found by checksums, on resume and on demand, before anything is replaced."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offload import SourceError, Store, StoreIo, verify_store
from offload.blocks import lay_out_object
from tests.offload.not_files import NOT_FILES, put_in_place
from tests.offload.test_store import LAYOUT, commit, contents, loaded


def make(folder: Path) -> Path:
    with Store.create(folder, fingerprint="model A") as store:
        commit(store, 7, a=1, b=2, c=3)
    assert verify_store(folder) == ()
    return folder


def file_of(folder: Path, name: str) -> Path:
    manifest = json.loads((folder / "store.json").read_text())
    return folder / "objects" / str(manifest["objects"][name]["file"])


def flip(file: Path, offset: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[offset] ^= 1
    file.write_bytes(raw)


def swap(folder: Path) -> None:
    a, b, other = file_of(folder, "a"), file_of(folder, "b"), folder / "objects" / "other"
    a.rename(other)
    b.rename(a)
    other.rename(b)


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "store.json").read_text())
    edit(manifest)
    (folder / "store.json").write_text(json.dumps(manifest))


BYTES: dict[str, Callable[[Path], None]] = {
    "the first bit": lambda folder: flip(file_of(folder, "b"), 0),
    "the last bit": lambda folder: flip(file_of(folder, "b"), LAYOUT.nbytes - 1),
    "zeros": lambda folder: (file_of(folder, "b").write_bytes(bytes(LAYOUT.nbytes)), None)[1],
    "shortened": lambda folder: os.truncate(file_of(folder, "b"), 4096),
    "missing": lambda folder: file_of(folder, "b").unlink(),
    "files swapped": swap,
}

VALUES: dict[str, Callable[[dict[str, Any]], object]] = {
    "step": lambda manifest: manifest.update(step=8),
    "extra": lambda manifest: manifest["extra"]["seeds"].update(a=2),
    "extra gone": lambda manifest: manifest.update(extra={}),
    "fingerprint": lambda manifest: manifest.update(fingerprint="model B"),
    "an object gone": lambda manifest: manifest["objects"].pop("b"),
    "an object renamed": lambda manifest: manifest["objects"].update(d=manifest["objects"].pop("b")),
    "shape": lambda manifest: manifest["objects"]["b"]["tensors"]["weight"].update(shape=[33, 70]),
    "dtype": lambda manifest: manifest["objects"]["b"]["tensors"]["weight"].update(dtype="float16"),
    "checksum": lambda manifest: manifest["objects"]["b"].update(crc32=1),
    "no checksum": lambda manifest: manifest["objects"]["b"].pop("crc32"),
    "no checksum of the whole": lambda manifest: manifest.pop("sha256"),
    "files exchanged": lambda manifest: manifest["objects"]["a"].update(
        file=manifest["objects"]["b"]["file"], _=manifest["objects"]["b"].update(file=manifest["objects"]["a"]["file"])
    ),
}


@pytest.mark.parametrize("kind", BYTES)
def test_bytes_that_are_not_what_was_written_are_named(tmp_path: Path, kind: str) -> None:
    folder = make(tmp_path / "run")
    BYTES[kind](folder)
    found = verify_store(folder)
    assert {error.field for error in found if isinstance(error, SourceError)} == (  # type: ignore[attr-defined]
        {"objects.a.file", "objects.b.file"} if kind == "files swapped" else {"objects.b.file"}
    )
    match = r"store\.json: objects\.[ab]\.file: .*\.bin"
    with pytest.raises(SourceError, match=match):
        Store.open(folder)
    with pytest.raises(SourceError, match=match), Store.open(folder, verify=False) as store:
        store.verify()


def test_whoever_keeps_the_error_keeps_no_thread(tmp_path: Path) -> None:
    """A collection would end these, in any thread: in one that is being started, both would wait for each other."""
    folder = make(tmp_path / "run")
    BYTES["the first bit"](folder)
    before = set(threading.enumerate())
    with pytest.raises(SourceError) as kept:
        Store.open(folder)
    with pytest.raises(SourceError) as kept_too:
        Store.restore(folder, tmp_path / "another")
    assert not [thread.name for thread in threading.enumerate() if thread not in before and "verify" in thread.name]
    del kept, kept_too


@pytest.mark.parametrize("kind", VALUES)
def test_values_that_are_not_what_was_written_are_refused(tmp_path: Path, kind: str) -> None:
    folder = make(tmp_path / "run")
    change(folder, VALUES[kind])
    (found,) = verify_store(folder)
    assert isinstance(found, SourceError)
    with pytest.raises(SourceError, match=r"store.json: "):
        Store.open(folder)


@pytest.mark.parametrize("kind", BYTES)
def test_a_damaged_checkpoint_replaces_nothing(tmp_path: Path, kind: str) -> None:
    saved, folder = make(tmp_path / "saved"), tmp_path / "run"
    with Store.create(folder, fingerprint="") as store:
        commit(store, 1, a=5)
    BYTES[kind](saved)
    with pytest.raises(SourceError, match=r"saved/.*store.json: objects"):
        Store.restore(saved, folder)
    with Store.open(folder) as store:
        assert (store.step, store.names()) == (1, ("a",))
        assert torch.equal(loaded(store, "a"), contents(5))
    assert verify_store(folder) == ()


def test_a_copy_of_damaged_bytes_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(18, os.strerror(18))

    monkeypatch.setattr(os, "link", refuse)
    with Store.open(make(tmp_path / "run")) as store:
        store.save_to(tmp_path / "saved")
        commit(store, 8, c=9)
        flip(file_of(tmp_path / "run", "b"), 5000)
        with pytest.raises(SourceError, match=r"\.bin: contents: its bytes are not those that were written"):
            store.save_to(tmp_path / "saved")
    assert verify_store(tmp_path / "saved") == ()
    with Store.open(tmp_path / "saved") as saved:
        assert (saved.step, len(list((tmp_path / "saved" / "objects").iterdir()))) == (7, 3)


def test_checksums_do_not_depend_on_how_it_was_written(tmp_path: Path) -> None:
    big = lay_out_object({"state": (torch.uint8, (3 << 20,))})
    checksums = set()
    for number, request_bytes in enumerate((4096, 1 << 20, 16 << 20)):
        folder = tmp_path / str(number)
        with Store.create(folder, fingerprint="", io=StoreIo(request_bytes=request_bytes)) as store:
            store.begin_step()
            store.write("a", big, contents(3, big))
            store.commit(step=1, extra={})
        assert verify_store(folder) == ()
        checksums.add(json.loads((folder / "store.json").read_text())["objects"]["a"]["crc32"])
    assert len(checksums) == 1


def test_objects_that_a_step_leaves_alone_keep_their_checksums(tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    with Store.open(folder) as store:
        commit(store, 8, a=4)
        store.verify()
        for step in range(9, 13):
            commit(store, step, b=step)
        store.verify()
    assert verify_store(folder) == ()


def test_what_is_no_store_is_said(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        (found,) = verify_store(folder)
        assert "store.json: file: it does not exist: nothing was committed here" in str(found)


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("name", ["store.json", "objects/1.bin"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path, kind: str, name: str) -> None:
    folder = make(tmp_path / "run")
    put_in_place(folder / name, kind)
    with pytest.raises(SourceError, match=r"store\.json: "):
        Store.open(folder)
    assert len(verify_store(folder)) == 1


@pytest.mark.parametrize("name", ["\ud800", "block \udfff/state"])
def test_names_that_are_no_text_are_refused(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "run")
    change(folder, lambda manifest: manifest["objects"].update({name: manifest["objects"]["a"]}))
    with pytest.raises(SourceError, match=r"store\.json: file: key .* is no text") as caught:
        Store.open(folder)
    str(caught.value).encode()
    with Store.create(tmp_path / "other", fingerprint="") as store:
        store.begin_step()
        with pytest.raises(ValueError, match="expected text, got half of a surrogate pair"):
            store.write(name, LAYOUT, contents(0))
