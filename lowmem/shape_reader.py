"""From a checkpoint's headers and a PEFT configuration to `ModelShapes`. Reads no weight: the model is on meta."""

from __future__ import annotations

import warnings
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lowmem.activations import MicroBatch, block_recompute_bytes
from lowmem.block_reader import read_block
from lowmem.dry_run import dry_run
from lowmem.shapes import BlockShape, ModelShapes

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig, PreTrainedModel

    from lowmem.loading import Opened
    from lowmem.models.build import Skeleton, StreamedBlock

_DRY_RUN_TOKENS = 2048
_MOST_OVER = 1.35


def read_shapes(opened: Opened, *, peft_config: PeftConfig | None = None) -> ModelShapes:
    """Read a model's sizes from an opened checkpoint.

    Args:
        opened: The checkpoint. With a `peft_config` its meta model gets the adapter's modules, and can then no longer
            be loaded.
        peft_config: The adapter to count; None for none.

    Raises:
        ValueError: The adapter fits nothing in the model.
    """
    built = opened.built
    built.model.requires_grad_(False)
    ends = _Ends.of(built)
    if peft_config is not None:
        _add_adapter(built.model, peft_config)
    return _shapes_of(built, ends, opened=opened, peft_config=peft_config)


@dataclass(frozen=True, kw_only=True)
class _Ends:
    """What stands before and after the blocks, as it was before an adapter wrapped it."""

    vocab_size: int
    embedding_bytes: int
    embedding_stored_bytes: int
    head_bytes: int
    num_head_params: int
    embedding_gatherable: bool
    other_bytes: int

    @staticmethod
    def of(built: Skeleton) -> _Ends:
        """Read the sizes of everything outside the blocks; tied weights count once, as the head."""
        from lowmem.loading import gatherable_embedding

        embedding = built.model.get_input_embeddings().weight
        output = built.model.get_output_embeddings()
        head = embedding if output is None else output.weight
        inside = {id(param) for streamed in built.blocks for param in streamed.block.module.parameters()}
        outside = {id(param): param for param in built.model.parameters() if id(param) not in inside}
        known = {id(embedding), id(head)}
        rest = sum(param.nbytes for key, param in outside.items() if key not in known)
        is_tied = head is embedding
        return _Ends(
            vocab_size=embedding.shape[0],
            embedding_bytes=0 if is_tied else embedding.nbytes,
            embedding_stored_bytes=0 if is_tied else _stored_bytes(built, embedding),
            head_bytes=head.nbytes,
            num_head_params=head.numel(),
            embedding_gatherable=gatherable_embedding(built) is not None,
            other_bytes=rest + sum(buffer.nbytes for buffer in built.model.buffers()),
        )


def _stored_bytes(built: Skeleton, embedding: torch.Tensor) -> int:
    name = next(name for name, param in built.model.named_parameters() if param is embedding)
    sources = built.mapping.recipes[name].sources
    return sum(spec.nbytes for spec in sources)


def _add_adapter(model: PreTrainedModel, peft_config: PeftConfig) -> None:
    """Put the adapter's modules into the meta model as PEFT will into the real one."""
    from peft import get_peft_model

    config = deepcopy(peft_config)
    if getattr(config, "init_lora_weights", True) is not True:
        # Other initialisations read the weights, which are not here; they change values, not shapes.
        config.init_lora_weights = True
    with torch.device("meta"), warnings.catch_warnings():
        # PEFT asks transformers for a property by its old name.
        warnings.simplefilter("ignore", FutureWarning)
        # PEFT says this of the patterns that it makes itself for stacked experts.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
        get_peft_model(model, config, low_cpu_mem_usage=True)


def _shapes_of(built: Skeleton, ends: _Ends, *, opened: Opened, peft_config: PeftConfig | None) -> ModelShapes:
    from lowmem.streaming.chunkable import can_chunk

    blocks = tuple(_block_shape(streamed, built.model.config) for streamed in built.blocks)
    trainable = [param for param in built.model.parameters() if param.requires_grad]
    stored = {str(spec.dtype) for streamed in built.blocks for spec in streamed.spec.tensors}
    return ModelShapes(
        name=str(built.model.config.name_or_path) or opened.folder.name,
        blocks=blocks,
        vocab_size=ends.vocab_size,
        embedding_bytes=ends.embedding_bytes,
        embedding_stored_bytes=ends.embedding_stored_bytes,
        head_bytes=ends.head_bytes,
        num_head_params=ends.num_head_params,
        embedding_gatherable=ends.embedding_gatherable,
        other_bytes=ends.other_bytes,
        compute_dtype=str(opened.dtype).removeprefix("torch."),
        stored_dtypes=tuple(sorted(dtype.removeprefix("torch.") for dtype in stored)),
        unchunkable=can_chunk(built.model) or "",
        adapter=describe_adapter(peft_config),
        num_outer_adapter_params=sum(param.numel() for param in trainable)
        - sum(block.num_adapter_params for block in blocks),
        outer_adapter_bytes=sum(param.nbytes for param in trainable) - sum(block.adapter_bytes for block in blocks),
    )


def _block_shape(streamed: StreamedBlock, config: PretrainedConfig) -> BlockShape:
    from lowmem.streaming.unpack import Unpacker
    from offload.layout import lay_out

    return read_block(
        streamed.block.module,
        config,
        buffer_bytes=lay_out(streamed.spec).buffer_bytes,
        workspace_bytes=Unpacker([streamed], device=torch.device("meta")).workspace_bytes,
    )


def corrected(shapes: ModelShapes, opened: Opened, *, seq_len: int) -> ModelShapes:
    """Hold the blocks' formula against a dry run of their code, and correct it where that knows better.

    Afterwards the formula gives at least what the dry run held, and at most a third more.

    Args:
        shapes: What `read_shapes` read of `opened`.
        opened: The checkpoint, with the same adapter in it.
        seq_len: Tokens of a sequence; longer ones than 2048 are run with 2048.
    """
    batch = MicroBatch(num_sequences=1, seq_len=min(seq_len, _DRY_RUN_TOKENS), dtype=shapes.compute_dtype)
    try:
        held = dry_run(opened.built, num_sequences=1, seq_len=batch.seq_len)
    except NotImplementedError:
        return shapes
    if len(held) != len(shapes.blocks):
        return shapes
    blocks = []
    for block, nbytes in zip(shapes.blocks, held, strict=True):
        formula = block_recompute_bytes(block, batch)
        blocks.append(replace(block, correction=min(max(formula, nbytes), _MOST_OVER * nbytes) / formula))
    return replace(shapes, blocks=tuple(blocks))


def describe_adapter(peft_config: PeftConfig | None) -> str:
    """Say in a few words what is trained: "LoRA r=16 on all-linear, dropout 0.05"."""
    if peft_config is None:
        return "none"
    kind = str(getattr(peft_config.peft_type, "value", peft_config.peft_type))
    rank, targets = getattr(peft_config, "r", None), getattr(peft_config, "target_modules", None)
    words = ["DoRA" if getattr(peft_config, "use_dora", False) else {"LORA": "LoRA"}.get(kind, kind)]
    words += [f"r={rank}"] if rank else []
    words += [f"on {targets if isinstance(targets, str) else ', '.join(sorted(targets))}"] if targets else []
    dropout = getattr(peft_config, "lora_dropout", 0.0)
    return " ".join(words) + (f", dropout {dropout:g}" if dropout else "")
