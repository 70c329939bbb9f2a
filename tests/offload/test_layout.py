import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from offload.blocks import BlockLayout, BlockSpec, TensorSpec, lay_out, round_up

PAGE = 4096


def block_of(*places: tuple[str, int, int]) -> BlockSpec:
    """A block of uint8 tensors, each given as (file, offset, bytes)."""
    return BlockSpec(
        name="block",
        tensors=tuple(
            TensorSpec(name=f"t{i}", dtype=torch.uint8, shape=(n,), file=Path(file), offset_bytes=offset, nbytes=n)
            for i, (file, offset, n) in enumerate(places)
        ),
    )


def ranges(layout: BlockLayout) -> list[tuple[str, int, int, int]]:
    return [(str(e.file), e.file_offset_bytes, e.nbytes, e.buffer_offset_bytes) for e in layout.extents]


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097])
@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, 4097])
def test_one_tensor_is_covered_from_the_page_it_begins_in(offset: int, nbytes: int) -> None:
    layout = lay_out(block_of(("/a", offset, nbytes)))
    start = offset // PAGE * PAGE
    assert ranges(layout) == [("/a", start, offset - start + nbytes, 0)]
    assert layout.tensor_offsets == {"t0": offset - start}
    assert layout.buffer_bytes == round_up(offset - start + nbytes, PAGE)


def test_neighbours_in_any_order_share_an_extent_and_a_page() -> None:
    layout = lay_out(block_of(("/a", 5000, 100), ("/a", 4100, 900)), max_gap_bytes=0)
    assert ranges(layout) == [("/a", 4096, 1004, 0)]
    assert layout.tensor_offsets == {"t0": 904, "t1": 4}


def test_gaps_are_read_up_to_the_limit_and_no_further() -> None:
    block = block_of(("/a", 0, 10), ("/a", PAGE * 3 + 5, 10))
    assert len(lay_out(block, max_gap_bytes=2 * PAGE).extents) == 1
    assert ranges(lay_out(block, max_gap_bytes=2 * PAGE - 1)) == [("/a", 0, 10, 0), ("/a", 3 * PAGE, 15, PAGE)]


def test_files_are_never_merged() -> None:
    layout = lay_out(block_of(("/b", 0, PAGE), ("/a", PAGE, 1)))
    assert ranges(layout) == [("/a", PAGE, 1, 0), ("/b", 0, PAGE, PAGE)]
    assert layout.buffer_bytes == 2 * PAGE


def test_empty_tensors_and_empty_blocks_need_no_bytes() -> None:
    layout = lay_out(block_of(("/a", 77, 0)))
    assert (layout.extents, layout.buffer_bytes, layout.tensor_offsets) == ((), 0, {"t0": 0})
    assert lay_out(block_of()).buffer_bytes == 0


def test_random_blocks_are_covered_once_page_aligned_and_without_large_waste() -> None:
    rng = random.Random(1)
    for _ in range(300):
        page = rng.choice([512, PAGE, 65536])
        gap = rng.choice([0, 4096, 65536, 10**6])
        places = [
            (rng.choice("ab"), rng.randrange(2_000_000), rng.choice([0, 1, 4095, 4096, 4097, 100_000]))
            for _ in range(rng.randrange(30))
        ]
        block = block_of(*places)
        layout = lay_out(block, page, max_gap_bytes=gap)
        for extent in layout.extents:
            assert extent.file_offset_bytes % page == extent.buffer_offset_bytes % page == 0
        for a, b in pairwise(layout.extents):
            assert b.buffer_offset_bytes == a.buffer_offset_bytes + round_up(a.nbytes, page)
            if a.file == b.file:
                assert b.file_offset_bytes - round_up(a.file_offset_bytes + a.nbytes, page) > gap
        for spec in block.tensors:
            if spec.nbytes:
                owners = [
                    extent
                    for extent in layout.extents
                    if extent.file == spec.file
                    and extent.file_offset_bytes <= spec.offset_bytes
                    and spec.offset_bytes + spec.nbytes <= extent.file_offset_bytes + extent.nbytes
                ]
                assert len(owners) == 1
                start = spec.offset_bytes - owners[0].file_offset_bytes
                assert layout.tensor_offsets[spec.name] == owners[0].buffer_offset_bytes + start
        assert layout.read_bytes <= block.nbytes + len(block.tensors) * (page + gap)


def test_impossible_alignment_is_refused() -> None:
    for page in (0, -1, 1000):
        with pytest.raises(ValueError, match=f"page_bytes must be a power of two, got {page}"):
            lay_out(block_of(), page)
    with pytest.raises(ValueError, match="max_gap_bytes must be 0 or more, got -1"):
        lay_out(block_of(), max_gap_bytes=-1)


def random_block(chance: random.Random) -> BlockSpec:
    """Tensors of odd and even sizes close together, as in a file whose header has an odd length."""
    places = []
    for file in ("/a", "/b"):
        position = chance.choice((0, 8, 77, 5000))
        for _ in range(chance.randrange(1, 8)):
            nbytes = chance.choice((0, 1, 6, 16, 64, 100, 4096, 5000, 70_000))
            places.append((file, position, nbytes))
            position += nbytes + chance.choice((0, 0, 0, 3, 9000))
    return block_of(*places)


@pytest.mark.parametrize("seed", range(40))
def test_tensors_lie_aligned_on_a_device_and_are_the_bytes_of_the_file(seed: int) -> None:
    chance = random.Random(seed)
    block = random_block(chance)
    layout = lay_out(block)
    staging = torch.frombuffer(bytearray(chance.randbytes(max(layout.buffer_bytes, 1))), dtype=torch.uint8)
    slot = torch.zeros(max(layout.buffer_bytes, 1), dtype=torch.uint8)
    for copy in layout.copies:
        source = staging[copy.source_offset_bytes : copy.source_offset_bytes + copy.nbytes]
        slot[copy.offset_bytes : copy.offset_bytes + copy.nbytes] = source
    ends = [copy.offset_bytes + copy.nbytes for copy in layout.copies]
    assert all(end <= copy.offset_bytes for end, copy in zip(ends, layout.copies[1:], strict=False))
    assert max(ends, default=0) <= layout.buffer_bytes
    for spec in block.tensors:
        there, here = layout.device_offsets[spec.name], layout.tensor_offsets[spec.name]
        assert torch.equal(slot[there : there + spec.nbytes], staging[here : here + spec.nbytes])
        assert there % 16 == 0
    assert sum(copy.offset_bytes % 256 == 0 for copy in layout.copies) >= len(layout.extents)


def test_even_tensors_are_one_copy_whatever_the_length_of_the_header() -> None:
    layout = lay_out(block_of(("/a", 5008, 4096), ("/a", 5008 + 4096, 32)))
    assert [(copy.nbytes, copy.offset_bytes) for copy in layout.copies] == [(4128, 0)]
    assert layout.device_offsets == {"t0": 0, "t1": 4096}


def test_a_slot_is_no_larger_than_a_staging_buffer_even_if_nothing_in_it_is_aligned() -> None:
    layout = lay_out(block_of(*(("/a", 3 * i, 3) for i in range(1000))))
    assert len(layout.copies) == 1
    assert layout.copied_bytes == 3000
    assert layout.buffer_bytes == PAGE
