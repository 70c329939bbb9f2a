"""Visits to blocks whose experts are taken one by one: what is fetched, what is unpacked, what is lent to the modules.

A visit that many tokens go through fetches the whole block, as stored, and unpacks experts as they are used. One that
few go through fetches the block without its experts; those that tokens are sent to are read when that is known.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lowmem.experts.foresight import Foresight, routers_bytes
from lowmem.experts.products import OpenStack, lend, take_back
from lowmem.experts.reading import ExpertReader
from lowmem.experts.stacks import ExpertStack, RoutedExperts, routed_experts, without_stacks
from lowmem.models.build import StreamedBlock, Unpacker, allocate
from offload import (
    PAGE_BYTES,
    BlockSpec,
    FileIO,
    Placement,
    PlacementPlan,
    Scheduler,
    lay_out,
    round_up,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "num_selected_experts")
"""What configurations call the number of experts that a token is sent to."""

MATRICES_BYTES = 128 << 20
"""Workspace for matrices of single experts: the ones used last stay unpacked, and are unpacked anew otherwise."""

READ_BYTES = 64 << 20
"""Memory for experts read one by one, as stored."""

MIN_READ = 2
"""One expert that is being used, one that is being read."""


def experts_by_block(blocks: Sequence[StreamedBlock]) -> tuple[RoutedExperts | None, ...]:
    """The experts of each block that are taken one by one: those that have to be unpacked."""
    found = (routed_experts(streamed) for streamed in blocks)
    return tuple(experts if experts is not None and experts.is_packed else None for experts in found)


def experts_per_token(config: PretrainedConfig) -> int:
    """Experts that a token is sent to; 1 where the configuration does not say."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in EXPERTS_PER_TOKEN)
    return next((value for value in found if isinstance(value, int) and value > 0), 1)


def num_matrices(experts: RoutedExperts) -> int:
    """How many matrices of each of a block's stacks the workspace holds."""
    each = sum(stack.matrix_bytes for stack in experts.stacks.values())
    return min(experts.num_experts, max(1, MATRICES_BYTES // each))


def buffer_bytes(experts: RoutedExperts) -> int:
    """Bytes that any one expert takes in a buffer, at most."""
    specs = (experts.alone(number, name="").tensors for number in range(experts.num_experts))
    return max(sum(round_up(spec.nbytes, PAGE_BYTES) + PAGE_BYTES for spec in tensors) for tensors in specs)


def workspace_bytes(streamed: StreamedBlock, *, device: torch.device) -> int:
    """Bytes that a visit to a block writes or reads besides its stored tensors.

    Args:
        streamed: The block, with its adapters' modules in it: a stack that carries one is unpacked whole.
        device: Compute device; nothing is allocated.
    """
    (experts,) = experts_by_block([streamed])
    if experts is None or experts.is_adapted:
        return Unpacker([streamed], device=device).workspace_bytes
    matrices = num_matrices(experts) * sum(
        round_up(stack.matrix_bytes, PAGE_BYTES) for stack in experts.stacks.values()
    )
    one = buffer_bytes(experts)
    read = max(MIN_READ, min(experts.num_experts, READ_BYTES // one)) * one
    return Unpacker([without_stacks(streamed, experts)], device=device).workspace_bytes + matrices + read


EXPERT_PASSES = 1.5
"""A forward makes an expert's values once, a backward twice: for the recomputation, and for the gradient."""


def packed_values_bytes(streamed: StreamedBlock) -> int:
    """Bytes of the values that a pass over a block makes of packed weights, every expert having tokens.

    Args:
        streamed: The block, with its adapters' modules in it.
    """
    (experts,) = experts_by_block([streamed])
    one_by_one = frozenset() if experts is None or experts.is_adapted else experts.keys
    slots = {slot.key: slot for slot in streamed.slots}
    total = 0.0
    for recipe in streamed.recipes:
        for target in recipe.targets if recipe.formats else ():
            if target in slots:
                nbytes = slots[target].shape.numel() * slots[target].dtype.itemsize
                total += nbytes * (EXPERT_PASSES if target in one_by_one else 1)
    return int(total)


class MatrixSlots:
    """Room for unpacked matrices of one shape; the least recently used one gives way.

    Args:
        shape: Of a matrix.
        dtype: Compute dtype.
        num: How many there is room for.
        device: Compute device.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, *, num: int, device: torch.device) -> None:
        self._shape, self._dtype, self._num, self._device = shape, dtype, num, device
        self._bytes = round_up(shape.numel() * dtype.itemsize, PAGE_BYTES)
        self._buffer: Tensor | None = None
        self._used: OrderedDict[object, int] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """All of the room."""
        return self._bytes * self._num

    def find(self, key: object) -> Tensor | None:
        """A matrix that is there still."""
        place = self._used.get(key)
        if place is None:
            return None
        self._used.move_to_end(key)
        return self._at(place)

    def __contains__(self, key: object) -> bool:
        """Whether a matrix is there still; does not count as a use of it."""
        return key in self._used

    @contextmanager
    def filling(self, key: object) -> Iterator[Tensor]:
        """Room for a matrix, to be written in the ``with``; where that fails, nothing is there."""
        place = len(self._used) if len(self._used) < self._num else self._used.popitem(last=False)[1]
        try:
            yield self._at(place)
        except BaseException:
            # Places are dense: without this one, none of them can be told apart.
            self._used.clear()
            raise
        self._used[key] = place

    def close(self) -> None:
        """Release the room."""
        self._buffer = None
        self._used.clear()

    def _at(self, place: int) -> Tensor:
        if self._buffer is None:
            self._buffer = allocate(self.nbytes, self._device)
        start = place * self._bytes
        return (
            self._buffer[start : start + self._shape.numel() * self._dtype.itemsize].view(self._dtype).view(self._shape)
        )


class VisitedStack:
    """One stack in the visit under way; see `OpenStack`.

    Args:
        stack: Where its experts lie.
        name: Of the parameter.
        block: Number of the block.
        stored: The block's stored tensors, where its experts are among them.
        slots: Room for matrices.
        reader: Reads single experts, where they are not.
    """

    def __init__(
        self,
        stack: ExpertStack,
        *,
        name: str,
        block: int,
        stored: Mapping[str, Tensor],
        slots: MatrixSlots,
        reader: ExpertReader | None,
    ) -> None:
        self.shape, self.dtype = stack.slot.shape, stack.slot.dtype
        self._stack, self._name, self._block = stack, name, block
        self._stored, self._slots, self._reader = stored, slots, reader

    def expect(self, experts: Sequence[int]) -> None:
        """Start reading those that are not unpacked still."""
        if self._reader is not None:
            self._reader.expect(self._block, [one for one in experts if self._slots.find(self._key(one)) is None])

    def expert(self, number: int) -> Tensor:
        """One expert's matrix."""
        key = self._key(number)
        found = self._slots.find(key)
        if found is not None:
            return found
        stored = self._stored if self._reader is None else self._reader.bring(self._block, number)
        with self._slots.filling(key) as matrix:
            self._stack.make(number, stored, matrix)
        return matrix

    def _key(self, number: int) -> object:
        return self._block, self._name, number


class ExpertUnpacker:
    """Unpacks what is dense in a block, and lends its experts' modules stacks that are unpacked as they are used.

    Args:
        blocks: The model's blocks.
        experts: Of each block, what is taken one by one.
        reader: Reads experts that a visit finds not fetched; stays the caller's.
        device: Compute device.
        foresight: Guesses for the reader; stays the caller's.
    """

    def __init__(
        self,
        blocks: Sequence[StreamedBlock],
        experts: Sequence[RoutedExperts | None],
        *,
        reader: ExpertReader | None,
        device: torch.device,
        foresight: Foresight | None = None,
    ) -> None:
        pairs = list(zip(blocks, experts, strict=True))
        self._experts, self._reader, self._device = tuple(experts), reader, device
        self._foresight = foresight
        self._dense = Unpacker([one if own is None else without_stacks(one, own) for one, own in pairs], device=device)
        # Adapted stacks are unpacked whole; allocated when there is one.
        self._whole = Unpacker(blocks, device=device)
        self._has_whole = False
        self._slots: dict[tuple[torch.Size, torch.dtype], MatrixSlots] = {}
        for own in experts:
            for stack in () if own is None else own.stacks.values():
                shape, dtype = stack.slot.shape[1:], stack.slot.dtype
                assert own is not None
                num = num_matrices(own)
                self._slots.setdefault((shape, dtype), MatrixSlots(shape, dtype, num=num, device=device))
        self._lent: RoutedExperts | None = None

    @property
    def workspace_bytes(self) -> int:
        """Bytes of all workspaces."""
        whole = self._whole.workspace_bytes if self._has_whole else 0
        return self._dense.workspace_bytes + whole + sum(slots.nbytes for slots in self._slots.values())

    def unpack(self, index: int, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The block's dense parameters by model name; all of them where its stacks carry an adapter."""
        self.release()
        experts = self._experts[index]
        if experts is None:
            return self._dense.unpack(index, stored)
        if experts.is_adapted:
            self._has_whole = True
            return self._whole.unpack(index, stored)
        first = next(iter(experts.stacks.values())).experts[0][0].wholes[0].name
        reader = self._reader if first not in stored else None
        values = self._dense.unpack(index, stored)
        foresee = None
        if reader is not None and self._foresight is not None:
            foresee = self._foresight.over(index, values, is_unpacked=self._is_unpacked)
        lend(
            experts.module,
            {name: self._open(index, name, stack, stored, reader) for name, stack in experts.stacks.items()},
            foresee,
        )
        self._lent = experts
        return values

    def release(self) -> None:
        """The visit has ended: stored tensors are no longer there."""
        if self._lent is not None:
            take_back(self._lent.module)
            self._lent = None

    def forget(self) -> None:
        """Take the workspace's contents for stale, after an error in the middle of unpacking."""
        self.release()
        self._dense.forget()
        self._whole.forget()

    def close(self) -> None:
        """Release the workspaces."""
        self.release()
        self._dense.close()
        self._whole.close()
        for slots in self._slots.values():
            slots.close()

    def _is_unpacked(self, block: int, number: int) -> bool:
        experts = self._experts[block]
        return experts is not None and all(
            (block, name, number) in self._slots[stack.slot.shape[1:], stack.slot.dtype]
            for name, stack in experts.stacks.items()
        )

    def _open(
        self, index: int, name: str, stack: ExpertStack, stored: Mapping[str, Tensor], reader: ExpertReader | None
    ) -> OpenStack:
        slots = self._slots[stack.slot.shape[1:], stack.slot.dtype]
        return VisitedStack(stack, name=name, block=index, stored=stored, slots=slots, reader=reader)


def single_experts_bytes(streamed: StreamedBlock) -> tuple[int, int]:
    """Of a block's experts that are taken one by one: bytes that are read for all of them, and those of their values.

    Args:
        streamed: The block, with its adapters' modules in it.
    """
    (experts,) = experts_by_block([streamed])
    if experts is None or experts.is_adapted:
        return 0, 0
    read = {
        spec.name: spec.nbytes
        for number in range(experts.num_experts)
        for spec in experts.alone(number, name="").tensors
    }
    return sum(read.values()), experts.num_experts * sum(stack.matrix_bytes for stack in experts.stacks.values())


def expected_share(num_tokens: int, *, num_experts: int, num_per_token: int) -> float:
    """Part of a block's experts that tokens are sent to, were they spread evenly."""
    return 1 - (1 - min(1.0, num_per_token / max(1, num_experts))) ** num_tokens


MOST_HIT = 0.5
"""Part of its experts up to which a forward without gradients reads them one by one."""


Phase = Literal["forward", "backward", "no_grad"]


class ExpertScheduler:
    """Brings blocks whole, or without their experts where few tokens go through them.

    To the scheduler behind it the blocks without their experts are further blocks, with numbers after the others.

    Args:
        scheduler: Brings both kinds, as `with_dense_blocks` lists them; closed with this.
        experts: Of each block, what is taken one by one.
        plan: Where whole blocks live.
        num_per_token: Experts that a token is sent to.
        reader: For what it holds; stays the caller's.
        foresight: Is told which blocks are read without their experts; stays the caller's.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        experts: Sequence[RoutedExperts | None],
        *,
        plan: PlacementPlan,
        num_per_token: int,
        reader: ExpertReader,
        foresight: Foresight | None = None,
    ) -> None:
        self._scheduler, self._experts, self._reader = scheduler, tuple(experts), reader
        self._has_dense = scheduler.num_blocks > len(experts)
        self._streamed = frozenset(block for block, place in enumerate(plan.placements) if place == Placement.STREAMED)
        self._num_per_token = num_per_token
        self._few = False
        self._foresight = foresight
        if foresight is not None:
            foresight.guess_for(self._streamed)

    def announce(self, phase: Phase, num_tokens: int) -> None:
        """Say what the next visit is for, before its block is asked for."""
        numbers = (own.num_experts for own in self._experts if own is not None)
        num_experts = min(numbers, default=0)
        share = expected_share(num_tokens, num_experts=num_experts, num_per_token=self._num_per_token)
        self._few = self._has_dense and phase == "no_grad" and share <= MOST_HIT

    def memory(self) -> dict[str, int]:
        """Bytes allocated now, by role."""
        kept = 0 if self._foresight is None else self._foresight.nbytes
        return {**self._scheduler.memory(), "expert_bytes": self._reader.allocated_bytes + kept}

    @property
    def bytes_read(self) -> int:
        """Bytes read from disk, of blocks and of single experts."""
        return self._scheduler.counters.bytes_read + self._reader.bytes_read

    def expect(self, order: Iterable[int]) -> None:
        """Fetch ahead for these visits."""
        self._scheduler.expect([self._number(block) for block in order])

    def resident(self, block: int) -> AbstractContextManager[Mapping[str, Tensor]]:
        """A block's tensors on the compute device, for the time of a ``with``."""
        return self._scheduler.resident(self._number(block))

    def reset(self) -> None:
        """End all visits."""
        self._scheduler.reset()

    def close(self) -> None:
        """Stop the transfers and free all buffers. May be called twice."""
        self._scheduler.close()

    def _number(self, block: int) -> int:
        experts = self._experts[block]
        if self._few and block in self._streamed and experts is not None and not experts.is_adapted:
            return len(self._experts) + block
        return block


def with_dense_blocks(
    blocks: Sequence[StreamedBlock], experts: Sequence[RoutedExperts | None], plan: PlacementPlan
) -> tuple[list[BlockSpec], PlacementPlan]:
    """What a scheduler brings: the blocks, and behind them, where any is streamed, the same without their experts.

    Args:
        blocks: The model's blocks.
        experts: Of each block, what is taken one by one.
        plan: Where whole blocks live.
    """
    specs = [streamed.spec for streamed in blocks]
    if Placement.STREAMED not in plan.placements:
        return specs, plan
    dense = [
        without_stacks(streamed, own).spec
        if own is not None and place == Placement.STREAMED
        else BlockSpec(name=f"{streamed.spec.name}, which is never asked for so", tensors=())
        for streamed, own, place in zip(blocks, experts, plan.placements, strict=True)
    ]
    both = replace(
        plan,
        placements=plan.placements + (Placement.STREAMED,) * len(dense),
        block_bytes=plan.block_bytes + tuple(lay_out(spec).buffer_bytes for spec in dense),
    )
    return specs + dense, both


def expert_reader(
    blocks: Sequence[StreamedBlock],
    experts: Sequence[RoutedExperts | None],
    *,
    num_per_token: int,
    reader: FileIO,
    device: torch.device,
) -> tuple[ExpertReader, Foresight | None]:
    """What reads single experts of some blocks, and what guesses for it where its memory leaves room for routers.

    Args:
        blocks: The model's blocks.
        experts: Of each block, what is taken one by one.
        num_per_token: Experts that a token is sent to.
        reader: Reads; stays the caller's.
        device: Compute device.
    """
    largest = max((buffer_bytes(own) for own in experts if own is not None), default=PAGE_BYTES)
    most = max((own.num_experts for own in experts if own is not None), default=1)
    num_buffers = max(MIN_READ, min(most, READ_BYTES // largest))
    # Those of this block, and those of the next one beside them.
    beside = num_buffers - -(-routers_bytes(experts) // largest)
    # A processor unpacks and multiplies an expert for about as long as it is read. A GPU computes next to nothing of
    # it: its disk is never idle, and wrong guesses only add to what it reads.
    guesses = device.type == "cpu" and routers_bytes(experts) > 0 and beside >= 2 * min(num_per_token, most)

    def spec_of(block: int, expert: int) -> BlockSpec:
        own = experts[block]
        assert own is not None
        return own.alone(expert, name=blocks[block].spec.name)

    single = ExpertReader(
        spec_of, reader=reader, device=device, buffer_bytes=largest, num_buffers=beside if guesses else num_buffers
    )
    return single, Foresight(experts, reader=single, num_per_token=num_per_token) if guesses else None
