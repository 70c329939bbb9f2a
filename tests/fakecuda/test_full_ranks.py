"""Every weight, trained by two ranks whose blocks a GPU computes: what one process trains with the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lowmem.processes.full_ranks_job import run
from tests.zoo.architectures import build

ROOT = Path(__file__).resolve().parents[2]
OURS = {"lr": 3e-3, "weight_decay": 0.1, "eps": 1e-3}
CASES: list[dict[str, Any]] = [
    {"name": "host", "kind": "blocks", "model": "llama", "device": "cuda", "optimizer": OURS},
    {"name": "shared-update", "kind": "blocks", "model": "llama", "device": "cuda", "optimizer": OURS, "share": 0.4},
    {"name": "experts", "kind": "blocks", "model": "mixtral", "device": "cuda", "optimizer": OURS},
]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_name() != "Simulated GPU", reason="simulated")
def test_two_ranks_train_what_one_process_trains(tmp_path: Path) -> None:
    for arch in ("llama", "mixtral"):
        build(arch, tmp_path / arch)
    (tmp_path / "cases.json").write_text(json.dumps(CASES))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.fakecuda.full_ranks_job", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    for case in CASES:
        found = [torch.load(tmp_path / f"{case['name']}.rank{rank}.pt", weights_only=True) for rank in range(2)]
        alone = run({**case, "name": "alone"}, tmp_path)
        for one in found:
            assert not one["races"]
            assert one["norms"] == found[0]["norms"] == pytest.approx(alone["norms"], rel=1e-6)
            for name, value in alone["weights"].items():
                assert torch.equal(one["weights"][name], found[0]["weights"][name]), name
                torch.testing.assert_close(one["weights"][name], value, rtol=1e-6, atol=1e-6, msg=name)
