"""Damaged checkpoints of ESSATrainer: resumed to the same steps, or refused with nothing changed."""

from __future__ import annotations

import io
import random
import shutil
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor

import lowmem
from tests.fuzz.damage import ODD_VALUES, copy_folder, damage_entry, damage_file
from tests.fuzz.outcomes import check_refusal
from tests.fuzz.workers import Ending, Fault, in_child, note
from tests.lowmem.tiny_training import lora, resident, streamed, word_tokenizer
from tests.zoo.architectures import build

_AT, _NUM_STEPS = 1, 2
_RUNS: dict[str, dict[str, object]] = {"own": {}, "seed": {"seed": 1}, "adapter": {"target_modules": ["q_proj"]}}
"""Other runs, whose files come in the place of the first one's."""


class EssaCheckpoints:
    """`ESSATrainer.train(resume_from_checkpoint=...)`, and the step after it."""

    limit_s = 60.0
    limit_bytes = 1 << 30
    cases_per_worker = 100

    def prepare(self, folder: Path) -> None:
        in_child(lambda: build("llama", folder / "model"))
        for name in _RUNS:
            in_child(lambda name=name: _finish(name, folder))  # type: ignore[misc]

    def run(self, seed: int, *, prepared: Path, scratch: Path) -> Ending:
        rng = random.Random(seed)
        checkpoint = copy_folder(prepared / "own" / f"checkpoint-{_AT}", scratch / "out" / f"checkpoint-{_AT}")
        what = note(scratch, _damage(checkpoint / "essa_state.pt", prepared, rng))
        made = _trainer(prepared / "model", scratch / "out", "own", stream=rng.random() < 0.3)
        before = _everything(made)
        try:
            made.train(resume_from_checkpoint=True if rng.random() < 0.5 else str(checkpoint))
        except Exception as error:
            check_refusal(error, scratch)
            if not _same(before, _everything(made)):
                raise Fault(f"a refused checkpoint has changed the run: {what}") from error
            return Ending("refused", what)
        found = _everything(made)
        if _same(found, torch.load(prepared / "own" / "end.pt")):
            return Ending("equal", what)
        if what.endswith("of the run with another seed"):
            return Ending("the other run", what)
        if what.startswith("rewritten"):
            # With checksums of its own: a value that may be is what was saved, to all that can be known.
            return Ending("as rewritten", what)
        raise Fault(f"a damaged checkpoint was resumed with another result: {what}")


def _finish(name: str, folder: Path) -> None:
    made = _trainer(folder / "model", folder / name, name)
    made.train()
    torch.save(_everything(made), folder / name / "end.pt")


def _trainer(folder: Path, output: Path, name: str, *, stream: bool = False) -> lowmem.ESSATrainer:
    options = dict(_RUNS[name])
    return lowmem.ESSATrainer(
        streamed(folder) if stream else resident(folder),
        lowmem.ESSAConfig(
            output_dir=str(output),
            max_steps=_NUM_STEPS,
            population_size=4,
            per_device_train_batch_size=2,
            max_completion_length=2,
            sigma=1.0,
            save_steps=_AT,
            seed=int(str(options.pop("seed", 0))),
        ),
        reward_funcs=lambda completion_ids, **columns: [float(sum(ids) % 7) for ids in completion_ids],
        train_dataset=Dataset.from_list([{"prompt": f"w{number} w{number + 1}"} for number in range(6)]),
        processing_class=word_tokenizer(),
        peft_config=lora(lora_dropout=0.0, **options),
    )


def _everything(made: lowmem.ESSATrainer) -> dict[str, object]:
    """Copies of all that a checkpoint holds."""
    stored = io.BytesIO()
    torch.save(
        {
            "spectrum": made.spectrum.state_dict(),
            "strategy": made.strategy.state_dict(),
            "log_history": made.log_history,
        },
        stored,
    )
    stored.seek(0)
    found: dict[str, object] = torch.load(stored)
    return found


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    return bool(one == other)


def _damage(file: Path, prepared: Path, rng: random.Random) -> str:
    chance = rng.random()
    if chance < 0.1:
        name = rng.choice(("seed", "adapter"))
        shutil.copy(prepared / name / f"checkpoint-{_AT}" / file.name, file)
        return f"{file.name} of the run with another {name}"
    if chance < 0.2:
        return damage_entry(file, rng)
    if chance < 0.5:
        return _rewrite(file, rng)
    return damage_file(file, rng)


def _rewrite(file: Path, rng: random.Random) -> str:
    """Save it again with one node changed."""
    state = torch.load(file, weights_only=True)
    owner: dict[str, object] = rng.choice((state, state["spectrum"], state["strategy"], state["log_history"][0]))
    name = rng.choice(sorted(owner))
    value, kind = owner[name], rng.choice(("odd", "odd", "gone", "shape", "type", "not finite", "more"))
    if kind == "gone":
        del owner[name]
    elif kind == "more":
        owner["more"] = 1
    elif isinstance(value, Tensor) and kind == "shape":
        owner[name] = rng.choice((value[None], value[:1], value[:0], value.flatten()[0]))
    elif isinstance(value, Tensor) and kind == "type":
        owner[name] = value.to(rng.choice((torch.float16, torch.int64, torch.complex64)))
    elif isinstance(value, Tensor) and kind == "not finite":
        owner[name] = torch.full_like(value, rng.choice((float("nan"), float("inf"))))
    else:
        kind, owner[name] = "odd", rng.choice(ODD_VALUES)
    torch.save(rng.choice(([], 1, None, {})) if rng.random() < 0.05 else state, file)
    return f"rewritten: {name} {kind}"


__all__ = ["EssaCheckpoints"]
