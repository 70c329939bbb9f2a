import sys
from pathlib import Path

import pytest
import torch

from offload.blocks import PAGE_BYTES, TensorSpec
from offload.buffers import StagingBuffer, view_tensor
from offload.errors import Closed


def spec_of(dtype: torch.dtype, shape: tuple[int, ...]) -> TensorSpec:
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    return TensorSpec(name="w", dtype=dtype, shape=shape, file=Path("/a"), offset_bytes=0, nbytes=nbytes)


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, (2 << 20) + 1])
def test_buffer_is_page_aligned_and_of_the_exact_size(nbytes: int) -> None:
    with StagingBuffer(nbytes) as buffer:
        assert buffer.nbytes == buffer.tensor.numel() == nbytes
        assert buffer.tensor.dtype == torch.uint8
        assert nbytes == 0 or buffer.tensor.data_ptr() % 4096 == 0
        buffer.tensor.fill_(7)


def test_views_outlive_the_buffer_and_the_buffer_does_not_outlive_close() -> None:
    buffer = StagingBuffer(4096)
    view = view_tensor(buffer.tensor.fill_(1), 8, spec=spec_of(torch.int8, (4,)))
    buffer.close()
    buffer.close()
    assert view.tolist() == [1, 1, 1, 1]
    with pytest.raises(Closed, match="the staging buffer was closed"):
        _ = buffer.tensor


@pytest.mark.skipif(torch.cuda.is_available(), reason="pinning works where CUDA does")
def test_pinning_falls_back_to_pageable_memory() -> None:
    with StagingBuffer(10, pin=True) as buffer:
        assert not buffer.tensor.is_pinned()
        buffer.tensor.fill_(3)


@pytest.mark.gpu
@pytest.mark.parametrize("nbytes", [1, 4097, (2 << 20) + 1])
def test_pinned_buffer_is_registered_until_it_is_closed(nbytes: int) -> None:
    buffer = StagingBuffer(nbytes, pin=True)
    assert buffer.tensor.is_pinned()
    memory = buffer.tensor.fill_(5)
    assert memory.is_pinned()
    assert torch.equal(memory.to("cuda", non_blocking=True).cpu(), memory)
    buffer.close()
    assert not memory.is_pinned()
    assert int(memory.sum()) == 5 * nbytes


def test_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="nbytes must be 0 or more, got -1"):
        StagingBuffer(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0, 4)])
@pytest.mark.parametrize("offset", [0, 1, 4, 8, 4095])
def test_tensor_is_viewed_without_a_copy_where_alignment_allows(
    dtype: torch.dtype, shape: tuple[int, ...], offset: int
) -> None:
    spec = spec_of(dtype, shape)
    stored = torch.randint(0, 2, (spec.nbytes,), dtype=torch.uint8)
    with StagingBuffer(8192) as buffer:
        buffer.tensor[offset : offset + spec.nbytes] = stored
        tensor = view_tensor(buffer.tensor, offset, spec=spec)
        assert tensor.dtype == dtype
        assert tensor.shape == shape
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), stored)
        shares = tensor.untyped_storage().data_ptr() == buffer.tensor.untyped_storage().data_ptr()
        assert shares == (offset % dtype.itemsize == 0)


def test_view_of_a_slice_is_checked_against_its_own_start() -> None:
    with StagingBuffer(8192) as buffer:
        buffer.tensor.copy_(torch.arange(8192) % 251)
        spec = spec_of(torch.float32, (2,))
        tensor = view_tensor(buffer.tensor[1:], 3, spec=spec)
        assert torch.equal(tensor.view(torch.uint8), torch.arange(4, 12, dtype=torch.uint8))
        assert tensor.untyped_storage().data_ptr() == buffer.tensor.untyped_storage().data_ptr()


def test_tensor_outside_the_buffer_is_refused() -> None:
    with StagingBuffer(16) as buffer:
        for offset in (-1, 13):
            with pytest.raises(ValueError, match=f"w: expected bytes {offset} to .* which has 16 bytes"):
                view_tensor(buffer.tensor, offset, spec=spec_of(torch.uint8, (4,)))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_memory_given_back_leaves_the_process_and_can_be_used_again() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES

    nbytes = 64 << 20
    with StagingBuffer(nbytes) as buffer:
        buffer.tensor.fill_(1)
        full_bytes = resident_bytes()
        buffer.give_back(PAGE_BYTES, nbytes)
        assert resident_bytes() < full_bytes - nbytes // 2
        assert (buffer.tensor[:PAGE_BYTES] == 1).all()
        buffer.tensor.fill_(2)
        assert (buffer.tensor == 2).all()
        with pytest.raises(ValueError, match="start must be a multiple of 4096, got 1"):
            buffer.give_back(1, nbytes)
    with pytest.raises(Closed):
        buffer.give_back(0, PAGE_BYTES)
