"""Damaged checkpoints: opened as plain transformers opens them, or refused in one sentence."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import lowmem
from tests.fuzz.damage import copy_folder, damage_entry, damage_file
from tests.fuzz.outcomes import check_equal, check_refusal
from tests.fuzz.workers import Ending, Fault, note
from tests.zoo.architectures import build

TINY: dict[str, object] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
_BASES: dict[str, tuple[str, dict[str, object], torch.dtype, int]] = {
    "sharded": ("llama", {}, torch.float32, 6000),
    "one file": ("llama", {"tie_word_embeddings": True}, torch.bfloat16, 10**9),
    "experts": ("qwen3_moe", {"moe_intermediate_size": 8, "num_experts": 2}, torch.float32, 12_000),
    "text of a multimodal one": ("gemma3", {"text_config": {}}, torch.float32, 10**9),
}
_WAYS = ("open", "open", "open", "open", "plan", "full")


class Checkpoints:
    """`from_pretrained` and `plan` on damaged folders."""

    limit_s = 20.0
    limit_bytes = 1 << 30
    cases_per_worker = 250

    def prepare(self, folder: Path) -> None:
        for name, (kind, changes, dtype, shard_bytes) in _BASES.items():
            fields = changes if "text_config" in changes else TINY | changes
            build(kind, folder / name, changes=fields, dtype=dtype, shard_bytes=shard_bytes)

    def run(self, seed: int, *, prepared: Path, scratch: Path) -> Ending:
        rng = random.Random(seed)
        # The first is the most common by far, and the cheapest.
        base = rng.choice([*_BASES, "sharded", "sharded"])
        folder = copy_folder(prepared / base, scratch / "model")
        what = note(scratch, f"{base}: {damage_checkpoint(folder, rng)}")
        way = rng.choice(_WAYS)
        try:
            if way == "plan":
                lowmem.plan(folder, seq_len=8, device="cpu", budget=_BUDGET)
                return Ending("planned", what)
            tuning = "full" if way == "full" else "adapter"
            model = lowmem.from_pretrained(folder, tuning=tuning, budget=_BUDGET, device="cpu")
        except Exception as error:  # noqa: BLE001
            check_refusal(error, folder)
            return Ending("refused", what)
        _compare(model, folder, prepared / base)
        return Ending("equal", what)


_BUDGET = lowmem.Budget(device="16MiB", host="16MiB")


_PARTS = ("config.json", "config.json", ".index.json", ".safetensors", ".safetensors", "generation", "")


def damage_checkpoint(folder: Path, rng: random.Random) -> str:
    """Damage one file of a checkpoint, sometimes two."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        files = sorted(folder.iterdir())
        kind = rng.choice(
            ("config.json", "config.json", ".index.json", ".safetensors", ".safetensors", "generation", "")
        )
        of_kind = [file for file in files if kind in file.name and not (kind == "config.json" and "gen" in file.name)]
        if not (of_kind or files):
            break
        file = rng.choice(of_kind or files)
        if rng.random() < 0.04:
            done.append(_add_stranger(folder, rng))
        elif file.is_symlink() or not file.is_file():
            continue
        elif rng.random() < 0.08:
            done.append(damage_entry(file, rng))
        else:
            done.append(damage_file(file, rng))
    return "; ".join(done)


_STRANGERS = {
    "pytorch_model.bin": b"x",
    "model.safetensors": b"x",
    "model.safetensors.index.json": b"{}",
    "other.safetensors": b"",
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": b"x",
    "tokenizer_config.json": b"[]",
    "generation_config.json": b"[]",
    "config.json": b"[]",
    "custom_generate": b"x",
    "quantization_config.json": b"[]",
    "chat_template.jinja": b"{{",
}


def _add_stranger(folder: Path, rng: random.Random) -> str:
    name = rng.choice(sorted(_STRANGERS))
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(_STRANGERS[name])
    return f"{name} added"


def _logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(2, 14).view(2, 6)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return logits


def _compare(model: PreTrainedModel, folder: Path, undamaged: Path) -> None:
    """See that a model that was opened is the one that transformers opens."""
    got = {"logits": _logits(model)}
    try:
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = {"logits": _logits(plain)}
    except Exception as error:  # noqa: BLE001
        original = AutoModelForCausalLM.from_pretrained(undamaged, dtype=torch.float32)
        try:
            check_equal(got, {"logits": _logits(original)}, "a model")
        except Fault as fault:
            raise Fault(f"opened and differs, while transformers refuses it: {error}") from fault
        return
    check_equal(got, expected, "logits")
    mine, theirs = model.generation_config.to_dict(), plain.generation_config.to_dict()
    if repr(mine) != repr(theirs):
        changed = [key for key in mine.keys() | theirs.keys() if repr(mine.get(key)) != repr(theirs.get(key))]
        raise Fault(f"generation_config differs: {changed}")


__all__ = ["TINY", "Checkpoints", "damage_checkpoint"]
