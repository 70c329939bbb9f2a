"""Options of the Trainer that a streamed model cannot honour: refused by name when the Trainer is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowmem.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import TrainingArguments

_BLOCKS = "a streamed block is always recomputed in its backward, and keeps only its input"


def refuse_training_options(args: TrainingArguments) -> None:
    """Refuse what would be ignored or would go wrong.

    Gradient checkpointing itself may be on or off: blocks are recomputed either way.

    Args:
        args: Of transformers or TRL.

    Raises:
        UnsupportedError: Names the option, the reason and what to use instead.
    """
    kwargs = getattr(args, "activation_checkpointing_kwargs", None) or {}
    harmless = {"every_n_layers": (None, 1), "offload": (None, False), "selective": (None, False)}
    for option, values in harmless.items():
        # By identity: True equals 1.
        if not any(kwargs.get(option) is value for value in values):
            raise UnsupportedError(
                f"activation_checkpointing_kwargs={{{option!r}: {kwargs[option]!r}}}",
                reason=_BLOCKS,
                instead="lowmem.plan, which decides from the budget what is kept where",
            )
    if getattr(args, "activation_offloading", False):
        raise UnsupportedError(
            "activation_offloading=True",
            reason="it would take streamed weights for activations",
            instead="Budget.device: block inputs go to the host where the plan finds no room",
        )
    if getattr(args, "torch_compile", False):
        raise UnsupportedError(
            "torch_compile=True",
            reason="a compiled graph cannot have its weights exchanged from block to block",
            instead="torch_compile=False",
        )
    for option in ("use_vllm", "use_transformers_continuous_batching"):
        if getattr(args, option, False):
            raise UnsupportedError(
                f"{option}=True",
                reason="another engine would need all weights, which are streamed",
                instead=f"{option}=False: generate goes block by block with the whole batch",
            )
    for option in ("deepspeed", "fsdp"):
        if getattr(args, option, None):
            raise UnsupportedError(
                f"{option}={getattr(args, option)!r}",
                reason="it moves and shards the weights itself",
                instead=f"no {option}: the scheduler streams the weights",
            )


__all__ = ["refuse_training_options"]
