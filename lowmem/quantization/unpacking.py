"""Arithmetic that formats share: rows of packed weights become fp32 a piece at a time, in the processor's cache.

Values are computed in fp32 and rounded once, to the type of the buffer that takes them. Torch alone: the same on every
device, and faster on a processor than kernels that walk a matrix element by element
(`python -m benchmarks.dequantisation`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FillRows = Callable[[slice, Tensor], None]
"""Writes some rows of a matrix, (rows, columns), contiguous fp32."""

_CACHED_ELEMENTS = 1 << 17
"""Half a megabyte of fp32, which a core's second-level cache holds through the passes over a piece."""
_DEVICE_ELEMENTS = 1 << 24
"""On a GPU a piece must be large enough to fill it; 64 MB of temporaries."""


def unpack_rows(out: Tensor, fill: FillRows, *, multiple: int = 1) -> None:
    """Fill a matrix of any floating-point type and any strides through pieces in fp32.

    Args:
        out: Shape (rows, columns); written completely.
        fill: Writes the rows that it is asked for.
        multiple: Pieces begin and end at multiples of so many rows, but for the end of the matrix.
    """
    num_rows, num_columns = out.shape
    if not out.numel():
        return
    elements = _CACHED_ELEMENTS if out.device.type == "cpu" else _DEVICE_ELEMENTS
    step = max(1, elements // num_columns // multiple) * multiple
    direct = out.dtype == torch.float32 and out.is_contiguous()
    piece = None if direct else torch.empty((min(step, num_rows), num_columns), dtype=torch.float32, device=out.device)
    # Where columns lie together the piece is turned first: written straight it would go to memory four bytes at a time.
    turned = rounded = None
    if piece is not None and out.stride(0) == 1 and num_rows > 1:
        rounded = piece if out.dtype == torch.float32 else torch.empty_like(piece, dtype=out.dtype)
        turned = torch.empty((num_columns, len(piece)), dtype=out.dtype, device=out.device)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        if piece is None:
            fill(rows, out[rows])
            continue
        part = piece[: rows.stop - rows.start]
        fill(rows, part)
        if turned is None or rounded is None:
            out[rows].copy_(part)
        else:
            # Rounded before: turning is quick within one type.
            if rounded is not piece:
                rounded[: len(part)].copy_(part)
            whole = turned[:, : len(part)]
            whole.copy_(rounded[: len(part)].t())
            out.t()[:, rows].copy_(whole)


class PairLookup:
    """Unpacks bytes of two weights each with one look-up, in memory that it keeps: fresh pages cost more than the work.

    A table has, for each byte, the values of its low and of its high nibble, as one element of 64 bits.

    Args:
        values: What the 16 codes stand for.
        device: Where bytes are unpacked.
    """

    def __init__(self, values: Sequence[float], *, device: torch.device) -> None:
        codes = torch.tensor(values, dtype=torch.float32)
        byte = torch.arange(256)
        pairs = torch.stack((codes[byte & 15], codes[byte >> 4]), dim=1)
        self._table = pairs.view(torch.int64).flatten().to(device)
        self._index = torch.empty(0, dtype=torch.int32, device=device)

    def __call__(self, packed: Tensor, *, into: Tensor) -> None:
        """Unpack bytes.

        Args:
            packed: Any shape, uint8.
            into: Contiguous fp32 with twice as many elements; low nibbles come first.
        """
        if self._index.numel() < packed.numel():
            self._index = torch.empty(packed.numel(), dtype=torch.int32, device=packed.device)
        index = self._index[: packed.numel()]
        index.view(packed.shape).copy_(packed)
        torch.index_select(self._table, 0, index, out=into.view(-1).view(torch.int64))


def power_scales(exponents: Tensor) -> Tensor:
    """Scales that are powers of two, in fp32: the format E8M0 of the OCP MX specification (1.0, section 5.4.1).

    Args:
        exponents: Any shape, uint8 or float8_e8m0fnu: a byte e is 2^(e - 127), and 255 is not a number.
    """
    # By table: hardware conversions of the smallest one, a subnormal, depend on the mode of the processor.
    table = torch.tensor([2.0 ** (e - 127) for e in range(255)] + [float("nan")], dtype=torch.float32)
    byte = exponents.contiguous().view(torch.uint8)
    return table.to(exponents.device)[byte.to(torch.int32)]


def scale_columns(values: Tensor, scales: Tensor, group: int, *, zeros: Tensor | None = None) -> None:
    """Multiply each run of `group` columns with its scale, the last run being shorter where columns do not divide.

    Args:
        values: Shape (rows, columns), fp32; changed in place.
        scales: Shape (rows, ceil(columns / group)), fp32.
        group: Columns that share a scale.
        zeros: What is subtracted before, of the shape of `scales`; None for nothing.
    """
    whole = values.shape[1] // group
    runs = values[:, : whole * group].view(values.shape[0], whole, group)
    rest = values[:, whole * group :]
    if zeros is not None:
        runs.sub_(zeros[:, :whole, None])
        rest.sub_(zeros[:, whole:])
    runs.mul_(scales[:, :whole, None])
    rest.mul_(scales[:, whole:])
