"""Merging an adapter into its base checkpoint, shard by shard: an ordinary checkpoint, in the memory of one tile."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lowmem.adapters.merge_plan import MergedTensor, MergePlan, num_rows, plan_merge
from lowmem.adapters.updates import Update, apply_all
from lowmem.errors import UnsupportedError
from lowmem.models.checkpoint import resolve, stays_inside
from lowmem.quantization.values import ValueReader
from offload import (
    NO_ROOM,
    OutputTensor,
    SafetensorsSource,
    ShardFile,
    TierFull,
    format_bytes,
    parse_bytes,
    split_into_shards,
    sync_folder,
    unfinished_folder,
    write_index,
)

# Values computed at a time, in bytes of fp32. Small enough that the allocator gives the same memory again: tiles of
# 8 MiB let the heap grow by 55 to 115 MiB from run to run, these by 15 to 30 (tests/lowmem/test_merge.py, full disk).
_TILE_BYTES = 2 << 20


# But no fewer rows: MKL sums a product of 9 rows on two threads in another order than PEFT's of all rows, one of 18 in
# the same (fp32 matrices of 28672 columns).
_TILE_ROWS = 32

_QUIET_S = 5.0
"""Seconds after which a merge shows how far it is."""

_TOLD_LOSS = 0.01
"""Part of the adapter's change that may be lost to rounding without a word."""

_COPIED_SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt", ".py", ".tiktoken"})
_ADAPTER_CONFIG = "adapter_config.json"

# What names code of the repository in the configurations of models, tokenizers and pipelines.
_CODE_FIELDS = ("auto_map", "custom_pipelines")

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def merge(
    model: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    max_shard_bytes: int | str = 5_000_000_000,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write the checkpoint that a model and its adapter make together.

    What the adapter leaves alone is copied bit by bit; packed weights are unpacked, and the output is an ordinary
    checkpoint in the dtype that the model's configuration names. What the adapter changes is computed in fp32 (fp64 for
    fp64 weights) and rounded once to the stored dtype, which is what PEFT's `merge_and_unload` gives for fp32 adapters
    on a resident model. Holds the adapter and one tile of one tensor in memory, whatever the size of the model; of a
    packed weight, its values. The output appears complete or not at all; model and adapter are only read. Says in a
    warning if rounding to the stored dtype loses more than a hundredth of what the adapter changes.

    Args:
        model: Local folder or hub id of the safetensors checkpoint that the adapter was trained on.
        adapter: Folder of the adapter, as PEFT's `save_pretrained` and the Trainer write it. Its tokenizer, if it has
            one, goes into the output.
        output: Folder to write; must not exist or be empty.
        dtype: Type to store all floating-point weights in; each keeps its own where None.
        max_shard_bytes: Largest shard, as a number or "5GB".
        revision: Branch, tag or commit of the model's hub repository.
        trust_remote_code: Run model code that comes with the checkpoint, and copy it to the output.

    Returns:
        The output folder.

    Raises:
        UnsupportedError: The adapter has no merged form in an ordinary checkpoint of this model.
        ValueError: The adapter does not fit the model.
        FileExistsError: The output folder is not empty.
        offload.TierFull: The disk has no room for the output.
        offload.SourceError: The checkpoint is damaged.
    """
    base, adapter_folder = resolve(model, revision=revision), Path(adapter).expanduser()
    target = Path(output).expanduser().absolute()
    stored, shard_bytes = _stored_dtype(dtype), parse_bytes(max_shard_bytes, field="max_shard_bytes")
    check_output(target, base)
    copies = _copies(base, adapter_folder, trust_remote_code=trust_remote_code)
    rounding = _Rounding()
    with SafetensorsSource(base) as source:
        plan = plan_merge(base, adapter_folder, source=source, dtype=stored, trust_remote_code=trust_remote_code)
        shards = split_into_shards([tensor.output for tensor in plan.tensors], max_shard_bytes=max(1, shard_bytes))
        _check_room(target, sum(tensor.output.nbytes for tensor in plan.tensors))
        try:
            with taking_the_place_of(target) as folder:
                _write_shards(folder, plan, shards, rounding)
                for file in source.files:
                    source.check_unchanged(file)
                for name, file in copies.items():
                    _copy(file, folder / name, has_code=trust_remote_code)
                _change_config(folder / "config.json", plan.config_changes)
        except (OSError, TierFull) as error:
            if isinstance(error, TierFull) or error.errno in NO_ROOM:
                raise TierFull(f"disk: writing {target} failed ({error}); nothing of it was left there") from error
            raise
    if rounding.lost > _TOLD_LOSS:
        warnings.warn(rounding.told(), UserWarning, stacklevel=2)
    return target


def _stored_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    chosen = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and chosen not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected float64, float32, bfloat16, float16 or None, got {dtype!r}")
    return chosen


def check_output(target: Path, base: Path) -> None:
    """Refuse a folder to write that is not empty, or that no folder can take the place of.

    Raises:
        FileExistsError: As it says.
        ValueError: It is inside of the base model's.
    """
    if target.is_symlink() or target.is_mount():
        what = "a link" if target.is_symlink() else "where a file system is mounted"
        raise FileExistsError(f"output: {target} is {what}, whose place no folder can take; give another one")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"output: {target} exists and is not an empty folder; give another one, or remove it")
    if target.resolve().is_relative_to(base.resolve()):
        raise ValueError(f"output: {target} is inside the model's folder {base}; give a folder outside of it")


@contextmanager
def taking_the_place_of(target: Path) -> Iterator[Path]:
    """A new folder, which has the target's name once the `with` is left without an error; else nothing is left.

    It lies in a private folder next to the target. A merge that was killed leaves that; the next one with the same
    target removes it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with unfinished_folder(target.parent, prefix=f".{target.name}.unfinished-") as private:
        folder = private / "merged"
        folder.mkdir()
        yield folder
        _sync_folder(folder)
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise FileExistsError(f"output: {target} was made by somebody else meanwhile") from error
            raise
        sync_folder(target.parent)


def _check_room(target: Path, needed_bytes: int) -> None:
    parent = next(folder for folder in target.parents if folder.is_dir())
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes:
        raise TierFull(
            f"disk: {target} needs {format_bytes(needed_bytes)}, {format_bytes(free_bytes)} are free on {parent}; "
            "free some space, give output on another disk, or a smaller dtype"
        )


def _write_shards(
    folder: Path, plan: MergePlan, shards: Mapping[str, tuple[OutputTensor, ...]], rounding: _Rounding
) -> None:
    by_name = {tensor.output.name: tensor for tensor in plan.tensors}
    writer = _TensorWriter(plan, rounding)
    num_bytes = sum(tensor.output.nbytes for tensor in plan.tensors)
    try:
        with tqdm(total=num_bytes, desc="merging", unit="B", unit_scale=True, leave=False, delay=_QUIET_S) as bar:
            for file, outputs in shards.items():
                with ShardFile(folder / file, outputs) as shard:
                    for output in outputs:
                        for values in writer.values(by_name[output.name]):
                            shard.write(values)
                            bar.update(values.nbytes)
    finally:
        writer.close()
    write_index(folder, shards)


@dataclass(kw_only=True)
class _Rounding:
    """How much of the changes is lost because the weights are stored in fewer bits than they are computed in."""

    wanted: float = 0.0
    """Sum of squares of the changes."""
    kept: float = 0.0
    """Scalar product of the changes and what is stored of them."""
    num_changed: int = 0
    """Values that change."""
    num_unmoved: int = 0
    """Those of them that are stored as before."""
    dtype: torch.dtype | None = None
    """What was rounded to."""

    def add(self, old: Tensor, new: Tensor, stored: Tensor) -> None:
        """Count values: before, after, and after as they are stored. Works in the memory of the first two."""
        old_stored = old.to(stored.dtype)
        change = new.sub_(old).reshape(-1)
        moved = old.copy_(stored).sub_(old_stored).reshape(-1)
        self.wanted += float(change @ change)
        self.kept += float(change @ moved)
        self.num_changed += int(change.count_nonzero())
        self.num_unmoved += int((change != 0).logical_and_(moved == 0).sum())
        self.dtype = stored.dtype

    @property
    def lost(self) -> float:
        """Part of the change that is lost, from 0 to 1."""
        return min(1.0, max(0.0, 1 - self.kept / self.wanted)) if self.wanted else 0.0

    def told(self) -> str:
        """The loss in a sentence."""
        unmoved = self.num_unmoved / max(1, self.num_changed)
        return (
            f"rounding to {str(self.dtype).removeprefix('torch.')} lost {self.lost:.0%} of what the adapter changes "
            f"({unmoved:.0%} of the changed values are stored as before); "
            'dtype="float32" (--dtype float32) keeps all of it'
        )


class _TensorWriter:
    """Makes the values of the output's tensors, a tile at a time."""

    def __init__(self, plan: MergePlan, rounding: _Rounding) -> None:
        self._reader = ValueReader(plan.packed)
        self._sources, self._rounding = plan.sources, rounding

    def values(self, tensor: MergedTensor) -> Iterator[Tensor]:
        """The tensor's values in its stored dtype, part by part; each is valid until the next."""
        spec, dtype = tensor.source, tensor.output.dtype
        if tensor.whole_layer is not None:
            layer, attribute = tensor.whole_layer
            merged = layer.merged(attribute, self._whole)
            yield self._rounded(merged, dtype, old=self._whole(f"{layer.prefix}.{attribute}"))
        elif not tensor.segments:
            step = _TILE_BYTES - _TILE_BYTES % spec.dtype.itemsize
            for start in range(0, spec.nbytes, step):
                yield self._reader.read(spec, start, nbytes=min(step, spec.nbytes - start)).to(dtype)
        else:
            for segment in tensor.segments:
                shift = segment.target_start - segment.start
                stop = segment.start + segment.num_rows
                for number, update in enumerate(segment.updates):
                    if update.sees_all_rows:
                        update.measure(self._updated(tensor, segment.updates[:number]))
                for start, tile in self._tiles(tensor, segment.start, stop):
                    old = tile.clone() if segment.updates and dtype.itemsize < tile.dtype.itemsize else None
                    yield self._rounded(apply_all(segment.updates, tile, start + shift), dtype, old=old)

    def _rounded(self, new: Tensor, dtype: torch.dtype, *, old: Tensor | None) -> Tensor:
        stored = new.to(dtype)
        if old is not None and dtype.itemsize < new.dtype.itemsize:
            self._rounding.add(old, new, stored)
        return stored

    def _updated(self, tensor: MergedTensor, updates: Iterable[Update]) -> Iterator[tuple[int, Tensor]]:
        for start, tile in self._tiles(tensor, 0, num_rows(tensor.output.shape)):
            yield start, apply_all(updates, tile, start)

    def _tiles(self, tensor: MergedTensor, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Rows of a tensor before the merge, in the dtype to compute in, in new memory; zeros for one of a new size."""
        spec, shape = tensor.source, tensor.output.shape
        width = torch.Size(shape).numel() // max(1, num_rows(shape))
        compute = _compute_dtype(spec.dtype)
        step = max(_TILE_ROWS, _TILE_BYTES // max(1, width * compute.itemsize))
        row_bytes = width * spec.dtype.itemsize
        for first in range(start, stop, step):
            count = min(step, stop - first)
            if shape != spec.shape:
                yield first, torch.zeros(count, width, dtype=compute)
                continue
            tile = self._reader.read(spec, first * row_bytes, nbytes=count * row_bytes)
            yield first, tile.to(compute, copy=True).view(count, -1)

    def _whole(self, name: str) -> Tensor:
        spec = self._sources[name]
        values = self._reader.read(spec, 0, nbytes=spec.nbytes)
        return values.to(_compute_dtype(spec.dtype), copy=True).view(spec.shape)

    def close(self) -> None:
        self._reader.close()


def _compute_dtype(stored: torch.dtype) -> torch.dtype:
    return torch.float64 if stored == torch.float64 else torch.float32


def _copies(base: Path, adapter: Path, *, trust_remote_code: bool) -> dict[str, Path]:
    """Files to copy, by their name in the output.

    Configuration, tokenizer and licence of the base, its code where that is trusted, the tokenizer of the adapter.

    Raises:
        UnsupportedError: One is a link to a file elsewhere, which nobody meant to give away with the model.
    """
    suffixes = _COPIED_SUFFIXES if trust_remote_code else _COPIED_SUFFIXES - {".py"}
    found = {
        file.name: _inside(file, base)
        for file in sorted(base.iterdir())
        if (file.suffix in suffixes or file.name.upper().startswith(("LICENSE", "NOTICE")))
        and file.is_file()
        and not file.name.endswith(".index.json")
        and file.name != _ADAPTER_CONFIG
    }
    if (adapter / "tokenizer_config.json").is_file():
        found |= {name: _inside(adapter / name, adapter) for name in _TOKENIZER_FILES if (adapter / name).is_file()}
    return found


def _inside(file: Path, folder: Path) -> Path:
    real = file.resolve()
    if not stays_inside(file, folder):
        raise UnsupportedError(
            f"{file} -> {real}",
            reason="the link leads out of its folder, and the output would have a copy of what it leads to",
            instead="a copy of that file in the folder if it belongs to the model, or no link",
        )
    return real


def _copy(file: Path, copy: Path, *, has_code: bool) -> None:
    content = _without_code(file) if file.suffix == ".json" or copy.suffix == ".json" else None
    if has_code or content is None:
        shutil.copyfile(file, copy)
    else:
        copy.write_text(content)


def _without_code(file: Path) -> str | None:
    """A configuration without its references to code that is not copied; None if it has none."""
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not any(name in values for name in _CODE_FIELDS):
        return None
    return json.dumps({name: value for name, value in values.items() if name not in _CODE_FIELDS}, indent=2) + "\n"


def _change_config(file: Path, changes: Mapping[str, object]) -> None:
    if not changes:
        return
    config = json.loads(file.read_text())
    if "dtype" in changes:
        config.pop("torch_dtype", None)
    for name, value in changes.items():
        if value is None:
            for part in (config, config.get("text_config")):
                if isinstance(part, dict):
                    part.pop(name, None)
            continue
        holders = [part for part in (config, config.get("text_config")) if isinstance(part, dict) and name in part]
        for holder in holders or [config]:
            holder[name] = value
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _sync_folder(folder: Path) -> None:
    """Put a folder's small files and its entries onto the disk, so that a rename cannot come before them."""
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    sync_folder(folder)
