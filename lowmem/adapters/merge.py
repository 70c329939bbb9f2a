"""Merging an adapter into its base checkpoint, shard by shard: an ordinary checkpoint, in the memory of one tile."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from lowmem.adapters.merge_packed import merge_into_packed
from lowmem.adapters.merge_plan import MergePlan, plan_merge
from lowmem.adapters.merged_values import MergedValues, Rounding
from lowmem.models.checkpoint import resolve
from lowmem.packing.beside import (
    change_config,
    copy_files,
    files_beside,
    refuse_output,
    require_room,
    telling_full_disk,
)
from lowmem.progress_line import showing_bytes
from lowmem.quantization.packing import packer_for
from offload import (
    OutputTensor,
    SafetensorsSource,
    ShardFile,
    parse_bytes,
    split_into_shards,
    sync_files,
    sync_folder,
    unfinished_folder,
    write_index,
)

_QUIET_S = 5.0
"""Seconds after which a merge shows how far it is."""

_SHARD_BYTES = 5_000_000_000
"""transformers' usual size of a shard."""

_TOLD_LOSS = 0.01
"""Part of the adapter's change that may be lost to rounding without a word."""


def merge(
    model: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    quantization: str | None = None,
    max_shard_bytes: int | str | None = None,
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

    With a `quantization` the output is a packed folder as `lowmem.pack` writes it, block by block: an interrupted merge
    goes on where it was. Weights that are packed in the same format in the base and that the adapter leaves alone keep
    their bytes; the others are quantised from the merged values. That rounds each of them by far more than an adapter
    usually changes it: a warning says by how much, and the adapter beside its base keeps all of it.

    Args:
        model: Local folder or hub id of the safetensors checkpoint that the adapter was trained on.
        adapter: Folder of the adapter, as PEFT's `save_pretrained` and the Trainer write it. Its tokenizer, if it has
            one, goes into the output.
        output: Folder to write; must not exist or be empty.
        dtype: Type to store all floating-point weights in; each keeps its own where None.
        quantization: Pack the result, to "nf4", "fp4" or "int8"; what is not packed keeps its dtype.
        max_shard_bytes: Largest shard, as a number or "5GB", which is what None means; a packed folder has one for each
            block.
        revision: Branch, tag or commit of the model's hub repository.
        trust_remote_code: Run model code that comes with the checkpoint, and copy it to the output.

    Returns:
        The output folder.

    Raises:
        UnsupportedError: The adapter has no merged form in an ordinary checkpoint of this model, or in a packed one.
        ValueError: The adapter does not fit the model.
        FileExistsError: The output folder is not empty.
        offload.TierFull: The disk has no room for the output.
        offload.SourceError: The checkpoint is damaged.
    """
    for name, given in (("adapter", adapter), ("output", output)):
        if not isinstance(given, str | os.PathLike):
            raise TypeError(f"{name}={given!r}: expected a folder")
    base, adapter_folder = resolve(model, revision=revision), Path(adapter).expanduser()
    target = Path(output).expanduser().absolute()
    if quantization is None:
        told = _merge_into_ordinary(
            base,
            adapter_folder,
            output=target,
            dtype=_stored_dtype(dtype),
            shard_bytes=parse_bytes(
                _SHARD_BYTES if max_shard_bytes is None else max_shard_bytes, field="max_shard_bytes"
            ),
            trust_remote_code=trust_remote_code,
        )
    else:
        for name, value in (("dtype", dtype), ("max_shard_bytes", max_shard_bytes)):
            if value is not None:
                raise ValueError(f"{name}={value!r} with quantization={quantization!r}: give one of them, not both")
        packer = packer_for(quantization)
        told = merge_into_packed(
            base, adapter_folder, packer, name=str(model), output=target, trust_remote_code=trust_remote_code
        )
    if told is not None:
        warnings.warn(told, UserWarning, stacklevel=2)
    return target


def _merge_into_ordinary(
    base: Path,
    adapter: Path,
    *,
    output: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
    trust_remote_code: bool,
) -> str | None:
    """Write the ordinary checkpoint; returns what rounding lost in a sentence, where that is worth one."""
    refuse_output(output, base)
    copies = files_beside(base, has_code=trust_remote_code, adapter=adapter)
    rounding = Rounding()
    with SafetensorsSource(base) as source:
        plan = plan_merge(base, adapter, source=source, dtype=dtype, trust_remote_code=trust_remote_code)
        shards = split_into_shards([tensor.output for tensor in plan.tensors], max_shard_bytes=max(1, shard_bytes))
        nbytes = sum(tensor.output.nbytes for tensor in plan.tensors)
        require_room(output, nbytes, instead="give output on another disk, or a smaller dtype")
        with telling_full_disk(output, "nothing of it was left there"), taking_the_place_of(output) as folder:
            _write_shards(folder, plan, shards, rounding)
            for file in source.files:
                source.check_unchanged(file)
            copy_files(copies, folder, has_code=trust_remote_code)
            change_config(folder, plan.config_changes)
    return rounding.told() if rounding.lost > _TOLD_LOSS else None


def _stored_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    chosen = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and chosen not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected float64, float32, bfloat16, float16 or None, got {dtype!r}")
    return chosen


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
        sync_files(folder)
        sync_folder(folder)
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise FileExistsError(f"output: {target} was made by somebody else meanwhile") from error
            raise
        sync_folder(target.parent)


def _write_shards(
    folder: Path, plan: MergePlan, shards: Mapping[str, tuple[OutputTensor, ...]], rounding: Rounding
) -> None:
    by_name = {tensor.output.name: tensor for tensor in plan.tensors}
    num_bytes = sum(tensor.output.nbytes for tensor in plan.tensors)
    showing = showing_bytes("merging", num_bytes, delay_s=_QUIET_S)
    with closing(MergedValues(plan, rounding)) as writer, showing as done:
        for file, outputs in shards.items():
            with ShardFile(folder / file, outputs) as shard:
                for output in outputs:
                    for values in writer.values(by_name[output.name]):
                        shard.write(values)
                        done(values.nbytes)
    write_index(folder, shards)
