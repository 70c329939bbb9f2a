"""How a unit's flat buffers are cut for the disk: chunks, as objects of a store that belong to steps.

Blocks whose weights change, as the scheduler sees them: sizes, and reads that bring the newest weight.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from traceback import walk_stack

import torch
from torch import Tensor

from lowmem.full.flat import (
    ELEMENT_BYTES,
    PAGE_ELEMENTS,
    FlatMoment,
    ParamPlace,
    UnitLayout,
    lay_out_moments,
)
from lowmem.full.tier import WEIGHT
from lowmem.planning.limits import state_chunk_bytes
from offload import (
    BlockLayout,
    BlockSpec,
    JsonObject,
    ObjectLayout,
    StagingBuffer,
    Store,
    StoreIo,
    TensorSpec,
    Trace,
    Transfer,
    ceil_div,
    lay_out_object,
)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A run of a unit's elements that is read, updated and written at once."""

    unit: int
    """Number of the unit."""
    number: int
    """Number within the unit."""
    name: str
    """Name of its objects, without what they hold."""
    start: int
    """First element of the unit's buffers."""
    stop: int
    """One past the last; whole pages."""
    num_wide: int
    """Elements, the first ones, whose moments may be in 8 bits."""
    weight_dtype: torch.dtype
    """Type of its weight."""

    @property
    def numel(self) -> int:
        """Elements."""
        return self.stop - self.start

    @property
    def weight_name(self) -> str:
        """The object that holds its weight."""
        return f"{self.name} weight"

    @property
    def moments_name(self) -> str:
        """The object that holds its moments."""
        return f"{self.name} moments"

    @property
    def weight_layout(self) -> ObjectLayout:
        """One flat tensor."""
        return lay_out_object({WEIGHT: (self.weight_dtype, (self.numel,))})

    def moments_layout(self, state_dtype: str) -> ObjectLayout:
        """Both moments, one after the other, stored in this way."""
        return lay_out_moments(state_dtype, self.numel, num_wide=self.num_wide)

    def moment(self, name: str, state_dtype: str, buffer: Tensor) -> FlatMoment:
        """One moment in a buffer of this layout."""
        return FlatMoment(name, self.moments_layout(state_dtype).views(buffer))


def chunk_numel(layouts: Sequence[UnitLayout]) -> int:
    """Elements of the largest chunk."""
    widest_bytes = max(layout.numel for layout in layouts) * ELEMENT_BYTES
    return ceil_div(state_chunk_bytes(widest_bytes), PAGE_ELEMENTS * ELEMENT_BYTES) * PAGE_ELEMENTS


def cut(layouts: Sequence[UnitLayout]) -> list[tuple[Chunk, ...]]:
    """The chunks of each unit, in order."""
    size = chunk_numel(layouts)
    return [
        tuple(
            # Numbered with leading zeros: in the order of their names they are in the order of the buffer.
            Chunk(
                unit=unit,
                number=number,
                name=f"{layout.name} {number:06d}",
                start=start,
                stop=min(start + size, layout.numel),
                num_wide=max(0, min(size, layout.num_wide - start, layout.numel - start)),
                weight_dtype=layout.weight_dtype,
            )
            for number, start in enumerate(range(0, layout.numel, size))
        )
        for unit, layout in enumerate(layouts)
    ]


def parts(chunks: Sequence[Chunk], place: ParamPlace) -> Iterator[tuple[Chunk, slice, slice]]:
    """The chunks that hold a parameter, where it is in each, and which part of it."""
    for chunk in chunks:
        start, stop = max(chunk.start, place.start), min(chunk.stop, place.stop)
        if start < stop:
            yield (
                chunk,
                slice(start - chunk.start, stop - chunk.start),
                slice(start - place.start, stop - place.start),
            )


def reads_newest(
    layouts: Sequence[UnitLayout], fetch: Callable[[int, Tensor], Transfer]
) -> Callable[[BlockLayout, Tensor], Transfer]:
    """What starts bringing a block's newest weight into a buffer for the scheduler, which knows it by its name.

    Args:
        layouts: Of the blocks.
        fetch: The same, by the block's number.
    """
    indices = {layout.name: index for index, layout in enumerate(layouts)}
    return lambda layout, into: fetch(indices[layout.name], into)


def block_spec(layout: UnitLayout, folder: Path) -> BlockSpec:
    """What the scheduler needs to know of a block: its size. It reads through the tier, not from this file."""
    shape = (layout.numel,)
    weight = TensorSpec(
        name=WEIGHT,
        dtype=layout.weight_dtype,
        shape=shape,
        file=folder / "newest" / layout.name,
        offset_bytes=0,
        nbytes=layout.weight_bytes,
    )
    return BlockSpec(name=layout.name, tensors=(weight,))


_STATE = " state"


class ChunkFiles:
    """The chunks of all units in one folder.

    What an earlier run has committed there is left alone until this run commits its first step, which replaces all of
    it, unless `adopt` goes on from it.

    Args:
        folder: The store's folder.
        fingerprint: What the state belongs to.
        chunks: Of each unit.
        load_base: Fills a flat buffer with a block's weight as the checkpoint has it.
        trace: Where transfers are recorded.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fingerprint: str,
        chunks: Sequence[tuple[Chunk, ...]],
        load_base: Callable[[int, Tensor], None],
        trace: Trace,
    ) -> None:
        self._chunks = chunks
        self.state_dtype = "fp32"
        """How moments are stored."""
        self.load_base = load_base
        """Fills a flat buffer with a block's weight as the checkpoint has it, by the block's number."""
        self._folder, self._fingerprint, self._io = folder, fingerprint, StoreIo(trace=trace)
        self._holder = f"the model opened by {calling_line()}"
        self._store = self._open()
        self._have: set[str] = set()
        self._is_fresh, self._in_step = True, False
        self._buffer: StagingBuffer | None = None
        self._in_buffer: str | None = None

    @property
    def step(self) -> int:
        """Number of the step whose state is committed, of whatever run; 0 before the first."""
        return self._store.step

    @property
    def record(self) -> JsonObject:
        """What belongs to the committed state."""
        return JsonObject(
            file=self._folder / "store.json",
            remedy="start again in another folder, or resume from a checkpoint",
            prefix="extra.",
            members=dict(self._store.extra),
        )

    def has_weight(self, unit: int) -> bool:
        """Whether a unit's weight was ever written."""
        return all(chunk.weight_name in self._have for chunk in self._chunks[unit])

    def start_load(self, chunk: Chunk, *, weight: Tensor | None, moments: Tensor | None) -> list[Transfer]:
        """Start reading a chunk's newest weight and moments, unless None; what there is not yet becomes zero."""
        found = []
        for name, into in ((chunk.weight_name, weight), (chunk.moments_name, moments)):
            if into is None:
                continue
            if name in self._have:
                found.append(self._store.load(name, into))
            else:
                into.zero_()
        return found

    def start_save(self, chunk: Chunk, *, weight: Tensor | None, moments: Tensor | None) -> list[Transfer]:
        """Start writing a chunk's new weight and moments; either may be None, and then stays."""
        parts: tuple[tuple[str, ObjectLayout, Tensor | None], ...] = (
            (chunk.weight_name, chunk.weight_layout, weight),
            (chunk.moments_name, chunk.moments_layout(self.state_dtype), moments),
        )
        writes = []
        for name, layout, data in parts:
            if data is not None:
                writes.append(self._store.write(name, layout, data))
                self._have.add(name)
                self._in_buffer = None
        return writes

    def has_state(self, key: str) -> bool:
        """Whether a parameter's rule has state in the store."""
        return _state_name(key) in self._have

    def state_keys(self) -> list[str]:
        """Parameters whose rules have state in the store."""
        return [name.removesuffix(_STATE) for name in self._have if name.endswith(_STATE)]

    def state_layout(self, key: str) -> ObjectLayout:
        """What a rule's state consists of."""
        return self._store.layout(_state_name(key))

    def start_load_state(self, key: str, into: Tensor) -> Transfer:
        """Start reading a rule's state."""
        return self._store.load(_state_name(key), into)

    def start_save_state(self, key: str, layout: ObjectLayout, data: Tensor) -> Transfer:
        """Start writing a rule's state."""
        self._have.add(_state_name(key))
        return self._store.write(_state_name(key), layout, data)

    def remove_state(self, key: str) -> None:
        """Forget a rule's state."""
        self._have.discard(_state_name(key))
        self._store.remove(_state_name(key))

    def read_weight(self, unit: int, into: Tensor) -> Transfer:
        """Start reading a unit's newest weight, which must be there, into a uint8 buffer."""
        return self._store.load([chunk.weight_name for chunk in self._chunks[unit]], into)

    def read_chunk(self, chunk: Chunk, field: str) -> Tensor:
        """A chunk's weight, flat, or moment in fp32: zeros where there is none, else valid until the next call."""
        is_weight = field == WEIGHT
        name, layout = (
            (chunk.weight_name, chunk.weight_layout)
            if is_weight
            else (chunk.moments_name, chunk.moments_layout(self.state_dtype))
        )
        if self._buffer is None or self._buffer.nbytes < layout.nbytes:
            self._buffer, self._in_buffer = StagingBuffer(layout.nbytes), None
        if name not in self._have:
            return torch.zeros(chunk.numel, dtype=chunk.weight_dtype if is_weight else torch.float32)
        if self._in_buffer != name:
            self._store.load(name, self._buffer.tensor).wait()
            self._in_buffer = name
        if is_weight:
            return layout.views(self._buffer.tensor)[WEIGHT]
        return chunk.moment(field, self.state_dtype, self._buffer.tensor).values(chunk.numel)

    def drop_moments(self, state_dtype: str) -> None:
        """Have no moments any more, and store those to come in another way."""
        self.state_dtype, self._in_buffer = state_dtype, None
        for name in [chunk.moments_name for unit in self._chunks for chunk in unit]:
            if name in self._have:
                self.begin()
                self._have.discard(name)
                self._store.remove(name)

    def begin(self) -> None:
        """Begin a step unless one is under way."""
        if self._in_step:
            return
        self._store.begin_step()
        self._in_step = True
        if self._is_fresh:
            # What this run does not write must not be there once it has committed.
            for name in self._store.names():
                self._store.remove(name)

    def commit(self, step: int, record: dict[str, object]) -> None:
        """Make everything written since `begin` the state; waits for the disk."""
        if self._in_step:
            self._store.commit(step=step, extra=record)
            self._in_step = self._is_fresh = False

    def adopt(self) -> None:
        """Go on from the committed state; what this run has written since is forgotten.

        Raises:
            SourceError: Nothing was committed.
        """
        self._store.verify()
        self._store.abort_step()
        self._go_on()

    def _go_on(self) -> None:
        self._in_step = self._is_fresh = False
        self._have, self._in_buffer = set(self._store.names()), None

    def save_to(self, folder: Path) -> None:
        """Make a folder a copy of the committed state, by links where possible."""
        self._store.save_to(folder)

    def restore(self, folder: Path) -> None:
        """Take over the state of a folder that `save_to` made; if it is refused, what is committed is the state."""
        self._store.abort_step()
        self._in_step = False
        self._have, self._in_buffer = set() if self._is_fresh else set(self._store.names()), None
        self._store.close()
        try:
            Store.restore(folder, self._folder)
        finally:
            self._store = self._open()
        # What `Store.restore` has read just now need not be read again.
        self._go_on()

    def close(self) -> None:
        """Stop transfers and let others have the folder. May be called twice."""
        self._store.close()

    def _open(self) -> Store:
        if Store.exists(self._folder):
            # `adopt` verifies the state; a run that begins anew replaces it.
            return Store.open(
                self._folder, fingerprint=self._fingerprint, io=self._io, verify=False, holder=self._holder
            )
        return Store.create(self._folder, fingerprint=self._fingerprint, io=self._io, holder=self._holder)


_OURS = ("lowmem", "offload")
_MAX_LINE = 100
"""Characters of a line that is quoted."""


def calling_line() -> str:
    """The line of the user's that all this is done for: its number, file and text."""
    caller, was_ours = None, False
    for frame, number in walk_stack(None):
        is_ours = str(frame.f_globals.get("__name__")).partition(".")[0] in _OURS
        if was_ours and not is_ours:
            caller = (frame.f_code.co_filename, number, frame.f_globals)
        was_ours = is_ours
    if caller is None:
        return "a thread of its own"
    file, number, names = caller
    text = shorten(linecache.getline(file, number, names), _MAX_LINE, placeholder=" ...")
    return f"line {number} of {file}" + (f": {text}" if text else "")


def _state_name(key: str) -> str:
    """The object that holds the state of a parameter's rule."""
    return key + _STATE
