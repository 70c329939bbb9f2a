"""bitsandbytes' kernels, called into memory of ours: from packed weights to values, from values to packed weights.

On a processor its operators always make new tensors (there is no kernel for `out=`), which costs a page fault for each
page of each weight, so the library underneath is called with addresses. Its modules are never used: their forward on a
processor may rewrite the weight in place. Where there is no kernel for a device the caller has torch do the same.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError, untested

Code = Literal["nf4", "fp4"]
"""Tables of 16 values that bitsandbytes has."""

_SUFFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_MOST_ROW_ELEMENTS = 4096
_BLOCK_SIZES_CUDA = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def is_installed() -> bool:
    """Whether bitsandbytes is there; does not import it."""
    try:
        version("bitsandbytes")
    except PackageNotFoundError:
        return False
    return True


def unpack_nibbles(packed: Tensor, absmax: Tensor, out: Tensor, *, code: Code, block_size: int) -> bool:
    """Write `code[nibble] * absmax[block]`, in float32 and rounded once, with bitsandbytes' kernel for the device.

    Args:
        packed: Two weights to a byte, the first in the high half: uint8, contiguous, (ceil(n / 2),).
        absmax: float32, contiguous, (ceil(n / block_size),).
        out: n elements, contiguous, in float32, bfloat16 or float16.
        code: Which table.
        block_size: Weights that share an absmax, a power of two.

    Returns:
        False if there is no kernel for this device: nothing is written then.
    """
    _check(out, packed=packed, absmax=absmax)
    if out.device.type == "cuda":
        functional = _functional_cuda()
        if functional is None or block_size not in _BLOCK_SIZES_CUDA:
            return False
        # The shape [1, n] of packed bytes would mean a transposed weight to it.
        functional.dequantize_4bit(
            packed.view(-1, 1), absmax=absmax, out=out.view(-1), blocksize=block_size, quant_type=code
        )
        return True
    library = _library()
    if library is None:
        return False
    kernel = _symbol(library, f"cdequantize_blockwise_cpu_{code}_{_SUFFIXES[out.dtype]}")
    num = out.numel()
    # Its threads share out rows; whole blocks to a row. The rest is a row of its own.
    row = max(block_size, _MOST_ROW_ELEMENTS)
    rows = num // row
    for start, num_rows, length in ((0, rows, row), (rows * row, 1, num - rows * row)):
        if num_rows and length:
            kernel(
                _address(packed, start // 2),
                _address(absmax, start // block_size),
                _address(out, start),
                *map(ctypes.c_longlong, (block_size, num_rows, length)),
            )
    return True


def unpack_bytes(packed: Tensor, absmax: Tensor, table: Tensor, out: Tensor, *, block_size: int) -> bool:
    """Write `table[byte] * absmax[block]`, in float32 and rounded once, with bitsandbytes' kernel for the device.

    Args:
        packed: uint8, contiguous, (n,).
        absmax: float32, contiguous, (ceil(n / block_size),).
        table: float32, contiguous, (256,).
        out: n elements, contiguous, in float32, bfloat16 or float16.
        block_size: Elements that share an absmax.

    Returns:
        False if there is no kernel for this device: nothing is written then.
    """
    _check(out, packed=packed, absmax=absmax, table=table)
    if out.device.type == "cuda":
        functional = _functional_cuda()
        if functional is None or block_size not in _BLOCK_SIZES_CUDA[1:]:
            return False
        state = functional.QuantState(absmax=absmax, code=table, blocksize=block_size, dtype=out.dtype)
        functional.dequantize_blockwise(packed, state, out=out.view(-1))
        return True
    library = _library()
    if library is None:
        return False
    kernel = _symbol(library, f"cdequantize_blockwise_cpu_{_SUFFIXES[out.dtype]}")
    kernel(
        *(_address(tensor, 0) for tensor in (table, packed, absmax, out)),
        *map(ctypes.c_longlong, (block_size, out.numel())),
    )
    return True


def pack_nibbles(values: Tensor, *, code: Code, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantise with bitsandbytes' `quantize_4bit`.

    Args:
        values: float32, bfloat16 or float16, of whole blocks but for the last.
        code: Which table.
        block_size: Weights that share an absmax.

    Returns:
        Packed bytes, uint8 (ceil(n / 2), 1), and float32 absmaxes (ceil(n / block_size),).
    """
    packed, state = _functional().quantize_4bit(values, blocksize=block_size, quant_type=code)
    return packed, state.absmax


def pack_bytes(values: Tensor, *, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise with bitsandbytes' `quantize_blockwise` and its dynamic table.

    Args:
        values: float32, (n,).
        block_size: Values that share an absmax.

    Returns:
        Codes, uint8 (n,), float32 absmaxes (ceil(n / block_size),) and the table, float32 (256,).
    """
    codes, state = _functional().quantize_blockwise(values, blocksize=block_size)
    return codes, state.absmax, state.code


def pack_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise with bitsandbytes' `int8_vectorwise_quant`, which takes float16.

    Args:
        values: (rows, columns), any floating dtype.

    Returns:
        Codes, int8 (rows, columns), and the largest magnitude of each row, float32 (rows,).
    """
    codes, scales, _ = _functional().int8_vectorwise_quant(values.to(torch.float16))
    return codes, scales


def _check(out: Tensor, **parts: Tensor) -> None:
    """What a kernel that gets addresses takes for granted."""
    if out.dtype not in _SUFFIXES or not out.is_contiguous():
        raise ValueError(f"out: expected contiguous float32, bfloat16 or float16, got {out.dtype} {out.stride()}")
    for name, part in parts.items():
        expected = torch.uint8 if name == "packed" else torch.float32
        if part.dtype != expected or not part.is_contiguous() or part.device != out.device:
            raise ValueError(
                f"{name}: expected contiguous {expected} on {out.device}, got {part.dtype} on {part.device} "
                f"with strides {part.stride()}"
            )


def _address(tensor: Tensor, element: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() + element * tensor.element_size())


@cache
def _library() -> Any | None:
    """The library of kernels for processors; None where bitsandbytes is not installed or has none for this machine."""
    if not is_installed():
        return None
    with _without_advertisement():
        from bitsandbytes import cextension
    library = getattr(cextension, "lib", None)
    if library is None:
        raise untested("bitsandbytes", "it has no cextension.lib")
    if isinstance(library, cextension.ErrorHandlerMockBNBNativeLibrary):
        return None
    return library


def _symbol(library: Any, name: str) -> Any:
    try:
        return getattr(library, name)
    except AttributeError as error:
        raise untested("bitsandbytes", f"its library has no {name}") from error


@cache
def _functional_cuda() -> Any | None:
    """`bitsandbytes.functional` where it has kernels for the GPU, else None."""
    # A GPU that is simulated by a processor's kernels has no others.
    return None if torch.version.cuda is None or not is_installed() else _functional()


@cache
def _functional() -> Any:
    """`bitsandbytes.functional`.

    Raises:
        UnsupportedError: bitsandbytes is not installed.
    """
    if not is_installed():
        raise UnsupportedError(
            "quantising weights",
            reason="bitsandbytes is not installed",
            instead="pip install 'lowmem[quant]', then again",
        )
    with _without_advertisement():
        from bitsandbytes import functional
    return functional


@contextmanager
def _without_advertisement() -> Iterator[None]:
    """Import it without its advice to install `kernels`, which is of use to its own forward only."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
