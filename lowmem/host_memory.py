"""Large tensors in mappings of their own, on a CPU.

What is as long as the sequence and lives from block to block would lie in the heap between temporaries and keep them
from being used again in large pieces. And the heap keeps what is freed at its end: up to 64 MiB, once something large
has been freed.

Products of few rows with a large matrix on a CPU, in the order in which its library uses all cores.

MKL runs x W^T of up to some hundred rows on one core, and W x^T on all of them: 17 against 9 ms for 32 rows and a
5632 x 2048 fp32 matrix on two cores. The values are the same sums in another order.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from offload import StagingBuffer, round_up

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


def process_peak_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Largest resident memory of this process so far, by the kernel's own high-water mark (`VmHWM`).

    Args:
        status: What Linux says about the process; elsewhere getrusage knows the peak.
    """
    try:
        lines = status.read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    # The kernel updates the mark lazily, when memory is given back: the current size may already be above it.
    return max(int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM:", "VmRSS:")))


_ALIGN_BYTES = 64

LEAVES_LITTLE_BYTES = 256 << 10
"""Steps with hidden states smaller than this leave so little on the heap that it is not given back around the head."""


def off_the_heap(grads: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients of one block's parameters in one piece of memory of their own, on a CPU.

    They live until the optimizer step. Small and left on the heap between a block's temporaries, they would keep its
    pages from being used again, and each further block would cost as much memory as the first.
    """
    on_cpu = [grad for grad in grads if grad is not None and grad.device.type == "cpu"]
    if not on_cpu:
        return grads
    memory = StagingBuffer(sum(round_up(grad.nbytes, _ALIGN_BYTES) for grad in on_cpu)).tensor
    moved: list[Tensor | None] = []
    start = 0
    for grad in grads:
        if grad is None:
            moved.append(None)
            continue
        place = memory[start : start + grad.nbytes].view(grad.dtype).view(grad.shape)
        moved.append(place.copy_(grad))
        start += round_up(grad.nbytes, _ALIGN_BYTES)
    return moved


def give_back_freed() -> None:
    """Let the C library give freed memory back to the system, where it can; takes some milliseconds."""
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)


# M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3). glibc maps pieces from 128 KiB on, and raises that to the largest
# that was freed, at most 32 MiB, and what it keeps at the heap's end to twice as much (DEFAULT_MMAP_THRESHOLD_MAX).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_AT_FIRST_BYTES, _AT_MOST_BYTES = 128 << 10, 32 << 20
_TOLD = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
_TUNED = ("glibc.malloc.mmap_threshold", "glibc.malloc.trim_threshold")
_BETWEEN_TRIMS_BYTES = 8 << 20
_maps_pieces, _num_read_bytes = False, 0


def weight_is_read(nbytes: int) -> None:
    """Somebody reads an absent weight on a CPU: from now on large pieces lie outside the heap, where that is glibc's.

    What he makes of each (PEFT's DoRA: four of its size) is freed before the next, but what he keeps lies between.
    4 MiB of adapters made the heap 22 to 138 MiB long, free but for them, and a step's temporaries lay all over it: the
    same job took 130 to 166 MiB; so it takes 134 to 138. Where the environment says when pieces are mapped, it is
    obeyed, and freed memory is given back once in a while.

    Args:
        nbytes: Of the weight.
    """
    global _maps_pieces, _num_read_bytes
    if not _maps_pieces and not _is_told():
        _maps_pieces = _mallopt(_MMAP_THRESHOLD, _AT_FIRST_BYTES)
    if _maps_pieces:
        return
    _num_read_bytes += nbytes
    if _num_read_bytes >= _BETWEEN_TRIMS_BYTES:
        _num_read_bytes = 0
        give_back_freed()


def _is_told() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(name in os.environ for name in _TOLD) or any(name in tunables for name in _TUNED)


def temporaries_begin() -> None:
    """A forward begins: pieces lie on the heap again, as glibc has it after the first large ones.

    A step's temporaries are of the same sizes as the last step's; in mappings of their own each would get new pages
    (twice the time for blocks of hidden 512 in chunks).
    """
    global _maps_pieces
    if _maps_pieces:
        _mallopt(_MMAP_THRESHOLD, _AT_MOST_BYTES)
        _mallopt(_TRIM_THRESHOLD, 2 * _AT_MOST_BYTES)
        _maps_pieces = False


def _mallopt(which: int, nbytes: int) -> bool:
    call = getattr(_LIBC, "mallopt", None)
    return call is not None and call(which, nbytes) == 1


# A single row is a product with a vector, which uses all cores.
_FEWEST_ROWS, _MOST_ROWS = 2, 128
_FEWEST_WEIGHTS = 1 << 20


def is_skinny(rows: Tensor, weight: Tensor) -> bool:
    """Whether ``rows @ weight.T`` is better computed by `product_of_few`.

    Args:
        rows: (..., H).
        weight: (V, H).
    """
    num_rows = rows.numel() // max(1, rows.shape[-1])
    return (
        _FEWEST_ROWS <= num_rows <= _MOST_ROWS
        and weight.numel() >= _FEWEST_WEIGHTS
        and rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and torch.get_num_threads() > 1
    )


def product_of_few(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows @ weight.T`` as the transpose of ``weight @ rows.T``: (..., V), a view with words outermost."""
    flat = rows.reshape(-1, rows.shape[-1])
    return torch.mm(weight, flat.t()).t().view(*rows.shape[:-1], weight.shape[0])


class SkinnyProducts(TorchFunctionMode):
    """Computes `linear` as (W x^T)^T where x has few rows."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Replace large products by few rows; let everything else pass."""
        if (
            func is torch.nn.functional.linear
            and len(args) >= 2
            and not kwargs
            and not torch.is_autocast_enabled("cpu")
        ):
            x, weight = args[0], args[1]
            if isinstance(x, Tensor) and isinstance(weight, Tensor) and is_skinny(x, weight):
                bias = args[2] if len(args) > 2 else None
                out = product_of_few(x, weight).contiguous()
                return out.add_(bias) if isinstance(bias, Tensor) else out
        return func(*args, **(kwargs or {}))


def products_for(
    device: torch.device, shapes: Iterable[Sequence[int]] | None, *, num_tokens: int
) -> AbstractContextManager[object]:
    """What a block that takes so many tokens should run in: `SkinnyProducts` where that helps.

    Args:
        device: Where it runs.
        shapes: Of the block's weights, if known: the mode costs each operator some microseconds, an eighth of the time
            of small blocks.
        num_tokens: Tokens of the call.
    """
    if device.type != "cpu" or not _FEWEST_ROWS <= num_tokens <= _MOST_ROWS:
        return nullcontext()
    if shapes is not None and all(math.prod(shape) < _FEWEST_WEIGHTS for shape in shapes):
        return nullcontext()
    return SkinnyProducts()
