"""Large tensors in mappings of their own, on a CPU.

What is as long as the sequence and lives from block to block would lie in the heap between temporaries, keep them from
being used again in large pieces, and stay with the process after it is freed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offload import StagingBuffer

_LARGE_BYTES = 1 << 20


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


__all__ = ["empty", "empty_like"]
