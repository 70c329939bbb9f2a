"""What the resident model answers: loss, logits and adapter gradients by plain transformers, PEFT and autograd."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from tests.zoo.sizes import SEQUENCE

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel
    from transformers import PreTrainedModel

FIRST_TOKEN, LAST_TOKEN = 3, 120
"""Text tokens: above the special ones, below the smallest of the zoo's vocabularies."""


NOT_FOR_PEFT: dict[str, list[str]] = {
    # PEFT refuses it: the fused kernel of a Mamba layer reads its weight past the adapter.
    "falcon_h1": ["out_proj"],
    "falcon_mamba": ["out_proj"],
    "mamba": ["out_proj"],
    "mamba2": ["out_proj"],
    "nemotron_h": ["out_proj"],
    # Linear layers of their own kind: grouped, or with several outputs.
    "deepseek_v4": ["o_a_proj"],
    "llama4": ["router"],
    "llama4_text": ["router"],
    "phimoe": ["router"],
}
"""Linear layers that "all-linear" would pick although PEFT's LoRA cannot wrap them."""


NO_DORA_ON_EXPERTS: frozenset[str] = frozenset(
    (
        *("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe"),
        *("exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash"),
        *("mellum", "minimax", "minimax_m2", "mixtral", "olmoe", "qwen3_moe", "qwen3_next", "solar_open"),
    )
)
"""Where "all-linear" takes in the fused experts, which PEFT's LoRA can wrap and its DoRA cannot."""

ATTENTION_ONLY = r".*\.(self_attn|linear_attn|mixer)(\.\d)?\.(?!gate_)\w*proj\w*"
"""The linear layers of attention of all kinds, by full name."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One forward and backward."""

    loss: Tensor
    """Scalar."""
    logits: Tensor
    """(batch, tokens, vocabulary)."""
    gradients: dict[str, Tensor]
    """By parameter name, of every trainable parameter that got one."""


def batch_of(
    num_sequences: int = 2, num_tokens: int = SEQUENCE, *, seed: int = 0, padding: bool = False
) -> dict[str, Tensor]:
    """Make a batch of random text.

    Args:
        num_sequences: Batch size.
        num_tokens: Length of each sequence.
        seed: Of the tokens.
        padding: Pad the first sequence on the right: its last 3 tokens are masked and have no label.

    Returns:
        `input_ids` and `labels` of shape (num_sequences, num_tokens), with `padding` also `attention_mask`.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(FIRST_TOKEN, LAST_TOKEN, (num_sequences, num_tokens), generator=generator)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    if padding:
        mask = torch.ones_like(tokens)
        mask[0, -3:] = 0
        batch["labels"][0, -3:] = -100
        batch["attention_mask"] = mask
    return batch


def adapt(model: PreTrainedModel, peft_config: PeftConfig, *, seed: int = 0) -> PeftModel:
    """Wrap a model with an adapter whose values are all different from their initial ones.

    A freshly made LoRA adapter adds nothing and gives half of its parameters no gradient, which would hide errors.

    Args:
        model: Resident or streamed; PEFT changes it in place.
        peft_config: The adapter.
        seed: Of the adapter's values, which depend on parameter names only.

    Returns:
        The wrapped model in training mode.
    """
    from peft import get_peft_model

    wrapped = cast("PeftModel", get_peft_model(model, peft_config))
    with torch.no_grad():
        for index, (name, parameter) in enumerate(sorted(trainable(wrapped).items())):
            generator = torch.Generator().manual_seed(1000 * seed + index)
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(noise)
            else:
                parameter.add_(noise.to(parameter))
    return wrapped.train()


def lora(name: str, *, use_dora: bool = False, **options: object) -> LoraConfig:
    """Make a LoRA configuration on every linear layer of an architecture that PEFT can adapt.

    Args:
        name: One of `ARCHITECTURES`.
        use_dora: Decompose the weights; leaves out experts.
        options: Further fields, such as `use_rslora=True`.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=4,
        lora_alpha=8,
        fan_in_fan_out=name in ("gpt2", "gpt-sw3"),
        target_modules=ATTENTION_ONLY if use_dora and name in NO_DORA_ON_EXPERTS else "all-linear",
        use_dora=use_dora,
        exclude_modules=NOT_FOR_PEFT.get(name),
        **options,  # type: ignore[arg-type]
    )


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def run(model: torch.nn.Module, batch: dict[str, Tensor], *, seed: int = 0) -> Outcome:
    """Run one forward with labels and one backward; leaves the gradients on the model cleared.

    Args:
        model: What `adapt` answered, or any causal language model with trainable parameters.
        batch: As `batch_of` makes them.
        seed: Of torch's own generator, for dropout and jitter.
    """
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    output = model(**batch, use_cache=False)
    output.loss.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in trainable(model).items() if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return Outcome(loss=output.loss.detach(), logits=output.logits.detach(), gradients=gradients)


def resident(
    folder: Path, *, dtype: torch.dtype = torch.float32, attention: str | None = None, checkpointing: bool = False
) -> PreTrainedModel:
    """Load a checkpoint the ordinary way, frozen, on the CPU.

    Args:
        folder: What `tests.zoo.architectures.build` wrote.
        dtype: Compute dtype.
        attention: "sdpa" or "eager"; transformers' choice where None.
        checkpointing: Recompute each block in the backward, as the Trainer's `gradient_checkpointing` does.
    """
    from transformers import AutoModelForCausalLM

    # The grouped kernel that transformers picks for experts has no fp64.
    experts = "eager" if dtype == torch.float64 else None
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, experts_implementation=experts
    )
    model.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return cast("PreTrainedModel", model)


def reference(
    folder: Path,
    peft_config: PeftConfig,
    batch: dict[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    checkpointing: bool = False,
    seed: int = 0,
) -> Outcome:
    """Loss, logits and adapter gradients of the resident model.

    Args:
        folder: What `tests.zoo.architectures.build` wrote.
        peft_config: The adapter; its values are drawn by `adapt`.
        batch: As `batch_of` makes them.
        dtype: Compute dtype.
        attention: "sdpa" or "eager"; transformers' choice where None.
        checkpointing: Recompute each block in the backward.
        seed: Of the adapter's values.
    """
    model = resident(folder, dtype=dtype, attention=attention, checkpointing=checkpointing)
    return run(adapt(model, peft_config, seed=seed), batch)
