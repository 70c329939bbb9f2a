"""Values of every format against references written from their specifications."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lowmem.quantization.float8 import dequantise_float8, scale_grid, widen_float8
from lowmem.quantization.int4 import dequantise_awq, dequantise_gptq
from lowmem.quantization.mxfp4 import dequantise_mxfp4
from lowmem.quantization.unpacking import power_scales
from tests.lowmem.quantization import reference_formats as reference


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)


def buffers(*shape: int) -> Iterator[Tensor]:
    """Every kind of buffer that values are written to: types, and one that is transposed."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        yield torch.full(shape, torch.nan, dtype=dtype)
    *stack, rows, columns = shape
    yield torch.full((*stack, columns, rows), torch.nan).transpose(-1, -2)


def assert_written(out: Tensor, expected: Tensor) -> None:
    # Equal bits, signs of zeros included; what is not a number only has to stay that.
    wanted = expected.to(out.dtype)
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out.nan_to_num(), wanted.nan_to_num())
    assert torch.equal(out.signbit() | out.isnan(), wanted.signbit() | wanted.isnan())


def test_widening_is_exact_for_every_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    into = torch.empty(256)
    widen_float8(codes.view(torch.float8_e4m3fn), into=into)
    assert_written(into, torch.tensor([reference.e4m3(code) for code in range(256)]))


def test_widening_is_exact_where_subnormals_are_flushed() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        test_widening_is_exact_for_every_code()
    finally:
        torch.set_flush_denormal(False)


def test_powers_of_two_are_exact() -> None:
    byte = torch.arange(256, dtype=torch.uint8)
    expected = torch.tensor([reference.e8m0(e) for e in range(256)])
    assert_written(power_scales(byte), expected)
    assert_written(power_scales(byte.view(torch.float8_e8m0fnu)), expected)


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((64, 96), (32, 48)),
        ((48, 80), (32, 32)),  # Ragged both ways, where the shapes of the scales alone suggest 24 and 27.
        ((5, 3), (128, 128)),
        ((70, 33), (7, 8)),
        ((40, 24), (1, 24)),  # A scale per row.
        ((40, 24), (40, 24)),  # One scale.
    ],
)
def test_float8_tiles(shape: tuple[int, int], tile: tuple[int, int]) -> None:
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    scales = (
        torch.rand(scale_grid(shape, tile)) * torch.tensor([1e-4, 3e4])[torch.randint(0, 2, scale_grid(shape, tile))]
    )
    expected = reference.float8_tiles(codes, scales, tile)
    for out in buffers(*shape):
        dequantise_float8(codes.view(torch.float8_e4m3fn), scales, tile=tile, out=out)
        assert_written(out, expected)


def test_float8_with_powers_of_two_per_32() -> None:
    codes = torch.randint(0, 256, (6, 80), dtype=torch.uint8)
    scales = torch.randint(100, 140, (6, 3), dtype=torch.uint8)
    out = torch.empty(6, 80)
    dequantise_float8(codes.view(torch.float8_e4m3fn), scales, tile=(1, 32), out=out)
    assert_written(out, reference.float8_tiles(codes, scales, (1, 32)))


def test_float8_is_the_same_in_many_pieces() -> None:
    # More rows than fit a piece, and pieces that end inside a tile.
    codes = torch.randint(0, 256, (300, 2048), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.rand(3, 16)
    out = torch.empty(300, 2048)
    dequantise_float8(codes, scales, tile=(128, 128), out=out)
    for row in (0, 63, 64, 127, 128, 299):
        one = torch.empty(1, 2048)
        dequantise_float8(codes[row : row + 1], scales[row // 128 :][:1], tile=(128, 128), out=one)
        assert_written(out[row : row + 1], one)


def test_mxfp4_experts_in_the_models_orientation() -> None:
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 10, 2), dtype=torch.uint8)
    expected = reference.mxfp4(blocks, scales)
    for out in buffers(3, 64, 10):
        dequantise_mxfp4(blocks, scales, out=out.transpose(1, 2))
        assert_written(out, expected)
    one = torch.empty(10, 64)
    dequantise_mxfp4(blocks[1], scales[1], out=one)
    assert_written(one, expected[1].t())


@pytest.mark.parametrize("first_version", [True, False])
@pytest.mark.parametrize("order", ["in order", "by activation"])
@pytest.mark.parametrize(("num_inputs", "group_size"), [(64, 16), (64, 64), (72, 32)])
def test_gptq(first_version: bool, order: str, num_inputs: int, group_size: int) -> None:
    groups = -(-num_inputs // group_size)
    qweight, qzeros, scales = words(num_inputs // 8, 24), words(groups, 3), torch.randn(groups, 24).half()
    g_idx = torch.arange(num_inputs, dtype=torch.int32) // group_size
    if order == "by activation":
        g_idx = g_idx[torch.randperm(num_inputs)]
    expected = reference.gptq(qweight, qzeros, scales, g_idx, first_version=first_version)
    for out in buffers(24, num_inputs):
        dequantise_gptq(
            [qweight, qzeros, scales],
            out,
            group_of_input=g_idx if order == "by activation" else None,
            zero_offset=int(first_version),
            group_size=group_size,
        )
        assert_written(out, expected)


@pytest.mark.parametrize(("num_inputs", "group_size"), [(64, 16), (64, 64), (512, 256)])
def test_awq(num_inputs: int, group_size: int) -> None:
    qweight, qzeros = words(num_inputs, 3), words(num_inputs // group_size, 3)
    scales = torch.randn(num_inputs // group_size, 24).half()
    expected = reference.awq(qweight, qzeros, scales, group_size=group_size)
    for out in buffers(24, num_inputs):
        dequantise_awq([qweight, qzeros, scales], out, group_size=group_size)
        assert_written(out, expected)
