"""The widths of a decoder block, read from its modules: what its recomputation keeps depends on nothing else.

From a checkpoint's headers and a PEFT configuration to `ModelShapes`. Reads no weight: the model is on meta.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from itertools import islice, product
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from lowmem.experts.visiting import EXPERTS_PER_TOKEN, packed_values_bytes, single_experts_bytes, workspace_bytes
from lowmem.models.blocks import can_chunk, first_alike
from lowmem.planning.block_memory import MicroBatch, block_recompute_bytes
from lowmem.planning.dry_run import dry_run
from lowmem.planning.shapes import BlockShape, ExpertsShape, LinearShape, ModelShapes, Part

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig, PreTrainedModel

    from lowmem.models.build import Skeleton, StreamedBlock
    from lowmem.models.checkpoint import Described


# Activations that transformers writes in Python, one kept tensor for each operation: the most that any of them keeps.
_PYTHON_ACTIVATIONS = {
    "NewGELUActivation": 6,
    "FastGELUActivation": 6,
    "QuickGELUActivation": 3,
    "LaplaceActivation": 4,
}


def read_block(block: nn.Module, config: PretrainedConfig, *, buffer_bytes: int, workspace_bytes: int) -> BlockShape:
    """Read one decoder block's widths from its modules.

    Args:
        block: The block, on any device, with its adapter's modules in it; only these require gradients.
        config: The model's configuration.
        buffer_bytes: Bytes it takes in a buffer.
        workspace_bytes: Bytes that unpacking it writes.
    """
    # A block's own configuration first: where layers differ, the model's does not say.
    own = (child.config for child in block.modules() if isinstance(getattr(child, "config", None), type(config)))
    configs = (*islice(own, 1), config.get_text_config())
    hidden_size = _field(configs, "hidden_size", "n_embd", "d_model") or 1
    kinds = {path: type(module).__name__ for path, module in block.named_modules()}
    attention = [path for path, kind in kinds.items() if "Attention" in kind]
    norms = [path for path, kind in kinds.items() if "Norm" in kind]
    num_inner_norms = sum(any(path.startswith(f"{parent}.") for parent in attention) for path in norms)
    heads = _Heads(configs, hidden_size)
    trainable = [param for param in block.parameters() if param.requires_grad]
    num_params = sum(param.numel() for param in block.parameters() if not param.requires_grad)
    experts, num_idle_params = _experts(block, configs)
    return BlockShape(
        buffer_bytes=buffer_bytes,
        workspace_bytes=workspace_bytes,
        num_params=num_params,
        num_active_params=num_params - num_idle_params,
        hidden_size=hidden_size,
        query_size=heads.num_queries * heads.key_width,
        key_size=heads.num_keys * heads.key_width,
        value_size=heads.num_keys * heads.value_width,
        num_heads=heads.num_queries,
        linears=tuple(_linears(block, attention, hidden_size)),
        num_norms=max(1, len(norms) - num_inner_norms),
        has_query_key_norm=num_inner_norms > 0,
        # What is one kernel keeps one.
        activation_copies=max(_PYTHON_ACTIVATIONS.get(type(module).__name__, 1) for module in block.modules()),
        experts=experts,
        num_adapter_params=sum(param.numel() for param in trainable),
        adapter_bytes=sum(param.nbytes for param in trainable),
    )


class _Heads:
    """Numbers and widths of attention heads, under the names that configurations use."""

    def __init__(self, configs: Sequence[PretrainedConfig], hidden_size: int) -> None:
        def first(*names: str) -> int | None:
            return _field(configs, *names)

        self.num_queries = first("num_attention_heads") or 1
        width = first("head_dim") or hidden_size // self.num_queries
        num_keys = first("num_key_value_heads", "num_kv_heads") or self.num_queries
        # Low-rank keys and values are expanded to all heads.
        self.num_keys = num_keys if first("kv_lora_rank") is None else self.num_queries
        rotary, plain = first("qk_rope_head_dim") or 0, first("qk_nope_head_dim") or 0
        self.key_width = first("qk_head_dim") or (rotary + plain) or width
        self.value_width = first("v_head_dim") or width


def _field(configs: Sequence[PretrainedConfig], *names: str) -> int | None:
    """The first of some fields that a configuration has as a number above 0; the largest where it has one per layer."""
    for config, name in product(configs, names):
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # transformers: it differs between layers, and this is not a layer's configuration
            continue
        if isinstance(value, (list, tuple)):
            value = max((entry for entry in value if isinstance(entry, int)), default=None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _linears(block: nn.Module, attention: Sequence[str], hidden_size: int) -> Iterator[LinearShape]:
    """Its linear layers outside the routed experts, in module order."""
    found = dict(_walk(block, ""))
    outs: dict[str, str] = {}
    for path, (module, _) in found.items():
        if features_of(module)[1] == hidden_size:
            # The last one of a group that leads back to the hidden size: o_proj, down_proj.
            outs[_group(path, attention)] = path
    for path, (module, adapter) in found.items():
        group = _group(path, attention)
        is_out = outs.get(group) == path
        if group in attention:
            part = Part.ATTENTION_OUT if is_out else Part.ATTENTION_IN
        else:
            part = Part.MLP_OUT if is_out else Part.MLP_IN
        in_features, out_features = features_of(module)
        yield LinearShape(
            part=part,
            in_features=in_features,
            out_features=out_features,
            rank=0 if adapter is None else _rank_of(adapter),
            has_dropout=adapter is not None and _has_dropout(adapter),
            is_dora=adapter is not None and any(getattr(adapter, "use_dora", {}).values()),
        )


def _group(path: str, attention: Sequence[str]) -> str:
    return next((parent for parent in attention if path.startswith(f"{parent}.")), path.rpartition(".")[0])


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, tuple[nn.Module, nn.Module | None]]]:
    """Paths of linear layers with their adapters; does not descend into an adapter's own layers."""
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        base = getattr(child, "base_layer", None)
        # PEFT nests a wrapper for each adapted stack of experts; what they hold besides it is the adapter's.
        while isinstance(inner := getattr(base, "base_layer", None), nn.Module):
            base = inner
        if isinstance(base, nn.Module):
            if is_linear(base):
                yield child_path, (base, child)
            else:
                yield from _walk(base, child_path)
        elif is_linear(child):
            yield child_path, (child, None)
        else:
            yield from _walk(child, child_path)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer; transformers' Conv1D (gpt2) is one whose weight is stored transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def features_of(module: nn.Module) -> tuple[int, int]:
    """Widths of a linear layer's input and output."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    num_in, num_out = module.weight.shape  # type: ignore[misc]
    return int(num_in), int(num_out)


def _rank_of(adapter: nn.Module) -> int:
    ranks = getattr(adapter, "r", None)
    if isinstance(ranks, dict) and ranks:
        return max(int(rank) for rank in ranks.values())
    # An adapter of another kind than LoRA keeps about what a LoRA of as many parameters keeps.
    num_params = sum(param.numel() for param in adapter.parameters() if param.requires_grad)
    in_features, out_features = features_of(cast("nn.Module", adapter.base_layer))
    return max(1, num_params // (in_features + out_features))


def _has_dropout(adapter: nn.Module) -> bool:
    dropouts = getattr(adapter, "lora_dropout", None)
    return isinstance(dropouts, nn.ModuleDict) and any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in dropouts.values()
    )


def _experts(block: nn.Module, configs: Sequence[PretrainedConfig]) -> tuple[ExpertsShape | None, int]:
    """The routed experts, and how many of their weights one token does not go through."""
    stacks = [
        (module, param)
        for module in block.modules()
        if not isinstance(module, (nn.Conv1d, nn.Conv2d))
        for param in module.parameters(recurse=False)
        if param.dim() == 3 and min(param.shape) > 1 and not param.requires_grad
    ]
    if not stacks:
        return None, 0
    num_experts = stacks[0][1].shape[0]
    num_per_token = min(num_experts, _field(configs, *EXPERTS_PER_TOKEN) or num_experts)
    product_size = _field(configs, "moe_intermediate_size", "intermediate_size") or stacks[-1][1].shape[1]
    num_params = sum(param.numel() for _, param in stacks)
    # PEFT nests one wrapper for each stack; a set finds the adapted ones, the stacks give the order of use.
    wrapped = [module for module in block.modules() if hasattr(module, "parameter_name")]
    adapted = {id(wrapper.get_param()) for wrapper in wrapped}  # type: ignore[operator]
    shape = ExpertsShape(
        num_experts=num_experts,
        num_per_token=num_per_token,
        expanded_size=product_size * (2 if getattr(stacks[0][0], "has_gate", True) else 1),
        product_size=product_size,
        adapted_bytes=tuple(param.nbytes for _, param in stacks if id(param) in adapted),
    )
    return shape, num_params - num_params * num_per_token // num_experts


_DRY_RUN_TOKENS = 2048


_MOST_OVER = 1.35


_DORA_OVER = 1.1
"""What blocks with DoRA hold over the formula's sum (benchmarks/plan_accuracy.py: 1 x 512 tokens at hidden 512)."""


def read_shapes(opened: Described, *, peft_config: PeftConfig | None = None, seq_len: int | None = None) -> ModelShapes:
    """Read a model's sizes from an opened checkpoint.

    Args:
        opened: The checkpoint. With a `peft_config` its meta model gets the adapter's modules, and can then no longer
            be loaded.
        peft_config: The adapter to count; None for none.
        seq_len: Tokens of a sequence, to hold the blocks' formula against a dry run (`corrected`); None to leave that.

    Raises:
        ValueError: The adapter fits nothing in the model.
    """
    built = opened.built
    built.model.requires_grad_(False)
    # What stands outside the blocks is read before an adapter wraps it.
    bare = _bare_shapes(opened)
    if peft_config is None:
        return bare if seq_len is None else corrected(bare, opened, seq_len=seq_len)
    first = first_alike([streamed.block for streamed in built.blocks])
    if _names_blocks(peft_config):
        first = tuple(range(len(built.blocks)))
    with _only(built, set(first)):
        _add_adapter(built.model, peft_config)
    adapted = with_what_trains(bare, built.model, built.blocks, first)
    adapted = replace(adapted, adapter=describe_adapter(peft_config))
    return adapted if seq_len is None else corrected(adapted, opened, seq_len=seq_len, adapted=first)


_CHOOSING_BLOCKS = ("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "target_parameters")


def _names_blocks(peft_config: PeftConfig) -> bool:
    """Whether a configuration may give blocks that are alike different adapters."""
    if any(getattr(peft_config, field, None) for field in _CHOOSING_BLOCKS):
        return True
    named: list[str] = []
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        value = getattr(peft_config, field, None) or ()
        if isinstance(value, str) and value != "all-linear":
            return True
        named += () if isinstance(value, str) else value
    return any("." in name or any(letter.isdigit() for letter in name) for name in named)


@contextmanager
def _only(built: Skeleton, kept: Collection[int]) -> Iterator[None]:
    """Have the model consist of some of its blocks for a while: an adapter for hundreds of layers takes seconds."""
    path, _, _ = built.blocks[0].block.name.rpartition(".")
    parent, _, attribute = path.rpartition(".")
    owner, every = built.model.get_submodule(parent), built.model.get_submodule(path)
    few = nn.ModuleList(built.blocks[index].block.module for index in sorted(kept))
    setattr(owner, attribute, few)
    try:
        yield
    finally:
        setattr(owner, attribute, every)


def with_what_trains(
    shapes: ModelShapes,
    model: PreTrainedModel,
    streamed: Sequence[StreamedBlock],
    adapted: Sequence[int] | None = None,
) -> ModelShapes:
    """The same model with the parameters that require gradients now, as `requires_grad` says; reads no weight.

    Args:
        shapes: The model's sizes.
        model: The model, on any device, with its adapters' modules in it.
        streamed: Its blocks.
        adapted: For each block the one that has its adapter, where only some have; None where each has its own.
    """
    if shapes.trains_every_weight:
        return shapes
    first = range(len(streamed)) if adapted is None else adapted
    read = {index: _block_shape(streamed[index], model.config) for index in sorted(set(first))}
    blocks = []
    for index, known in zip(first, shapes.blocks, strict=True):
        made, bare = read[index], shapes.blocks[index]
        # An adapter on a stack of experts has it unpacked whole.
        more_bytes = made.workspace_bytes - bare.workspace_bytes
        more_values = made.packed_values_bytes - bare.packed_values_bytes
        blocks.append(
            replace(
                made,
                buffer_bytes=known.buffer_bytes,
                workspace_bytes=known.workspace_bytes + more_bytes,
                correction=known.correction,
                packed_values_bytes=known.packed_values_bytes + more_values,
            )
        )
    trainable = [param for param in model.parameters() if param.requires_grad]
    in_blocks = read.values()
    configs = list((getattr(model, "peft_config", None) or {}).values())
    return replace(
        shapes,
        blocks=tuple(blocks),
        adapter=", ".join(map(describe_adapter, configs)) or "none",
        num_outer_adapter_params=sum(param.numel() for param in trainable)
        - sum(block.num_adapter_params for block in in_blocks),
        outer_adapter_bytes=sum(param.nbytes for param in trainable) - sum(block.adapter_bytes for block in in_blocks),
    )


def _bare_shapes(opened: Described) -> ModelShapes:
    """A model without adapters; tied weights count once, as the head."""
    from lowmem.models.checkpoint import gatherable_embedding

    built, model = opened.built, opened.built.model
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    head = embedding if output is None else output.weight
    is_tied = head is embedding
    inside = {id(param) for streamed in built.blocks for param in streamed.block.module.parameters()}
    outside = {id(param): param for param in model.parameters() if id(param) not in inside}
    rest = {key: param.nbytes for key, param in outside.items() if key not in (id(embedding), id(head))}
    stored = {name for streamed in built.blocks for recipe in streamed.recipes for name in recipe.stored_as}
    return ModelShapes(
        name=str(model.config.name_or_path) or opened.folder.name,
        blocks=tuple(_block_shape(streamed, model.config) for streamed in built.blocks),
        vocab_size=embedding.shape[0],
        embedding_bytes=0 if is_tied else embedding.nbytes,
        embedding_stored_bytes=0 if is_tied else _stored_bytes(built, embedding),
        embedding_gatherable=gatherable_embedding(built) is not None,
        head_bytes=head.nbytes,
        num_head_params=head.numel(),
        other_bytes=sum(rest.values()) + sum(buffer.nbytes for buffer in model.buffers()),
        num_outer_params=sum(param.numel() for param in outside.values()),
        compute_dtype=str(opened.dtype).removeprefix("torch."),
        stored_dtypes=tuple(sorted(dtype.removeprefix("torch.") for dtype in stored)),
        unchunkable=can_chunk(model) or "",
        max_positions=max_positions(model.config),
    )


def max_positions(config: PretrainedConfig) -> int | None:
    """Tokens of the longest sequence that a configuration says its model was made for; None where it says nothing."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


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
        # Said again, and to the user, where the real adapter is made.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        get_peft_model(model, config, low_cpu_mem_usage=True)


def _block_shape(streamed: StreamedBlock, config: PretrainedConfig) -> BlockShape:
    from offload import lay_out

    bare = read_block(
        streamed.block.module,
        config,
        buffer_bytes=lay_out(streamed.spec).buffer_bytes,
        workspace_bytes=workspace_bytes(streamed, device=torch.device("meta")),
    )
    single_bytes, values_bytes = single_experts_bytes(streamed)
    return replace(
        bare,
        packed_values_bytes=packed_values_bytes(streamed),
        expert_bytes=single_bytes,
        expert_values_bytes=values_bytes,
    )


def corrected(
    shapes: ModelShapes, opened: Described, *, seq_len: int, adapted: Sequence[int] | None = None
) -> ModelShapes:
    """Hold the blocks' formula against a dry run of their code, and correct it where that knows better.

    Afterwards the formula gives at least what the dry run held, and at most a third more.

    Args:
        shapes: What `read_shapes` read of `opened`.
        opened: The checkpoint, with the same adapter in it.
        seq_len: Tokens of a sequence; longer ones than 2048 are run with 2048.
        adapted: For each block the one that has its adapter, where only some have; None where each has its own.
    """
    batch = MicroBatch(num_sequences=1, seq_len=min(seq_len, _DRY_RUN_TOKENS), dtype=shapes.compute_dtype)
    try:
        held = dry_run(opened.built, num_sequences=1, seq_len=batch.seq_len, adapted=adapted)
    except NotImplementedError:
        return shapes
    if len(held) != len(shapes.blocks):
        return shapes
    blocks = []
    for block, nbytes in zip(shapes.blocks, held, strict=True):
        if any(linear.is_dora for linear in block.linears):
            # PEFT's norm of the adapted weight forms it; the one that a streamed model gets does not.
            blocks.append(replace(block, correction=_DORA_OVER))
            continue
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
    # What "all-linear" becomes of a mixture: its stacks of experts are parameters, not layers.
    stacks = sorted(getattr(peft_config, "target_parameters", None) or ())
    words += [f"{'and' if targets else 'on'} {', '.join(stacks)}"] if stacks else []
    dropout = getattr(peft_config, "lora_dropout", 0.0)
    return " ".join(words) + (f", dropout {dropout:g}" if dropout else "")
