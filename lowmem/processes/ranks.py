"""The processes of one run, as torchrun and accelerate start them: who this one is, and what all of them go by.

DDP averages the gradients of adapters; it is torch's own, wrapped around the model by accelerate. What is here comes
before it: each rank opens the model on its own device, within its part of the node's memory, by one plan.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Protocol, TypeVar, cast

import torch

from lowmem.errors import UnsupportedError
from offload import Budget, OffloadError

T = TypeVar("T")

AGREE_S = 1800.0
"""Longest wait for rank 0, which may be reading headers from a slow disk: torch's own default for process groups."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Where this process stands among those of a run."""

    rank: int = 0
    """Its number among all."""
    size: int = 1
    """How many there are."""
    local_rank: int = 0
    """Its number on this node."""
    local_size: int = 1
    """How many there are on this node."""
    node: int = 0
    """Number of this node."""
    launched: bool = False
    """Whether a launcher started it, be it alone: accelerate then takes a model on several devices for a mistake."""

    @property
    def are_several(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    @property
    def is_first(self) -> bool:
        """Whether this one writes checkpoints and reports."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"


def ranks(environ: Mapping[str, str] = os.environ) -> Ranks:
    """Read what the launcher says in the environment; one process alone if it says nothing.

    Raises:
        ValueError: It says only a part, or what cannot be.
    """
    size = _number(environ, "WORLD_SIZE", 1)
    if size <= 1:
        return Ranks(launched="LOCAL_RANK" in environ)
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE={size} without {', '.join(missing)}: start the script with torchrun --nproc_per_node N or "
            "accelerate launch --num_processes N, which set all of them, or unset WORLD_SIZE for one process"
        )
    local_size = _number(environ, "LOCAL_WORLD_SIZE", 1)
    found = Ranks(
        rank=_number(environ, "RANK", 0),
        size=size,
        local_rank=_number(environ, "LOCAL_RANK", 0),
        local_size=local_size,
        node=_number(environ, "GROUP_RANK", _number(environ, "RANK", 0) // max(1, local_size)),
        launched=True,
    )
    if not (0 <= found.rank < size and 0 <= found.local_rank < local_size <= size):
        raise ValueError(
            f"the environment says RANK={found.rank} of WORLD_SIZE={size} and LOCAL_RANK={found.local_rank} of "
            f"LOCAL_WORLD_SIZE={local_size}, which cannot be: let one launcher set all of them"
        )
    return found


def _number(environ: Mapping[str, str], name: str, otherwise: int) -> int:
    text = environ.get(name, "")
    if not text:
        return otherwise
    if not text.lstrip("-").isdecimal():
        raise ValueError(f"{name}={text!r} in the environment: expected a whole number; launchers set it")
    return int(text)


# What accelerate's launcher sets, and what the user asked it for.
_OTHER_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP (accelerate launch --use_fsdp)",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed (accelerate launch --use_deepspeed)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM (accelerate launch --use_megatron_lm)",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration (accelerate launch --use_parallelism_config)",
}


def refuse_for_ranks(found: Ranks, *, tuning: str, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse what several processes cannot do, before anything is opened.

    Raises:
        UnsupportedError: Another engine than DDP was asked for, or every weight is to be trained by several ranks.
    """
    for name, what in _OTHER_ENGINES.items():
        if environ.get(name, "").lower() in ("true", "1", "yes"):
            raise UnsupportedError(
                what,
                reason="it moves and shards the weights itself, which are streamed here",
                instead="torchrun --nproc_per_node N or accelerate launch --multi_gpu --num_processes N: DDP",
            )
    if found.are_several and tuning == "full":
        raise UnsupportedError(
            f'tuning="full" in {found.size} processes',
            reason="gradients of streamed weights go to their tier past DDP, so each rank would train another model",
            instead="one process (python SCRIPT), or adapters (peft_config), which several ranks train together",
        )


def refuse_several(what: str, *, reason: str, instead: str) -> None:
    """Refuse something that one process alone does.

    Raises:
        UnsupportedError: There are several.
    """
    found = ranks()
    if found.are_several:
        raise UnsupportedError(f"{what} in {found.size} processes", reason=reason, instead=instead)


def budget_of_rank(
    budget: Budget | None, device: torch.device, *, shared_bytes: int = 0, found: Ranks | None = None
) -> Budget:
    """One rank's bounds: the host's are given for the node, and measured for it, and its ranks share them.

    Args:
        budget: As it was given; device memory is each rank's own, on a CPU too.
        device: Where this rank computes.
        shared_bytes: Taken off at once: its part of what the node's ranks pass blocks on through.
        found: Of this process.
    """
    given, found = budget or Budget(), found or ranks()
    if found.local_size == 1:
        return given.measured(device)
    host_bytes = None if given.host_bytes is None else given.host_bytes // found.local_size
    own = Budget(device=given.device_bytes, host=host_bytes, disk=given.disk)
    full = own.measured(device, num_processes=found.local_size)
    # Buffers that transfers to a GPU pass through are the host's; on a CPU blocks are computed from them.
    sizes = {"device": full.device_bytes or 0, "host": full.host_bytes or 0}
    tier = "device" if device.type == "cpu" else "host"
    sizes[tier] = max(0, sizes[tier] - shared_bytes)
    return Budget(**{name: nbytes if nbytes >= 1024 else 0 for name, nbytes in sizes.items()}, disk=full.disk)


class KeyValueStore(Protocol):
    """What is needed of a store of torch.distributed."""

    def set(self, key: str, value: bytes) -> None:
        """Store a value."""

    def get(self, key: str) -> bytes:
        """A value that was stored."""

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """Wait until values are stored under all of these keys.

        Raises:
            RuntimeError: They were not in time.
        """


class Agreement:
    """What all ranks go by is rank 0's: it is passed on through the launcher's own key-value store.

    No process group is needed, which accelerate makes later by the user's options. Every rank asks the same questions
    in the same order.

    Args:
        store: Of torch.distributed, the same for all ranks.
        found: Of this process.
    """

    def __init__(self, store: KeyValueStore, found: Ranks) -> None:
        self.store, self._ranks = store, found
        self._num_asked = 0

    def key(self, what: str) -> str:
        """A key of the store that nothing else uses; the same on all ranks that ask equally often."""
        self._num_asked += 1
        return f"lowmem/{self._num_asked}/{what}"

    def on(self, what: str, make: Callable[[], T]) -> T:
        """Make something on every rank, and return what rank 0 made.

        Args:
            what: A word for it.
            make: Makes it; its errors are this rank's own, and rank 0's end the others too.

        Raises:
            OffloadError: Rank 0 could not make it, or did not say anything.
        """
        key = self.key(what)
        if self._ranks.is_first:
            try:
                made = make()
            except Exception as error:
                self.store.set(key, pickle.dumps((None, f"{type(error).__name__}: {error}")))
                raise
            self.store.set(key, pickle.dumps((made, None)))
            return made
        make()
        try:
            self.store.wait([key], timedelta(seconds=AGREE_S))
        except RuntimeError as error:
            raise OffloadError(
                f"{self._ranks}: rank 0 has not said its {what} for {AGREE_S:.0f} s; look at what it wrote, and make "
                "sure that every rank runs the same script"
            ) from error
        value, problem = pickle.loads(self.store.get(key))
        if problem is not None:
            raise OffloadError(f"{self._ranks}: rank 0 could not make the {what}: {problem}")
        return cast(T, value)


@cache
def agreement() -> Agreement:
    """This run's; kept as long as the process, because rank 0 may be the store's server."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=AGREE_S)))
    return Agreement(cast(KeyValueStore, store), ranks())


def agreed(what: str, make: Callable[[], T]) -> T:
    """Rank 0's, as `Agreement.on`; in one process what it makes."""
    return agreement().on(what, make) if ranks().are_several else make()
