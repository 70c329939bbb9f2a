"""Memory without a name goes to those who ask for it at an address, and to nobody afterwards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from offload import HandingOn, SharedArena

NBYTES = 1 << 16


def test_all_who_ask_have_the_same_memory() -> None:
    with SharedArena.create(NBYTES) as own, HandingOn(own) as offer, ThreadPoolExecutor(1) as thread:
        handed = thread.submit(offer.to, 2, wait_s=30.0)
        others = [SharedArena.received(offer.address, NBYTES) for _ in range(2)]
        handed.result()
        own.view(0, 4).copy_(torch.arange(4, dtype=torch.uint8))
        others[0].view(NBYTES - 1, 1).fill_(7)
        for one in others:
            assert one.view(0, 4).tolist() == [0, 1, 2, 3]
            assert one.view(NBYTES - 1, 1).item() == 7
            one.close()
            one.close()


def test_who_does_not_come_is_waited_for_no_longer_than_was_said() -> None:
    with SharedArena.create(NBYTES) as own, HandingOn(own) as offer, pytest.raises(TimeoutError):
        offer.to(1, wait_s=0.05)


def test_nothing_is_handed_on_after_it_was_closed() -> None:
    with SharedArena.create(NBYTES) as own:
        offer = HandingOn(own)
        offer.close()
        offer.close()
        with pytest.raises(OSError, match="refused"):
            SharedArena.received(offer.address, NBYTES)
