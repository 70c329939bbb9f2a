"""Blocks whose bytes change between visits: no visit ever sees an old version, whatever was being fetched."""

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload import BlockLayout, BlockSpec, Placement, PlacementPlan, Scheduler, TensorSpec, Trace, Transfer
from offload.device import CpuDevice, Device
from tests.offload.stored_blocks import DelayedDevice

NUM_BLOCKS, NUMEL = 5, 1024
DEVICES: dict[str, Callable[[], Device]] = {
    "in place": CpuDevice,
    "separate slots": lambda: CpuDevice(separate_slots=True),
    "delayed copies": lambda: DelayedDevice(delay_s=0.001),
}


class Versions:
    """Reads blocks whose every element is the version that was current when the read began; reads take a while."""

    def __init__(self) -> None:
        self.current = [0] * NUM_BLOCKS
        self._rng = random.Random(0)

    def read(self, layout: BlockLayout, into: Tensor) -> Transfer:
        value = self.current[int(layout.name)]
        transfer = Transfer(layout.name, nbytes=into.numel(), num_pieces=1, memory=into)
        delay_s = self._rng.choice((0, 0.001, 0.004))

        def finish() -> None:
            transfer.begin_piece()
            time.sleep(delay_s)
            into.view(torch.float32).fill_(value)
            transfer.finish_piece()

        threading.Thread(target=finish).start()
        return transfer


def _scheduler(versions: Versions, device: Device) -> Scheduler:
    specs = [
        BlockSpec(
            name=str(block),
            tensors=(
                TensorSpec(
                    name="weight",
                    dtype=torch.float32,
                    shape=(NUMEL,),
                    file=Path("nowhere"),
                    offset_bytes=0,
                    nbytes=4 * NUMEL,
                ),
            ),
        )
        for block in range(NUM_BLOCKS)
    ]
    plan = PlacementPlan(
        placements=(Placement.STREAMED,) * NUM_BLOCKS,
        block_bytes=(4 * NUMEL,) * NUM_BLOCKS,
        device_is_host=device.is_host,
        num_staging=3,
        num_slots=0 if device.is_host else 3,
        num_passes=2,
    )
    return Scheduler(specs, plan=plan, read=versions.read, device=device, trace=Trace(), poison=False)


@pytest.mark.parametrize("kind", DEVICES)
def test_a_visit_sees_the_version_that_was_current_at_its_invalidation(kind: str) -> None:
    versions, rng = Versions(), random.Random(1)
    with _scheduler(versions, DEVICES[kind]()) as scheduler:
        for _ in range(30):
            for order in (range(NUM_BLOCKS), reversed(range(NUM_BLOCKS))):
                visits = list(order)
                scheduler.expect((*visits, *reversed(visits)))
                for block in visits:
                    with scheduler.resident(block) as tensors:
                        assert (tensors["weight"] == versions.current[block]).all()
                    time.sleep(rng.choice((0, 0, 0.002)))
            for block in rng.sample(range(NUM_BLOCKS), k=3):
                versions.current[block] += 1
                scheduler.invalidate((block,))


def test_a_block_that_is_being_visited_cannot_change() -> None:
    with _scheduler(Versions(), CpuDevice()) as scheduler:
        with scheduler.resident(2), pytest.raises(RuntimeError, match="block 2 changes while a visit"):
            scheduler.invalidate((2,))
        scheduler.invalidate((2,))
