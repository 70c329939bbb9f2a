"""Damaged stores: the state that was committed, or a refusal; nothing outside the folder is ever written."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import torch

from offload import ObjectLayout, StagingBuffer, Store, lay_out_object
from tests.fuzz.damage import copy_folder, damage_bytes, damage_entry, damage_json
from tests.fuzz.outcomes import check_refusal
from tests.fuzz.workers import Ending, Fault, note

_FINGERPRINT = "fuzzed"
_EXTRA = {"steps": {"a": 3}, "note": "whatever a run remembers"}
_OUTSIDE = b"somebody else's"
_LAYOUTS: dict[str, ObjectLayout] = {
    "block 0": lay_out_object({"master": (torch.float32, (40, 3)), "exp_avg": (torch.float32, (40, 3))}),
    "block 1": lay_out_object({"master": (torch.float32, (40, 3)), "exp_avg": (torch.float32, (40, 3))}),
    "rest/a": lay_out_object({"values": (torch.bfloat16, (7,)), "step": (torch.int64, (1,))}),
    "empty": lay_out_object({}),
}
_LINKED = ("store.lock", "store.json", "store.json.tmp", "objects", "objects/9.bin", ".store.json.tmp", "objects/0.bin")


def _data(name: str, version: int) -> torch.Tensor:
    """What an object holds: every value differs from object to object and from version to version."""
    buffer = StagingBuffer(max(1, _LAYOUTS[name].nbytes)).tensor[: _LAYOUTS[name].nbytes]
    generator = torch.Generator().manual_seed(100 * version + sorted(_LAYOUTS).index(name))
    values = torch.randint(0, 256, buffer.shape, dtype=torch.uint8, generator=generator)
    buffer.zero_()
    for placed in _LAYOUTS[name].tensors:
        part = slice(placed.offset_bytes, placed.offset_bytes + placed.nbytes)
        buffer[part] = values[part]
    return buffer


def _commit(store: Store, step: int) -> None:
    store.begin_step()
    for name, layout in _LAYOUTS.items():
        store.write(name, layout, _data(name, step))
    store.commit(step=step, extra=_EXTRA)


class Stores:
    """`Store.open`, `Store.restore`, and the step after it."""

    limit_s = 60.0
    limit_bytes = 1 << 30
    cases_per_worker = 500

    def prepare(self, folder: Path) -> None:
        with Store.create(folder / "store", fingerprint=_FINGERPRINT) as store:
            for step in (1, 2, 3):
                _commit(store, step)

    def run(self, seed: int, *, prepared: Path, scratch: Path) -> Ending:
        rng = random.Random(seed)
        folder = copy_folder(prepared / "store", scratch / "store")
        outside = scratch / "outside"
        outside.write_bytes(_OUTSIDE)
        (scratch / "others").mkdir()
        what = note(scratch, _damage(folder, scratch, rng))
        try:
            if rng.random() < 0.3:
                what = note(scratch, f"restored: {what}")
                Store.restore(folder, scratch / "restored")
                folder = scratch / "restored"
            with Store.open(folder, fingerprint=_FINGERPRINT) as store:
                _check(store, step=3)
                _commit(store, 4)
                _check(store, step=4)
            with Store.open(folder, fingerprint=_FINGERPRINT) as store:
                _check(store, step=4)
        except Exception as error:  # noqa: BLE001
            check_refusal(error, scratch)
            return Ending("refused", what)
        finally:
            if outside.read_bytes() != _OUTSIDE or any((scratch / "others").iterdir()):
                raise Fault("a store wrote through a link")
        return Ending("equal", what)


def _damage(folder: Path, scratch: Path, rng: random.Random) -> str:
    done = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        objects = sorted(file for file in (folder / "objects").iterdir() if file.is_file() and not file.is_symlink())
        manifest = folder / "store.json"
        in_use = (
            {entry["file"] for entry in json.loads(manifest.read_bytes())["objects"].values()} if not done else set()
        )
        used = [file for file in objects if done or file.name in in_use]
        kind = rng.choice(
            ("manifest", "manifest", "values", "values", "values", "exchange", "entry", "link", "stranger")
        )
        if kind == "manifest" and manifest.is_file():
            done.append(damage_json(manifest, rng))
        elif kind == "values" and used:
            done.append(_flip(rng.choice(used), rng))
        elif kind == "exchange" and len(used) > 1:
            first, second = rng.sample(used, 2)
            kept = first.read_bytes()
            first.write_bytes(second.read_bytes())
            second.write_bytes(kept)
            done.append(f"{first.name} and {second.name} exchanged")
        elif kind == "entry" and used:
            done.append(damage_entry(rng.choice([*used, manifest]), rng))
        elif kind == "link":
            done.append(_plant(folder, scratch, rng))
        elif kind == "stranger":
            name = rng.choice(("objects/12.bin", "objects/x", "store.json.tmp", "objects/012.bin", "x"))
            (folder / name).write_bytes(rng.randbytes(rng.choice((0, 100, 8192))))
            done.append(f"{name} added")
        if not done:
            done.append(damage_bytes(manifest, rng))
        # Further damage is to what is still a folder of files.
        if (
            manifest.is_symlink()
            or not manifest.is_file()
            or (folder / "objects").is_symlink()
            or not (folder / "objects").is_dir()
        ):
            break
    return "; ".join(done)


def _flip(file: Path, rng: random.Random) -> str:
    if rng.random() < 0.3 or not file.stat().st_size:
        return damage_bytes(file, rng)
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return f"bit at {at} of {file.name} flipped"


def _plant(folder: Path, scratch: Path, rng: random.Random) -> str:
    name = rng.choice(_LINKED)
    entry = folder / name
    if entry.is_dir():
        # The folder of objects, moved elsewhere and linked; or a link to another one.
        shutil.move(entry, scratch / "moved")
        entry.symlink_to(rng.choice((scratch / "moved", scratch / "others")))
        return f"{name} is a link to {entry.readlink().name}"
    entry.unlink(missing_ok=True)
    entry.symlink_to(rng.choice((scratch / "outside", scratch / "others" / "new")))
    return f"{name} is a link to {entry.readlink().name}"


def _check(store: Store, *, step: int) -> None:
    if store.step != step or dict(store.extra) != _EXTRA:
        raise Fault(f"a store says something else: step {store.step}, extra {store.extra}")
    if set(store.names()) != set(_LAYOUTS):
        raise Fault(f"a store has other objects: {store.names()}")
    for name, layout in _LAYOUTS.items():
        if store.layout(name) != layout:
            raise Fault(f"a store has another layout: {name}, {store.layout(name)}")
        into = StagingBuffer(max(1, layout.nbytes)).tensor
        store.load(name, into).wait()
        expected = _data(name, step)
        for placed in layout.tensors:
            part = slice(placed.offset_bytes, placed.offset_bytes + placed.nbytes)
            if not torch.equal(into[part], expected[part]):
                raise Fault(f"a store gives other values: {name} {placed.name}")


__all__ = ["Stores"]
