from pathlib import Path

import pytest
import torch

from offload.blocks import BlockSpec, TensorSpec
from offload.errors import BudgetError, OffloadError, ReadError, SourceChanged, SourceError


def spec_of(name: str = "w", shape: tuple[int, ...] = (2, 3), nbytes: int = 12, offset_bytes: int = 9) -> TensorSpec:
    return TensorSpec(
        name=name,
        dtype=torch.bfloat16,
        shape=shape,
        file=Path("/a.safetensors"),
        offset_bytes=offset_bytes,
        nbytes=nbytes,
    )


def test_bytes_of_a_block_are_the_sum_of_its_tensors() -> None:
    assert BlockSpec(name="b", tensors=(spec_of("a"), spec_of("b", (), 2), spec_of("c", (0, 4), 0))).nbytes == 14


def test_tensor_whose_bytes_do_not_match_its_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"w: shape \[2, 3\] of torch.bfloat16 is 12 bytes, got 13"):
        spec_of(nbytes=13)
    with pytest.raises(ValueError, match=r"w: shape \[-1, -1\]"):
        spec_of(shape=(-1, -1), nbytes=2)
    with pytest.raises(ValueError, match="w: offset_bytes must be 0 or more, got -1"):
        spec_of(offset_bytes=-1)


def test_tensor_listed_twice_in_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"block layer\.0: tensor w is listed twice"):
        BlockSpec(name="layer.0", tensors=(spec_of(), spec_of()))


def test_errors_are_one_family_and_carry_what_they_name() -> None:
    file = Path("/a.safetensors")
    errors = [
        SourceError(file, field="dtype", problem="p", remedy="r"),
        SourceChanged(file, problem="expected 2 bytes, got 1"),
        ReadError(file, offset_bytes=4096, nbytes=7, reason="Input/output error (EIO)"),
        BudgetError("too small", needed_bytes=5),
    ]
    assert all(isinstance(error, OffloadError) for error in errors)
    assert isinstance(errors[0], ValueError)
    assert str(errors[0]) == "/a.safetensors: dtype: p; r"
    assert "reading 7 bytes at offset 4096 failed: Input/output error (EIO)" in str(errors[2])
    assert errors[3].needed_bytes == 5
