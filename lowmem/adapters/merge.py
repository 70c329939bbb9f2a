"""Merging an adapter into its base checkpoint, shard by shard: an ordinary checkpoint, in the memory of one tile."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lowmem.adapters.merge_plan import MergedTensor, MergePlan, num_rows, plan_merge
from lowmem.adapters.updates import Update, apply_all
from lowmem.models.checkpoint import resolve
from offload import (
    NO_ROOM,
    OutputTensor,
    SafetensorsSource,
    ShardFile,
    TensorReader,
    TensorSpec,
    TierFull,
    format_bytes,
    parse_bytes,
    split_into_shards,
    sync_folder,
    write_index,
)

# Values computed at a time, in bytes of fp32. Small enough that the allocator gives the same memory again.
_TILE_BYTES = 8 << 20


_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")


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

    What the adapter leaves alone is copied bit by bit. What it changes is computed in fp32 (fp64 for fp64 weights) and
    rounded once to the stored dtype, which is what PEFT's `merge_and_unload` gives for fp32 adapters on a resident
    model. Holds the adapter and one tile of one tensor in memory, whatever the size of the model. The output appears
    complete or not at all; model and adapter are only read.

    Args:
        model: Local folder or hub id of the safetensors checkpoint that the adapter was trained on.
        adapter: Folder of the adapter, as PEFT's `save_pretrained` and the Trainer write it. Its tokenizer, if it has
            one, goes into the output.
        output: Folder to write; must not exist or be empty.
        dtype: Type to store all floating-point weights in; each keeps its own where None.
        max_shard_bytes: Largest shard, as a number or "5GB".
        revision: Branch, tag or commit of the model's hub repository.
        trust_remote_code: Run model code that comes with the checkpoint.

    Returns:
        The output folder.

    Raises:
        UnsupportedError: The adapter has no merged form in an ordinary checkpoint of this model.
        ValueError: The adapter does not fit the model.
        FileExistsError: The output folder is not empty.
        offload.TierFull: The disk has no room for the output.
        offload.SourceError: The checkpoint is damaged.
    """
    base, adapter_folder, target = resolve(model, revision=revision), Path(adapter), Path(output).absolute()
    stored, shard_bytes = _stored_dtype(dtype), parse_bytes(max_shard_bytes, field="max_shard_bytes")
    if not (adapter_folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{adapter_folder}: no adapter_config.json; give the folder of a saved PEFT adapter")
    _check_output(target, base)
    with SafetensorsSource(base) as source:
        plan = plan_merge(base, adapter_folder, source=source, dtype=stored, trust_remote_code=trust_remote_code)
        shards = split_into_shards([tensor.output for tensor in plan.tensors], max_shard_bytes=max(1, shard_bytes))
        _check_room(target, sum(tensor.output.nbytes for tensor in plan.tensors))
        unfinished = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
        unfinished.mkdir(parents=True)
        try:
            _write_shards(unfinished, plan, shards)
            for file in source.files:
                source.check_unchanged(file)
            _copy_files(base, adapter_folder, unfinished, changes=plan.config_changes)
            _sync_folder(unfinished)
            unfinished.replace(target)
        except BaseException as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if isinstance(error, TierFull) or (isinstance(error, OSError) and error.errno in NO_ROOM):
                raise TierFull(f"disk: writing {target} failed ({error}); nothing of it was left there") from error
            raise
    _sync_folder(target.parent)
    return target


def _stored_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    chosen = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and chosen not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected float64, float32, bfloat16, float16 or None, got {dtype!r}")
    return chosen


def _check_output(target: Path, base: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"output: {target} exists and is not an empty folder; give another one, or remove it")
    if target.is_relative_to(base.absolute()):
        raise ValueError(f"output: {target} is inside the model's folder {base}; give a folder outside of it")


def _check_room(target: Path, needed_bytes: int) -> None:
    parent = next(folder for folder in target.parents if folder.is_dir())
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes:
        raise TierFull(
            f"disk: {target} needs {format_bytes(needed_bytes)}, {format_bytes(free_bytes)} are free on {parent}; "
            "free some space, give output on another disk, or a smaller dtype"
        )


def _write_shards(folder: Path, plan: MergePlan, shards: Mapping[str, tuple[OutputTensor, ...]]) -> None:
    by_name = {tensor.output.name: tensor for tensor in plan.tensors}
    writer = _TensorWriter(plan.sources)
    try:
        for file, outputs in shards.items():
            with ShardFile(folder / file, outputs) as shard:
                for output in outputs:
                    for values in writer.values(by_name[output.name]):
                        shard.write(values)
    finally:
        writer.close()
    write_index(folder, shards)


class _TensorWriter:
    """Makes the values of the output's tensors, a tile at a time."""

    def __init__(self, sources: Mapping[str, TensorSpec]) -> None:
        self._reader = TensorReader()
        self._sources = sources

    def values(self, tensor: MergedTensor) -> Iterator[Tensor]:
        """The tensor's values in its stored dtype, part by part; each is valid until the next."""
        spec, dtype = tensor.source, tensor.output.dtype
        if tensor.whole_layer is not None:
            layer, attribute = tensor.whole_layer
            yield layer.merged(attribute, self._whole).to(dtype)
        elif not tensor.segments:
            step = _TILE_BYTES - _TILE_BYTES % spec.dtype.itemsize
            for start in range(0, spec.nbytes, step):
                yield self._reader.read(spec, start, nbytes=min(step, spec.nbytes - start)).to(dtype)
        else:
            for segment in tensor.segments:
                shift = segment.target_start - segment.start
                stop = segment.start + segment.num_rows
                if any(update.sees_all_rows for update in segment.updates):
                    self._measure(spec, segment.updates)
                for start, tile in self._tiles(spec, segment.start, stop):
                    yield apply_all(segment.updates, tile, start + shift).to(dtype)

    def _measure(self, spec: TensorSpec, updates: tuple[Update, ...]) -> None:
        for number, update in enumerate(updates):
            if update.sees_all_rows:
                update.measure(self._updated(spec, updates[:number]))

    def _updated(self, spec: TensorSpec, updates: Iterable[Update]) -> Iterator[tuple[int, Tensor]]:
        for start, tile in self._tiles(spec, 0, num_rows(spec.shape)):
            yield start, apply_all(updates, tile, start)

    def _tiles(self, spec: TensorSpec, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Rows of a stored tensor, in the dtype to compute in, in new memory."""
        row_bytes = spec.nbytes // max(1, num_rows(spec.shape))
        compute = torch.float64 if spec.dtype == torch.float64 else torch.float32
        row_compute_bytes = row_bytes // spec.dtype.itemsize * compute.itemsize
        step = max(1, _TILE_BYTES // max(1, row_compute_bytes))
        for first in range(start, stop, step):
            count = min(step, stop - first)
            tile = self._reader.read(spec, first * row_bytes, nbytes=count * row_bytes)
            yield first, tile.to(compute, copy=True).view(count, -1)

    def _whole(self, name: str) -> Tensor:
        spec = self._sources[name]
        compute = torch.float64 if spec.dtype == torch.float64 else torch.float32
        return self._reader.read(spec, 0, nbytes=spec.nbytes).to(compute, copy=True).view(spec.shape)

    def close(self) -> None:
        self._reader.close()


def _copy_files(base: Path, adapter: Path, folder: Path, *, changes: Mapping[str, object]) -> None:
    """Configuration, tokenizer, licence and model code of the base, then the tokenizer that was trained with."""
    for file in sorted(base.iterdir()):
        wanted = file.suffix in _COPIED_SUFFIXES or file.name.upper().startswith(("LICENSE", "NOTICE"))
        if file.is_file() and wanted and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    if (adapter / "tokenizer_config.json").is_file():
        for name in _TOKENIZER_FILES:
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, folder / name)
    if changes:
        config = json.loads((folder / "config.json").read_text())
        if "torch_dtype" in config and "dtype" in changes:
            config.pop("torch_dtype")
        config.update(changes)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _sync_folder(folder: Path) -> None:
    """Put a folder's small files and its entries onto the disk, so that a rename cannot come before them."""
    for file in folder.glob("*.json"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    sync_folder(folder)


__all__ = ["merge"]
