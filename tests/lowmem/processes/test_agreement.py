"""All ranks go by what rank 0 made; those of a node share its blocks, or say why they cannot."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch.distributed import HashStore, TCPStore

import lowmem
from lowmem.headers.description import describing
from lowmem.planning.job import Job
from lowmem.planning.plan import Plan
from lowmem.planning.planner import plan_alone, plan_step
from lowmem.planning.read_model import read_shapes
from lowmem.planning.step_time import assumed_rates
from lowmem.processes import node as node_room
from lowmem.processes import ranks as ranks_room
from lowmem.processes.node import NodeBlocks, share_blocks, shared_bytes
from lowmem.processes.ranks import Agreement, Ranks
from offload import NUM_SLOTS, Budget, FileIO, OffloadError, Placement, SharedReader, lay_out
from tests.offload.stored_blocks import StoredBlocks
from tests.zoo.architectures import build

FIRST = Ranks(rank=0, size=2, local_rank=0, local_size=2, launched=True)
SECOND = Ranks(rank=1, size=2, local_rank=1, local_size=2, launched=True)


@pytest.fixture
def both() -> tuple[Agreement, Agreement]:
    store = HashStore()
    return Agreement(store, FIRST), Agreement(store, SECOND)


def test_what_rank_0_made_is_everybodys(both: tuple[Agreement, Agreement]) -> None:
    first, second = both
    for number in range(3):
        assert first.on("number", lambda: number) == number  # noqa: B023
        assert second.on("number", lambda: -1) == number


def test_a_plan_arrives_as_it_was(both: tuple[Agreement, Agreement], tmp_path: Path) -> None:
    plan = lowmem.plan(build("llama", tmp_path), seq_len=16, device="cpu", budget=lowmem.Budget(device="64MiB", host=0))
    both[0].on("plan", lambda: plan)
    arrived: Plan = both[1].on("plan", lambda: plan)
    assert arrived == plan
    assert str(arrived) == str(plan)


def test_what_rank_0_could_not_make_ends_the_others_with_its_reason(both: tuple[Agreement, Agreement]) -> None:
    def refuse() -> NoReturn:
        raise lowmem.UnsupportedError("x=1", reason="it is not", instead="x=0")

    with pytest.raises(lowmem.UnsupportedError), both[0].opening():
        both[0].on("plan", refuse)
    says = r"rank 1 of 2: rank 0 could not open the model: UnsupportedError: x=1 is not"
    with pytest.raises(OffloadError, match=says), both[1].opening():
        both[1].on("plan", lambda: 1)


def test_every_rank_ends_with_the_reason_of_the_one_that_could_not(both: tuple[Agreement, Agreement]) -> None:
    first, second = both
    with pytest.raises(FileNotFoundError), second.opening():
        raise FileNotFoundError("/data/model: there is no such folder")
    says = r"rank 0 of 2: rank 1 could not open the model: FileNotFoundError: /data/model: there is no such folder"
    with pytest.raises(OffloadError, match=says), first.opening():  # noqa: PT012
        assert first.on("plan", lambda: 3) == 3
        first.of_all("opened model", None)


def test_what_all_ranks_cannot_do_each_says_for_itself(both: tuple[Agreement, Agreement]) -> None:
    for one in both:
        with pytest.raises(ValueError, match=r"^too small$"), one.opening():  # noqa: PT012
            one.on("plan", lambda: 1)
            raise ValueError("too small")


def test_an_opening_that_failed_is_forgotten_by_the_next(both: tuple[Agreement, Agreement]) -> None:
    first, second = both
    with pytest.raises(ValueError, match="once"), second.opening():
        raise ValueError("once")
    with pytest.raises(OffloadError, match="ValueError: once"), first.opening():
        first.of_all("opened model", None)
    with first.opening(), second.opening(), ThreadPoolExecutor(2) as threads:
        told = list(threads.map(lambda one: one.of_all("number", one.on("plan", lambda: 7)), both))
    assert told == [[7, 7], [7, 7]]


def test_what_ranks_said_before_the_launcher_started_them_again_is_not_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = HashStore()
    Agreement(store, FIRST, attempt="0").on("plan", lambda: 1)
    monkeypatch.setattr(ranks_room, "AGREE_S", 0.2)
    with pytest.raises(OffloadError, match="rank 0 has not said the plan"):
        Agreement(store, SECOND, attempt="1").on("plan", lambda: 1)


def test_a_long_wait_says_for_whom(both: tuple[Agreement, Agreement], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_room, "AGREE_S", 0.5)
    monkeypatch.setattr(ranks_room, "SAY_S", 0.1)
    says = "rank 0 of 2: rank 1 has not said the opened model"
    with pytest.warns(UserWarning, match=says), pytest.raises(OffloadError, match=says):
        both[0].of_all("opened model", None)


def test_when_the_launcher_is_gone_a_rank_says_so() -> None:
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("localhost", server.port, is_master=False, wait_for_workers=False)
    del server
    with pytest.raises(OffloadError, match=r"the launcher, or rank 0\) has ended"), Agreement(client, SECOND).opening():
        Agreement(client, SECOND).on("plan", lambda: 1)


def test_a_rank_0_that_says_nothing_is_not_waited_for_without_end(
    both: tuple[Agreement, Agreement], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_room, "AGREE_S", 0.2)
    with pytest.raises(OffloadError, match="rank 0 has not said the plan"):
        both[1].on("plan", lambda: 1)


@pytest.fixture
def stored(tmp_path: Path) -> StoredBlocks:
    return StoredBlocks(tmp_path, 5)


@pytest.fixture
def share(
    stored: StoredBlocks, both: tuple[Agreement, Agreement], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., NodeBlocks]]:
    with ExitStack() as stack:

        def sharing(rank: int, files: dict[Path, object] | None = None) -> NodeBlocks:
            monkeypatch.setattr(node_room, "ranks", lambda: (FIRST, SECOND)[rank])
            monkeypatch.setattr(node_room, "agreement", lambda: both[rank])
            reader = stack.enter_context(FileIO())
            made = share_blocks(stored.blocks, reader=reader, files=files or {}, pin=False)
            stack.callback(made.close)
            return made

        yield sharing


def test_ranks_with_the_same_files_share_and_say_so(share: Callable[..., NodeBlocks], stored: StoredBlocks) -> None:
    found = [share(0), share(1)]
    largest = max(lay_out(block).buffer_bytes for block in stored.blocks)
    for one in found:
        assert isinstance(one.reader, SharedReader)
        assert one.is_shared
        assert not one.note
        layout = lay_out(stored.blocks[2])
        place = one.keep(layout)
        assert place is not None
        one.reader.read(layout, place.tensor).wait()
        assert one.lost(0.0) is None
    assert sum(shared_bytes(stored.blocks, rank) for rank in (FIRST, SECOND)) >= NUM_SLOTS * largest
    assert shared_bytes(stored.blocks, Ranks()) == 0


def test_a_rank_with_other_files_reads_for_itself_and_says_so(
    share: Callable[..., NodeBlocks], stored: StoredBlocks
) -> None:
    share(0, {Path("a"): 1})
    other = share(1, {Path("a"): 2})
    assert isinstance(other.reader, FileIO)
    assert "rank 1 of 2 reads and keeps its blocks for itself" in other.note
    assert "other files" in other.note
    assert other.keep(lay_out(stored.blocks[0])) is None
    assert other.lost(0.0) is None


def test_without_shared_memory_each_reads_for_itself(
    share: Callable[..., NodeBlocks], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> NoReturn:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuse)
    for rank in range(2):
        found = share(rank)
        assert isinstance(found.reader, FileIO)
        assert "no shared memory" in found.note


def test_one_process_is_left_alone(stored: StoredBlocks) -> None:
    with FileIO() as reader:
        found = share_blocks(stored.blocks, reader=reader, files={}, pin=torch.cuda.is_available())
        assert found.reader is reader
        assert not found.note


def test_ranks_that_share_cache_in_the_host_memory_of_all(tmp_path: Path) -> None:
    folder = build("llama", tmp_path, changes={"num_hidden_layers": 8})
    device = torch.device("cpu")
    with describing(folder, device=device, dtype=None) as opened:
        shapes = read_shapes(opened)
    sizes = [block.buffer_bytes for block in shapes.blocks]
    staging = 2 * max(sizes)
    rates = assumed_rates("cuda")
    job = Job(seq_len=16, device="cuda")
    least = plan_step(shapes, job, budget=Budget(device=0, host=0), rates=rates).smallest_device_bytes
    budget = Budget(device=least, host=2 * max(sizes) + staging)
    num_cached: list[int] = []
    for num_sharing in (1, 2, 4):
        made = plan_step(shapes, replace(job, num_sharing=num_sharing), budget=budget, rates=rates)
        assert made.fits
        num_cached.append(made.placements.count(Placement.HOST))
        passing = made.bytes_of("staging buffers", tier="host")
        assert num_cached[-1] * min(sizes) + num_sharing * passing <= num_sharing * made.host_budget_bytes
        alone = plan_alone(made, shapes)
        assert alone.job.num_sharing == 1
        assert alone.placements.count(Placement.HOST) == num_cached[0]
    assert 0 < num_cached[0] < num_cached[1] <= num_cached[2] == len(sizes)
