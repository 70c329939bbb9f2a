"""Whole sequences held against the process: what a training step makes it grow by is what was planned, or less."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.zoo.architectures import build

ROOT = Path(__file__).resolve().parents[2]
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 8192,
}
FEW_KEYS = {"num_key_value_heads": 2}
WIDE_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128}
WINDOW = {"sliding_window": 512}
CASES = [
    # As README names it: 256 wide, 8 heads, one sequence.
    *(("llama", {}, 1, tokens) for tokens in (512, 2048, 4096, 8192)),
    ("llama", FEW_KEYS, 4, 512),
    ("llama", WIDE_HEADS, 1, 4096),
    ("qwen3", FEW_KEYS, 1, 2048),
    ("gemma2", {**FEW_KEYS, **WINDOW, "query_pre_attn_scalar": 32}, 1, 2048),
    ("gemma3_text", {**FEW_KEYS, **WINDOW}, 1, 4096),
    ("gpt_oss", {**FEW_KEYS, **WINDOW}, 1, 2048),
]


def said_by(*arguments: str, told: Mapping[str, str] | None = None) -> str:
    """The last line of a Python process of its own, which must end well.

    Args:
        arguments: Python's.
        told: Of its environment, besides this one's.
    """
    found = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(told or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark is read from /proc")
@pytest.mark.parametrize(
    ("name", "changes", "num_sequences", "seq_len"),
    CASES,
    ids=[f"{name}-{len(changes)}-{batch}x{tokens}" for name, changes, batch, tokens in CASES],
)
def test_a_step_of_whole_sequences_takes_what_was_planned(
    tmp_path: Path, name: str, changes: dict[str, Any], num_sequences: int, seq_len: int
) -> None:
    folder = build(name, tmp_path / "model", changes=SIZES | changes)
    report = json.loads(said_by("-m", "tests.lowmem.peak_job", str(folder), str(num_sequences), str(seq_len)))
    assert report["chunk_tokens"] is None
    # A few MiB are the interpreter's and the libraries' own.
    assert report["grown"] <= 1.03 * report["planned"] + (4 << 20), report
    assert report["planned"] <= 2.5 * report["grown"], report


_ADAPTED = """
import sys
import torch
from peft import LoraConfig, get_peft_model
import lowmem
from benchmarks.process_memory import PeakMeter

torch.set_num_threads(1)
lora = LoraConfig(r=8, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM")
model = lowmem.from_pretrained(sys.argv[1], budget=lowmem.Budget(device="48MiB", host=0), device="cpu")
with PeakMeter() as meter:
    get_peft_model(model, lora)
print(meter.growth_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark is read from /proc")
@pytest.mark.parametrize(
    "told",
    [{}, {"MALLOC_MMAP_THRESHOLD_": str(32 << 20)}, {"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={32 << 20}"}],
    ids=["default", "told", "tuned"],
)
def test_making_dora_adapters_takes_no_more_for_many_blocks_than_for_one(tmp_path: Path, told: dict[str, str]) -> None:
    sizes = SIZES | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 10, "head_dim": 64}
    folder = build("llama", tmp_path / "model", changes=sizes)
    # The adapters are 4 MiB; PEFT makes four tensors of 2.75 MiB of a weight, and all weights are 122 MiB.
    assert int(said_by("-c", _ADAPTED, str(folder), told=told)) < 48 << 20


_HEAP = """
import ctypes
import os
import sys
import torch
from peft import LoraConfig, get_peft_model
import lowmem

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", *"abc", "hblkhd", *"defgh")]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
torch.set_num_threads(1)
lora = LoraConfig(r=8, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM")
model = lowmem.from_pretrained(sys.argv[1], budget=lowmem.Budget(device="64MiB", host=0), device="cpu")
before_bytes = libc.mallinfo2().arena
model = get_peft_model(model, lora)
grown_bytes = libc.mallinfo2().arena - before_bytes

def mapped_bytes():
    before = libc.mallinfo2().hblkhd
    pieces = [torch.empty(1 << 20, dtype=torch.uint8) for _ in range(64)]
    return libc.mallinfo2().hblkhd - before

kept, small = [mapped_bytes()], torch.arange(8)[None]
model(small, labels=small)
print(grown_bytes, kept[0], mapped_bytes())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs the GNU C library")
@pytest.mark.parametrize("told", [{}, {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}], ids=["default", "told"])
def test_making_dora_adapters_leaves_no_long_heap_of_freed_pieces(tmp_path: Path, told: dict[str, str]) -> None:
    sizes = SIZES | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 10, "head_dim": 64}
    folder = build("llama", tmp_path / "model", changes=sizes)
    grown, before, in_training = map(int, said_by("-c", _HEAP, str(folder), told=told).split())
    # A step's temporaries would lie all over it. The adapters are 4 MiB.
    assert grown < 16 << 20
    # New pieces of 1 MiB have mappings of their own until the first forward, and lie on the heap from then on; where
    # the environment says when, it is obeyed.
    assert before >= 60 << 20
    assert in_training >= 60 << 20 if told else in_training < 8 << 20
