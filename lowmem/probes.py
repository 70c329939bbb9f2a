"""Measurements of this machine as plain records, each with what it was measured on."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from lowmem.rates import probe_copy
from offload import probe_compute, probe_disk


def probe_lines(files: Sequence[Path], *, device: torch.device, dtype: torch.dtype) -> Iterator[Mapping[str, object]]:
    """Measure disk, copies and computation, one after the other.

    Args:
        files: The checkpoint's shards.
        device: Compute device.
        dtype: Compute dtype.

    Yields:
        One flat record for each setting of the disk, then for copies, then for computation.

    Raises:
        SourceError: A file is missing or empty.
        ReadError: A file cannot be read.
    """
    machine = {"machine": platform.machine(), "torch": torch.__version__, "num_threads": torch.get_num_threads()}
    disk = probe_disk(files, max_s=2.0, max_bytes=1 << 30)
    for setting in disk.measured:
        yield {
            "probe": "disk",
            "folder": str(files[0].parent),
            "gb_per_s": round(setting.read_bytes_per_s / 1e9, 3),
            "num_requests": setting.num_threads,
            "request_bytes": setting.request_bytes,
            "is_chosen": (setting.num_threads, setting.request_bytes) == (disk.num_threads, disk.request_bytes),
        }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    yield {"probe": "copy", "device": name, "gb_per_s": round(probe_copy(device) / 1e9, 3), **machine}
    yield {
        "probe": "compute",
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "gflop_per_s": round(probe_compute(dtype, device) / 1e9, 2),
        **machine,
    }
