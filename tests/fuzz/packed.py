"""Damaged packed checkpoints: opened and run, or refused in one sentence before any weight is read."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

import lowmem
from tests.fuzz.checkpoints import TINY, damage_checkpoint
from tests.fuzz.damage import copy_folder
from tests.fuzz.outcomes import check_refusal
from tests.fuzz.workers import Ending, note
from tests.lowmem.quantization.checkpoints import KINDS, quantised
from tests.lowmem.quantization.public_layouts import write_layout
from tests.zoo.architectures import build

_BASES: tuple[tuple[str, str, dict[str, object]], ...] = (
    ("llama", "fp8", TINY),
    ("llama", "fp8 per row", TINY),
    ("llama", "gptq by activation", TINY),
    ("llama", "awq", TINY),
    ("llama", "nf4", TINY),
    ("llama", "int8", TINY),
    ("qwen3_moe", "mxfp8", TINY | {"moe_intermediate_size": 8, "num_experts": 4}),
    ("gpt_oss", "mxfp4", {"vocab_size": 128, "intermediate_size": 64}),
)
_SETTINGS = (
    *("quant_method", "bits", "group_size", "weight_block_size", "checkpoint_format", "version", "zero_point", "fmt"),
    *("config_groups", "format", "scale_fmt", "expert_dtype", "bnb_4bit_quant_type", "load_in_4bit", "desc_act"),
)
_VALUES = (
    None,
    0,
    -1,
    3,
    4,
    8,
    1 << 70,
    "",
    "nf4",
    "gptq",
    "awq",
    "fp8",
    "gemm",
    True,
    [],
    [1],
    [0, 0],
    [1, 32],
    {},
    {"a": 1},
)
_BUDGET = lowmem.Budget(device="16MiB", host="16MiB")


class PackedCheckpoints:
    """`from_pretrained` and a forward on damaged folders of packed weights."""

    limit_s = 60.0
    limit_bytes = 1 << 30
    cases_per_worker = 250

    def prepare(self, folder: Path) -> None:
        for number, (name, layout, changes) in enumerate(_BASES):
            plain = build(name, folder / f"plain-{number}", changes=changes)
            write = quantised if layout in KINDS else write_layout
            write(plain, folder / str(number), layout)[0].rename(folder / f"packed-{number}")

    def run(self, seed: int, *, prepared: Path, scratch: Path) -> Ending:
        rng = random.Random(seed)
        number = rng.randrange(len(_BASES))
        folder = copy_folder(prepared / f"packed-{number}", scratch / "model")
        damage = _change_settings if rng.random() < 0.4 else damage_checkpoint
        what = note(scratch, f"{_BASES[number][1]}: {damage(folder, rng)}")
        try:
            model = lowmem.from_pretrained(folder, budget=_BUDGET, device="cpu")
        except Exception as error:  # noqa: BLE001
            check_refusal(error, folder)
            return Ending("refused", what)
        # Damaged bits may be any numbers; what is asked for is that they are read as some.
        with torch.no_grad():
            model.eval()(input_ids=torch.arange(2, 14).view(2, 6), use_cache=False)
        return Ending("ran", what)


def _change_settings(folder: Path, rng: random.Random) -> str:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    name, value = rng.choice(_SETTINGS), rng.choice(_VALUES)
    config["quantization_config"][name] = value
    if rng.random() < 0.1:
        config["quantization_config"] = value
    path.write_text(json.dumps(config))
    return f"{name}={value!r}"
