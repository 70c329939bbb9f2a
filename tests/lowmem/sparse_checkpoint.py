"""Checkpoints of any size that take no room: true headers over a hole in the file."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig


def write_sparse(folder: Path, config: PretrainedConfig, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write config.json and a model.safetensors whose weights read as zeros.

    Args:
        folder: Where it goes.
        config: The model.
        dtype: Type the weights are stored in: bfloat16 or float32.

    Returns:
        `folder`.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config.save_pretrained(folder)
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    header: dict[str, object] = {}
    end = 0
    for name, value in model.state_dict().items():
        if name in tied:
            continue
        start, end = end, end + value.nbytes
        stored = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
        header[name] = {"dtype": stored, "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder
