"""Large tensors in mappings of their own, on a CPU.

What is as long as the sequence and lives from block to block would lie in the heap between temporaries and keep them
from being used again in large pieces. And the heap keeps what is freed at its end: up to 64 MiB, once something large
has been freed.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from offload import StagingBuffer

_LARGE_BYTES = 1 << 20
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def empty(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor, no view of anything.

    Args:
        shape: Its shape.
        dtype: Its type.
        device: Its device; anywhere but on a CPU this is torch's own.
    """
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cpu" or nbytes < _LARGE_BYTES:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    storage = StagingBuffer(nbytes).tensor.untyped_storage()
    strides = torch.empty(tuple(shape), device="meta").stride()
    return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape), strides)


def empty_like(tensor: Tensor) -> Tensor:
    """The same for a tensor of another's shape and type, contiguous whatever that is."""
    return empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def give_back_freed() -> None:
    """Have the C library give freed memory back to the system, where it can; takes some milliseconds."""
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)


__all__ = ["empty", "empty_like", "give_back_freed"]
