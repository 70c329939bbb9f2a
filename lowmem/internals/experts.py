"""How transformers runs routed experts: stacks of weights, and a table of functions that a configuration chooses from.

Classes of experts are decorated with `transformers.integrations.use_experts_implementation`, which notes on each module
how its stacks lie. Registering a function of ours in the table is public; that a module has these notes, and the gate
that it applies between its two products, is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lowmem.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ExpertsForward = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""Runs a module of experts: hidden states (tokens, hidden), numbers (tokens, k) and weights (tokens, k) of the experts
that each token goes to. Returns (tokens, hidden)."""

GROUPED = "grouped_mm"
"""transformers' usual implementation: tokens sorted by expert, one product for each expert."""

_NOTES = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")


@dataclass(frozen=True, kw_only=True)
class ExpertsTraits:
    """How one module of experts computes."""

    up: str
    """Name of the stack of the first product."""
    down: str
    """Name of the stack of the second one."""
    is_transposed: bool
    """Whether a stack is (experts, inputs, outputs) rather than (experts, outputs, inputs)."""
    has_bias: bool
    """Whether each stack has a bias beside it, (experts, outputs), under its name and "_bias"."""
    has_post_norm: bool
    """Whether `module.post_expert_norm` follows the second product."""
    gate: Callable[[Tensor], Tensor]
    """What stands between the products."""


def experts_traits(module: nn.Module) -> ExpertsTraits | None:
    """How a module of experts computes; None where it is not one that a registered function can run.

    Args:
        module: Any module.
    """
    if not all(isinstance(getattr(module, note, None), bool) for note in _NOTES):
        return None
    if module._is_expert_parallel:
        return None
    up = "gate_up_proj" if module.has_gate else "up_proj"
    gate = getattr(module, "_apply_gate" if module.has_gate else "act_fn", None)
    stacks = [getattr(module, name, None) for name in (up, "down_proj")]
    if not callable(gate) or not all(isinstance(stack, Tensor) and stack.ndim == 3 for stack in stacks):
        return None
    return ExpertsTraits(
        up=up,
        down="down_proj",
        is_transposed=bool(module.is_transposed),
        has_bias=bool(module.has_bias),
        has_post_norm=bool(module.has_post_expert_norm),
        gate=gate,
    )


def experts_implementation(model: PreTrainedModel) -> str:
    """Name of the function that runs a model's experts now."""
    name = getattr(model.config.get_text_config(), "_experts_implementation", None)
    return str(name)


def grouped_experts(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Run a module of experts as transformers does, on its whole stacks."""
    try:
        from transformers.integrations.moe import grouped_mm_experts_forward
    except ImportError as error:
        raise _changed() from error
    result: Tensor = grouped_mm_experts_forward(module, hidden, index, weights)
    return result


def use_experts_forward(model: PreTrainedModel, name: str, forward: ExpertsForward) -> None:
    """Have a model's experts run by a function of ours.

    Args:
        model: The model; its configuration names the function from now on.
        name: What the function is called in transformers' table.
        forward: The function; the same one each time for a name.

    Raises:
        UnsupportedError: This transformers has another table, or does not let the model change.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise _changed() from error
    ALL_EXPERTS_FUNCTIONS.register(name, forward)
    model.set_experts_implementation(name)
    if experts_implementation(model) != name:
        raise _changed()


def _changed() -> UnsupportedError:
    return UnsupportedError(
        f"transformers {version('transformers')}",
        reason="it runs routed experts in another way, and they could not be unpacked one by one",
        instead="a version of transformers that README names as tested",
    )
