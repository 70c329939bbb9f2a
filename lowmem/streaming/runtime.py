"""The runtime behind a streamed model: brings its blocks one after the other and binds their weights for a visit.

Which blocks come next is predicted (`VisitingOrder`), so that they are fetched ahead.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from lowmem import host_memory
from lowmem.errors import UnsupportedError
from lowmem.internals.torch import parameter_table, put_parameter
from lowmem.models.build import StreamedBlock
from lowmem.streaming.boundary import BoundaryTier
from lowmem.streaming.call import SplitChoice
from lowmem.streaming.chunking.carrier import Workspace
from lowmem.streaming.recompute import ProductKey, RandomTape
from offload import ComputeTimes

if TYPE_CHECKING:
    from transformers import TrainerState

    from lowmem.planning.plan import Plan
    from lowmem.planning.shapes import OptimizerShape
    from lowmem.streaming.chunking.chunks import InChunks
    from offload import Trace


Phase = Literal["forward", "backward", "no_grad"]


@dataclass(frozen=True, kw_only=True)
class Visit:
    """The start or the end of one visit of one block, told in the training thread."""

    block: int
    """Number of the block."""
    num_blocks: int
    """How many blocks the model has."""
    phase: Phase
    """A forward that will have a backward, that backward, or a forward without gradients."""
    started: bool
    """True when the visit begins (its weights may still be on their way), False when it has ended."""
    time_ns: int
    """time.perf_counter_ns()."""
    num_tokens: int
    """Tokens of the batch that go through the block, padding included."""


class ActiveRows:
    """Tells modules inside a block which rows of the batch their input's rows are.

    Finished sequences are left out and a prompt may pass in parts, so row 0 of what a module gets need not be row 0 of
    the batch. Modules that treat rows differently (one adapter per row) look here.
    """

    def __init__(self) -> None:
        self.index: Tensor | None = None
        """Numbers of the rows in the batch, shape (rows,), int64; None for all of them in order."""

    @contextmanager
    def set(self, index: Tensor | None) -> Iterator[None]:
        """Announce rows for the time of a `with`."""
        before, self.index = self.index, index
        try:
            yield
        finally:
            self.index = before


@dataclass(eq=False)
class TrainingPass:
    """One forward that awaits its backward. Alive while autograd holds its graph."""

    recorded: list[int] = field(default_factory=list)
    """Blocks that recorded a call, in forward order."""


class VisitingOrder:
    """Predicts the order of visits and tells it whenever a new pass begins.

    A wrong prediction costs time, never correctness: the scheduler fetches whatever block is asked for.

    Args:
        num_blocks: Number of blocks.
        tell: Called with the upcoming order, the current visit first.
    """

    def __init__(self, num_blocks: int, *, tell: Callable[[Sequence[int]], None]) -> None:
        self._all = list(range(num_blocks))
        self._tell = tell
        self._phase: Phase | None = None
        self._last = -1
        self._passes: list[weakref.ref[TrainingPass]] = []
        self._last_recorded = self._all
        self._current: TrainingPass | None = None

    def tell_to(self, tell: Callable[[Sequence[int]], None]) -> None:
        """Tell another one from the next pass on."""
        self._tell = tell
        self.forget()

    def enter(self, block: int, phase: Phase) -> None:
        """Note that a block is about to be visited."""
        forwards = phase != "backward"
        begins = phase != self._phase or (block <= self._last if forwards else block >= self._last)
        if begins:
            if phase == "forward":
                self._begin_training_pass()
            self._tell(self._order(block, phase))
        self._phase, self._last = phase, block

    def record(self, block: int) -> TrainingPass:
        """Note that the block being visited recorded a call; the caller keeps the pass as long as its graph."""
        if self._current is None:
            self._begin_training_pass()
        assert self._current is not None
        self._current.recorded.append(block)
        return self._current

    def forget(self) -> None:
        """After an error: the next visit begins a new pass."""
        self._phase, self._last, self._current = None, -1, None

    def _begin_training_pass(self) -> None:
        if self._current is not None and self._current.recorded:
            self._last_recorded = self._current.recorded
        self._current = TrainingPass()
        self._passes = [ref for ref in self._passes if ref() is not None]
        self._passes.append(weakref.ref(self._current))

    def _order(self, block: int, phase: Phase) -> list[int]:
        ahead = self._all[block:]
        if phase == "forward":
            return ahead + self._last_recorded[::-1] + self._all
        waiting = [training.recorded for ref in self._passes if (training := ref()) is not None and training.recorded]
        if phase == "no_grad":
            # A second pass without gradients in a row: tokens are being generated, one pass each.
            return ahead + (waiting[-1][::-1] if waiting and self._phase != "no_grad" else self._all)
        own = next((recorded for recorded in reversed(waiting) if block in recorded), self._all)
        rest = [index for index in reversed(own) if index <= block]
        return rest + self._all


class BlockSource(Protocol):
    """Brings blocks to the compute device: `offload.Scheduler`, or the master weights of full tuning."""

    def memory(self) -> dict[str, int]:
        """Bytes allocated now, by role."""

    def expect(self, order: Iterable[int]) -> None:
        """Fetch ahead for these visits, the nearest first."""

    def resident(self, block: int) -> AbstractContextManager[Mapping[str, Tensor]]:
        """A block's tensors on the compute device, for the time of a ``with``."""

    def reset(self) -> None:
        """End all visits."""

    def close(self) -> None:
        """Stop the transfers and free all buffers. May be called twice."""


class BlockUnpacker(Protocol):
    """Makes a block's parameters from what its source brought."""

    @property
    def workspace_bytes(self) -> int:
        """Bytes of its workspace."""

    def unpack(self, index: int, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters by model name; valid while `stored` is and until another block is unpacked.

        Those that are left out stay absent: their module has been lent them in another way, until `release`.
        """

    def release(self) -> None:
        """The visit has ended."""

    def forget(self) -> None:
        """Take the workspace's contents for stale."""

    def close(self) -> None:
        """Release the workspace."""


class CachedForwards(Protocol):
    """Runs blocks for a generation, with their K/V cache; it lies in a room above this one."""

    def run(
        self,
        forward: Callable[..., object],
        args: Sequence[object],
        kwargs: Mapping[str, object],
        *,
        block: int,
        rows: ActiveRows,
        in_chunks: InChunks | None = None,
    ) -> object:
        """Run a block's raw forward, whose weights are bound."""

    def memory(self) -> dict[str, int]:
        """Bytes held now, by role."""


class TrainedWeights(Protocol):
    """Takes the gradients of blocks whose own weights are trained; it lies in a room above this one."""

    optimizer: OptimizerShape | None
    """What the optimizer that serves them keeps, once there is one."""
    stored_shapes: Callable[[], Mapping[str, tuple[int, ...]]]
    """Shapes of the tensors of a saved checkpoint by name."""

    def taking_gradients(self, index: int, *, in_parts: bool) -> AbstractContextManager[Callable[[str, Tensor], None]]:
        """What takes a weight's gradient by name, for the time of one backward of a block."""


_ATTRIBUTE = "_lowmem_runtime"

_LARGE_BYTES = 8 << 20


class Runtime:
    """Owns what brings the blocks of one model, and lends each block its weights for the time of a visit.

    One thread at a time: a visit binds weights into modules that the whole process shares.

    Args:
        blocks: The model's blocks in visiting order.
        scheduler: Brings their stored tensors to the compute device; closed with the runtime.
        unpacker: Makes parameters of them.
        boundaries: Where blocks' inputs wait for the backward; closed with the runtime.
        plan: What was planned, for reports.
        trace: Where visits are recorded.
        device: Compute device.
        choose_split: How much of a call goes through a block at a time.
    """

    generation: CachedForwards | None = None
    """What runs blocks that are called with a cache; None for a model that cannot generate."""
    products: BoundaryTier | None = None
    """Where large products of blocks wait for the backward; None where they are computed again."""
    full: TrainedWeights | None = None
    """Where every weight is trained: takes the blocks' gradients."""
    idle_bytes = 0
    """Largest resident memory of the process before the model was opened."""
    has_mentioned_hooks = False
    """Whether a user was told of hooks inside the blocks."""

    def __init__(
        self,
        blocks: Sequence[StreamedBlock],
        *,
        scheduler: BlockSource,
        unpacker: BlockUnpacker,
        boundaries: BoundaryTier,
        plan: Plan,
        trace: Trace,
        device: torch.device,
        choose_split: SplitChoice,
    ) -> None:
        self.blocks = tuple(blocks)
        """In visiting order."""
        self.num_blocks = len(self.blocks)
        self.modules = tuple(streamed.block.module for streamed in self.blocks)
        self.plan, self.trace, self.device = plan, trace, device
        self.scheduler, self.boundaries, self.choose_split = scheduler, boundaries, choose_split
        self.chunk_workspace = Workspace()
        self.tape = RandomTape(device)
        self.rows = ActiveRows()
        self.num_calls = count(1)
        """Numbers the blocks' calls that a backward will follow."""
        self.unread_products: dict[int, set[ProductKey]] = {}
        """For each block, those of its large products that no gradient needs."""
        self._times = ComputeTimes(device, trace) if device.type == "cuda" else None
        self._unpacker = unpacker
        self._order = VisitingOrder(self.num_blocks, tell=scheduler.expect)
        self._listeners: list[Callable[[Visit], None]] = []
        self._visiting = threading.Lock()
        self._visitor: tuple[int, int] | None = None  # Thread and block of the visit under way.
        self._on_reset: list[Callable[[], None]] = []
        self.advise_interrupted: Callable[[], str] | None = None
        """Says how to go on after an interruption, while a Trainer trains."""
        self.output_claim = ExitStack()
        """Keeps other trainings out of the folder that a Trainer saves to, until it is closed."""
        self.announce: Callable[[Phase, int], None] | None = None
        """Told what a visit is for, and how many tokens it is for, before its block is asked for."""
        self.optimizer: OptimizerShape | None = None
        """What updates what trains, where somebody has told; a plan for a batch counts what it keeps."""
        self.add_to_log: Callable[[TrainerState, dict[str, float]], None] | None = None
        """Adds what a monitor measured to a log of the Trainer's, while one watches."""
        self.find_lost: Callable[[float], BaseException | None] | None = None
        """Says which process that shares this one's blocks has died, waiting so many seconds; None in one process."""
        self.note_interrupted: Callable[[], None] | None = None
        """Has a monitor write down what it saw until an interruption, while one watches."""

    def listen(self, callback: Callable[[Visit], None]) -> Callable[[], None]:
        """Call `callback` in the training thread when a visit starts and ends; returns what removes it again."""
        self._listeners.append(callback)
        return lambda: self._listeners.remove(callback) if callback in self._listeners else None

    def on_reset(self, callback: Callable[[], None]) -> None:
        """Call `callback` with every `reset`; it must not refer to the runtime or its model."""
        self._on_reset.append(callback)

    def memory(self) -> dict[str, int]:
        """Bytes held now, by role."""
        return {
            **self.scheduler.memory(),
            "workspace_bytes": self._unpacker.workspace_bytes,
            "boundary_bytes": self.boundaries.held_bytes,
            **({} if self.products is None else {"product_bytes": self.products.held_bytes}),
            "chunk_bytes": self.chunk_workspace.nbytes,
            **({} if self.generation is None else self.generation.memory()),
        }

    @contextmanager
    def visit(self, index: int, phase: Phase, *, num_tokens: int) -> Iterator[None]:
        """Bind a block's weights into its modules for the time of a ``with``.

        Args:
            index: Number of the block.
            phase: What for.
            num_tokens: Tokens of the batch that will go through it, for listeners.

        Raises:
            OffloadError: Its weights cannot be brought.
            UnsupportedError: Another thread visits a block.
        """
        if not self._visiting.acquire(blocking=False):
            visitor = self._visitor
            if visitor is not None and visitor[0] == threading.get_ident():
                raise RuntimeError(f"block {index} was called inside block {visitor[1]}: blocks do not nest")
            refuse_second_thread()
        self._visitor = (threading.get_ident(), index)
        try:
            if self.announce is not None:
                self.announce(phase, num_tokens)
            self._order.enter(index, phase)
            self._tell(index, phase, num_tokens, started=True)
            asked = None if self._times is None else self._times.now()
            with self.scheduler.resident(index) as stored:
                start_ns, arrived = time.perf_counter_ns(), None if self._times is None else self._times.now()
                values = self._unpacker.unpack(index, stored)
                with self._binding(index, values):
                    yield
                if self._times is None:
                    self.trace.add("compute", f"{phase} {index}", start_ns, time.perf_counter_ns())
                elif asked is not None and arrived is not None:
                    self._times.add("stall", self.blocks[index].block.name, asked, arrived)
                    self._times.add("compute", f"{phase} {index}", arrived, self._times.now())
        except BaseException:
            self._order.forget()
            self._unpacker.forget()
            raise
        finally:
            self._unpacker.release()
            self._visitor = None
            self._visiting.release()
        self._tell(index, phase, num_tokens, started=False)

    def settle_times(self) -> None:
        """Have the trace know all visits that are over; on a GPU, wait for it first."""
        if self._times is not None:
            self._times.settle()

    def record(self, index: int) -> TrainingPass:
        """Note that the block being visited recorded a call; the caller keeps the pass as long as its graph."""
        return self._order.record(index)

    def trained_weights(self, index: int) -> dict[str, Tensor]:
        """The weights of the block being visited that are trained themselves, by model name."""
        params = {slot.key: parameter_table(slot.module)[slot.attribute] for slot in self.blocks[index].slots}
        return {key: param for key, param in params.items() if param is not None and param.requires_grad}

    @contextmanager
    def _binding(self, index: int, values: Mapping[str, Tensor]) -> Iterator[None]:
        slots = [slot for slot in self.blocks[index].slots if slot.key in values]
        absent = [parameter_table(slot.module)[slot.attribute] for slot in slots]
        try:
            for slot, param in zip(slots, absent, strict=True):
                # .data: a version counter of its own. Views share their buffer's, and an in-place change of one weight
                # (torch's parametrizations do `set_`) would then look like a change of all.
                value = values[slot.key].data
                trains = param is not None and param.requires_grad
                put_parameter(slot.module, slot.attribute, torch.nn.Parameter(value, requires_grad=trains))
            yield
        finally:
            for slot, param in zip(slots, absent, strict=True):
                put_parameter(slot.module, slot.attribute, param)

    def _tell(self, index: int, phase: Phase, num_tokens: int, *, started: bool) -> None:
        if not self._listeners:
            return
        visit = Visit(
            block=index,
            num_blocks=self.num_blocks,
            phase=phase,
            started=started,
            time_ns=time.perf_counter_ns(),
            num_tokens=num_tokens,
        )
        for callback in list(self._listeners):
            callback(visit)

    @property
    def is_visiting(self) -> bool:
        """Whether a block's weights are bound now."""
        return self._visitor is not None

    def bring_blocks_from(self, source: BlockSource) -> None:
        """Bring blocks from another source from now on; the one before is closed already, and no block is visited."""
        self.scheduler = source
        self._order.tell_to(source.expect)

    def make_room_for_head(self, num_bytes: int) -> None:
        """Give memory back between a forward's last block and its backward: the head runs then, and needs its own.

        Args:
            num_bytes: Size of the last block's output; where it is small, so is what the C library's heap keeps of the
                step before. Left there, a step's temporaries find new places from time to time, beside the head's.
        """
        self.boundaries.release_idle()
        if self.products is not None:
            self.products.release_idle()
        if self.chunk_workspace.nbytes >= _LARGE_BYTES:
            self.chunk_workspace.clear()
        self._trim(num_bytes)

    def trim_after_head(self, num_bytes: int) -> None:
        """Give back what the head left in the C library's heap, before the backward of the last block.

        Args:
            num_bytes: Size of the gradient that arrives; where it is small, so is what was left.
        """
        self._trim(num_bytes)

    def _trim(self, num_bytes: int) -> None:
        if self.device.type == "cpu" and num_bytes >= host_memory.LEAVES_LITTLE_BYTES:
            host_memory.give_back_freed()

    def reset(self) -> None:
        """Make the runtime ready for a new step after an exception; safe to call at any time."""
        self._order.forget()
        for callback in self._on_reset:
            callback()
        self._unpacker.forget()
        self.chunk_workspace.clear()
        if self._times is not None:
            self._times.forget()
        self.scheduler.reset()

    def close(self) -> None:
        """Stop the transfers and release all buffers. The model can no longer be run."""
        self.scheduler.close()
        self._unpacker.close()
        self.boundaries.close()
        if self.products is not None:
            self.products.close()


def refuse_second_thread() -> None:
    """Refuse a call from a thread while another one runs the model.

    Raises:
        UnsupportedError: Always.
    """
    raise UnsupportedError(
        "one streamed model in two threads at a time",
        reason="its blocks take turns in memory, and one thread would compute with the other's weights",
        instead="a lock around forward and backward, or a model for each thread",
    )


def runtime_of(model: torch.nn.Module) -> Runtime:
    """Find the runtime behind a model, however it is wrapped (PEFT, accelerate, torch.compile).

    Raises:
        ValueError: The model is not a streamed one.
    """
    for module in model.modules():
        runtime = module.__dict__.get(_ATTRIBUTE)
        if isinstance(runtime, Runtime):
            return runtime
    raise ValueError("not a streamed model: it was not made by lowmem.from_pretrained")


def give_runtime(module: torch.nn.Module, runtime: Runtime) -> None:
    """Let a module own a runtime: it lives as long as the module does, and `runtime_of` finds it there."""
    object.__setattr__(module, _ATTRIBUTE, runtime)


def is_streamed(model: torch.nn.Module) -> bool:
    """Whether a runtime runs this model's blocks."""
    return any(_ATTRIBUTE in module.__dict__ for module in model.modules())
