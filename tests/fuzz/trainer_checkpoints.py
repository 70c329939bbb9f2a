"""Damaged Trainer checkpoints: resumed as the whole one, refused, or taken as plain transformers takes them."""

from __future__ import annotations

import json
import random
import shutil
import traceback
from pathlib import Path

from tests.fuzz.damage import copy_folder, damage_entry, damage_file
from tests.fuzz.outcomes import check_refusal
from tests.fuzz.runs import KINDS, NUM_STEPS, made
from tests.fuzz.workers import Ending, Fault, in_child, note
from tests.zoo.architectures import build

_AT = 2
"""Steps that the damaged checkpoint has."""
_ADAPTERS = ("sft", "dpo")
_OWN_FILES = ("optimizer_state", "optimizer.pt", "model", "config.json", "generation_config.json")
"""Beginnings of what lowmem writes into a checkpoint of full tuning; the rest is the Trainer's own."""


class TrainerCheckpoints:
    """`train(resume_from_checkpoint=...)` of adapter and full runs.

    Args:
        kinds: Of runs.

    """

    limit_s = 60.0
    limit_bytes = 1 << 30
    cases_per_worker = 20

    def __init__(self, kinds: tuple[str, ...] = KINDS) -> None:
        self._kinds = kinds

    def prepare(self, folder: Path) -> None:
        in_child(lambda: build("llama", folder / "model"))
        for kind in self._kinds:
            # A second run with other data: what belongs to it is not the first one's.
            for seed in (0, 1):
                in_child(lambda kind=kind, seed=seed: _finish(kind, folder, seed))  # type: ignore[misc]

    def run(self, seed: int, *, prepared: Path, scratch: Path) -> Ending:
        rng = random.Random(seed)
        kind = rng.choice(self._kinds)
        whole = prepared / f"{kind} 0"
        checkpoint = copy_folder(whole / "out" / f"checkpoint-{_AT}", scratch / "out" / f"checkpoint-{_AT}")
        other = prepared / f"{kind} 1" / "out" / f"checkpoint-{_AT}"
        damaged, done = _damage(checkpoint, other, rng)
        what = note(scratch, f"{kind}: {done}")
        before = _entries(checkpoint)
        said, error = _resumed(kind, prepared, scratch, checkpoint)
        if _entries(checkpoint) != before:
            raise Fault(f"{kind}: a damaged checkpoint was changed")
        if error is not None and _is_ours(error):
            check_refusal(error, scratch)
            return Ending("refused", what)
        if error is None and said == json.loads((whole / "said.json").read_text())[_AT:]:
            return Ending("equal", what)
        if kind in _ADAPTERS:
            plain_said, plain_error = _resumed(kind, prepared, scratch, checkpoint, plain=True)
            if type(error) is type(plain_error) and (error is not None or len(said) == len(plain_said)):
                return Ending("as plain", what)
            raise Fault(f"{kind}: resumed otherwise than plain transformers: {error!r}, plain {plain_error!r}")
        if not any(name.startswith(_OWN_FILES) for name in damaged):
            return Ending("the Trainer's own", what)
        if error is not None:
            raise error
        raise Fault(f"{kind}: a damaged checkpoint was resumed with another result: {done}")


def _finish(kind: str, folder: Path, seed: int) -> None:
    work = folder / f"{kind} {seed}"
    said: list[str] = []
    num_steps = NUM_STEPS if seed == 0 else _AT
    options = {"seed": seed, "max_steps": num_steps}
    trainer = made(kind, folder / "model", work / "out", work / "state", say=said.append, **options)
    trainer.train()
    assert len(said) == num_steps
    (work / "said.json").write_text(json.dumps(said))
    # What ran here is gone when a checkpoint is resumed elsewhere.
    shutil.rmtree(work / "state", ignore_errors=True)
    for checkpoint in (work / "out").glob("checkpoint-*"):
        if not checkpoint.name.endswith(f"-{_AT}"):
            shutil.rmtree(checkpoint)


def _damage(checkpoint: Path, other: Path, rng: random.Random) -> tuple[list[str], str]:
    """Damage one file, sometimes two; returns which and how."""
    damaged, done = [], []
    for _ in range(rng.choice((1, 1, 1, 2))):
        files = sorted(file for file in checkpoint.rglob("*") if file.is_file() and not file.is_symlink())
        if rng.random() < 0.5:
            files = [file for file in files if str(file.relative_to(checkpoint)).startswith(_OWN_FILES)] or files
        if not files:
            break
        file = rng.choice(files)
        name = str(file.relative_to(checkpoint))
        damaged.append(name)
        chance = rng.random()
        if chance < 0.15 and (other / name).is_file():
            shutil.copy(other / name, file)
            done.append(f"{name} of another run")
        elif chance < 0.2 and (checkpoint / "optimizer_state").is_dir():
            shutil.rmtree(checkpoint / "optimizer_state")
            damaged.append("optimizer_state")
            done.append("optimizer_state removed")
        elif chance < 0.35:
            done.append(f"in {name}: {damage_entry(file, rng)}")
        else:
            done.append(f"in {name}: {damage_file(file, rng)}")
    return damaged, "; ".join(done)


def _entries(folder: Path) -> list[tuple[str, int, int]]:
    found = [(str(entry.relative_to(folder)), entry.lstat()) for entry in sorted(folder.rglob("*"))]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in found if name != "."]


def _resumed(
    kind: str, prepared: Path, scratch: Path, checkpoint: Path, *, plain: bool = False
) -> tuple[list[str], Exception | None]:
    """What each step said after a resume, and the error that ended it."""
    said: list[str] = []
    work = scratch / ("plain" if plain else "streamed")
    try:
        trainer = made(
            kind,
            prepared / "model",
            work / "out",
            work / "state",
            say=said.append,
            plain=plain,
            save_strategy="no",
        )
        trainer.train(resume_from_checkpoint=str(checkpoint))
    except Exception as error:  # noqa: BLE001
        return said, error
    return said, None


def _is_ours(error: Exception) -> bool:
    root = Path(__file__).parents[2]
    ours = tuple(str(root / package) for package in ("lowmem", "offload"))
    return any(frame.filename.startswith(ours) for frame in traceback.extract_tb(error.__traceback__))


__all__ = ["TrainerCheckpoints"]
