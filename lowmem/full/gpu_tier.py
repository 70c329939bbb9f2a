"""State of full tuning in RAM, blocks computed on a GPU: weights go up through its ring, gradients come down as made.

The fp32 masters, moments and accumulated gradients are the host's. A block's weights are copied into page-locked memory
and from there into a slot on the device, ahead of its visit, by the scheduler that streams frozen blocks. A weight's
gradient is copied down while autograd goes on, through page-locked memory that holds those of two blocks, and a thread
adds it to what is accumulated. Updates run on the processor, unit by unit; a block's next fetch follows its own. What
is outside the blocks the model itself holds on the device, and anybody may set it there: an update begins from that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowmem.full.chunks import reads_newest
from lowmem.full.flat import (
    ELEMENT_BYTES,
    EXP_AVG,
    EXP_AVG_SQ,
    FlatBuffers,
    FlatMoment,
    ParamPlace,
    Segment,
    UnitLayout,
    UpdateRuns,
    clipped,
    update_runs,
)
from lowmem.full.tier import WEIGHT, Contribution, Edit, FlatWeight, MemoryTier, StateMemory, weakly
from lowmem.optim.state import BLOCK_VALUES
from lowmem.planning.limits import NUM_LANDING_BLOCKS, NUM_MASTER_STAGING, NUM_UPDATE_PIECES, UPDATE_PIECE_BYTES
from offload import (
    PAGE_BYTES,
    BlockSpec,
    CopyStream,
    Placement,
    PlacementPlan,
    Scheduler,
    SerialThread,
    StagingBuffer,
    TensorSpec,
    Trace,
    Transfer,
    WorkerThread,
    lay_out,
    open_device,
    round_up,
)

_ALIGN_BYTES = 256


class GpuMemoryTier(MemoryTier):
    """Keeps state in RAM for blocks that a GPU computes.

    Args:
        layouts: The units, blocks first.
        live: The weights that the model itself holds on the device, by unit.
        memory: Where the state is; page-locked where the device updates a share of it.
        num_blocks: How many of the units are blocks.
        device: The GPU.
        num_slots: Blocks that are on the device at a time.
        num_passes: Visits of each block in one optimizer step.
        trace: Where copies and stalls are recorded.
        moved_dtype: Type in which weights of products go up, and their gradients come down; what else there is stays as
            it is. For blocks that run under autocast, which would make the same of them.
        products: Names of the weights that go up so: those that autocast casts.
        update_share: Which part of each block's state is updated on the device.
        reduces: Whether gradients are reduced on the device, where all that an optimizer wants is a projection.
        takes_bases: Whether the bases of such projections are read off gradients there.
    """

    def __init__(
        self,
        layouts: Sequence[UnitLayout],
        *,
        live: Mapping[int, Tensor],
        memory: StateMemory,
        num_blocks: int,
        device: torch.device,
        num_slots: int,
        num_passes: int,
        trace: Trace,
        moved_dtype: torch.dtype = torch.float32,
        products: Collection[str] = (),
        update_share: float = 0.0,
        reduces: bool = False,
        takes_bases: bool = False,
    ) -> None:
        super().__init__(layouts, live=live, memory=memory, updates_live=False)
        self.device, self.reduces, self.takes_bases = device, reduces, takes_bases
        self._bases: dict[str, StagingBuffer] = {}
        self._basis_copies = CopyStream(device) if reduces else None
        self._updates = DeviceUpdates(device, share=update_share) if update_share > 0 else None
        # Held while a master changes beside the host: nobody reads it meanwhile.
        self._masters = threading.Lock()
        # Blocks that rules have changed, one parameter after the other; they are fetched anew once they are complete.
        self._changed: set[int] = set()
        self._num_blocks = num_blocks
        blocks = self.layouts[:num_blocks]
        self._halves = [_Halves(layout, moved_dtype, products=products) for layout in blocks]
        widest_bytes = ELEMENT_BYTES * max(layout.numel for layout in blocks)
        self._landing = GradientLanding(device, widest_bytes=widest_bytes)
        self._lifts = SerialThread("master-lifts")
        self._scheduler = Scheduler(
            [halves.spec for halves in self._halves],
            plan=PlacementPlan(
                placements=(Placement.STREAMED,) * num_blocks,
                block_bytes=tuple(halves.read.buffer_bytes for halves in self._halves),
                device_is_host=False,
                num_staging=NUM_MASTER_STAGING,
                num_slots=num_slots,
                num_passes=num_passes,
            ),
            read=reads_newest(blocks, weakly(self._lift)),
            device=open_device(device),
            trace=trace,
        )

    @contextmanager
    def lend(self, index: int) -> Iterator[FlatWeight]:
        """See `StateTier.lend`: a slot of the device's ring."""
        if index in self._changed:
            # A step has failed before its end.
            self._renew(index)
        with self._scheduler.resident(index) as tensors:
            yield self._halves[index].joined(tensors)

    def expect(self, order: Sequence[int]) -> None:
        self._scheduler.expect(order)

    @contextmanager
    def accumulating(self, index: int, *, adds: bool, stays: bool) -> Iterator[Callable[[Contribution], None]]:
        """See `StateTier.accumulating`. Gradients of the device land later; whoever needs them waits."""
        with super().accumulating(index, adds=adds, stays=stays) as keep:
            yield partial(self._landing.take, keep=keep)

    def exchange(
        self, index: int, taken: Collection[str], earlier: Mapping[str, tuple[float, ...] | None]
    ) -> Collection[str]:
        if self._memory.is_shared:
            self._landing.finish()
        return super().exchange(index, taken, earlier)

    def read_gradient(self, index: int, place: ParamPlace) -> Tensor:
        self._landing.finish()
        return super().read_gradient(index, place)

    def gradient_norm(self, index: int, place: ParamPlace) -> Tensor:
        self._landing.finish()
        return super().gradient_norm(index, place)

    def clear_gradient(self, index: int, place: ParamPlace) -> None:
        self._landing.finish()
        super().clear_gradient(index, place)

    def update(self, index: int, segments: Sequence[Segment], gradient: Tensor | None) -> None:
        """See `StateTier.update`: at once, on the processor; what the device has of the unit is replaced."""
        self._landing.finish()
        if gradient is not None:
            down = torch.zeros(self.layouts[index].numel)
            # In its own type: it becomes fp32 here.
            down[: gradient.numel()].copy_(gradient.cpu())
            gradient = down
        super().update(index, segments, gradient)

    def _run(self, index: int, segments: Sequence[Segment], gradient: Tensor | None) -> None:
        with self._masters:
            unit = self._buffers_of(index, gradient)
            if index < self._num_blocks and self._updates is not None:
                self._updates.run(unit, segments, within=self._memory.part(index), beside=self._update_here)
            else:
                self._update_here(unit, segments)

    def change(self, edit: Edit) -> None:
        self._landing.finish()
        down = None if edit.gradient is None else edit.gradient.to(device="cpu", dtype=torch.float32)
        if edit.unit < self._num_blocks:
            # Whatever happens: what the device has of it is of no use.
            self._changed.add(edit.unit)
        super().change(replace(edit, gradient=down))

    def end_step(self, step: int, record: dict[str, object]) -> None:
        """See `StateTier.end_step`: what rules have changed is brought to the device from now on."""
        super().end_step(step, record)
        for index in sorted(self._changed):
            self._renew(index)

    def write(self, index: int, field: str, place: ParamPlace, value: Tensor) -> None:
        super().write(index, field, place, value)
        if field == WEIGHT and index < self._num_blocks:
            self._renew(index)

    def keep_basis(self, key: str, basis: Tensor) -> Tensor:
        """A copy of a parameter's basis in page-locked memory, in place of the last one."""
        self._bases[key] = buffer = StagingBuffer(basis.nbytes, pin=True, in_children=False)
        kept = buffer.tensor.view(basis.dtype).view(basis.shape)
        return kept.copy_(basis)

    def bring_basis(self, kept: Tensor) -> Tensor:
        """Start bringing a basis that is kept to the device, for what is computed there from now on.

        Nobody may change it before the gradients that it reduces have landed.
        """
        assert self._basis_copies is not None, "gradients are not reduced"
        return self._basis_copies.up(kept)[0]

    def reset(self) -> None:
        self._scheduler.reset()

    def memory(self) -> dict[str, int]:
        return {
            **super().memory(),
            **self._scheduler.memory(),
            "gradient_buffer_bytes": self._landing.held_bytes,
        }

    def close(self) -> None:
        """Stop the transfers and release all buffers."""
        if isinstance(threading.current_thread(), WorkerThread):
            # The collector runs finalizers in any thread; one that the transfers need must not wait for them.
            threading.Thread(target=self.close, name="lowmem-close").start()
            return
        self._scheduler.close()
        self._lifts.close()
        self._landing.close()
        for buffer in self._bases.values():
            buffer.close()
        self._bases.clear()
        super().close()

    def _renew(self, index: int) -> None:
        """Bring a unit's newest weight to the device: now, or for a block when it is visited next."""
        self._changed.discard(index)
        if index < self._num_blocks:
            # After the master has changed: what is being read of it meanwhile is dropped.
            self._scheduler.invalidate((index,))
        else:
            super()._renew(index)

    def _fill(self, index: int, into: Tensor) -> None:
        with self._masters:
            self._halves[index].fill(into, self._flat(index, WEIGHT))

    def _lift(self, index: int, into: Tensor) -> Transfer:
        """Start copying a block's master weight into a staging buffer; called by the scheduler's thread."""
        lifted = Transfer(self.layouts[index].name, nbytes=into.numel(), num_pieces=1, memory=into)
        self._lifts.run(partial(_carry_out, lifted, partial(self._fill, index, into)))
        return lifted


_MATRICES, _VECTORS = "matrices", "vectors"


class _Halves:
    """How a block's weight goes up: what autocast multiplies with in one type, the rest as the masters have it."""

    def __init__(self, layout: UnitLayout, dtype: torch.dtype, *, products: Collection[str]) -> None:
        if layout.weight_dtype != torch.float32:
            dtype = layout.weight_dtype
        self._places = layout.places
        self._at: dict[int, tuple[str, int]] = {}
        numels = {_MATRICES: 0, _VECTORS: 0}
        for place in layout.places:
            half = _MATRICES if place.key in products else _VECTORS
            self._at[place.start] = half, numels[half]
            numels[half] += round_up(place.shape.numel(), _ALIGN_BYTES)
        # No file has this name: what the scheduler reads are the masters.
        matrices = TensorSpec(
            name=_MATRICES,
            dtype=dtype,
            shape=(numels[_MATRICES],),
            file=Path("/masters"),
            offset_bytes=0,
            nbytes=numels[_MATRICES] * dtype.itemsize,
        )
        rest = replace(
            matrices,
            name=_VECTORS,
            dtype=layout.weight_dtype,
            shape=(numels[_VECTORS],),
            offset_bytes=round_up(matrices.nbytes, PAGE_BYTES),
            nbytes=numels[_VECTORS] * layout.weight_dtype.itemsize,
        )
        self.spec = BlockSpec(name=layout.name, tensors=(matrices, rest))
        self.read = lay_out(self.spec)

    def fill(self, into: Tensor, master: Tensor) -> None:
        """Fill a staging buffer from the flat master."""
        starts = self.read.tensor_offsets
        joined = self.joined(
            {spec.name: into[starts[spec.name] :][: spec.nbytes].view(spec.dtype) for spec in self.spec.tensors}
        )
        for place in self._places:
            joined[place.start : place.stop].copy_(master[place.start : place.stop])

    def joined(self, tensors: Mapping[str, Tensor]) -> FlatWeight:
        """What can be sliced, a parameter at a time, like the flat master."""
        return _Joined(tensors, self._at)


class _Joined:
    def __init__(self, tensors: Mapping[str, Tensor], at: Mapping[int, tuple[str, int]]) -> None:
        self._tensors, self._at = tensors, at

    def __getitem__(self, elements: slice, /) -> Tensor:
        half, start = self._at[elements.start]
        return self._tensors[half][start : start + elements.stop - elements.start]


_PIECE_ELEMENTS = UPDATE_PIECE_BYTES // ELEMENT_BYTES


class DeviceUpdates:
    """Runs AdamW on a GPU for state in page-locked memory: pieces go up, are updated, and come down.

    Two streams take turns, so that one piece comes down while the next goes up. The host waits in `finish` only. Used
    by one thread at a time.

    Args:
        device: The GPU.
        share: Which part of a unit, or of a chunk of one, is updated there.
    """

    def __init__(self, device: torch.device, *, share: float) -> None:
        self._share = share
        self._streams = [torch.cuda.Stream(device) for _ in range(2)]  # type: ignore[no-untyped-call]
        shape = (NUM_UPDATE_PIECES // len(self._streams), UPDATE_PIECE_BYTES)
        self._pieces: list[Tensor] = []
        for stream in self._streams:
            # Weight, both moments and gradient of a piece. It is the stream's own: what has it next is of that stream.
            with torch.cuda.stream(stream):
                self._pieces.append(torch.empty(shape, dtype=torch.uint8, device=device))

    def run(
        self,
        state: FlatBuffers,
        segments: Sequence[Segment],
        *,
        within: slice | None = None,
        beside: UpdateRuns = update_runs,
    ) -> None:
        """Update runs: the first elements here, and the others on the processor at the same time.

        Args:
            state: Flat buffers in page-locked memory, as they are stored.
            segments: The runs.
            within: Elements that they lie in, and whose share is updated here; all of the buffers if not given.
            beside: Updates those of the processor.
        """
        first, last = (0, state.weight.numel()) if within is None else (within.start, within.stop)
        # Whole blocks of moments in 8 bits.
        end_here = min(last, first + round_up(round((last - first) * self._share), BLOCK_VALUES))
        try:
            self.begin(state, clipped(segments, first, end_here))
            beside(state, clipped(segments, end_here, last))
        finally:
            self.finish()

    def begin(self, state: FlatBuffers, segments: Iterable[Segment]) -> None:
        """Start updating some runs of a unit; leave its buffers alone until `finish` returns.

        Args:
            state: Flat buffers in page-locked memory, as they are stored.
            segments: The runs.
        """
        turn = 0
        for run in segments:
            for start in range(run.start, run.stop, _PIECE_ELEMENTS):
                piece = clipped((run,), start, start + _PIECE_ELEMENTS)
                with torch.cuda.stream(self._streams[turn]):
                    self._update(piece[0], state, self._pieces[turn])
                turn = 1 - turn

    def _update(self, piece: Segment, state: FlatBuffers, memory: Tensor) -> None:
        where = slice(piece.start, piece.stop)
        here = (
            {WEIGHT: state.weight[where]},
            state.exp_avg.stored(where),
            state.exp_avg_sq.stored(where),
            {"gradient": state.gradient[where]},
        )
        there = [_brought(stored, into) for stored, into in zip(here, memory, strict=True)]
        at = FlatBuffers(
            weight=there[0][WEIGHT],
            exp_avg=FlatMoment(EXP_AVG, there[1]),
            exp_avg_sq=FlatMoment(EXP_AVG_SQ, there[2]),
            gradient=there[3]["gradient"],
        )
        update_runs(at, [replace(piece, start=0, stop=piece.stop - piece.start)])
        for stored, updated in zip(here[:3], there, strict=False):
            for name, value in stored.items():
                value.copy_(updated[name], non_blocking=True)

    def finish(self) -> None:
        """Wait until everything has come down."""
        for stream in self._streams:
            stream.synchronize()


def _brought(stored: Mapping[str, Tensor], into: Tensor) -> dict[str, Tensor]:
    """Start copying tensors to the device, into memory that they fit into one behind the other."""
    found, start = {}, 0
    for name, value in stored.items():
        found[name] = into[start : start + value.nbytes].view(value.dtype)
        found[name].copy_(value, non_blocking=True)
        start += round_up(value.nbytes, _ALIGN_BYTES)
    return found


def _carry_out(transfer: Transfer, run: Callable[[], object]) -> None:
    """Do within memory what a transfer stands for."""
    error: BaseException | None = None
    transfer.begin_piece()
    try:
        run()
    # Whatever it is belongs to the thread that waits.
    except BaseException as caught:  # noqa: BLE001
        error = caught
    transfer.finish_piece(error)


class GradientLanding:
    """Brings weights' gradients down while autograd goes on, and has a thread add them up in the order they came.

    Args:
        device: The GPU.
        widest_bytes: Bytes of the largest block's gradients; the page-locked memory that they pass holds a few of it.
    """

    def __init__(self, device: torch.device, *, widest_bytes: int) -> None:
        self._device, self._nbytes = device, NUM_LANDING_BLOCKS * widest_bytes
        self._thread = SerialThread("gradient-landing")
        self._buffer: StagingBuffer | None = None
        self._copies: CopyStream | None = None
        # Positions in the buffer only grow: from where on gradients come, and up to where they have been kept.
        self._start = self._freed = 0
        self._changed = threading.Condition()
        self._num_on_the_way = 0
        self._error: BaseException | None = None

    @property
    def held_bytes(self) -> int:
        """Bytes of page-locked memory; none before the first gradient."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def take(self, one: Contribution, *, keep: Callable[[Contribution], None]) -> None:
        """Have a gradient kept: from the device later, behind those before it; from the host now."""
        if one.value.device.type == "cpu":
            self.finish()
            keep(one)
        else:
            self.put(one, keep)

    def put(self, one: Contribution, keep: Callable[[Contribution], None]) -> None:
        """Start copying a gradient; returns at once where there is room.

        Args:
            one: Its value is on the device and may be dropped.
            keep: Called with the same on the host, in the thread.

        Raises:
            Exception: An earlier one could not be kept.
        """
        if self._buffer is None or self._copies is None:
            self._buffer = StagingBuffer(self._nbytes, pin=True, in_children=False)
            self._copies = CopyStream(self._device)
        value = one.value.detach().contiguous()
        place = self._room(value.nbytes)
        bounce = self._buffer.tensor[place : place + value.nbytes].view(value.dtype).view(value.shape)
        copied = self._copies.down(value, bounce)
        with self._changed:
            self._num_on_the_way += 1
        self._thread.run(partial(self._land, copied, replace(one, value=bounce), keep, self._start))

    def finish(self) -> None:
        """Wait until everything has been kept.

        Raises:
            Exception: Something could not be kept.
        """
        with self._changed:
            while self._num_on_the_way:
                self._changed.wait()
            self._raise_error()

    def close(self) -> None:
        """Wait for what is on its way, then give the memory back. Twice is fine."""
        self._thread.close()
        if self._buffer is not None:
            self._buffer.close()

    def _room(self, nbytes: int) -> int:
        """Where the next bytes go: behind the last ones, or at the beginning once these are free."""
        wanted = round_up(nbytes, _ALIGN_BYTES)
        if wanted > self._nbytes:
            raise ValueError(f"a gradient of {nbytes} bytes does not fit into {self._nbytes} bytes")
        place = self._start % self._nbytes
        if place + wanted > self._nbytes:
            # What is left at the end is skipped.
            self._start += self._nbytes - place
            place = 0
        self._start += wanted
        with self._changed:
            while self._start - self._freed > self._nbytes and self._num_on_the_way:
                self._changed.wait()
            self._raise_error()
        return place

    def _land(
        self, copied: torch.cuda.Event, one: Contribution, keep: Callable[[Contribution], None], end: int
    ) -> None:
        """Add a gradient up once it has come down; in the thread."""
        error: BaseException | None = None
        try:
            copied.synchronize()
            keep(one)
        # Whatever it is belongs to the thread that trains.
        except BaseException as caught:  # noqa: BLE001
            error = caught
        with self._changed:
            self._error = self._error or error
            self._num_on_the_way -= 1
            self._freed = end
            self._changed.notify_all()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
