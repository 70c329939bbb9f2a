"""Where the runtime gets a block's weights from: frozen ones from a checkpoint, or masters that change.

The runtime behind a streamed model: visits its blocks with their weights bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lowmem import host_memory
from lowmem.errors import UnsupportedError
from lowmem.internals.torch import parameter_table, put_parameter
from lowmem.models.build import StreamedBlock
from lowmem.planning.step_memory import num_boundary_buffers
from lowmem.streaming.block import BlockFunction, VisitedCall
from lowmem.streaming.boundary import tier_for
from lowmem.streaming.call import BlockCall, Split, SplitChoice
from lowmem.streaming.chunking.carrier import Workspace
from lowmem.streaming.chunking.chunks import CallArguments, ChunkedCall, RunBlock, forward_chunks
from lowmem.streaming.recompute import RandomTape
from lowmem.streaming.reference import Twins
from lowmem.streaming.visits import ActiveRows, Phase, TrainingPass, Visit, VisitingOrder

if TYPE_CHECKING:
    from transformers import TrainerState

    from lowmem.full.engine import FullTuning
    from lowmem.generation.hooks import GenerationHooks
    from lowmem.planning.plan import Plan
    from lowmem.streaming.reference import Entry
    from offload import Trace


class BlockSource(Protocol):
    """Brings blocks to the compute device: `offload.Scheduler`, or the master weights of full tuning."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""

    def memory(self) -> dict[str, int]:
        """Bytes allocated now, by role."""

    def expect(self, order: Iterable[int]) -> None:
        """Fetch ahead for these visits, the nearest first."""

    def resident(self, block: int) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Have a block's tensors on the compute device for the time of a ``with``."""

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
        """The parameters by model name; valid while `stored` is and until another block is unpacked."""

    def forget(self) -> None:
        """Take the workspace's contents for stale."""

    def close(self) -> None:
        """Release the workspace."""


_ATTRIBUTE = "_lowmem_runtime"


_LARGE_BYTES = 8 << 20


class Runtime:
    """Owns the scheduler and the workspace of one model, and lends each block its weights for the time of a visit."""

    def __init__(
        self,
        blocks: Sequence[StreamedBlock],
        *,
        scheduler: BlockSource,
        unpacker: BlockUnpacker,
        plan: Plan,
        trace: Trace,
        device: torch.device,
        choose_split: SplitChoice,
    ) -> None:
        """Take over blocks; nothing is read yet.

        Args:
            blocks: The model's blocks in visiting order.
            scheduler: Brings their stored tensors to the compute device; closed with the runtime.
            unpacker: Makes parameters of them.
            plan: What was planned, for reports.
            trace: Where visits are recorded.
            device: Compute device.
            choose_split: How much of a call goes through a block at a time.
        """
        self.plan, self.trace, self.device = plan, trace, device
        self.scheduler = scheduler
        self._blocks = tuple(blocks)
        self._unpacker = unpacker
        self._order = VisitingOrder(len(self._blocks), tell=scheduler.expect)
        self._listeners: list[Callable[[Visit], None]] = []
        self._before_first: list[Callable[[], None]] = []
        self.advise_interrupted: Callable[[], str] | None = None
        """Says how to go on after an interruption, while a Trainer trains."""
        self.add_to_log: Callable[[TrainerState, dict[str, float]], None] | None = None
        """Adds what a monitor measured to a log of the Trainer's, while one watches."""
        self._choose_split = choose_split
        self.chunk_workspace = Workspace()
        self.tape = RandomTape(device)
        self._bound: int | None = None
        self.rows = ActiveRows()
        self.generation: GenerationHooks | None = None
        self._twins = Twins(expects_reference=plan.job.task in ("dpo", "kto") and bool(plan.job.uses_reference))
        self.full: FullTuning | None = None
        """Where every weight is trained: takes the blocks' gradients."""
        self.boundaries = tier_for(
            device,
            planned=plan.boundary_tier,
            disk=None if plan.disk_folder is None else Path(plan.disk_folder),
            num_buffers=num_boundary_buffers(device.type),
            trace=trace,
        )

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self._blocks)

    @property
    def blocks(self) -> tuple[StreamedBlock, ...]:
        """The blocks in visiting order."""
        return self._blocks

    def listen(self, callback: Callable[[Visit], None]) -> Callable[[], None]:
        """Call `callback` in the training thread when a visit starts and ends; answers what removes it again."""
        self._listeners.append(callback)
        return lambda: self._listeners.remove(callback) if callback in self._listeners else None

    def before_first_block(self, callback: Callable[[], None]) -> None:
        """Call `callback` before block 0 of each forward, to check or prepare what was added to the model."""
        self._before_first.append(callback)

    def memory(self) -> dict[str, int]:
        """Bytes held now, by role."""
        held = self.scheduler.memory()
        return {
            **held,
            "workspace_bytes": self._unpacker.workspace_bytes,
            "boundary_bytes": self.boundaries.held_bytes,
            "chunk_bytes": self.chunk_workspace.nbytes,
            **({} if self.generation is None else self.generation.memory()),
        }

    def call(self, index: int, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """Run one block as its module would: recorded where gradients will be asked for, else just run.

        Args:
            index: Number of the block.
            args: Positional arguments of the block's forward.
            kwargs: Keyword arguments of the block's forward.
        """
        if torch.compiler.is_compiling():
            raise UnsupportedError(
                "torch.compile",
                reason="a compiled graph cannot have its weights exchanged from block to block",
                instead="the model as it is",
            )
        if index == 0:
            for callback in self._before_first:
                callback()
        if self.full is not None:
            # Weights that change between two forwards are not compared; and a full run's reference is another model.
            return self.run_block(index, args, kwargs)
        return self._twins.call(self, index, args, kwargs)

    def run_block(
        self,
        index: int,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        *,
        beside: Callable[[], None] | None = None,
        recorded_beside: bool = False,
    ) -> object:
        """As `Visitor.run_block`."""
        phase: Phase = "forward" if recorded_beside else "no_grad"
        if not torch.is_grad_enabled():
            return self._run(index, args, kwargs, beside=beside, phase=phase)
        kwargs = _without_cache(kwargs)
        call = BlockCall(args, kwargs)
        params = [param for param in self._blocks[index].block.module.parameters() if param.requires_grad]
        inputs = call.take_inputs()
        if not params and not any(value.requires_grad for value in inputs):
            with torch.no_grad():
                return self._run(index, *call.arguments(inputs, None), beside=beside, phase=phase)
        entry = VisitedCall(self, index, call, self._choose_split(call), beside=beside)
        outputs = BlockFunction.apply(entry, len(inputs), *inputs, *params)  # type: ignore[no-untyped-call]
        return entry.rebuild(outputs)

    def _run(
        self,
        index: int,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        *,
        beside: Callable[[], None] | None = None,
        phase: Phase = "no_grad",
    ) -> object:
        shape = next((leaf.shape[:2] for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)), torch.Size())
        with self.visit(index, phase, num_tokens=shape.numel() if shape else 0):
            output = self.run_here(index, args, kwargs)
            if beside is not None:
                beside()
            return output

    def run_here(self, index: int, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """As `Blocks.run_here`."""
        if _has_cache(kwargs):
            return self._run_with_cache(index, args, kwargs)
        call = BlockCall(args, kwargs)
        split = self._choose_split(call)
        if split != Split():
            inputs = call.take_inputs()
            entry = VisitedCall(self, index, call, split, keeps=False)
            return entry.rebuild(entry.forward_here(inputs))
        return self._run_whole(index, args, kwargs)

    def _run_with_cache(self, index: int, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        shape = next((leaf.shape[:2] for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)), torch.Size())
        chunk_tokens = self._choose_split.chunk_for(shape[-1], num_tokens=shape.numel()) if shape else None
        in_chunks = None if chunk_tokens is None else partial(self._in_chunks, index, chunk_tokens)
        return self._run_whole(index, args, kwargs, in_chunks=in_chunks)

    def _run_whole(
        self,
        index: int,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        *,
        in_chunks: Callable[[RunBlock, CallArguments], object] | None = None,
    ) -> object:
        block = self._blocks[index].block
        forward = partial(block.raw_forward, block.module)
        if self.generation is None:
            return forward(*args, **kwargs)
        return self.generation.run(forward, args, kwargs, block=index, rows=self.rows, in_chunks=in_chunks)

    def recorded_call(self, index: int, args: Sequence[object], kwargs: Mapping[str, object]) -> tuple[Entry, Tensor]:
        """As `Blocks.recorded_call`."""
        call = BlockCall(args, kwargs)
        (hidden,) = call.take_inputs()
        return VisitedCall(self, index, call, self._choose_split(call)), hidden

    @property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        """The blocks' modules."""
        return tuple(streamed.block.module for streamed in self._blocks)

    def _in_chunks(self, index: int, chunk_tokens: int, run: RunBlock, arguments: CallArguments) -> object:
        call = ChunkedCall(self._blocks[index].block.raw_forward, *arguments)
        workspace = self.chunk_workspace
        return forward_chunks(run, call, chunk_tokens=chunk_tokens, device=self.device, workspace=workspace).output

    @contextmanager
    def visit(self, index: int, phase: Phase, *, num_tokens: int) -> Iterator[None]:
        """Have a block's weights bound into its modules.

        Raises:
            OffloadError: Its weights cannot be brought.
        """
        self._order.enter(index, phase)
        self._tell(index, phase, num_tokens, started=True)
        try:
            with self.scheduler.resident(index) as stored:
                start_ns = time.perf_counter_ns()
                values = self._unpacker.unpack(index, stored)
                with self._binding(index, values):
                    yield
                self.trace.add("compute", f"{phase} {index}", start_ns, time.perf_counter_ns())
        except BaseException as error:
            self._order.forget()
            self._unpacker.forget()
            if self.advise_interrupted is not None and isinstance(error, KeyboardInterrupt):
                error.add_note(self.advise_interrupted())
            raise
        self._tell(index, phase, num_tokens, started=False)

    @contextmanager
    def fetch_block(self, index: int) -> Iterator[dict[str, Tensor]]:
        """A block's true parameters by model name, in the compute dtype, valid inside the `with`."""
        with self.scheduler.resident(index) as stored:
            yield self._unpacker.unpack(index, stored)

    def trained_weights(self, index: int) -> dict[str, Tensor]:
        """The weights of the block being visited that are trained themselves, by model name."""
        params = {slot.key: parameter_table(slot.module)[slot.attribute] for slot in self._blocks[index].slots}
        return {key: param for key, param in params.items() if param is not None and param.requires_grad}

    @contextmanager
    def _binding(self, index: int, values: Mapping[str, Tensor]) -> Iterator[None]:
        if self._bound is not None:
            raise RuntimeError(f"block {index} was called inside block {self._bound}: blocks do not nest")
        slots = self._blocks[index].slots
        absent = [parameter_table(slot.module)[slot.attribute] for slot in slots]
        self._bound = index
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
            self._bound = None

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

    def record(self, index: int) -> TrainingPass:
        """Note that a block recorded a call."""
        return self._order.record(index)

    def rest(self) -> None:
        """Give back what is not needed while the head runs, between a forward's last block and its backward."""
        self.boundaries.rest()
        if self.chunk_workspace.nbytes >= _LARGE_BYTES:
            self.chunk_workspace.clear()

    def resume(self, hidden: Tensor | None) -> None:
        """Give back what the head has left, before the backward of the last block.

        Args:
            hidden: The gradient that arrives; where it is small, so is what was left.
        """
        if hidden is not None and hidden.device.type == "cpu" and hidden.nbytes >= _LARGE_BYTES:
            host_memory.give_back_freed()

    def reset(self) -> None:
        """Make the runtime ready for a new step after an exception; safe to call at any time."""
        self._order.forget()
        self._twins.forget()
        self._unpacker.forget()
        self.chunk_workspace.clear()
        self.scheduler.reset()

    def close(self) -> None:
        """Stop the transfers and release all buffers. The model can no longer be run."""
        self.scheduler.close()
        self._unpacker.close()
        self.boundaries.close()


_CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past")


def _has_cache(kwargs: Mapping[str, object]) -> bool:
    return any(kwargs.get(name) is not None for name in _CACHE_NAMES)


def _without_cache(kwargs: Mapping[str, object]) -> dict[str, object]:
    """A training forward keeps no K/V cache, as with transformers' own checkpointing.

    Raises:
        RuntimeError: The cache already holds something that the block would attend to.
    """
    cleaned = dict(kwargs)
    for name in _CACHE_NAMES:
        cache = cleaned.get(name)
        if cache is None:
            continue
        length = getattr(cache, "get_seq_length", lambda: 1)()
        if length:
            raise RuntimeError(
                f"{name} holds {length} tokens in a forward with gradients; streamed blocks train "
                "without a prefix (prefix tuning is not supported: use LoRA)"
            )
        cleaned[name] = None
    if cleaned.get("use_cache"):
        cleaned["use_cache"] = False
    return cleaned


def attach(model: torch.nn.Module, runtime: Runtime) -> None:
    """Let the runtime run a model's blocks.

    Replaces `forward` on the block instances, which serves training, evaluation and generation alike and does not
    depend on gradient checkpointing being on.

    Trainers make the embeddings' output require gradients, for checkpointing's sake. A streamed block asks its own
    parameters, so that is left out: it would keep the embeddings throughout the step, and their gradient.
    """
    object.__setattr__(model, _ATTRIBUTE, runtime)
    object.__setattr__(model, "enable_input_require_grads", _do_nothing)
    for index, streamed in enumerate(runtime.blocks):
        streamed.block.module.forward = _streamed_forward(runtime, index)


def _do_nothing() -> None:
    pass


def _streamed_forward(runtime: Runtime, index: int) -> Callable[..., object]:
    def forward(*args: object, **kwargs: object) -> object:
        return runtime.call(index, args, kwargs)

    return forward


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


def is_streamed(model: torch.nn.Module) -> bool:
    """Whether a runtime runs this model's blocks."""
    return any(_ATTRIBUTE in module.__dict__ for module in model.modules())
