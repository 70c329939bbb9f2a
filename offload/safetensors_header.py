"""The header of a safetensors file, read and checked before anything in it is believed."""

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NoReturn, TypeGuard

import torch

from offload.errors import SourceError
from offload.spec import TensorSpec

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
