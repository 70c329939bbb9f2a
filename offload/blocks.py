"""Stored tensors, the blocks and objects they make up, and where each lies in files and buffers. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Where a tensor lies on disk and how its bytes are to be read."""

    name: str
    """Name of the tensor in its checkpoint."""
    dtype: torch.dtype
    """Type of the stored elements; bytes are moved raw, conversion is the reader's business."""
    shape: tuple[int, ...]
    """Shape of the stored tensor; ``()`` for a scalar."""
    file: Path
    """File that holds it."""
    offset_bytes: int
    """Position of the first byte from the start of the file; need not be aligned to anything."""
    nbytes: int
    """Stored bytes: number of elements times element size."""

    def __post_init__(self) -> None:
        if self.offset_bytes < 0:
            raise ValueError(f"{self.name}: offset_bytes must be 0 or more, got {self.offset_bytes}")
        expected_bytes = math.prod(self.shape) * self.dtype.itemsize
        if self.nbytes != expected_bytes or min(self.shape, default=0) < 0:
            raise ValueError(
                f"{self.name}: shape {list(self.shape)} of {self.dtype} is {expected_bytes} bytes, got {self.nbytes}"
            )


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """The tensors that are moved together because they are used together."""

    name: str
    """Name of the block, for errors and traces."""
    tensors: tuple[TensorSpec, ...]
    """Its tensors, from any files and in any order."""

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for spec in self.tensors:
            if spec.name in seen:
                raise ValueError(f"block {self.name}: tensor {spec.name} is listed twice; list each tensor once")
            seen.add(spec.name)

    @property
    def nbytes(self) -> int:
        """Stored bytes of all its tensors, without alignment."""
        return sum(spec.nbytes for spec in self.tensors)


ALIGNMENT_BYTES = 16
"""What kernels of a GPU ask of a tensor's address: grouped products refuse less, others run in narrower variants."""

FIRST_ALIGNMENT_BYTES = 256
"""What torch's own allocator gives the first tensor of a piece of memory, or more."""

PAGE_BYTES = 4096
"""What O_DIRECT asks of file offsets, lengths and memory addresses on every common disk and file system."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """One contiguous range of one file that is read in one go.

    Both offsets are multiples of the page. A direct read may round `nbytes` up to a whole page: the buffer has room for
    that before the next extent begins, and a file may end inside the page.
    """

    file: Path
    """File to read from."""
    file_offset_bytes: int
    """First byte to read."""
    nbytes: int
    """Bytes that must be there: up to the last byte of the last tensor in the range."""
    buffer_offset_bytes: int
    """Where the first byte lands in the staging buffer."""


@dataclass(frozen=True, kw_only=True)
class DeviceCopy:
    """A contiguous part of a staging buffer, and where a device with memory of its own gets it."""

    source_offset_bytes: int
    """First byte in the staging buffer."""
    nbytes: int
    """Bytes."""
    offset_bytes: int
    """Where the first byte goes in a slot of the device."""


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """How a block is read: its extents, and where its tensors are once they have been read."""

    name: str
    """Name of the block, for errors and traces."""
    extents: tuple[Extent, ...]
    """Ranges to read, by file and then by offset."""
    tensor_offsets: Mapping[str, int]
    """Position of each tensor's first byte in the staging buffer, by tensor name. May be misaligned for its dtype."""
    buffer_bytes: int
    """Staging bytes needed: every extent rounded up to whole pages."""
    copies: tuple[DeviceCopy, ...] = ()
    """What goes to a device with memory of its own, in `buffer_bytes` there at most."""
    device_offsets: Mapping[str, int] = field(default_factory=dict)
    """Position of each tensor's first byte in the device's slot. Aligned for kernels, where there is room for that."""
    page_bytes: int = PAGE_BYTES
    """Alignment of the extents."""

    @property
    def read_bytes(self) -> int:
        """Bytes that the extents ask for, alignment and merged gaps included."""
        return sum(extent.nbytes for extent in self.extents)

    @property
    def copied_bytes(self) -> int:
        """Bytes that go to a device with memory of its own."""
        return sum(copy.nbytes for copy in self.copies)


def ceil_div(value: int, divisor: int) -> int:
    """`value` divided by `divisor`, rounded up."""
    return -(-value // divisor)


def round_up(nbytes: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `nbytes`."""
    return ceil_div(nbytes, multiple) * multiple


def lay_out(block: BlockSpec, page_bytes: int = PAGE_BYTES, *, max_gap_bytes: int = 65536) -> BlockLayout:
    """Cover a block's tensors with few page-aligned extents.

    Tensors of one file whose pages are at most `max_gap_bytes` apart share an extent: reading a small gap costs less
    than one more request.

    Args:
        block: The block; its tensors may lie in several files, in any order, and may overlap.
        page_bytes: Alignment of file offsets and of positions in the buffer; a power of two.
        max_gap_bytes: Largest number of unused bytes that is read to save a request.

    Raises:
        ValueError: `page_bytes` is not a power of two, or `max_gap_bytes` is negative.
    """
    if page_bytes < 1 or page_bytes & (page_bytes - 1):
        raise ValueError(f"page_bytes must be a power of two, got {page_bytes}")
    if max_gap_bytes < 0:
        raise ValueError(f"max_gap_bytes must be 0 or more, got {max_gap_bytes}")
    # An empty tensor occupies nothing: it sits at the start of the buffer.
    offsets = {spec.name: 0 for spec in block.tensors}
    extents: list[Extent] = []
    buffer_bytes = 0
    groups = _group(block, page_bytes, max_gap_bytes=max_gap_bytes)
    for group in groups:
        start = group[0].offset_bytes // page_bytes * page_bytes
        nbytes = max(spec.offset_bytes + spec.nbytes for spec in group) - start
        extents.append(
            Extent(file=group[0].file, file_offset_bytes=start, nbytes=nbytes, buffer_offset_bytes=buffer_bytes)
        )
        for spec in group:
            offsets[spec.name] = buffer_bytes + spec.offset_bytes - start
        buffer_bytes += round_up(nbytes, page_bytes)
    copies, device_offsets = _device_copies(groups, offsets, room_bytes=buffer_bytes, split=True)
    if copies is None:
        copies, device_offsets = _device_copies(groups, offsets, room_bytes=buffer_bytes, split=False)
    return BlockLayout(
        name=block.name,
        extents=tuple(extents),
        tensor_offsets=offsets,
        buffer_bytes=buffer_bytes,
        copies=copies or (),
        device_offsets=device_offsets,
        page_bytes=page_bytes,
    )


def _device_copies(
    groups: Sequence[Sequence[TensorSpec]], offsets: Mapping[str, int], *, room_bytes: int, split: bool
) -> tuple[tuple[DeviceCopy, ...] | None, dict[str, int]]:
    """One copy per extent, without what lies before its first tensor, so that this one is aligned for kernels.

    Args:
        groups: The tensors of each extent in file order.
        offsets: Where each lies in the staging buffer.
        room_bytes: Bytes of a slot.
        split: Where a tensor of odd size puts those behind it out of step, begin another copy.

    Returns:
        The copies, or None where the split ones find no room (a great many tensors of a few bytes); and where the
        tensors lie. Without a split those out of step stay so, and `view_tensor` copies them.
    """
    found: list[DeviceCopy] = []
    placed = dict.fromkeys(offsets, 0)
    end = 0
    for group in groups:
        at = round_up(end, FIRST_ALIGNMENT_BYTES)
        run = DeviceCopy(source_offset_bytes=offsets[group[0].name], nbytes=0, offset_bytes=at)
        for spec in group:
            start = offsets[spec.name]
            if split and (start - run.source_offset_bytes) % ALIGNMENT_BYTES:
                found.append(run)
                at = round_up(run.offset_bytes + run.nbytes, ALIGNMENT_BYTES)
                run = DeviceCopy(source_offset_bytes=start, nbytes=0, offset_bytes=at)
            run = replace(run, nbytes=max(run.nbytes, start + spec.nbytes - run.source_offset_bytes))
            placed[spec.name] = run.offset_bytes + start - run.source_offset_bytes
        found.append(run)
        end = run.offset_bytes + run.nbytes
    # Pages smaller than an alignment are for tests; a slot of whole pages has room for one copy of each extent.
    return (None if split and end > room_bytes else tuple(found)), placed


def _group(block: BlockSpec, page_bytes: int, *, max_gap_bytes: int) -> list[list[TensorSpec]]:
    """Group tensors that share an extent, each group in file order."""
    groups: list[list[TensorSpec]] = []
    end = 0
    for spec in sorted(block.tensors, key=lambda spec: (str(spec.file), spec.offset_bytes, spec.nbytes)):
        if spec.nbytes == 0:
            continue
        start = spec.offset_bytes // page_bytes * page_bytes
        if groups and groups[-1][0].file == spec.file and start - end <= max_gap_bytes:
            groups[-1].append(spec)
        else:
            groups.append([spec])
            end = 0
        end = max(end, round_up(spec.offset_bytes + spec.nbytes, page_bytes))
    return groups


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedTensor:
    """One tensor of an object."""

    name: str
    """Its name within the object."""
    dtype: torch.dtype
    """Type of its elements."""
    shape: tuple[int, ...]
    """Its shape."""
    offset_bytes: int
    """Where it begins, from the start of the object: a whole number of pages."""

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class ObjectLayout:
    """The tensors that make up one object; the same in its file and in a buffer that it is read into as a whole."""

    tensors: tuple[PlacedTensor, ...]
    """By position."""

    @property
    def nbytes(self) -> int:
        """Size of the object in whole pages."""
        return max((round_up(placed.offset_bytes + placed.nbytes, PAGE_BYTES) for placed in self.tensors), default=0)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tensors in a buffer of shape (nbytes,), uint8, by name: views of it.

        Raises:
            ValueError: The buffer is too small.
        """
        if buffer.numel() < self.nbytes:
            raise ValueError(f"expected a buffer of at least {self.nbytes} bytes, got {buffer.numel()}")
        return {
            placed.name: buffer[placed.offset_bytes : placed.offset_bytes + placed.nbytes]
            .view(placed.dtype)
            .view(placed.shape)
            for placed in self.tensors
        }


def lay_out_object(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> ObjectLayout:
    """Lay tensors out one after another, each on a page of its own, so that each can be read alone without a page more.

    Args:
        tensors: Type and shape by name.
    """
    placed = []
    start = 0
    for name, (dtype, shape) in tensors.items():
        tensor = PlacedTensor(name=name, dtype=dtype, shape=tuple(shape), offset_bytes=start)
        placed.append(tensor)
        start = round_up(start + tensor.nbytes, PAGE_BYTES)
    return ObjectLayout(tensors=tuple(placed))
