"""The state of rules, parameter by parameter: in RAM, or as objects of a store that are committed with the step.

Single parameters of blocks on disk on their way through a rule: the next is read meanwhile, the last written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowmem.full.chunks import Chunk, ChunkFiles, parts
from lowmem.full.disk_gradients import DiskGradients
from lowmem.full.flat import ELEMENT_BYTES, ParamPlace
from lowmem.full.tier import Edit
from lowmem.optim.rule import State
from offload import ObjectLayout, StagingBuffer, Transfer, lay_out_object


class RuleStates(Protocol):
    """Keeps each parameter's state from step to step."""

    def expect(self, key: str) -> None:
        """Start reading a parameter's state, where it is not in memory anyway."""
        return

    def lend(self, key: str) -> AbstractContextManager[State]:
        """A parameter's state, empty before its first step, to be changed in the ``with``."""

    def forget_expected(self) -> None:
        """Give back what was expected and not lent."""
        return

    def drop(self, key: str) -> None:
        """Forget a parameter's state."""

    def clear(self) -> None:
        """Forget all."""

    def saved(self) -> dict[str, State]:
        """What belongs into a state dict: nothing where the states are saved with the weights."""

    @property
    def go_with_weights(self) -> bool:
        """Whether there are any that are saved with the weights."""


class MemoryStates(RuleStates):
    """In RAM."""

    def __init__(self) -> None:
        self._states: dict[str, State] = {}

    @contextmanager
    def lend(self, key: str) -> Iterator[State]:
        yield self._states.setdefault(key, {})

    def drop(self, key: str) -> None:
        self._states.pop(key, None)

    def clear(self) -> None:
        self._states.clear()

    def get(self, key: str) -> State | None:
        """A parameter's state; None before its first step."""
        return self._states.get(key)

    def load(self, states: Mapping[str, State]) -> None:
        """Take these states over, instead of all that there were."""
        self._states = dict(states)

    def saved(self) -> dict[str, State]:
        """See `RuleStates.saved`: all of them."""
        return {key: dict(state) for key, state in self._states.items()}

    @property
    def go_with_weights(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A state in memory, or on its way there."""

    layout: ObjectLayout
    buffer: StagingBuffer
    read: Transfer


class DiskStates(RuleStates):
    """On disk: read when they are expected, written when they have been changed, in the version of the step.

    Args:
        files: The store.
        begin: Called before anything is changed in it.
    """

    def __init__(self, files: ChunkFiles, *, begin: Callable[[], None]) -> None:
        self._files, self._begin = files, begin
        self._expected: dict[str, _Loaded] = {}
        self._write: Transfer | None = None

    def expect(self, key: str) -> None:
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
        if self._files.has_state(key):
            self._begin()
            self._expected.pop(key, None)
            self._files.remove_state(key)

    def clear(self) -> None:
        for key in self._files.state_keys():
            self.drop(key)

    def saved(self) -> dict[str, State]:
        """See `RuleStates.saved`: nothing."""
        return {}

    @property
    def go_with_weights(self) -> bool:
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
        layout = lay_out_object({name: (value.dtype, tuple(value.shape)) for name, value in state.items()})
        # Rules change tensors in place; whatever they have put in their stead is copied.
        buffer = loaded.buffer if loaded is not None and loaded.layout == layout else StagingBuffer(layout.nbytes)
        for name, view in layout.views(buffer.tensor).items():
            _copy_unless_same(state[name], view)
        self._write = self._files.start_save_state(key, layout, buffer.tensor)


def _copy_unless_same(value: Tensor, view: Tensor) -> None:
    if value.data_ptr() != view.data_ptr():
        view.copy_(value.detach().to(torch.device("cpu")))


class RuleStream:
    """Lends weight and gradient of one parameter after the other to a rule that changes the weight.

    In memory are the chunks of the parameter that is being changed, those of the next, which are read meanwhile, and
    those of the last until they are written. Chunks that two parameters share stay from one to the other.

    Args:
        files: Where weights lie.
        gradients: Where gradients lie.
        chunks: Of each unit.
        settle: Called before a unit is read; carries its pending update out.
        changed: Called when a unit's new weight has been written.
    """

    def __init__(
        self,
        files: ChunkFiles,
        gradients: DiskGradients,
        chunks: Sequence[tuple[Chunk, ...]],
        *,
        settle: Callable[[int], None],
        changed: Callable[[int], None],
    ) -> None:
        self._files, self._gradients, self._chunks = files, gradients, chunks
        self._settle, self._changed = settle, changed
        self._windows: dict[int, _Window] = {}

    def run(self, edit: Edit) -> None:
        """Run a rule on a parameter. After an error nothing is in memory, and what was not written is lost."""
        upcoming = edit.upcoming
        try:
            weight, gradient = self._bring(edit.unit, edit.place).lend(edit.place)
            # Only now is there room for the next: what the last one wrote from is given back first.
            self._finish_writes()
            if upcoming is not None:
                self._bring(*upcoming)
            for scale in edit.scales:
                gradient.mul_(scale)
            edit.run(weight, gradient)
            for number, other in self._windows.items():
                other.start_writes(keep=upcoming[1] if upcoming is not None and upcoming[0] == number else None)
        except BaseException:
            windows, self._windows = self._windows, {}
            for other in windows.values():
                other.abandon()
            raise

    def flush(self) -> None:
        """Write what is in memory."""
        for window in self._windows.values():
            window.start_writes(keep=None)
        self._finish_writes()

    def _bring(self, index: int, place: ParamPlace) -> _Window:
        """Start reading a parameter, where that has not been done."""
        window = self._windows.get(index)
        if window is None:
            self._settle(index)
            self._files.begin()
            window = self._windows[index] = _Window(self._files, self._gradients, self._chunks[index])
        self._gradients.check_unspent(index, place)
        window.start(place)
        return window

    def _finish_writes(self) -> None:
        """Wait for all writes, and release units of which nothing is in memory then."""
        for number, window in list(self._windows.items()):
            window.finish_writes()
            if window.is_empty:
                del self._windows[number]
                self._changed(number)


class _Window:
    """Some chunks of one unit, at their places in buffers for all of it, of which the rest takes no memory."""

    def __init__(self, files: ChunkFiles, gradients: DiskGradients, chunks: Sequence[Chunk]) -> None:
        self._files, self._gradients, self._chunks = files, gradients, chunks
        self._dtype = chunks[-1].weight_dtype
        self._weight = StagingBuffer(chunks[-1].stop * self._dtype.itemsize)
        self._gradient = StagingBuffer(chunks[-1].stop * ELEMENT_BYTES)
        self._weight_reads: dict[Chunk, list[Transfer]] = {}
        self._gradient_reads: dict[Chunk, Transfer] = {}
        self._writes: dict[Chunk, list[Transfer]] = {}
        self._dirty: set[Chunk] = set()
        if not files.has_weight(chunks[0].unit):
            # As the checkpoint has it, and written as a whole: from now on parts of it may differ.
            files.load_base(chunks[0].unit, self._weight.tensor.view(self._dtype))
            self._weight_reads = {chunk: [] for chunk in chunks}
            self._dirty.update(chunks)

    def start(self, place: ParamPlace) -> None:
        """Start reading a parameter's chunks, those that are not here."""
        for chunk, _, _ in parts(self._chunks, place):
            if chunk not in self._weight_reads:
                # It may have been here before.
                for write in self._writes.pop(chunk, []):
                    write.wait()
                weight = _at(self._weight, chunk, self._dtype)
                self._weight_reads[chunk] = self._files.start_load(chunk, weight=weight, moments=None)
            if chunk not in self._gradient_reads:
                self._gradient_reads[chunk] = self._gradients.start_read(chunk, _at(self._gradient, chunk))

    def lend(self, place: ParamPlace) -> tuple[Tensor, Tensor]:
        """Weight and gradient of a parameter that is being read: views of its shape."""
        for chunk, _, _ in parts(self._chunks, place):
            for read in (*self._weight_reads[chunk], self._gradient_reads[chunk]):
                read.wait()
            self._dirty.add(chunk)
        weight, gradient = (
            buffer.tensor.view(dtype)[place.start : place.stop].view(place.shape)
            for buffer, dtype in ((self._weight, self._dtype), (self._gradient, torch.float32))
        )
        return weight, gradient

    def start_writes(self, *, keep: ParamPlace | None) -> None:
        """Start writing what has changed, and release all gradients, but for the chunks of one parameter."""
        kept = set() if keep is None else {chunk for chunk, _, _ in parts(self._chunks, keep)}
        for chunk in [chunk for chunk in self._weight_reads if chunk not in kept]:
            for read in self._weight_reads.pop(chunk):
                read.wait()
            if chunk in self._dirty:
                self._dirty.discard(chunk)
                weight = _at(self._weight, chunk, self._dtype)
                self._writes[chunk] = self._files.start_save(chunk, weight=weight, moments=None)
        for chunk in [chunk for chunk in self._gradient_reads if chunk not in kept]:
            self._gradient_reads.pop(chunk).wait()
            _give_back(self._gradient, chunk)

    def finish_writes(self) -> None:
        """Wait for the writes, and give back what they were made from."""
        while self._writes:
            chunk, writes = self._writes.popitem()
            for write in writes:
                write.wait()
            _give_back(self._weight, chunk, self._dtype)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in memory or on its way there."""
        return not (self._weight_reads or self._gradient_reads or self._writes)

    def abandon(self) -> None:
        """Wait until nothing uses the buffers any more, whatever came of it."""
        reads = [read for started in self._weight_reads.values() for read in started]
        writes = [write for started in self._writes.values() for write in started]
        for transfer in (*reads, *self._gradient_reads.values(), *writes):
            transfer.outcome()


def _at(buffer: StagingBuffer, chunk: Chunk, dtype: torch.dtype = torch.float32) -> Tensor:
    return buffer.tensor[chunk.start * dtype.itemsize : chunk.stop * dtype.itemsize]


def _give_back(buffer: StagingBuffer, chunk: Chunk, dtype: torch.dtype = torch.float32) -> None:
    buffer.give_back(chunk.start * dtype.itemsize, chunk.stop * dtype.itemsize)
