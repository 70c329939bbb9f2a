"""What recomputing and differentiating a real decoder block takes, by the allocator's own account."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from lowmem.adapters import dora
from lowmem.models.blocks import find_blocks
from lowmem.planning.block_memory import MicroBatch
from lowmem.planning.read_model import read_block
from lowmem.planning.shapes import BlockShape

VOCAB = 128
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "gemma3": Gemma3TextConfig,
    "mixtral": MixtralConfig,
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One block's recomputation."""

    peak_bytes: int
    """Largest growth over what was there before: weights, input, arriving gradient."""
    forward_bytes: int
    """The same of a forward without gradients."""
    block: BlockShape
    """The block's widths as the planner reads them."""
    batch: MicroBatch


def config_of(kind: str, *, hidden: int, mlp: int, heads: int, key_heads: int, head_dim: int) -> PretrainedConfig:
    """A model of one block."""
    extra = {
        "gemma3": {"layer_types": ["full_attention"]},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    }.get(kind, {})
    config: PretrainedConfig = CONFIGS[kind](
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        vocab_size=VOCAB,
        **extra,
    )
    return config


def measure(
    config: PretrainedConfig,
    *,
    num_sequences: int,
    seq_len: int,
    dtype: torch.dtype = torch.float32,
    lora: LoraConfig,
    has_mask: bool = False,
) -> Measured:
    """Build a model of `config` with a LoRA and measure its first block."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
    peft_model = get_peft_model(model, lora).train()
    dora.install(peft_model, frozen_base=True)
    block = find_blocks(model)[0]
    args, kwargs = _arguments(model, block.module, num_sequences=num_sequences, seq_len=seq_len, has_mask=has_mask)
    hidden = torch.randn(num_sequences, seq_len, config.hidden_size, dtype=dtype)
    gradient = torch.randn_like(hidden)
    params = [param for param in block.module.parameters() if param.requires_grad]

    def recompute() -> object:
        leaf = hidden.detach().requires_grad_()
        output = block.raw_forward(block.module, leaf, *args, **kwargs)
        result = output[0] if isinstance(output, tuple) else output
        return torch.autograd.grad(result, [leaf, *params], gradient, allow_unused=True)  # type: ignore[arg-type]

    def forward() -> object:
        with torch.no_grad():
            return block.raw_forward(block.module, hidden, *args, **kwargs)

    return Measured(
        peak_bytes=peak_bytes(recompute),
        forward_bytes=peak_bytes(forward),
        block=read_block(block.module, config, buffer_bytes=1, workspace_bytes=0),
        batch=MicroBatch(
            num_sequences=num_sequences,
            seq_len=seq_len,
            dtype=str(dtype).removeprefix("torch."),
            has_mask=has_mask,
        ),
    )


class _Reached(Exception):
    """The block was called."""


def _arguments(
    model: Any, block: torch.nn.Module, *, num_sequences: int, seq_len: int, has_mask: bool
) -> tuple[tuple[object, ...], dict[str, object]]:
    """What the model passes to its first block besides the hidden states."""
    found: dict[str, Any] = {}

    def record(*args: object, **kwargs: object) -> None:
        found.update(args=args[1:], kwargs=kwargs)
        raise _Reached

    tokens = torch.randint(3, VOCAB, (num_sequences, seq_len))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    block.forward = record
    try:
        model(input_ids=tokens, attention_mask=mask if has_mask else None, use_cache=False)
    except _Reached:
        pass
    finally:
        del block.forward
    return found["args"], found["kwargs"]


def peak_bytes(work: Callable[[], object]) -> int:
    """Largest sum of what `work` had allocated and not freed, at any moment."""
    work()  # first-time allocations of kernels
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    del kept
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
