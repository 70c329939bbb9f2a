"""Opening a checkpoint as a streamed model: check, plan, build, attach. In that order, so that refusals come first."""

from __future__ import annotations

import os
import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.full.master_weights import MasterWeights
from lowmem.full.opening import AdapterRefusal, Masters, open_full
from lowmem.models.build import Skeleton, StreamedBlock, fill, skeleton
from lowmem.streaming.chunkable import can_chunk, enable_chunks
from lowmem.streaming.embedding import GatheredEmbedding, read_now
from lowmem.streaming.outer_norms import tile_outer_norms
from lowmem.streaming.preparation import Preparation
from lowmem.streaming.runtime import Runtime, attach
from lowmem.streaming.split_choice import SplitChoice
from lowmem.streaming.trl_hash import hash_by_fingerprint
from lowmem.streaming.unpack import Unpacker
from offload import BlockSpec, FileReader, SafetensorsSource, Scheduler, Trace, open_device

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from lowmem.step_plan import Plan


_ROW_THREADS = 4
"""Requests in flight where rows of an embedding table are read one by one."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint whose files and configuration have been checked; no weight is read yet."""

    source: SafetensorsSource
    """Its files."""
    built: Skeleton
    """The model on meta, matched with them."""
    device: torch.device
    """Compute device."""
    dtype: torch.dtype
    """Compute dtype."""
    folder: Path
    """Where it lies."""
    num_labels: int | None = None
    """Outputs of a sequence classification model; None for a language model."""


def open_checkpoint(
    folder: Path,
    *,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    num_labels: int | None = None,
    trust_remote_code: bool = False,
) -> Opened:
    """Check a checkpoint and match it with its model class.

    Args:
        folder: Local folder.
        name: What the user called it; adapters record it as their base model.
        device: Compute device.
        dtype: Compute dtype.
        num_labels: Outputs of a sequence classification model; None for a language model.
        trust_remote_code: As in transformers.

    Raises:
        UnsupportedError: The architecture or the checkpoint cannot be streamed.
        SourceError: A file is missing, damaged, or does not fit the configuration.
    """
    from lowmem.models.blocks import refuse_config, refuse_labels

    config = read_config(folder, trust_remote_code=trust_remote_code)
    # The text part as well: of some checkpoints only that is built.
    config.name_or_path = config.get_text_config().name_or_path = name
    refuse_config(config)
    if num_labels is not None:
        refuse_labels(config, num_labels)
        config.num_labels = num_labels
    source = SafetensorsSource(folder)
    try:
        built = skeleton(
            config,
            source.tensors,
            dtype=dtype,
            folder=folder,
            classifies=num_labels is not None,
            trust_remote_code=trust_remote_code,
        )
    except BaseException:
        source.close()
        raise
    return Opened(source=source, built=built, device=device, dtype=dtype, folder=folder, num_labels=num_labels)


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """A folder's model configuration.

    Raises:
        FileNotFoundError: The folder has no config.json.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json; give the folder of a transformers checkpoint")
    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def load(opened: Opened, *, plan: Plan) -> PreTrainedModel:
    """Make the streamed model: read what stays resident, start the scheduler, take over the blocks.

    Args:
        opened: A checked checkpoint; its files are closed with the model.
        plan: What goes where.

    Raises:
        OffloadError: A file cannot be read, or memory cannot be had.
    """
    from lowmem.generation.hooks import GenerationHooks
    from lowmem.generation.room import KvRoom

    built, device = opened.built, opened.device
    with ExitStack() as stack:
        stack.callback(opened.source.close)
        reader = FileReader(
            num_threads=plan.rates.disk_num_threads,
            request_bytes=plan.rates.disk_request_bytes,
            stamps=opened.source.stamps,
        )
        stack.callback(reader.close)
        trace = Trace()
        tables = _Weights(built.blocks, built, reader=reader, device=device)
        masters = Masters() if plan.job.tuning == "full" else None
        gathered = gatherable_embedding(built) if plan.embedding_on_disk else None
        model = fill(
            built,
            device=device,
            read=lambda block: read_now(block, reader=reader, device=device),
            load=tables.load if masters is None else masters.load,
            store=None if masters is None else masters.store,
            absent=frozenset(() if gathered is None else (gathered,)),
        )
        if gathered is not None:
            # Its own threads: the rows of a token must not wait for the blocks that are being fetched ahead.
            rows = FileReader(num_threads=_ROW_THREADS, stamps=opened.source.stamps)
            stack.callback(rows.close)
            GatheredEmbedding(
                model.get_input_embeddings(),
                spec=built.mapping.recipes[gathered].sources[0],
                reader=rows,
                dtype=opened.dtype,
                device=device,
            )
        weights = (
            _FrozenWeights(built, plan=plan, reader=reader, device=device, trace=trace)
            if masters is None
            else MasterWeights(open_full(model, opened, masters, plan=plan, reader=reader, trace=trace))
        )
        stack.callback(weights.scheduler.close)
        chunks = can_chunk(model) is None
        if chunks:
            enable_chunks(model)
        tile_outer_norms(model, [streamed.block.module for streamed in built.blocks])
        runtime = Runtime(
            built.blocks,
            scheduler=weights.scheduler,
            unpacker=weights.unpacker,
            plan=plan,
            trace=trace,
            device=device,
            choose_split=SplitChoice(plan, can_chunk=chunks),
        )
        # From here on they live as long as the runtime, and must not keep it alive. Closed in reverse: the scheduler
        # waits for the reads that still write into its buffers.
        weakref.finalize(runtime, stack.pop_all().close)
    runtime.full = None if masters is None else masters.full
    runtime.generation = GenerationHooks(model, room=KvRoom.of(plan))
    attach(model, runtime)
    if masters is not None:
        runtime.before_first_block(AdapterRefusal(model))
    runtime.before_first_block(Preparation(model))
    if masters is None:
        hash_by_fingerprint(model, opened.source.fingerprint())
    _give_generation_config(model, opened.folder)
    return model


class _FrozenWeights:
    """Weights that stay in the checkpoint and never change."""

    def __init__(self, built: Skeleton, *, plan: Plan, reader: FileReader, device: torch.device, trace: Trace) -> None:
        self.scheduler = Scheduler(
            [streamed.spec for streamed in built.blocks],
            plan=plan.placement,
            reader=reader,
            device=open_device(device),
            trace=trace,
        )
        self.unpacker = Unpacker(built.blocks, device=device)


class _Weights:
    """Reads one parameter's true values, for code that looks at an absent weight outside a visit."""

    def __init__(
        self, blocks: tuple[StreamedBlock, ...], built: Skeleton, *, reader: FileReader, device: torch.device
    ) -> None:
        self._recipes = built.mapping.recipes
        self._dtypes = {slot.key: slot.dtype for streamed in blocks for slot in streamed.slots}
        self._default = built.model.dtype
        self._reader, self._device = reader, device

    def load(self, key: str) -> Tensor:
        recipe = self._recipes[key]
        stored = read_now(BlockSpec(name=key, tensors=recipe.sources), reader=self._reader, device=self._device)
        # A clone: the caller may keep it, and must not keep the staging memory of a whole expert stack alive.
        return recipe.run(stored)[key].to(self._dtypes.get(key, self._default), copy=True).contiguous()


def gatherable_embedding(built: Skeleton) -> str | None:
    """Name of the input embedding's table if its rows can be read one by one from the checkpoint, else None."""
    model = built.model
    table = model.get_input_embeddings()
    output = model.get_output_embeddings()
    weight = getattr(table, "weight", None)
    if not isinstance(table, torch.nn.Embedding) or (output is not None and output.weight is weight):
        return None
    name = next((name for name, param in model.named_parameters() if param is weight), None)
    tied = getattr(model, "all_tied_weights_keys", {})
    if name is None or name in tied or name in tied.values():
        return None
    recipe = built.mapping.recipes.get(name)
    return name if recipe is not None and recipe.convert is None and table.max_norm is None else None


def _give_generation_config(model: PreTrainedModel, folder: Path) -> None:
    from transformers import GenerationConfig

    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def pick_device(device: torch.device | str | None) -> torch.device:
    """The compute device: the one asked for, else the GPU if there is one, else the CPU.

    Raises:
        UnsupportedError: A device that is neither, or several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UnsupportedError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}",
            reason="a streamed model trains in one process",
            instead="start the script with python, not torchrun or accelerate launch with several processes",
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"device={str(device)!r}", reason="only CPUs and CUDA are known", instead="cpu or cuda")
    # Equal only where no card is named.
    if chosen == torch.device("cuda"):
        chosen = torch.device("cuda", torch.cuda.current_device())
    return chosen


def pick_dtype(dtype: torch.dtype | str | None, *, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The compute dtype: the one asked for, else fp32 on a CPU and the stored one on a GPU (bf16 where it can).

    Raises:
        UnsupportedError: Not a floating-point dtype that models compute in.
    """
    if isinstance(dtype, str):
        dtype = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(
            dtype, getattr(torch, dtype, dtype)
        )
    if dtype is None:
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if stored != torch.float32 and torch.cuda.is_bf16_supported() else stored
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedError(
            f"dtype={dtype!r}", reason="models compute in floating point", instead="float32, bfloat16 or float16"
        )
    assert isinstance(dtype, torch.dtype)
    return dtype


__all__ = ["Opened", "gatherable_embedding", "load", "open_checkpoint", "pick_device", "pick_dtype", "read_config"]
