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

from offload.blocks import TensorSpec
from offload.files.file import File, open_regular, open_source
from offload.files.safetensors_read import DTYPES, INDEX_NAME, SINGLE_NAME
from offload.transfer import bytes_of

_CODES = {dtype: code for code, dtype in DTYPES.items()}


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
    """Reads whole rows of stored tensors into one buffer that is used again for each read; keeps the files open."""

    def __init__(self) -> None:
        self._files: dict[Path, File] = {}
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
        file = self._files.get(spec.file)
        if file is None:
            file = self._files[spec.file] = open_source(spec.file, direct=False)
        file.read(bytes_of(part, name=spec.name), offset_bytes=spec.offset_bytes + start_bytes)
        return part.view(spec.dtype)

    def close(self) -> None:
        """Close the files and release the buffer."""
        while self._files:
            self._files.popitem()[1].close()
        self._buffer = torch.empty(0, dtype=torch.uint8)


class ShardFile:
    """One safetensors file, written from its first byte to its last.

    Args:
        path: File to create; must not exist.
        tensors: What it will hold, in the order of `write`.
        mode: Who may read and write it, less the umask.

    Raises:
        ValueError: A tensor is of a type that safetensors does not have.
    """

    def __init__(self, path: Path, tensors: Sequence[OutputTensor], *, mode: int = 0o666) -> None:
        header = _header(tensors)
        start_bytes = len(header) + 8
        self._end_bytes = start_bytes + sum(tensor.nbytes for tensor in tensors)
        self._file = File(open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode=mode), path, direct=False)
        self._done_bytes = 0
        self._append(memoryview(len(header).to_bytes(8, "little") + header))

    def write(self, values: Tensor) -> None:
        """Append values: the next part of the next tensor, contiguous, in its stored dtype, on the CPU.

        Raises:
            TierFull: The disk has no room for them.
            WriteError: The disk failed.
        """
        self._append(bytes_of(values.reshape(-1).view(torch.uint8), name=str(self._file.path)))

    def _append(self, data: memoryview) -> None:
        self._file.write(data, offset_bytes=self._done_bytes)
        self._done_bytes += len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                left_bytes = self._end_bytes - self._done_bytes
                assert left_bytes == 0, f"{self._file.path}: {left_bytes} bytes were not written"
                self._file.sync()
                self._file.drop_cached(0, nbytes=self._end_bytes)
        finally:
            self._file.close()


def _header(tensors: Sequence[OutputTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end_bytes = 0
    for tensor in tensors:
        code = _CODES.get(tensor.dtype)
        if code is None:
            raise ValueError(f"{tensor.name}: safetensors has no type for {tensor.dtype}")
        start_bytes, end_bytes = end_bytes, end_bytes + tensor.nbytes
        entries[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start_bytes, end_bytes]}
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
        return {SINGLE_NAME: ordered[0]}
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
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
