"""The state of rules, parameter by parameter: in RAM, or as objects of a store that are committed with the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowmem.full.chunk_files import ChunkFiles
from lowmem.optim.rule import State
from offload import StagingBuffer, Transfer
from offload.object_layout import ObjectLayout, place


class RuleStates(Protocol):
    """Keeps each parameter's state from step to step."""

    def expect(self, key: str) -> None:
        """Have a parameter's state ready soon."""

    def lend(self, key: str) -> AbstractContextManager[State]:
        """A parameter's state, empty before its first step, to be changed in the ``with``."""

    def forget_expected(self) -> None:
        """Give back what was expected and not lent."""

    def drop(self, key: str) -> None:
        """Forget a parameter's state."""

    def clear(self) -> None:
        """Forget all."""

    def saved(self) -> dict[str, State]:
        """What belongs into a state dict: nothing where the states are saved with the weights."""

    @property
    def go_with_weights(self) -> bool:
        """Whether there are any that are saved with the weights."""


class MemoryStates:
    """In RAM."""

    def __init__(self) -> None:
        """Begin without any."""
        self._states: dict[str, State] = {}

    def expect(self, key: str) -> None:
        """Do nothing: everything is here."""

    def forget_expected(self) -> None:
        """Do nothing."""

    @contextmanager
    def lend(self, key: str) -> Iterator[State]:
        """See `RuleStates.lend`."""
        yield self._states.setdefault(key, {})

    def drop(self, key: str) -> None:
        """See `RuleStates.drop`."""
        self._states.pop(key, None)

    def clear(self) -> None:
        """See `RuleStates.clear`."""
        self._states.clear()

    def load(self, states: Mapping[str, State]) -> None:
        """Have copies of these states instead of all that there were."""
        self._states = {key: {name: value.clone() for name, value in state.items()} for key, state in states.items()}

    def saved(self) -> dict[str, State]:
        """See `RuleStates.saved`: all of them."""
        return {key: dict(state) for key, state in self._states.items()}

    @property
    def go_with_weights(self) -> bool:
        """See `RuleStates.go_with_weights`."""
        return False


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A state in memory, or on its way there."""

    layout: ObjectLayout
    buffer: StagingBuffer
    read: Transfer


class DiskStates:
    """On disk: read when they are expected, written when they have been changed, in the version of the step."""

    def __init__(self, files: ChunkFiles, *, begin: Callable[[], None]) -> None:
        """Take what the store holds.

        Args:
            files: The store.
            begin: Called before anything is changed in it.
        """
        self._files, self._begin = files, begin
        self._expected: dict[str, _Loaded] = {}
        self._write: Transfer | None = None

    def expect(self, key: str) -> None:
        """See `RuleStates.expect`."""
        if key not in self._expected and (found := self._load(key)) is not None:
            self._expected[key] = found

    def forget_expected(self) -> None:
        """See `RuleStates.forget_expected`. A buffer lives as long as a read fills it."""
        self._expected.clear()

    @contextmanager
    def lend(self, key: str) -> Iterator[State]:
        """See `RuleStates.lend`: views of one buffer, which is written at the end. After an error nothing is."""
        loaded = self._expected.pop(key, None) or self._load(key)
        state: State = {}
        if loaded is not None:
            loaded.read.wait()
            state = loaded.layout.views(loaded.buffer.tensor)
        yield state
        self._put(key, state, loaded)

    def drop(self, key: str) -> None:
        """See `RuleStates.drop`."""
        if self._files.has_state(key):
            self._begin()
            self._expected.pop(key, None)
            self._files.remove_state(key)

    def clear(self) -> None:
        """See `RuleStates.clear`."""
        for key in self._files.state_keys():
            self.drop(key)

    def saved(self) -> dict[str, State]:
        """See `RuleStates.saved`: nothing."""
        return {}

    @property
    def go_with_weights(self) -> bool:
        """See `RuleStates.go_with_weights`."""
        return bool(self._files.state_keys())

    def _load(self, key: str) -> _Loaded | None:
        if not self._files.has_state(key):
            return None
        layout = self._files.state_layout(key)
        buffer = StagingBuffer(layout.nbytes)
        return _Loaded(layout=layout, buffer=buffer, read=self._files.start_load_state(key, buffer.tensor))

    def _put(self, key: str, state: State, loaded: _Loaded | None) -> None:
        # One state's memory at a time waits for the disk.
        if self._write is not None:
            self._write.wait()
        self._begin()
        layout = place({name: (value.dtype, tuple(value.shape)) for name, value in state.items()})
        # Rules change tensors in place; whatever they have put in their stead is copied.
        buffer = loaded.buffer if loaded is not None and loaded.layout == layout else StagingBuffer(layout.nbytes)
        for name, view in layout.views(buffer.tensor).items():
            _copy_unless_same(state[name], view)
        self._write = self._files.start_save_state(key, layout, buffer.tensor)


def _copy_unless_same(value: Tensor, view: Tensor) -> None:
    if value.data_ptr() != view.data_ptr():
        view.copy_(value.detach().to(torch.device("cpu")))


__all__ = ["DiskStates", "MemoryStates", "RuleStates"]
