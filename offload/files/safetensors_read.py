"""The header of a safetensors file, read and checked before anything in it is believed.

Checkpoints as people have them: safetensors files, read in place.
"""

from __future__ import annotations

import json
import math
import os
import stat
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import NoReturn, Self, TypeGuard

import torch

from offload.blocks import TensorSpec
from offload.errors import Closed, SourceError
from offload.files.file import FileStamp, check_stamp, stamp_of

_MAX_JSON_BYTES = 100_000_000


_MAX_DIMS = 64


_LENGTH_BYTES = 8


_DTYPES = {
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


_AGAIN = "download or write the file again"


@dataclass(frozen=True, kw_only=True)
class SafetensorsHeader:
    """What a safetensors file says it holds, after checking that it can be true."""

    tensors: tuple[TensorSpec, ...]
    """Its tensors, by position in the file; offsets count from the start of the file."""
    digest: str
    """SHA-256 of the header's bytes."""


def read_header(file: Path, *, fd: int, size_bytes: int) -> SafetensorsHeader:
    """Read and check a safetensors header.

    Args:
        file: Path of the file, for the specs and for errors.
        fd: The file, open for reading.
        size_bytes: Length of the file.

    Raises:
        SourceError: The header is cut short, absurdly long, not JSON, or describes tensors that cannot be in the file.
    """
    if size_bytes < _LENGTH_BYTES:
        raise SourceError(
            file,
            field="header length",
            problem=f"expected at least {_LENGTH_BYTES} bytes, the file has {size_bytes}: it is truncated",
            remedy=_AGAIN,
        )
    length = int.from_bytes(_pread_all(file, fd=fd, offset_bytes=0, nbytes=_LENGTH_BYTES), "little")
    data_start = _LENGTH_BYTES + length
    if length > _MAX_JSON_BYTES:
        raise SourceError(
            file,
            field="header length",
            problem=f"expected at most {_MAX_JSON_BYTES} bytes, got {length}",
            remedy=f"this is not a safetensors file, or it is damaged: {_AGAIN}",
        )
    if data_start > size_bytes:
        raise SourceError(
            file,
            field="header length",
            problem=f"expected {data_start} bytes with the header, the file has {size_bytes}: it is truncated",
            remedy=_AGAIN,
        )
    raw = _pread_all(file, fd=fd, offset_bytes=_LENGTH_BYTES, nbytes=length)
    entries = parse_json_object(file, raw, field="header")
    _check_metadata(file, entries.pop("__metadata__", {}))
    tensors = [_spec_from(file, name, entry=entry, data_start=data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda spec: (spec.offset_bytes, spec.nbytes))
    _check_positions(file, tensors, data_start=data_start, size_bytes=size_bytes)
    return SafetensorsHeader(tensors=tuple(tensors), digest=sha256(raw).hexdigest())


def parse_json_object(file: Path, raw: bytes, *, field: str) -> dict[str, object]:
    """Parse bytes as one JSON object, refusing keys that occur twice.

    Raises:
        SourceError: Not UTF-8, not JSON, not an object, or an object in it has the same key twice.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise SourceError(file, field=field, problem=f"key {_short(twice)} occurs twice", remedy=_AGAIN)
        return entries

    if len(raw) > _MAX_JSON_BYTES:
        problem = f"expected at most {_MAX_JSON_BYTES} bytes of JSON, got {len(raw)}"
        raise SourceError(file, field=field, problem=problem, remedy=_AGAIN)
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise SourceError(file, field=field, problem=f"not UTF-8 ({error})", remedy=_AGAIN) from error
    except SourceError:
        raise
    except (ValueError, RecursionError) as error:
        raise SourceError(file, field=field, problem=f"not valid JSON ({error})", remedy=_AGAIN) from error
    if not isinstance(value, dict):
        problem = f"expected a JSON object, got {type(value).__name__}"
        raise SourceError(file, field=field, problem=problem, remedy=_AGAIN)
    return value


def _pread_all(file: Path, *, fd: int, offset_bytes: int, nbytes: int) -> bytes:
    parts: list[bytes] = []
    done = 0
    while done < nbytes:
        try:
            part = os.pread(fd, nbytes - done, offset_bytes + done)
        except OSError as error:
            problem = f"reading {nbytes - done} bytes at offset {offset_bytes + done} failed: {error.strerror}"
            raise SourceError(file, field="header", problem=problem, remedy="check the disk") from error
        if not part:
            problem = f"the file ended at byte {offset_bytes + done} while {nbytes - done} more were expected"
            raise SourceError(file, field="header", problem=problem, remedy=_AGAIN)
        parts.append(part)
        done += len(part)
    return b"".join(parts)


def _check_metadata(file: Path, metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problem = "expected an object whose values are text"
        raise SourceError(file, field="__metadata__", problem=problem, remedy=_AGAIN)


def _spec_from(file: Path, name: str, *, entry: object, data_start: int) -> TensorSpec:
    if not isinstance(entry, dict):
        _refuse(file, name, field="entry", problem=f"expected an object, got {type(entry).__name__}")
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    dtype = _DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        _refuse(file, name, field="dtype", problem=f"expected one of {', '.join(_DTYPES)}, got {_short(code)}")
    if not _is_naturals(shape) or len(shape) > _MAX_DIMS:
        _refuse(
            file,
            name,
            field="shape",
            problem=f"expected at most {_MAX_DIMS} integers of 0 or more, got {_short(shape)}",
        )
    if not _is_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(
            file,
            name,
            field="data_offsets",
            problem=f"expected [begin, end] with 0 <= begin <= end, got {_short(offsets)}",
        )
    nbytes = offsets[1] - offsets[0]
    expected_bytes = math.prod(shape) * dtype.itemsize
    if nbytes != expected_bytes:
        problem = f"expected {expected_bytes} bytes for shape {list(shape)} of {code}, got {nbytes}"
        _refuse(file, name, field="data_offsets", problem=problem)
    return TensorSpec(
        name=name, dtype=dtype, shape=tuple(shape), file=file, offset_bytes=data_start + offsets[0], nbytes=nbytes
    )


def _check_positions(file: Path, tensors: Sequence[TensorSpec], *, data_start: int, size_bytes: int) -> None:
    """Check that tensors, sorted by position, fill the file from `data_start` to its end, once."""
    end = data_start
    previous: TensorSpec | None = None
    for spec in tensors:
        if spec.offset_bytes != end:
            verb = "overlaps" if spec.offset_bytes < end else "leaves a hole after"
            before = "the header" if previous is None else _short(previous.name)
            problem = f"it {verb} {before}: expected byte {end} of the file, got {spec.offset_bytes}"
            _refuse(file, spec.name, field="data_offsets", problem=problem)
        end += spec.nbytes
        previous = spec
        if end > size_bytes:
            problem = f"it ends at byte {end}, the file has {size_bytes} bytes: it is truncated"
            _refuse(file, spec.name, field="data_offsets", problem=problem)
    if end != size_bytes:
        problem = f"the last tensor ends at byte {end}, the file has {size_bytes} bytes"
        raise SourceError(file, field="data_offsets", problem=problem, remedy=_AGAIN)


def _is_naturals(value: object) -> TypeGuard[list[int]]:
    # JSON's true is an int to Python, and torch counts in 64 bits.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _refuse(file: Path, name: str, *, field: str, problem: str) -> NoReturn:
    raise SourceError(file, field=f"tensor {_short(name)} {field}", problem=problem, remedy=_AGAIN)


_INDEX_NAME = "model.safetensors.index.json"


_SINGLE_NAME = "model.safetensors"


_SUFFIX = ".safetensors"


_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


_AGAIN = "download or write the checkpoint again"


class SafetensorsSource:
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
        self._fds: dict[Path, int] = {}
        self._finalizer = weakref.finalize(self, _close_all, self._fds)
        try:
            stamps: dict[Path, FileStamp] = {}
            headers: dict[Path, SafetensorsHeader] = {}
            for file in files:
                fd = _open_regular(file)
                self._fds[file] = fd
                stamps[file] = stamp_of(fd)
                headers[file] = read_header(file, fd=fd, size_bytes=stamps[file].size_bytes)
            tensors = _merge(headers, index)
        except BaseException:
            self.close()
            raise
        self._files = files
        self._stamps = MappingProxyType(stamps)
        self._tensors = MappingProxyType(tensors)
        self._digests = {file: header.digest for file, header in headers.items()}

    @property
    def files(self) -> tuple[Path, ...]:
        """Its files, absolute, in the order of their names."""
        return self._files

    @property
    def stamps(self) -> Mapping[Path, FileStamp]:
        """Each file as it was when its header was checked; give them to `FileReader`."""
        return self._stamps

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor of the checkpoint by name."""
        return self._tensors

    def fingerprint(self) -> str:
        """Hash over every file's name, size, time of last write and header: the same for the same checkpoint."""
        digest = sha256()
        for file in sorted(self._files, key=lambda file: file.name):
            stamp = self._stamps[file]
            digest.update(f"{file.name!a} {stamp.size_bytes} {stamp.mtime_ns} {self._digests[file]}\n".encode())
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
        check_stamp(file, fd=self._fds[file], stamp=self._stamps[file])

    def close(self) -> None:
        """Close its descriptors. What was read from it stays valid. May be called twice."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _close_all(fds: dict[Path, int]) -> None:
    while fds:
        os.close(fds.popitem()[1])


def _open_regular(file: Path) -> int:
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer for ever.
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise SourceError(file, field="file", problem="it does not exist", remedy=_AGAIN) from error
    except (OSError, ValueError) as error:
        raise SourceError(
            file, field="file", problem=f"it cannot be opened ({error})", remedy="check its permissions"
        ) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SourceError(file, field="file", problem="expected a regular file, got another kind", remedy=_AGAIN)
    return fd


def _files_at(location: Path) -> tuple[tuple[Path, ...], dict[str, Path]]:
    """The safetensors files of a folder, sorted, and which of them the index says holds each tensor."""
    if not location.exists():
        problem = "expected a checkpoint folder or a safetensors file, there is nothing of that name"
        raise SourceError(location, field="location", problem=problem, remedy="check the path")
    if not location.is_dir():
        _refuse_pickled(location, [location])
        return (location,), {}
    index_file, single = location / _INDEX_NAME, location / _SINGLE_NAME
    if index_file.exists():
        index = _read_index(index_file)
        if single.exists() and single not in index.values():
            raise SourceError(
                index_file,
                field="weight_map",
                problem=f"the folder also holds a {_SINGLE_NAME} that the index does not name: two checkpoints",
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
    try:
        raw = index_file.read_bytes()
    except OSError as error:
        raise SourceError(
            index_file, field="file", problem=f"it cannot be read ({error.strerror})", remedy="check its permissions"
        ) from error
    weight_map = parse_json_object(index_file, raw, field="index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        problem = f"expected a non-empty object of tensor name to file name, got {type(weight_map).__name__}"
        raise SourceError(index_file, field="weight_map", problem=problem, remedy=_AGAIN)
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
    field = f"weight_map[{tensor!a}]"
    if not isinstance(name, str) or not name.endswith(_SUFFIX) or "\0" in name:
        problem = f"expected the name of a {_SUFFIX} file, got {name!a}"
        raise SourceError(index_file, field=field, problem=problem, remedy=_AGAIN)
    folder = index_file.parent
    path = folder / name
    # A shard itself may be a link (hub caches); the way to it, links and ".." followed, may not lead outside.
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise SourceError(
            index_file,
            field=field,
            problem=f"it names a file outside the folder: {name!a}",
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
