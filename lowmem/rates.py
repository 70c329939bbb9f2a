"""How fast bytes are read and copied and how fast the device computes: measured, or assumed and said so."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from offload import probe_compute, probe_disk

_MIB = 1 << 20
_COPY_BYTES = 32 * _MIB

_DISK_BYTES_PER_S = 1.0e9
"""One NVMe drive of the slower kind, or a virtual disk."""
_COPY_BYTES_PER_S = {"cpu": 8.0e9, "cuda": 10.0e9}
"""Conversion of a block on a processor; pinned copies over PCIe 3.0 x16."""
_FLOPS_PER_S = {"cpu": 50.0e9, "cuda": 30.0e12}
"""Sustained in matrix products: two cores with AVX2 in fp32; a consumer GPU in bf16."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the predicted step time is made of."""

    disk_bytes_per_s: float = _DISK_BYTES_PER_S
    """Reading the checkpoint, past the page cache."""
    copy_bytes_per_s: float = _COPY_BYTES_PER_S["cpu"]
    """To the device; on a CPU, writing a block's parameters in the compute dtype."""
    compute_flops_per_s: float = _FLOPS_PER_S["cpu"]
    """Matrix products in the compute dtype, a multiplication and an addition counted as two."""
    disk_num_threads: int = 8
    """Requests in flight."""
    disk_request_bytes: int = 4 * _MIB
    """Size of a request."""
    measured: tuple[str, ...] = ()
    """Which of "disk", "copy" and "compute" were measured on this machine; the others are assumed."""

    def __post_init__(self) -> None:
        for name in ("disk_bytes_per_s", "copy_bytes_per_s", "compute_flops_per_s", "disk_num_threads"):
            if getattr(self, name) <= 0:
                raise ValueError(f"Rates.{name} is {getattr(self, name)}; expected a positive number")


def assumed_rates(device: str) -> Rates:
    """Conservative rates for a kind of device, none of them measured.

    Args:
        device: "cpu" or "cuda".
    """
    return Rates(copy_bytes_per_s=_COPY_BYTES_PER_S[device], compute_flops_per_s=_FLOPS_PER_S[device])


def measure_rates(files: Sequence[Path], *, device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure all rates, in about a second: reads from the files, multiplies and copies on the device.

    Args:
        files: The checkpoint's shards.
        device: Compute device.
        dtype: Compute dtype.

    Raises:
        SourceError: A file is missing or empty.
        ReadError: A file cannot be read.
    """
    disk = probe_disk(files)
    return Rates(
        disk_bytes_per_s=disk.read_bytes_per_s,
        disk_num_threads=disk.num_threads,
        disk_request_bytes=disk.request_bytes,
        copy_bytes_per_s=probe_copy(device),
        compute_flops_per_s=probe_compute(dtype, device),
        measured=("disk", "copy", "compute"),
    )


def probe_copy(device: torch.device) -> float:
    """Bytes per second of pinned copies to a GPU, or of widening bf16 to fp32 on a CPU (bytes written)."""
    is_cuda = device.type == "cuda"
    source = torch.zeros(_COPY_BYTES // 2, dtype=torch.bfloat16, pin_memory=is_cuda)
    target = torch.empty(source.numel(), dtype=source.dtype if is_cuda else torch.float32, device=device)
    best_s = float("inf")
    # The first round touches the memory for the first time.
    for _ in range(4):
        start_s = time.perf_counter()
        target.copy_(source, non_blocking=is_cuda)
        if is_cuda:
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - start_s)
    return target.nbytes / best_s
