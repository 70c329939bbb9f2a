"""Two ranks that train every weight on the simulated GPU: python -m tests.fakecuda.full_ranks_job FOLDER.

Each writes `NAME.rankR.pt` for each case of FOLDER/cases.json, and what the simulator saw: it is made before torch is
imported, in each process for itself. They have one GPU between them, which two would refuse in earnest.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

from tests.lowmem.processes.forked_ranks import fork_ranks


def run_rank(folder: Path, rank: int, port: int) -> None:
    """All cases, in a process of its own."""
    from tests.fakecuda import simulated_gpu

    simulated_gpu.install(lag_ms=1.0)
    simulated_gpu.watch()
    from tests.fakecuda.host_memory import watch_host_memory

    watch_host_memory()
    import torch

    from lowmem.models import checkpoint
    from tests.lowmem.processes.full_ranks_job import run

    checkpoint._gpu_of_rank = lambda *_: torch.device("cuda", 0)  # type: ignore[assignment]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    torch.set_num_threads(1)
    for case in json.loads((folder / "cases.json").read_text()):
        found = run(case, folder)
        torch.save({**found, "races": simulated_gpu.simulator.races()}, folder / f"{case['name']}.rank{rank}.pt")


if __name__ == "__main__":
    fork_ranks(2, partial(run_rank, Path(sys.argv[1])))
