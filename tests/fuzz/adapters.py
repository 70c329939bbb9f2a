"""Damaged adapters: merged as PEFT merges them, or refused in one sentence before anything is written."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import lowmem
from tests.fuzz.checkpoints import TINY
from tests.fuzz.damage import ODD_VALUES, copy_folder, damage_entry, damage_file, damage_json, edit_json
from tests.fuzz.outcomes import check_equal, check_refusal
from tests.fuzz.workers import Ending, Fault, note
from tests.zoo.architectures import build

_TARGETS = ["q_proj", "down_proj"]
_KINDS: dict[str, dict[str, object]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "saved modules": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "trained tokens": {"trainable_token_indices": [1, 5]},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 3}, "use_rslora": True},
}
_SECRET = b"a file of somebody else"


class Adapters:
    """`lowmem.merge` with damaged adapters, and with links planted in either folder."""

    limit_s = 60.0
    limit_bytes = 1 << 30
    cases_per_worker = 250

    def prepare(self, folder: Path) -> None:
        base = build("llama", folder / "model", changes=TINY, shard_bytes=6000)
        for name, options in _KINDS.items():
            torch.manual_seed(len(name))
            config = LoraConfig(r=2, target_modules=_TARGETS, task_type="CAUSAL_LM", **options)
            adapted = get_peft_model(_resident(base), config)
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn(parameter.shape))
            adapted.save_pretrained(folder / name)
            lowmem.merge(base, adapter=folder / name, output=folder / f"{name} merged")
        (folder / "secret").write_bytes(_SECRET)

    def run(self, seed: int, *, prepared: Path, scratch: Path) -> Ending:
        rng = random.Random(seed)
        kind = rng.choice([*_KINDS, "lora", "lora"])
        model, adapter = scratch / "model", copy_folder(prepared / kind, scratch / "adapter")
        copy_folder(prepared / "model", model)
        output = scratch / "merged"
        what = note(scratch, f"{kind}: {_damage(model, adapter, output, prepared / 'secret', rng)}")
        before = _state(model), _state(adapter)
        try:
            lowmem.merge(model, adapter=adapter, output=output)
        except Exception as error:
            if left := [entry.name for entry in scratch.iterdir() if "unfinished" in entry.name]:
                raise Fault(f"a refused merge leaves a folder behind: {left}") from error
            check_refusal(error, scratch)
            return Ending("refused", what)
        finally:
            if (_state(model), _state(adapter)) != before:
                raise Fault("a merge changed its input")
        for file in output.rglob("*"):
            if file.is_file() and file.read_bytes() == _SECRET:
                raise Fault(f"a merge copied through a link: {file.name}")
        _compare(output, model, adapter, prepared / f"{kind} merged")
        return Ending("equal", what)


def _damage(model: Path, adapter: Path, output: Path, secret: Path, rng: random.Random) -> str:
    done = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        kind = rng.choice(("config", "config", "weights", "weights", "field", "link", "output", "stranger", "entry"))
        config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
        if kind == "config" and config.is_file():
            done.append(damage_json(config, rng))
        elif kind == "weights" and weights.is_file():
            done.append(damage_file(weights, rng))
        elif kind == "field" and config.is_file():
            key, value = rng.choice(_FIELDS), rng.choice(ODD_VALUES)
            edit_json(config, {key: value})
            done.append(f"{key} is {repr(value)[:60]}")
        elif kind == "link":
            name = rng.choice(("LICENSE", "tokenizer.json", "chat_template.jinja", "notes.txt", "modeling_x.py"))
            link = rng.choice((model, adapter)) / name
            link.symlink_to(secret) if not link.is_symlink() else None
            done.append(f"{link.parent.name}/{name} is a link that leaves the folder")
        elif kind == "output" and not output.exists() and not output.is_symlink():
            done.append(_odd_output(output, rng))
        elif kind == "stranger":
            name = rng.choice(("adapter_model.bin", "tokenizer_config.json", "added_tokens.json", "auto_map.py"))
            (adapter / name).write_bytes(rng.choice((b"", b"[]", b"x", b"\x80\x04.")))
            done.append(f"{name} added")
        elif kind == "entry":
            file = rng.choice(sorted(adapter.iterdir()))
            if file.is_file() and not file.is_symlink():
                done.append(damage_entry(file, rng))
    return "; ".join(done)


_FIELDS = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "peft_type",
    "task_type",
    "bias",
    "fan_in_fan_out",
    "layers_to_transform",
    "layers_pattern",
    "layer_replication",
    "rank_pattern",
    "alpha_pattern",
    "megatron_config",
    "trainable_token_indices",
    "loftq_config",
    "eva_config",
    "corda_config",
    "use_dora",
    "use_rslora",
    "use_qalora",
    "lora_bias",
    "init_lora_weights",
    "target_parameters",
    "auto_mapping",
    "base_model_name_or_path",
    "peft_version",
    "runtime_config",
    "unknown_field",
)


def _odd_output(output: Path, rng: random.Random) -> str:
    kind = rng.choice(("a file", "a link to a folder", "a dangling link", "a full folder", "an empty folder"))
    if kind == "a file":
        output.touch()
    elif kind == "a link to a folder":
        (output.parent / "elsewhere").mkdir()
        output.symlink_to(output.parent / "elsewhere")
    elif kind == "a dangling link":
        output.symlink_to(output.parent / "nowhere")
    else:
        output.mkdir()
        if kind == "a full folder":
            (output / "x").touch()
    return f"the output is {kind}"


def _state(folder: Path) -> list[tuple[str, int, int]]:
    statuses = [(entry.name, entry.lstat()) for entry in sorted(folder.iterdir())]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in statuses]


def _resident(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _weights(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def _compare(output: Path, model: Path, adapter: Path, undamaged: Path) -> None:
    """See that a merged checkpoint is what PEFT makes of the same two folders."""
    got = _weights(output)
    if (model / "config.json").exists():
        # As transformers and PEFT name and load them.
        for file in adapter.iterdir():
            # What is read through a link belongs to the adapter; the rest only gets in PEFT's way.
            if file.is_symlink() and file.name not in ("adapter_config.json", "adapter_model.safetensors"):
                file.unlink()
        try:
            merged = PeftModel.from_pretrained(_resident(model), adapter).merge_and_unload()
        except Exception as error:  # noqa: BLE001
            try:
                check_equal(got, _weights(undamaged), "a merge")
            except Fault as fault:
                raise Fault(f"merged and differs, while PEFT refuses it: {error}") from fault
            return
    shutil.rmtree(output)
    check_equal(got, dict(merged.state_dict()), "merged weights")


__all__ = ["Adapters"]
