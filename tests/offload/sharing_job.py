"""A process that visits blocks in step with others: python -m tests.offload.sharing_job FOLDER HOW DEVICE PLAN.

FOLDER has what `blocks_in` wrote there. HOW: "serve", "alone", or a server's address. DEVICE: "cpu", "simulated" (a
GPU) or "real". PLAN: how many blocks stay, in the device's memory on a CPU and in the host's before a GPU.

It prints its server's address, takes a step for each line that it gets, every byte compared, and says "done" to it. At
the line "end" it prints what the kernel and the simulated GPU say of it, as JSON, and leaves at the next line.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.offload.stored_blocks import StoredBlocks

NUM_BLOCKS = 9
BLOCK_BYTES = 6_000_000
NUM_PASSED = 2
# A step's visits, and those of the next one that are fetched ahead.
STEP = (*range(NUM_BLOCKS), *reversed(range(NUM_BLOCKS)))


def blocks_in(folder: Path, *, are_there: bool = False) -> StoredBlocks:
    """Blocks that are large beside whatever else a process of ours takes, aligned: what is not would be copied."""
    from tests.offload.stored_blocks import StoredBlocks

    return StoredBlocks(folder, NUM_BLOCKS, block_bytes=BLOCK_BYTES, most_gap=0, are_there=are_there)


def main(folder: Path, how: str, device: str, num_kept: int) -> None:
    """Serve or be served, until there is no line more."""
    import torch

    from offload import BlockServer, FileIO, Scheduler, SharedReader, Trace, lay_out, open_device
    from tests.offload.kernel_counts import mapped_bytes, private_bytes, storage_bytes

    torch.set_num_threads(1)
    stored = blocks_in(folder, are_there=True)
    layouts = [lay_out(block) for block in stored.blocks]
    on_gpu = device != "cpu"
    with ExitStack() as stack:
        reader: Any = stack.enter_context(FileIO())
        options: dict[str, Any] = {}
        address = how
        if how == "serve":
            # Longer than a busy machine keeps a process from running: what each has done decides who is waited for.
            address = stack.enter_context(BlockServer(layouts, reader=reader, patience_s=(60.0, 120.0))).address
        if how != "alone":
            reader = stack.enter_context(SharedReader(address, layouts, reader=reader, pin=on_gpu))
            options = {"keep": reader.keep, "visited": reader.visited}
        plan = stored.plan(
            ring=2, resident=0 if on_gpu else num_kept, cached=num_kept if on_gpu else 0, is_host=not on_gpu
        )
        opened = open_device(torch.device("cuda" if on_gpu else "cpu"))
        scheduler = stack.enter_context(
            Scheduler(stored.blocks, plan=plan, read=reader.read, device=opened, trace=Trace(), **options)
        )
        print(address, flush=True)
        private, counted = private_bytes(), storage_bytes()
        for line in sys.stdin:
            if line == "end\n":
                break
            scheduler.expect((*STEP, *STEP[:NUM_PASSED]))
            for block in STEP:
                with scheduler.resident(block) as tensors:
                    stored.check(block, tensors)
            print("done", flush=True)
            if line == "first\n":
                counted = storage_bytes()
        found = {
            "mapped": mapped_bytes("lowmem-blocks"),
            "private_bytes": private_bytes() - private,
            "storage_bytes": storage_bytes() - counted,
            "bytes_read": scheduler.counters.bytes_read,
            "placements": [placement.name for placement in plan.placements],
        }
        if device == "simulated":
            from tests.fakecuda import simulated_gpu

            found["copied_bytes"] = simulated_gpu.simulator.copied_bytes().get("H2D", 0)
            found["races"] = list(simulated_gpu.simulator.races())
        print(json.dumps(found), flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    if sys.argv[3] == "simulated":
        # Before torch is imported.
        from tests.fakecuda import simulated_gpu
        from tests.fakecuda.host_memory import watch_reads_and_writes

        simulated_gpu.install(lag_ms=1.0)
        watch_reads_and_writes()
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
