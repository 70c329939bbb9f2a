"""Checkpoints as people have them, in safetensors files: opened in place and checked, and written part by part."""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import NoReturn, Self

import torch
from torch import Tensor

from offload.blocks import TensorSpec
from offload.errors import Closed, ClosedAfterwards, SourceError
from offload.files.file import File, FileStamp, open_regular, open_source
from offload.files.strict_json import MAX_JSON_BYTES, JsonObject, is_text, parse_json_object, read_json_object, short
from offload.transfer import bytes_of

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""Types that are stored, by the names that safetensors gives them."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_DIMS = 64
_LENGTH_BYTES = 8
_SUFFIX = ".safetensors"
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_AGAIN = "download or write the checkpoint again"


@dataclass(frozen=True, kw_only=True)
class SafetensorsHeader:
    """What a safetensors file says it holds, after checking that it can be true."""

    tensors: tuple[TensorSpec, ...]
    """Its tensors, by position in the file; offsets count from the start of the file."""
    digest: str
    """SHA-256 of the header's bytes."""


def read_header(file: File) -> SafetensorsHeader:
    """Read and check a safetensors header.

    Raises:
        SourceError: The header is cut short, absurdly long, not JSON, or describes tensors that cannot be in the file.
        ReadError: It cannot be read.
    """
    path, size_bytes = file.path, file.size_bytes
    if size_bytes < _LENGTH_BYTES:
        _refuse_length(path, f"expected at least {_LENGTH_BYTES} bytes, the file has {size_bytes}: it is truncated")
    length = int.from_bytes(_read_bytes(file, 0, nbytes=_LENGTH_BYTES), "little")
    data_start = _LENGTH_BYTES + length
    if length > MAX_JSON_BYTES:
        why = "this is not a safetensors file, or it is damaged: "
        _refuse_length(path, f"expected at most {MAX_JSON_BYTES} bytes, got {length}", why)
    if data_start > size_bytes:
        _refuse_length(path, f"expected {data_start} bytes with the header, the file has {size_bytes}: it is truncated")
    return _check_header(path, _read_bytes(file, _LENGTH_BYTES, nbytes=length), size_bytes=size_bytes)


def _check_header(path: Path, raw: bytes, *, size_bytes: int) -> SafetensorsHeader:
    header = parse_json_object(path, raw, field="header", remedy=_AGAIN)
    metadata = header.members.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        header.refuse("__metadata__", "expected an object whose values are text")
    data_start = _LENGTH_BYTES + len(raw)
    tensors = [_spec_from(header, name, data_start=data_start) for name in header if name != "__metadata__"]
    tensors.sort(key=lambda spec: (spec.offset_bytes, spec.nbytes))
    _check_positions(header, tensors, data_start=data_start, size_bytes=size_bytes)
    return SafetensorsHeader(tensors=tuple(tensors), digest=sha256(raw).hexdigest())


def tensors_of_headers(headers: Mapping[Path, tuple[bytes, int]], *, index_file: Path | None) -> dict[str, TensorSpec]:
    """Every tensor of shards of which only the headers are here, checked as files are.

    Args:
        headers: By the shard's path, which need not exist: its header's bytes, the length before them left out, and the
            whole shard's size in bytes.
        index_file: The index that lies beside them; None where there is none.

    Raises:
        SourceError: A header describes tensors that cannot be in its shard, or the index lies.
    """
    checked = {path: _check_header(path, raw, size_bytes=size) for path, (raw, size) in headers.items()}
    return _merge(checked, {} if index_file is None else _read_index(index_file))


def shards_of_index(index_file: Path) -> tuple[Path, ...]:
    """The shards that an index names, sorted; they need not exist.

    Raises:
        SourceError: It is no index, or names a file outside its folder.
    """
    return tuple(sorted(set(_read_index(index_file).values())))


def _read_bytes(file: File, offset_bytes: int, *, nbytes: int) -> bytes:
    raw = bytearray(nbytes)
    file.read(memoryview(raw), offset_bytes=offset_bytes)
    return bytes(raw)


def _refuse_length(file: Path, problem: str, why: str = "") -> NoReturn:
    raise SourceError(file, field="header length", problem=problem, remedy=why + _AGAIN)


def _spec_from(header: JsonObject, name: str, *, data_start: int) -> TensorSpec:
    if not isinstance(header.members[name], dict):
        header.refuse(f"tensor {short(name)} entry", f"expected an object, got {type(header.members[name]).__name__}")
    entry = header.inner(name, prefix=f"tensor {short(name)} ")
    code = entry.members.get("dtype")
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        entry.refuse("dtype", f"expected one of {', '.join(DTYPES)}, got {short(code)}")
    shape, offsets = entry.naturals("shape"), entry.naturals("data_offsets")
    if len(shape) > _MAX_DIMS:
        entry.refuse("shape", f"expected at most {_MAX_DIMS} dimensions, got {len(shape)}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        entry.refuse("data_offsets", f"expected [begin, end] with 0 <= begin <= end, got {short(list(offsets))}")
    nbytes = offsets[1] - offsets[0]
    expected_bytes = math.prod(shape) * dtype.itemsize
    if nbytes != expected_bytes:
        problem = f"expected {expected_bytes} bytes for shape {list(shape)} of {code}, got {nbytes}"
        entry.refuse("data_offsets", problem)
    return TensorSpec(
        name=name, dtype=dtype, shape=shape, file=header.file, offset_bytes=data_start + offsets[0], nbytes=nbytes
    )


def _check_positions(header: JsonObject, tensors: Sequence[TensorSpec], *, data_start: int, size_bytes: int) -> None:
    """Check that tensors, sorted by position, fill the file from `data_start` to its end, once."""
    end = data_start
    before = "the header"
    for spec in tensors:
        field = f"tensor {short(spec.name)} data_offsets"
        if spec.offset_bytes != end:
            verb = "overlaps" if spec.offset_bytes < end else "leaves a hole after"
            header.refuse(field, f"it {verb} {before}: expected byte {end} of the file, got {spec.offset_bytes}")
        end += spec.nbytes
        before = short(spec.name)
        if end > size_bytes:
            header.refuse(field, f"it ends at byte {end}, the file has {size_bytes} bytes: it is truncated")
    if end != size_bytes:
        header.refuse("data_offsets", f"the last tensor ends at byte {end}, the file has {size_bytes} bytes")


class SafetensorsSource(ClosedAfterwards):
    """A checkpoint in one or more safetensors files, opened read-only and checked completely before use.

    A folder is read through its ``model.safetensors.index.json`` if it has one, else ``model.safetensors``, else every
    ``*.safetensors`` in it. Shards may be symbolic links to files elsewhere, as in hub caches; the index may not name
    files outside the folder. Keeps one read-only descriptor per file until `close`. Reads headers, no tensors.

    Args:
        location: A checkpoint folder, one safetensors file, or a list of them.

    Raises:
        SourceError: A file is missing, truncated, not safetensors, or describes itself wrongly; an index lies; two
            files hold the same tensor and no index decides; the checkpoint is pickled.
    """

    def __init__(self, location: Path | str | Sequence[Path]) -> None:
        # Absolute, so that a later change of the working directory does not change what the paths name.
        if isinstance(location, (str, Path)):
            files, index = _files_at(Path(location).absolute())
        else:
            files, index = tuple(dict.fromkeys(Path(file).absolute() for file in location)), {}
            if not files:
                raise ValueError("location: expected at least one safetensors file, got an empty list")
        self._opened: dict[Path, File] = {}
        self._finalizer = weakref.finalize(self, _close_all, self._opened)
        try:
            stamps: dict[Path, FileStamp] = {}
            headers: dict[Path, SafetensorsHeader] = {}
            for path in files:
                fd = _open_shard(path)
                stamps[path] = FileStamp.of(os.fstat(fd))
                self._opened[path] = File(fd, path, stamp=stamps[path], direct=False)
                headers[path] = read_header(self._opened[path])
            tensors = _merge(headers, index)
        except BaseException:
            self.close()
            raise
        self.files = files
        """Its files, absolute, in the order of their names."""
        self.stamps: Mapping[Path, FileStamp] = MappingProxyType(stamps)
        """Each file as it was when its header was checked; give them to `FileIO`."""
        self.tensors: Mapping[str, TensorSpec] = MappingProxyType(tensors)
        """Every tensor of the checkpoint by name."""
        self._digests = {file: header.digest for file, header in headers.items()}

    def fingerprint(self, *, of_copies: bool = False) -> str:
        """Hash over every file's name, size, time of last write and header: the same for the same checkpoint.

        Args:
            of_copies: In the place of the time, in which copies on several machines differ, some values from all over
                each file, in which another training of the same model differs.

        Raises:
            ReadError: They cannot be read.
        """
        digest = sha256()
        for file in sorted(self.files, key=lambda file: file.name):
            stamp = self.stamps[file]
            mtime_ns = 0 if of_copies else stamp.mtime_ns
            digest.update(f"{file.name!a} {stamp.size_bytes} {mtime_ns} {self._digests[file]}\n".encode())
            for start in _sampled(stamp.size_bytes) if of_copies else ():
                nbytes = min(_SAMPLE_BYTES, stamp.size_bytes - start)
                digest.update(_read_bytes(self._opened[file], start, nbytes=nbytes))
        return digest.hexdigest()

    def check_unchanged(self, file: Path) -> None:
        """Check that a file is still the one whose header was read: two system calls, no reading.

        Raises:
            SourceChanged: It was shortened, extended, rewritten in place, replaced or removed.
            Closed: The source was closed.
            KeyError: `file` is not one of `files`.
        """
        if not self._finalizer.alive:
            raise Closed(f"{file}: the source was closed; open it again")
        self._opened[file].check_unchanged()

    def close(self) -> None:
        """Close its descriptors. What was read from it stays valid. May be called twice."""
        self._finalizer()


_NUM_SAMPLES = 16
_SAMPLE_BYTES = 4096
"""Of each sample: a page, which comes from an SSD in 0.1 ms and from a disk that turns in 10 ms."""


def _sampled(size_bytes: int) -> tuple[int, ...]:
    """Where samples of a file begin: evenly from its first byte to its last."""
    last = max(0, size_bytes - _SAMPLE_BYTES)
    return tuple(sorted({last * number // (_NUM_SAMPLES - 1) for number in range(_NUM_SAMPLES)}))


def _close_all(opened: dict[Path, File]) -> None:
    while opened:
        opened.popitem()[1].close()


def _open_shard(file: Path) -> int:
    try:
        return open_regular(file)
    except FileNotFoundError as error:
        raise SourceError(file, field="file", problem="it does not exist", remedy=_AGAIN) from error
    except (OSError, ValueError) as error:
        problem = f"it cannot be opened ({error.strerror if isinstance(error, OSError) else error})"
        raise SourceError(file, field="file", problem=problem, remedy="check it and its permissions") from error


def _files_at(location: Path) -> tuple[tuple[Path, ...], dict[str, Path]]:
    """The safetensors files of a folder, sorted, and which of them the index says holds each tensor."""
    if not location.exists():
        problem = "expected a checkpoint folder or a safetensors file, there is nothing of that name"
        raise SourceError(location, field="location", problem=problem, remedy="check the path")
    if not location.is_dir():
        _refuse_pickled(location, [location])
        return (location,), {}
    index_file, single = location / INDEX_NAME, location / SINGLE_NAME
    if index_file.exists():
        index = _read_index(index_file)
        if single.exists() and single not in index.values():
            raise SourceError(
                index_file,
                field="weight_map",
                problem=f"the folder also holds a {SINGLE_NAME} that the index does not name: two checkpoints",
                remedy="move one of the two to another folder",
            )
        return tuple(sorted(set(index.values()))), index
    if single.exists():
        return (single,), {}
    names = sorted(path for path in location.iterdir() if not path.name.startswith("."))
    files = tuple(path for path in names if path.name.endswith(_SUFFIX))
    if not files:
        _refuse_pickled(location, names)
        raise SourceError(
            location, field="*.safetensors", problem="the folder holds no such file", remedy="check the path"
        )
    return files, {}


def _refuse_pickled(location: Path, files: Iterable[Path]) -> None:
    pickled = [file.name for file in files if file.suffix in _PICKLED_SUFFIXES]
    if pickled:
        raise SourceError(
            location,
            field=pickled[0],
            problem="the checkpoint is pickled, which can run code on loading and cannot be read in place",
            remedy="convert it once, where it fits in memory: transformers' "
            "AutoModelForCausalLM.from_pretrained(folder, dtype='auto').save_pretrained(new_folder), "
            "or torch.load(file, weights_only=True) and safetensors.torch.save_file",
        )


def _read_index(index_file: Path) -> dict[str, Path]:
    members = read_json_object(index_file, field="index", remedy=_AGAIN)
    weight_map = members.members.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        kind = type(weight_map).__name__
        members.refuse("weight_map", f"expected a non-empty object of tensor name to file name, got {kind}")
    paths: dict[object, Path] = {}
    index: dict[str, Path] = {}
    for tensor, name in weight_map.items():
        # Many tensors, few files: each file name is checked once.
        path = paths.get(name) if isinstance(name, str) else None
        if path is None:
            path = paths[name] = _shard_path(index_file, tensor, name=name)
        index[tensor] = path
    return index


def _shard_path(index_file: Path, tensor: str, *, name: object) -> Path:
    """Path of a shard that the index names, which must lie in the index's folder."""
    field = f"weight_map[{short(tensor)}]"
    if not isinstance(name, str) or not name.endswith(_SUFFIX) or "\0" in name or not is_text(name):
        problem = f"expected the name of a {_SUFFIX} file, got {short(name)}"
        raise SourceError(index_file, field=field, problem=problem, remedy=_AGAIN)
    folder = index_file.parent
    path = folder / name
    # A shard itself may be a link (hub caches); the way to it, links and ".." followed, may not lead outside.
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise SourceError(
            index_file,
            field=field,
            problem=f"it names a file outside the folder: {short(name)}",
            remedy="do not use a checkpoint from someone who would write this; download it from its publisher",
        )
    return path


def _merge(headers: Mapping[Path, SafetensorsHeader], index: Mapping[str, Path]) -> dict[str, TensorSpec]:
    """All tensors by name; the index decides where two files hold the same one."""
    tensors: dict[str, TensorSpec] = {}
    for file, header in headers.items():
        for spec in header.tensors:
            held_by = index.get(spec.name, file)
            if held_by is not file and held_by != file:
                continue
            if spec.name in tensors:
                raise SourceError(
                    file,
                    field=f"tensor {spec.name!a}",
                    problem=f"{tensors[spec.name].file} holds a tensor of the same name, and no index decides",
                    remedy="leave only the files of one checkpoint in the folder",
                )
            tensors[spec.name] = spec
    for name, file in index.items():
        if name not in tensors:
            raise SourceError(
                file,
                field=f"tensor {name!a}",
                problem="the index says that this file holds it, its header does not",
                remedy=_AGAIN,
            )
    return tensors


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
        align_bytes: Where the first tensor begins: at a multiple of this, and of 8.

    Raises:
        ValueError: A tensor is of a type that safetensors does not have.
    """

    def __init__(self, path: Path, tensors: Sequence[OutputTensor], *, mode: int = 0o666, align_bytes: int = 8) -> None:
        header = shard_header(tensors, align_bytes=align_bytes)
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


def shard_header(tensors: Sequence[OutputTensor], *, align_bytes: int = 8) -> bytes:
    """The header of a file that holds some tensors one after the other, without its length.

    Args:
        tensors: In the order in which they are written.
        align_bytes: Where the first of them begins: at a multiple of this.

    Raises:
        ValueError: A tensor is of a type that safetensors does not have.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end_bytes = 0
    for tensor in tensors:
        code = _CODES.get(tensor.dtype)
        if code is None:
            raise ValueError(f"{tensor.name}: safetensors has no type for {tensor.dtype}")
        start_bytes, end_bytes = end_bytes, end_bytes + tensor.nbytes
        entries[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start_bytes, end_bytes]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    # Padded so that the first tensor is aligned for every element size, and to what was asked for.
    return header + b" " * (-(len(header) + _LENGTH_BYTES) % align_bytes)


def split_into_shards(
    tensors: Iterable[OutputTensor | Sequence[OutputTensor]], *, max_shard_bytes: int
) -> dict[str, tuple[OutputTensor, ...]]:
    """Spread tensors over files in their order; a tensor larger than a shard gets one of its own.

    Args:
        tensors: What is written; tensors given as a sequence come into the same file.
        max_shard_bytes: Largest file.

    Returns:
        File names and the tensors of each, widest elements first so that every tensor is aligned.
    """
    shards: list[list[OutputTensor]] = [[]]
    shard_bytes = 0
    for one in tensors:
        group = (one,) if isinstance(one, OutputTensor) else tuple(one)
        group_bytes = sum(tensor.nbytes for tensor in group)
        if shards[-1] and shard_bytes + group_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].extend(group)
        shard_bytes += group_bytes
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
