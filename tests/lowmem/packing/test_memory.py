"""How much memory packing takes: pieces of a weight, whatever its size and however its experts are stored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.zoo.architectures import build

MIB = 1 << 20
PROGRAM = """
import json, sys, warnings
from pathlib import Path
import lowmem, torch
from lowmem.host_memory import give_back_freed

def megabytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024

# Each further thread has an arena of the C library's, and temporaries.
torch.set_num_threads(1)
small, large, output = map(Path, sys.argv[1:4])
lowmem.pack(small, quantization=sys.argv[4], output=output / "small-packed", device="cpu")
give_back_freed()
before = megabytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
lowmem.pack(large, quantization=sys.argv[4], output=output / "large-packed", device="cpu")
print(json.dumps(megabytes("VmHWM") - before))
"""


@pytest.mark.parametrize("quantization", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["qwen3_moe", pytest.param("llama", marks=pytest.mark.slow)])
def test_packing_holds_pieces_of_a_weight(name: str, quantization: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "num_hidden_layers": 1, "vocab_size": 1024}
    if name == "qwen3_moe":
        # Two stacks of 48 and of 24 MiB, stored expert by expert.
        sizes |= {"num_experts": 64, "moe_intermediate_size": 768, "mlp_only_layers": []}
    else:
        sizes |= {"intermediate_size": 65536}
    small = build(name, tmp_path / "small", dtype=torch.bfloat16, changes={"num_hidden_layers": 1})
    large = build(name, tmp_path / "large", dtype=torch.bfloat16, changes=sizes)
    num_bytes = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert num_bytes > 70 * MIB
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(small), str(large), str(tmp_path), quantization],
        # What is freed is gone: the heap keeps more or less of it from run to run, by where small things lie.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Of bitsandbytes' temporaries for two million values, and a tile: 39 to 48 MiB of a weight, 10 to 12 of experts.
    assert json.loads(done.stdout.splitlines()[-1]) < 60
