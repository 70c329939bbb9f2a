"""Reading parts of stored tensors, and writing a safetensors checkpoint tensor by tensor, part by part."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from offload import ReadError, SourceChanged, TensorSpec

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


_INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class OutputTensor:
    """A tensor of the checkpoint to be written."""

    name: str
    """Name it gets."""
    dtype: torch.dtype
    """Type it is stored in."""
    shape: tuple[int, ...]
    """Its shape."""

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class TensorReader:
    """Reads whole rows of stored tensors into one buffer that is used again for each read; owns its descriptors."""

    def __init__(self) -> None:
        self._fds: dict[Path, int] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def read(self, spec: TensorSpec, start_bytes: int, *, nbytes: int) -> Tensor:
        """Read part of a tensor.

        Args:
            spec: The tensor.
            start_bytes: Where the part begins, from the tensor's first byte; a multiple of its element size.
            nbytes: Its length, a multiple of the element size.

        Returns:
            1-D tensor in the stored dtype, valid until the next call.

        Raises:
            SourceChanged: The file ends before the tensor does.
            ReadError: The operating system could not read it.
        """
        if self._buffer.numel() < nbytes:
            self._buffer = torch.empty(nbytes, dtype=torch.uint8)
        part = self._buffer[:nbytes]
        view = part.numpy().data
        fd = self._fds.get(spec.file)
        if fd is None:
            fd = self._fds[spec.file] = os.open(spec.file, os.O_RDONLY | os.O_CLOEXEC)
        done_bytes = 0
        while done_bytes < nbytes:
            offset_bytes = spec.offset_bytes + start_bytes + done_bytes
            try:
                num_read = os.preadv(fd, [view[done_bytes:]], offset_bytes)
            except OSError as error:
                raise ReadError(
                    spec.file, offset_bytes=offset_bytes, nbytes=nbytes - done_bytes, reason=str(error)
                ) from error
            if num_read == 0:
                raise SourceChanged(spec.file, problem=f"it ends at byte {offset_bytes}, inside {spec.name}")
            done_bytes += num_read
        _drop_from_page_cache(fd)
        return part.view(spec.dtype)

    def close(self) -> None:
        """Close its descriptors and release the buffer."""
        while self._fds:
            os.close(self._fds.popitem()[1])
        self._buffer = torch.empty(0, dtype=torch.uint8)


class ShardFile:
    """One safetensors file, written from its first byte to its last.

    Args:
        path: File to create; must not exist.
        tensors: What it will hold, in the order of `write`.
    """

    def __init__(self, path: Path, tensors: Sequence[OutputTensor]) -> None:
        header = _header(tensors)
        self._left_bytes = sum(tensor.nbytes for tensor in tensors)
        self._path = path
        self._file = path.open("xb", buffering=0)
        self._write(len(header).to_bytes(8, "little") + header)

    def write(self, values: Tensor) -> None:
        """Append values: the next part of the next tensor, contiguous, in its stored dtype, on the CPU."""
        data = values.reshape(-1).view(torch.uint8).numpy().data
        self._left_bytes -= len(data)
        self._write(data)

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            view = view[self._file.write(view) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                assert self._left_bytes == 0, f"{self._path}: {self._left_bytes} bytes were not written"
                os.fsync(self._file.fileno())
                _drop_from_page_cache(self._file.fileno())
        finally:
            self._file.close()


def _header(tensors: Sequence[OutputTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end_bytes = 0
    for tensor in tensors:
        name = _DTYPE_NAMES.get(tensor.dtype)
        if name is None:
            raise UnsupportedError(
                f"{tensor.name} stored as {tensor.dtype}",
                reason="merging into quantised weights would round them again",
                instead="the bf16, fp16 or fp32 checkpoint of the same model",
            )
        start_bytes, end_bytes = end_bytes, end_bytes + tensor.nbytes
        entries[tensor.name] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [start_bytes, end_bytes]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    # Padded so that the first tensor is aligned for every element size.
    return header + b" " * (-len(header) % 8)


def split_into_shards(tensors: Iterable[OutputTensor], *, max_shard_bytes: int) -> dict[str, tuple[OutputTensor, ...]]:
    """Spread tensors over files in their order; a tensor larger than a shard gets one of its own.

    Returns:
        File names and the tensors of each, widest elements first so that every tensor is aligned.
    """
    shards: list[list[OutputTensor]] = [[]]
    shard_bytes = 0
    for tensor in tensors:
        if shards[-1] and shard_bytes + tensor.nbytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(tensor)
        shard_bytes += tensor.nbytes
    ordered = [tuple(sorted(shard, key=lambda tensor: -tensor.dtype.itemsize)) for shard in shards]
    if len(ordered) == 1:
        return {"model.safetensors": ordered[0]}
    return {
        f"model-{number:05d}-of-{len(ordered):05d}.safetensors": shard for number, shard in enumerate(ordered, start=1)
    }


def write_index(folder: Path, shards: Mapping[str, tuple[OutputTensor, ...]]) -> None:
    """Write the index of a checkpoint of several shards; one shard needs none."""
    if len(shards) == 1:
        return
    weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    total_bytes = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / _INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _drop_from_page_cache(fd: int) -> None:
    # A merge touches every byte once: what it leaves in the page cache only pushes out what others use.
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


__all__ = ["OutputTensor", "ShardFile", "TensorReader", "split_into_shards", "write_index"]
