"""Quantised checkpoints in the layouts that people have, and beside each one an ordinary one with the same values."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_type": "nf4", "compress_statistics": True},
    "nf4 plain": {"quant_type": "nf4", "compress_statistics": False},
    "nf4 in bf16": {"quant_type": "nf4", "compress_statistics": True, "quant_storage": torch.bfloat16},
    "fp4": {"quant_type": "fp4", "compress_statistics": True, "blocksize": 128},
    "int8": {},
}
"""Options of bitsandbytes by a name of ours."""

LINEAR = re.compile(
    r"\.(\w+_proj|c_attn|c_proj|c_fc|fc\w*|dense\w*|query_key_value|wq|wk|wv|o|w[123]|gate_up_proj|qkv_proj)\.weight$"
)
"""Stored names of linear layers' weights in the zoo, those of single experts among them."""


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All stored tensors."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dictionary
    return found


def write(folder: Path, base: Path, tensors: dict[str, Tensor], *, config: dict[str, object] | None = None) -> Path:
    """Write tensors with a base's other files; `config` is added to its config.json."""
    folder.mkdir(parents=True)
    for file in base.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            shutil.copy(file, folder)
    if config is not None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def quantised(
    base: Path, folder: Path, kind: str, *, picks: Callable[[str], object] = LINEAR.search, conv1d: bool = False
) -> tuple[Path, Path]:
    """Quantise a checkpoint's weights, as they are stored.

    Args:
        base: The ordinary checkpoint.
        folder: Where both go.
        kind: One of `KINDS`.
        picks: Says by stored name which matrices.
        conv1d: They are stored as (in, out); bitsandbytes has them as (out, in).

    Returns:
        The quantised checkpoint, and an ordinary one in fp32 that holds its values.
    """
    packed: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors_of(base).items():
        if tensor.dim() != 2 or not picks(name):
            packed[name] = plain[name] = tensor
            continue
        oriented = tensor.t().contiguous() if conv1d else tensor
        parts, value = pack(name, oriented, kind)
        packed |= parts
        plain[name] = value.t() if conv1d else value
    config = config_of(kind)
    return write(folder / "packed", base, packed, config=config), write(folder / "plain", base, plain)


def config_of(kind: str) -> dict[str, object]:
    """What config.json says."""
    settings: dict[str, object] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    if kind != "int8":
        settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        settings["bnb_4bit_quant_type"] = KINDS[kind]["quant_type"]
    return {"quantization_config": settings}


def pack(name: str, weight: Tensor, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """Stored tensors of a weight, and its values in fp32 by bitsandbytes' own functions."""
    if kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        stem = name.removesuffix("weight")
        parts = {name: codes, f"{stem}SCB": scales, f"{stem}weight_format": torch.tensor(0, dtype=torch.uint8)}
        return parts, functional.int8_vectorwise_dequant(codes, scales)
    packed, state = functional.quantize_4bit(weight, **KINDS[kind])
    parts = {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    # As one row: bitsandbytes 0.50 takes the wrong absmax on processors where a row does not end with a block.
    state.dtype, state.shape = torch.float32, torch.Size((1, weight.numel()))
    return parts, functional.dequantize_4bit(packed, state).view(weight.shape)
