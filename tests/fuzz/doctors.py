"""`lowmem doctor` on damaged models, adapters and stores: words, nothing changed, no damage that is called whole."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import lowmem
from lowmem.doctor import check_folder
from offload import OffloadError
from tests.fuzz.checkpoints import TINY, damage_checkpoint
from tests.fuzz.damage import copy_folder, damage_file
from tests.fuzz.workers import Ending, Fault, note
from tests.lowmem.full_training import full
from tests.zoo.architectures import build

_KINDS = ("model", "model", "adapter", "state")
_BUDGET = lowmem.Budget(device="16MiB", host="16MiB")


class Doctors:
    """`check_folder`, and then what it looked at is opened."""

    limit_s = 60.0
    limit_bytes = 1 << 30
    cases_per_worker = 250

    def prepare(self, folder: Path) -> None:
        base = build("llama", folder / "model", changes=TINY, shard_bytes=6000)
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder / "adapter")
        # Of a usual size: the tiny one would stay in memory.
        model = full(build("llama", folder / "trained"), "disk", folder / "run")
        optimizer = lowmem.optim.AdamW(model, lr=1e-3)
        ids = torch.arange(8).view(1, 8)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        del model, optimizer
        next(file.parent for file in (folder / "run").rglob("store.json")).rename(folder / "state")

    def run(self, seed: int, *, prepared: Path, scratch: Path) -> Ending:
        rng = random.Random(seed)
        kind = rng.choice(_KINDS)
        folder = copy_folder(prepared / kind, scratch / kind)
        what = note(scratch, f"{kind}: {_damage(kind, folder, rng)}")
        before = _entries(folder)
        checks = list(check_folder(folder))
        if _entries(folder) != before:
            raise Fault(f"{kind}: the doctor changed what it looked at")
        for check in checks:
            if check.is_broken and not (check.finding and check.remedy):
                raise Fault(f"{kind}: {check.name} is broken, without a word")
        if any(check.is_broken for check in checks):
            return Ending("broken", what)
        if kind == "model":
            try:
                lowmem.from_pretrained(folder, budget=_BUDGET, device="cpu")
            except (OffloadError, lowmem.UnsupportedError, ValueError) as error:
                raise Fault(f"the doctor finds nothing, and opening it is refused: {error}") from error
        return Ending("whole", what)


def _damage(kind: str, folder: Path, rng: random.Random) -> str:
    if kind == "model":
        return damage_checkpoint(folder, rng)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    return damage_file(rng.choice(files), rng)


def _entries(folder: Path) -> list[tuple[str, int, int]]:
    found = [(str(entry.relative_to(folder)), entry.lstat()) for entry in sorted(folder.rglob("*"))]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in found]


__all__ = ["Doctors"]
