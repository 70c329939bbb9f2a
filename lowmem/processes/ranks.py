"""The processes of one run, as torchrun and accelerate start them: who this one is, and what all of them go by.

DDP averages the gradients of adapters; it is torch's own, wrapped around the model by accelerate. What is here comes
before it: each rank opens the model on its own device, within its part of the node's memory, by one plan.
"""

from __future__ import annotations

import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from socket import gethostname
from typing import Protocol, TypeVar, cast

import torch

from lowmem.errors import UnsupportedError
from offload import Budget, BudgetError, OffloadError, format_bytes

T = TypeVar("T")

AGREE_S = 1800.0
"""Longest wait for a rank, which may be reading headers from a slow disk: torch's own default for process groups."""

SAY_S = 60.0
"""A wait that is longer is said."""

_POLL_S = (0.002, 0.25)
"""Between two looks at the store: at first, and in the end."""


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


def refuse_engines(environ: Mapping[str, str] = os.environ) -> None:
    """Refuse other engines than DDP, before anything is opened.

    Raises:
        UnsupportedError: The launcher was told to use one.
    """
    for name, what in _OTHER_ENGINES.items():
        if environ.get(name, "").lower() in ("true", "1", "yes"):
            raise UnsupportedError(
                what,
                reason="it moves and shards the weights itself, which are streamed here",
                instead="torchrun --nproc_per_node N or accelerate launch --multi_gpu --num_processes N: DDP",
            )


def refuse_full(
    found: Ranks, *, masters: torch.dtype | str | None = None, tier: str = "host", optimizer: str | None = None
) -> None:
    """Refuse what several processes cannot do to every weight.

    Args:
        found: The processes.
        masters: Type of the master weights; None for fp32.
        tier: Where the state is.
        optimizer: Name of one of `lowmem.optim` that takes or rounds whole parameters.

    Raises:
        UnsupportedError: There are several, and they cannot do that exactly.
    """
    if not found.are_several:
        return
    what = f'tuning="full" in {found.size} processes'
    if masters not in (None, torch.float32, "float32", "fp32"):
        raise UnsupportedError(
            f"{what} and masters={masters}",
            reason="they are rounded parameter by parameter, and each process updates a part of every block",
            instead="masters='fp32', or one process",
        )
    if tier == "disk":
        raise UnsupportedError(
            f"{what} and state on disk",
            reason="a folder of state is one process's to write",
            instead="a budget with room for the state in RAM, once for each machine; or one process",
        )
    if optimizer is not None:
        raise UnsupportedError(
            f"{what} and {optimizer}",
            reason="each updates a part of every block, and this takes whole matrices, or rounds whole parameters",
            instead="lowmem.optim.AdamW with fp32 moments, torch.optim.AdamW, or one process",
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


def with_shared(error: BudgetError, passing_bytes: int) -> BudgetError:
    """What is said of a budget that is too small for a rank, with the one to give: `budget_of_rank` takes some off.

    Args:
        error: For what was left.
        passing_bytes: Taken off, as its `shared_bytes`.
    """
    needed_bytes = error.needed_bytes + passing_bytes
    return BudgetError(
        f"{error}. That is without {format_bytes(passing_bytes)}, taken off each rank's budget for what the "
        f"{ranks().local_size} ranks of this machine pass on to each other: with them it is "
        f"{format_bytes(needed_bytes)} ({needed_bytes} bytes)",
        needed_bytes=needed_bytes,
    )


class KeyValueStore(Protocol):
    """What is needed of a store of torch.distributed."""

    def set(self, key: str, value: bytes) -> None:
        """Store a value."""

    def get(self, key: str) -> bytes:
        """A value that was stored."""

    def check(self, keys: list[str]) -> bool:
        """Whether values are stored under all of these keys."""


class Agreement:
    """What ranks tell each other while they open a model: passed on through the launcher's own key-value store.

    No process group is needed, which accelerate makes later by the user's options. Every rank opens the same models in
    the same order, and asks the same questions meanwhile.

    Args:
        store: Of torch.distributed, the same for all ranks.
        found: Of this process.
        attempt: How often the launcher has started the ranks again: its store may be the one they had before.
    """

    def __init__(self, store: KeyValueStore, found: Ranks, *, attempt: str = "0") -> None:
        self._store, self._ranks, self._attempt = store, found, attempt
        self._num_openings = self._num_asked = 0

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Around the opening of one model: an error of any rank ends the others too, which would wait for it."""
        self._num_openings += 1
        self._num_asked = 0
        try:
            yield
        except Exception as error:
            # Whoever hears of it fails as well, and must not say that it was the first. The store ends with rank 0.
            with suppress(RuntimeError):
                if not self._store.check([self._failed_key]):
                    told = (self._ranks.rank, f"{type(error).__name__}: {error}")
                    self._store.set(self._failed_key, pickle.dumps(told))
            raise

    def on(self, what: str, make: Callable[[], T], *, rank: int = 0) -> T:
        """Make something on every rank, and return what one of them made.

        Args:
            what: A word for it.
            make: Makes it; its errors are this rank's own.
            rank: The one that decides.

        Raises:
            OffloadError: That one or another could not open its model, or did not say anything.
        """
        key, made = self._key(what), make()
        if self._ranks.rank == rank:
            self._store.set(key, pickle.dumps(made))
            return made
        self._wait({rank: key}, what)
        return cast(T, pickle.loads(self._store.get(key)))

    def of_all(self, what: str, own: T) -> list[T]:
        """What each rank says, in the order of their numbers.

        Args:
            what: A word for it.
            own: What this one says.

        Raises:
            OffloadError: One of them could not open its model, or did not say anything.
        """
        stem = self._key(what)
        self._store.set(f"{stem}/{self._ranks.rank}", pickle.dumps(own))
        keys = {rank: f"{stem}/{rank}" for rank in range(self._ranks.size)}
        self._wait(keys, what)
        return [pickle.loads(self._store.get(key)) for key in keys.values()]

    def room_for_group(self, what: str) -> tuple[KeyValueStore, str]:
        """The store, and a beginning of keys that nothing else uses, for a process group that all ranks make."""
        return self._store, self._key(what)

    def _key(self, what: str) -> str:
        """A key that nothing else uses; the same on all ranks that have asked equally often."""
        self._num_asked += 1
        return f"lowmem/{self._attempt}/{self._num_openings}/{self._num_asked}/{what}"

    @property
    def _failed_key(self) -> str:
        return f"lowmem/{self._attempt}/{self._num_openings}/failed"

    def _wait(self, keys: Mapping[int, str], what: str) -> None:
        """Wait until ranks have said something.

        Args:
            keys: Under which key each rank says it.
            what: A word for it.

        Raises:
            OffloadError: A rank could not open its model, or they did not in time.
        """
        start_s, pause_s, was_said = time.monotonic(), _POLL_S[0], False
        while not self._has(*keys.values()):
            if self._has(self._failed_key) and not self._has(*keys.values()):
                rank, problem = pickle.loads(self._store.get(self._failed_key))
                raise OffloadError(f"{self._ranks}: rank {rank} could not open the model: {problem}")
            waited_s = time.monotonic() - start_s
            if waited_s > AGREE_S:
                raise OffloadError(
                    f"{self._ranks}: {self._silent(keys)} not said the {what} for {AGREE_S:.0f} s; look at what was "
                    "written there, and make sure that every rank runs the same script"
                )
            if waited_s > SAY_S and not was_said:
                was_said = True
                warnings.warn(
                    f"{self._ranks}: {self._silent(keys)} not said the {what} for {SAY_S:.0f} s; every rank has to "
                    "open each model, in the same order",
                    stacklevel=2,
                )
            time.sleep(pause_s)
            pause_s = min(_POLL_S[1], 2 * pause_s)

    def _has(self, *keys: str) -> bool:
        try:
            return self._store.check(list(keys))
        except RuntimeError as error:
            raise OffloadError(
                f"{self._ranks}: the process that keeps what ranks say (the launcher, or rank 0) has ended; "
                "look at what was written there"
            ) from error

    def _silent(self, keys: Mapping[int, str]) -> str:
        """Who has said nothing, and the verb to it."""
        return _numbered([rank for rank, key in keys.items() if not self._has(key)])


@cache
def agreement() -> Agreement:
    """This run's; kept as long as the process, because rank 0 may be the store's server."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=AGREE_S)))
    return Agreement(cast(KeyValueStore, store), ranks(), attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def opening_together() -> Iterator[None]:
    """Around the opening of a model, which all ranks go through together: all of them, or none, have it in the end.

    Raises:
        OffloadError: Another rank could not open it.
    """
    if not ranks().are_several:
        yield
        return
    with agreement().opening():
        yield
        agreement().of_all("opened model", None)


def agreed(what: str, make: Callable[[], T]) -> T:
    """Rank 0's, as `Agreement.on`; in one process what it makes."""
    return agreement().on(what, make) if ranks().are_several else make()


def refuse_another(folder: Path, fingerprint: str, *, settings: Mapping[str, object]) -> None:
    """Refuse ranks that open something else than rank 0 does, or the same with other settings; all ranks call it.

    Args:
        folder: The checkpoint that this rank opens.
        fingerprint: Of its configuration and files.
        settings: What this rank was told of the model, by the names of arguments: what DDP, and the plan that rank 0
            makes for all, take for the same everywhere.

    Raises:
        ValueError: On all ranks: one of them differs from rank 0's.
    """
    given = {name: str(value) for name, value in settings.items()}
    told = agreement().of_all("checkpoint", (gethostname(), str(folder), fingerprint, given))
    others = [rank for rank, (_, _, theirs, _) in enumerate(told) if theirs != told[0][2]]
    if others:
        (machine, where, *_), (first_machine, first, *_) = told[others[0]], told[0]
        raise ValueError(
            f"{ranks()}: the files of {where} on {machine}, which {_numbered(others)} opened, are not copies "
            f"of those of {first} on {first_machine}, which rank 0 has opened: config.json, names, sizes, "
            "headers or values differ; give all ranks copies of the same checkpoint"
        )
    for name in given:
        others = [rank for rank, (*_, theirs) in enumerate(told) if theirs[name] != told[0][3][name]]
        if others:
            raise ValueError(
                f"{ranks()}: {_numbered(others)} opened {told[others[0]][1]} with {name}={told[others[0]][3][name]}, "
                f"and rank 0 with {name}={told[0][3][name]}; give all ranks the same"
            )


def _numbered(numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers))
    return f"ranks {listed} have" if len(numbers) > 1 else f"rank {listed} has"
