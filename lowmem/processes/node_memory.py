"""Memory that the ranks of a machine work in together, and the meetings at which they wait for each other.

Nobody owns it: it has no name, and goes with the last rank that has it. Meetings and sums over machines go through
process groups of its own, over gloo and the launcher's store; DDP's groups, which accelerate makes, are left alone.
"""

from __future__ import annotations

import os
import select
from contextlib import ExitStack, suppress
from datetime import timedelta
from typing import Protocol, cast

import torch
from torch import Tensor

from lowmem.processes.ranks import AGREE_S, Ranks, agreement, ranks
from offload import HandingOn, OffloadError, PeerLost, SharedArena, round_up

_LOST_WAIT_S = 2.0
"""Longest wait for a process to be gone, after a connection to it has closed: the kernel closes them as it ends."""

_HEAD_BYTES = 4096
"""Before the memory itself: the ranks' process numbers."""


class _Waitable(Protocol):
    def wait(self) -> bool: ...


class _Group(Protocol):
    """What is used of a process group of torch.distributed; its stubs leave this out."""

    def barrier(self) -> _Waitable: ...

    def allreduce(self, tensors: list[Tensor]) -> _Waitable: ...


class NodeMemory:
    """A piece of memory of this node, the same for all of its ranks.

    All ranks of a run make one, in the same order among their other questions. It holds zeros, and a page of it takes
    memory when a rank first writes there.

    Args:
        nbytes: Its size.

    Raises:
        OffloadError: The ranks of the node cannot share memory, or one says nothing.
    """

    def __init__(self, nbytes: int) -> None:
        self.ranks = ranks()
        found = self.ranks
        if found.size % found.local_size or found.rank != found.node * found.local_size + found.local_rank:
            raise OffloadError(
                f"{found} is number {found.local_rank} of {found.local_size} on machine {found.node}: every weight is "
                "trained by equally many ranks on each machine, numbered one machine after the other; start them with "
                "torchrun --nnodes M --nproc_per_node N"
            )
        self._owned = ExitStack()
        self._pids: dict[int, int] = {}
        try:
            self._arena = _share(_HEAD_BYTES + round_up(nbytes, _HEAD_BYTES), found)
        except OSError as error:
            raise OffloadError(
                f"{found}: the ranks of this machine cannot share memory ({error}); they have to run as one user, in "
                "one network namespace"
            ) from error
        self._owned.callback(self._arena.close)
        # Whoever could not come this far is heard of here; groups would wait for it.
        agreement().of_all("shared memory", None)
        num_nodes = found.size // found.local_size
        node = _group(f"meetings of node {found.node}", found.local_rank, found.local_size)
        self._node: _Group | None = node
        self._across: _Group | None = None
        if num_nodes > 1:
            self._across = _group(f"sums of local rank {found.local_rank}", found.node, num_nodes)
        self._watch()

    def view(self, start: int, nbytes: int) -> Tensor:
        """Some of its bytes: uint8 of shape (nbytes,).

        Raises:
            Closed: This was closed.
        """
        return self._arena.view(_HEAD_BYTES + start, nbytes)

    def meet(self) -> None:
        """Wait until every rank of the node is here: what each wrote before, all see afterwards.

        Raises:
            PeerLost: One has ended.
            OffloadError: One did not come.
        """
        assert self._node is not None, "it was closed"
        try:
            self._node.barrier().wait()
        except RuntimeError as error:
            raise self._explained(error) from error

    def sum_over_nodes(self, values: Tensor) -> None:
        """Add up what the ranks with this one's number on their machines have, in place; the same bits on each.

        Args:
            values: fp32 on the host, of the same shape on each; on one machine alone it stays as it is.

        Raises:
            OffloadError: A machine is gone, or did not come.
        """
        if self._across is None:
            return
        try:
            self._across.allreduce([values]).wait()
        except RuntimeError as error:
            raise self._explained(error) from error

    def lost(self, wait_s: float) -> PeerLost | None:
        """Which rank of this machine has ended, if one has.

        Args:
            wait_s: Longest wait for it.
        """
        watched = select.poll()
        for descriptor in self._pids:
            watched.register(descriptor, select.POLLIN)
        gone = watched.poll(round(wait_s * 1000)) if self._pids else []
        return PeerLost(f"process {self._pids[gone[0][0]]}") if gone else None

    def close(self) -> None:
        """Let go of it. May be called twice."""
        self._node = self._across = None
        self._pids.clear()
        self._owned.close()

    def _watch(self) -> None:
        """Have an eye on the other ranks of the node."""
        found = self.ranks
        pids = self._arena.view(0, 8 * found.local_size).view(torch.int64)
        pids[found.local_rank] = os.getpid()
        self.meet()
        for local_rank, pid in enumerate(pids.tolist()):
            if local_rank != found.local_rank:
                # In another namespace of processes it has another number, and its end is seen by its connection alone.
                with suppress(OSError):
                    descriptor = os.pidfd_open(pid)
                    self._owned.callback(os.close, descriptor)
                    self._pids[descriptor] = pid

    def _explained(self, error: RuntimeError) -> OffloadError:
        lost = self.lost(_LOST_WAIT_S)
        if lost is not None:
            return lost
        return OffloadError(
            f"{self.ranks}: the ranks did not come together ({error}); one has ended, or does something else: a step, "
            "and whatever changes weights, gradients or moments, is done by all ranks"
        )


def _share(nbytes: int, found: Ranks) -> SharedArena:
    """The memory: made by the first rank of the node, which hands it on to the others.

    Raises:
        OSError: It cannot be had.
    """
    made: list[tuple[SharedArena, HandingOn]] = []
    with ExitStack() as unless_shared:

        def make() -> tuple[str, str]:
            if found.local_rank:
                return "", ""
            try:
                arena = unless_shared.enter_context(SharedArena.create(nbytes))
                made.append((arena, unless_shared.enter_context(HandingOn(arena))))
            except OSError as error:
                return "", str(error)
            return made[0][1].address, ""

        first = found.rank - found.local_rank
        address, problem = agreement().on(f"memory of node {found.node}", make, rank=first)
        if problem:
            raise OSError(problem)
        for arena, offer in made:
            with offer:
                offer.to(found.local_size - 1, wait_s=AGREE_S)
            unless_shared.pop_all()
            return arena
        return SharedArena.received(address, nbytes)


def _group(what: str, rank: int, size: int) -> _Group:
    from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, Store

    store, prefix = agreement().room_for_group(what)
    made = ProcessGroupGloo(PrefixStore(prefix, cast(Store, store)), rank, size, timedelta(seconds=AGREE_S))
    return cast(_Group, made)
