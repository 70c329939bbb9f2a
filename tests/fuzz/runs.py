"""Short training runs through the Trainer and TRL that save every step and go on from their last checkpoint."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import lowmem
from tests.lowmem.full_training import full
from tests.lowmem.kill_job import last_complete_checkpoint
from tests.lowmem.tiny_training import NUM_WORDS, lora, streamed, word_tokenizer

NUM_STEPS = 4
KINDS = ("sft", "dpo", "full disk", "full disk sft", "full host", "galore on disk")

_OPTIONS: dict[str, object] = {
    "max_steps": NUM_STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
Say = Callable[[str], object]


def _ids(num: int, low: int, high: int, *, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(NUM_WORDS) for _ in range(rng.randint(low, high))] for _ in range(num)]


def _tokenized(seed: int) -> Dataset:
    """Rows that need no tokenizer: most of a short run would be spent on it."""
    return Dataset.from_list([{"input_ids": ids} for ids in _ids(16, 8, 16, seed=seed)])


def _compared(seed: int) -> Dataset:
    parts = [[" ".join(f"w{i}" for i in ids) for ids in _ids(16, 3, 6, seed=seed + part)] for part in range(3)]
    rows = zip(*parts, strict=True)
    return Dataset.from_list([{"prompt": p, "chosen": " " + c, "rejected": " " + r} for p, c, r in rows])


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what is trained, by name."""
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


def digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Of names and bits."""
    found = sha256()
    for name, weight in sorted(weights.items()):
        found.update(name.encode() + weight.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


class _Digests(TrainerCallback):
    """Says each step's number and the digest of all that is trained."""

    def __init__(self, say: Say) -> None:
        self._say = say

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self._say(f"step {state.global_step} {digest(trainable(kwargs['model']))}\n")  # type: ignore[attr-defined,arg-type]


def _opened(kind: str, folder: Path, state: Path, *, plain: bool) -> PreTrainedModel:
    if plain:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if kind in ("sft", "dpo"):
        return streamed(folder)
    state.mkdir(parents=True, exist_ok=True)
    return full(folder, "host" if kind == "full host" else "disk", state)


def made(
    kind: str,
    folder: Path,
    output: Path,
    state: Path,
    *,
    say: Say,
    seed: int = 0,
    plain: bool = False,
    **options: object,
) -> Trainer:
    """A trainer that is ready to train.

    Args:
        kind: One of `KINDS`.
        folder: The checkpoint to start from.
        output: The Trainer's folder.
        state: Where full tuning keeps its state on disk.
        say: Told of each step.
        seed: Of the data.
        plain: Adapters on the resident model instead.
        options: For the trainer's configuration.
    """
    torch.manual_seed(0)
    model = _opened(kind, folder, state, plain=plain)
    given = {**_OPTIONS, **options}
    callbacks: list[TrainerCallback] = [_Digests(say)]
    if kind == "dpo":
        return DPOTrainer(
            model=model,
            args=DPOConfig(str(output), **given),
            train_dataset=_compared(seed),
            processing_class=word_tokenizer(),
            peft_config=lora(),
            callbacks=callbacks,
        )
    if kind in ("sft", "full disk sft"):
        optimizer = None if kind == "sft" else lowmem.optim.AdamW(model, lr=1e-2)
        return SFTTrainer(
            model=model,
            args=SFTConfig(str(output), **given),
            train_dataset=_tokenized(seed),
            processing_class=word_tokenizer(),
            peft_config=lora() if kind == "sft" else None,
            callbacks=callbacks,
            optimizers=(optimizer, None),
        )
    if kind == "galore on disk":
        optimizer = lowmem.optim.GaLore(model, lr=1e-2, rank=4, update_proj_gap=2)
        lowmem.full.state_on_disk(optimizer)
    else:
        optimizer = lowmem.optim.AdamW(model, lr=1e-2)
    rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in _ids(16, 12, 12, seed=seed)]
    return Trainer(
        model=model,
        args=TrainingArguments(str(output), **given),
        train_dataset=rows,
        callbacks=callbacks,
        optimizers=(optimizer, None),
    )


def run(kind: str, folder: Path, work: Path, *, say: Say, **options: object) -> None:
    """Train from the last complete checkpoint to the end, saving every step; says each step and "done"."""
    trainer = made(kind, folder, work / "out", work / "state", say=say, **options)  # type: ignore[arg-type]
    checkpoint = last_complete_checkpoint(work / "out")
    say(f"from {checkpoint.name if checkpoint is not None else 'the start'}\n")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model(str(work / "final"))
    say("done\n")


__all__ = ["KINDS", "NUM_STEPS", "digest", "made", "run", "trainable"]
