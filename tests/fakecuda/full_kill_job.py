"""A run of full tuning on the GPU that is killed: python -m tests.fakecuda.full_kill_job FOLDER STATE simulated|real.

State is on disk. It prints a line after each step. The simulated GPU is made before torch is imported.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(folder: Path, state: Path) -> None:
    """Train until killed, or to the end."""
    import torch

    import lowmem
    from tests.fakecuda import test_full

    torch.set_num_threads(1)  # as in the tests: sums of more threads have another order
    model = test_full.on_gpu(folder, state)
    optimizer = lowmem.optim.AdamW(test_full.groups(model), lr=3e-3)
    for step in range(test_full.NUM_STEPS):
        test_full.train(model, optimizer, parts=1, steps=range(step, step + 1))
        print(step + 1, flush=True)


if __name__ == "__main__":
    if sys.argv[3] == "simulated":
        from tests.fakecuda import simulated_gpu

        simulated_gpu.install(lag_ms=1.0)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
