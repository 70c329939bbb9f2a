"""What a hub repository holds, without its weights: small files through the hub's cache, headers by ranges of bytes.

Of a shard two ranges are asked for: the eight bytes that say how long its header is, and the header. They are kept in
the platform's cache folder by the commit, which never changes, so that a second plan asks the hub for nothing but the
name of the newest commit, and one without a network for nothing at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from platformdirs import user_cache_path

from lowmem.models.checkpoint import unreachable
from offload import Folder, SourceError, TensorSpec, shards_of_index, tensors_of_headers

_CONFIG, _INDEX, _SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"


_OTHER_FILES = ("generation_config.json", "adapter_config.json")
"""What configurations are checked together with; most repositories have only one of them."""


_LENGTH_BYTES = 8


_MOST_HEADER_BYTES = 100_000_000
"""As in safetensors' own readers."""


_NUM_REQUESTS = 16
"""In flight: a shard's header is small, and the way there and back is what takes time."""


_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class RemoteCheckpoint:
    """A repository at one commit: its small files, and its tensors as their headers describe them."""

    folder: Path
    """Where config.json and the index lie, in the hub's cache."""
    tensors: Mapping[str, TensorSpec] | None
    """By stored name; their files need not exist. None where all of them lie in `folder` already."""


def read_remote(model: str, *, revision: str | None = None, with_code: bool = False) -> RemoteCheckpoint:
    """Read a hub repository's configuration and its shards' headers; not one byte of a weight.

    Args:
        model: The repository's id, "Qwen/Qwen3-32B".
        revision: Branch, tag or commit.
        with_code: Whether the model's own code is fetched too.

    Raises:
        FileNotFoundError: There is no such repository, it has no safetensors files, or it cannot be reached and what is
            needed is not in the caches.
        SourceError: A header, or the index, lies.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        config = _small_file(model, _CONFIG, revision=revision)
        if config is None:
            # An adapter's folder is refused by name where its configuration is read.
            config = _small_file(model, "adapter_config.json", revision=revision)
        if config is None:
            raise FileNotFoundError(f"{model}: the repository has no config.json; give one of a transformers model")
        folder = config.parent
        commit = folder.name
        for name in _OTHER_FILES:
            _small_file(model, name, revision=commit)
        if with_code:
            snapshot_download(model, revision=commit, allow_patterns=["*.py"])
        index = _small_file(model, _INDEX, revision=commit)
        shards = shards_of_index(index) if index is not None else _shards_without_index(model, folder)
        if all(shard.exists() for shard in shards):
            return RemoteCheckpoint(folder=folder, tensors=None)
        read = partial(_header_of, model, folder=folder)
        with ThreadPoolExecutor(_NUM_REQUESTS) as pool:
            headers = dict(zip(shards, pool.map(read, shards), strict=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, ConnectionError) as error:
        raise unreachable(model, error) from error
    return RemoteCheckpoint(folder=folder, tensors=tensors_of_headers(headers, index_file=index))


def _small_file(model: str, name: str, *, revision: str | None) -> Path | None:
    """A file in the hub's cache, fetched if it is not there; None where the repository has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except LocalEntryNotFoundError:
        if name == _CONFIG:
            raise
        # Without a network: nobody can tell whether it exists.
        return None
    except EntryNotFoundError:
        return None


def _shards_without_index(model: str, folder: Path) -> tuple[Path, ...]:
    if (folder / _SINGLE).exists() or _kept_file(model, folder / _SINGLE).exists():
        return (folder / _SINGLE,)
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, list_repo_files
    from huggingface_hub.errors import EntryNotFoundError

    with suppress(EntryNotFoundError):
        get_hf_file_metadata(hf_hub_url(model, _SINGLE, revision=folder.name))
        return (folder / _SINGLE,)
    names = list_repo_files(model, revision=folder.name)
    found = tuple(folder / name for name in sorted(names) if name.endswith(".safetensors") and "/" not in name)
    if not found:
        raise FileNotFoundError(f"{model}: the repository has no safetensors files; pickled weights are never read")
    return found


def _header_of(model: str, shard: Path, *, folder: Path) -> tuple[bytes, int]:
    """A shard's header and the whole shard's size, kept from an earlier call or asked for now."""
    kept = _kept_file(model, shard)
    if kept.exists():
        raw = kept.read_bytes()
        return raw[_LENGTH_BYTES:], int.from_bytes(raw[:_LENGTH_BYTES], "little")
    name = shard.relative_to(folder).as_posix()
    length_bytes, size_bytes = _range_of(model, name, folder.name, 0, _LENGTH_BYTES)
    length = int.from_bytes(length_bytes, "little")
    if not 0 < length <= min(_MOST_HEADER_BYTES, size_bytes - _LENGTH_BYTES):
        problem = f"the shard of {size_bytes} bytes says that its header has {length}"
        raise SourceError(shard, field="header length", problem=problem, remedy="choose another revision of the model")
    header, _ = _range_of(model, name, folder.name, _LENGTH_BYTES, length)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with Folder.open(kept.parent) as cache:
        cache.put(kept.name, size_bytes.to_bytes(_LENGTH_BYTES, "little") + header)
    return header, size_bytes


def _kept_file(model: str, shard: Path) -> Path:
    return user_cache_path("lowmem") / "headers" / model.replace("/", "--") / shard.parent.name / f"{shard.name}.header"


def _range_of(model: str, name: str, commit: str, start: int, nbytes: int) -> tuple[bytes, int]:
    """Some bytes of a file of a repository, and the whole file's size.

    Raises:
        FileNotFoundError: The server does not serve parts of files.
    """
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    url = hf_hub_url(model, name, revision=commit)
    # Otherwise a server may compress, and the sizes would be those of something else.
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + nbytes - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as response:
        hf_raise_for_status(response)
        size = response.headers.get("Content-Range", "").rpartition("/")[2]
        if response.status_code != 206 or not size.isdecimal():
            # Reading on would fetch the whole file.
            raise FileNotFoundError(f"{url}: the server does not serve parts of files, so headers cannot be read alone")
        found: bytes = response.read()
    if len(found) != nbytes:
        raise FileNotFoundError(f"{url}: asked for {nbytes} bytes from byte {start} on, got {len(found)}")
    return found, int(size)
