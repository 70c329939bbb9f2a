"""Damaged checkpoints: opened as plain transformers opens them, or refused in one sentence."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
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

    limit_s = 60.0
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
        _compare(model, folder, scratch)
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


def _compare(model: PreTrainedModel, folder: Path, scratch: Path) -> None:
    """See that a model that was opened is the one that transformers opens."""
    try:
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except Exception:  # noqa: BLE001
        # It minds what says nothing of the weights, such as the index's metadata.
        plain = AutoModelForCausalLM.from_pretrained(_in_one_file(folder, scratch / "whole"), dtype=torch.float32)
    try:
        got = {"logits": _logits(model)}
    except Exception as error:
        with contextlib.suppress(type(error)):
            _logits(plain)
            raise Fault(f"a forward fails that is none in transformers: {error}") from error
        return
    check_equal(got, {"logits": _logits(plain)}, "logits")
    mine, theirs = model.generation_config.to_dict(), plain.generation_config.to_dict()
    if repr(mine) != repr(theirs):
        changed = [key for key in mine.keys() | theirs.keys() if repr(mine.get(key)) != repr(theirs.get(key))]
        raise Fault(f"generation_config differs: {changed}")


def _in_one_file(folder: Path, target: Path) -> Path:
    """The same configuration, and the tensors that the index names; a stranger beside them is none of the model's."""
    target.mkdir()
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    index = folder / "model.safetensors.index.json"
    named = json.loads(index.read_bytes())["weight_map"] if index.is_file() else {}
    shards = [folder / file for file in sorted({*named.values()} or {"model.safetensors"})]
    tensors = {
        name: value
        for shard in shards
        for name, value in load_file(shard).items()
        if named.get(name, shard.name) == shard.name
    }
    save_file(tensors, target / "model.safetensors")
    return target


__all__ = ["TINY", "Checkpoints", "damage_checkpoint"]
