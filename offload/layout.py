"""Which byte ranges of which files make up a block, and where each lands in its staging buffer. Pure arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from offload.spec import BlockSpec, TensorSpec

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
    page_bytes: int = PAGE_BYTES
    """Alignment of the extents."""

    @property
    def read_bytes(self) -> int:
        """Bytes that the extents ask for, alignment and merged gaps included."""
        return sum(extent.nbytes for extent in self.extents)


def round_up(nbytes: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `nbytes`."""
    return -(-nbytes // multiple) * multiple


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
    for group in _group(block, page_bytes, max_gap_bytes=max_gap_bytes):
        start = group[0].offset_bytes // page_bytes * page_bytes
        nbytes = max(spec.offset_bytes + spec.nbytes for spec in group) - start
        extents.append(
            Extent(file=group[0].file, file_offset_bytes=start, nbytes=nbytes, buffer_offset_bytes=buffer_bytes)
        )
        for spec in group:
            offsets[spec.name] = buffer_bytes + spec.offset_bytes - start
        buffer_bytes += round_up(nbytes, page_bytes)
    return BlockLayout(
        name=block.name,
        extents=tuple(extents),
        tensor_offsets=offsets,
        buffer_bytes=buffer_bytes,
        page_bytes=page_bytes,
    )


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
