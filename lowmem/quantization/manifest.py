"""What a packed folder says of itself: made of what, how, of which files, and the checksum of each tensor.

`lowmem_pack.json` lies beside the weights. Other programs ignore it; without it the folder is an ordinary quantised
checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from offload import Folder, SafetensorsSource, SourceError, TensorReader, TensorSpec, read_json_object

MANIFEST = "lowmem_pack.json"
"""Its name."""

VERSION = 1
"""Of its members."""

_AGAIN = "remove the folder and pack the model again (lowmem pack)"
_TILE_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class PackManifest:
    """The manifest of a packed folder, or of one that is being written."""

    source: str
    """The checkpoint that it was made of, as the user named it."""
    fingerprint: str
    """Of that checkpoint's files: names, sizes, times and headers."""
    settings: Mapping[str, object]
    """How it was packed."""
    files: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each weight file."""
    tensors: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each tensor's bytes."""

    def is_of(self, fingerprint: str, settings: Mapping[str, object]) -> bool:
        """Whether it was made of these files in this way."""
        return self.fingerprint == fingerprint and dict(self.settings) == dict(settings)

    def write(self, folder: Path) -> None:
        """Replace the file, so that it is the old one or the new one at any instant.

        Raises:
            OSError: It cannot be written.
        """
        with Folder.open(folder) as opened:
            opened.put(
                MANIFEST, json.dumps({"version": VERSION, **asdict(self)}, indent=1).encode() + b"\n", mode=0o644
            )
            opened.sync()


def read_manifest(folder: Path) -> PackManifest | None:
    """The manifest of a folder; None where there is none.

    Raises:
        SourceError: It is damaged, or of another version.
    """
    file = folder / MANIFEST
    if not file.exists():
        return None
    read = read_json_object(file, field="manifest", remedy=_AGAIN)
    if read.natural("version") != VERSION:
        read.refuse("version", f"expected {VERSION}, got {read.natural('version')}")
    files, tensors, settings = read.inner("files"), read.inner("tensors"), read.inner("settings")
    return PackManifest(
        source=read.text("source"),
        fingerprint=read.text("fingerprint"),
        settings=dict(settings.members),
        files={name: files.natural(name) for name in files},
        tensors={name: tensors.text(name) for name in tensors},
    )


def check_files(folder: Path) -> PackManifest | None:
    """Compare a packed folder's weight files with its manifest: names and sizes. Opens none of them.

    Args:
        folder: Any checkpoint.

    Returns:
        The manifest; None where there is none, and nothing was compared.

    Raises:
        SourceError: A file is missing, or is of another size.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        _check_sizes(folder, manifest, {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()})
    return manifest


def check_opened(folder: Path, manifest: PackManifest, source: SafetensorsSource) -> None:
    """Compare the files of a packed folder, as they were opened, with its manifest: names, sizes, tensors.

    Args:
        folder: Where they are.
        manifest: The folder's.
        source: The files; their headers have been read.

    Raises:
        SourceError: A file is missing, is of another size, or holds other tensors.
    """
    _check_sizes(folder, manifest, {file.name: source.stamps[file].size_bytes for file in source.files})
    if different := set(manifest.tensors) ^ set(source.tensors):
        name = min(different)
        problem = f"the files {'hold' if name in source.tensors else 'do not hold'} {name}, the manifest says otherwise"
        raise SourceError(folder / MANIFEST, field="tensors", problem=problem, remedy=_AGAIN)


def _check_sizes(folder: Path, manifest: PackManifest, sizes: Mapping[str, int]) -> None:
    for name, expected in manifest.files.items():
        if sizes.get(name) != expected:
            problem = f"expected {name} with {expected} bytes, got {sizes.get(name, 'no such file')}"
            raise SourceError(folder / MANIFEST, field=f"files[{name}]", problem=problem, remedy=_AGAIN)


def raw_bytes(values: Tensor) -> memoryview:
    """A tensor's bytes, for checksums; of one on the CPU."""
    return values.contiguous().view(-1).view(torch.uint8).numpy().data


def damaged(manifest: PackManifest, tensors: Mapping[str, TensorSpec]) -> Iterator[tuple[str, bool]]:
    """Read every tensor and compare its checksum.

    Yields:
        Each tensor's name, and whether it is damaged, in the order of the manifest; `tensors` may lack some.
    """
    with closing(TensorReader()) as reader:
        for name, expected in manifest.tensors.items():
            if name in tensors:
                yield name, _checksum_of(tensors[name], reader) != expected


def _checksum_of(spec: TensorSpec, reader: TensorReader) -> str:
    # As bytes: a tile need not be a whole number of elements.
    raw, digest = replace(spec, dtype=torch.uint8, shape=(spec.nbytes,)), sha256()
    for start in range(0, spec.nbytes, _TILE_BYTES):
        digest.update(reader.read(raw, start, nbytes=min(_TILE_BYTES, spec.nbytes - start)).numpy().data)
    return digest.hexdigest()
