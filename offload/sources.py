"""Checkpoints as people have them: safetensors files, read in place."""

import os
import stat
import weakref
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from offload.errors import Closed, SourceError
from offload.safetensors_header import SafetensorsHeader, parse_json_object, read_header
from offload.spec import TensorSpec
from offload.stamp import FileStamp, check_stamp, stamp_of

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
