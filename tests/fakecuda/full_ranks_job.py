"""Two ranks that train every weight on the simulated GPU: python -m tests.fakecuda.full_ranks_job FOLDER.

Each writes `NAME.rankR.pt` for each case of FOLDER/cases.json, and what the simulator saw: it is made before torch is
imported, in each process for itself. They have one GPU between them, which two would refuse in earnest.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from pathlib import Path


def run_rank(rank: int, port: int, folder: Path) -> None:
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


def main(folder: Path) -> None:
    """Fork both, and wait for them."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    pids = []
    for rank in range(2):
        pid = os.fork()
        if not pid:
            status = 1
            try:
                run_rank(rank, port, folder)
                status = 0
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        pids.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    assert not any(statuses), statuses


if __name__ == "__main__":
    main(Path(sys.argv[1]))
