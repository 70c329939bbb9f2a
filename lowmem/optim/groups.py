"""Parameter groups of a model: what is projected, what decays, and which block a parameter belongs to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn

# "model.layers.3.": everything up to the first number in a parameter's name.
_BLOCK = re.compile(r"^(?:[^.]+\.)*?\d+\.")

Group = dict[str, object]


def is_matrix(param: Tensor) -> bool:
    """Whether a parameter is a matrix, or a stack of matrices such as experts, with two real sides."""
    return param.ndim in (2, 3) and min(param.shape[-2:]) > 1


def block_name(name: str) -> str | None:
    """The part of a parameter's name that names its decoder block, None outside blocks."""
    found = _BLOCK.match(name)
    return found.group() if found else None


def embedding_names(model: nn.Module) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the trainable parameters of embeddings, and of the head (tied ones are embeddings)."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    heads = {id(param) for param in head.parameters()} - embeddings if isinstance(head, nn.Module) else set()
    named = list(_trainable(model))
    return (
        frozenset(name for name, param in named if id(param) in embeddings),
        frozenset(name for name, param in named if id(param) in heads),
    )


def groups_of_module(model: nn.Module, *, project: Callable[[str, Tensor], bool] | None = None) -> list[Group]:
    """Group a model's trainable parameters, in the model's order within each group.

    Args:
        model: The model.
        project: Whether a parameter is updated by the method, rather than by plain AdamW; given its name. None: there
            is no such difference.

    Returns:
        Up to four groups of named parameters, with `project` if there is a difference; those of norms and biases have
        weight_decay 0.

    Raises:
        ValueError: Nothing is trainable.
    """
    undecayed = {
        id(param)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for param in module.parameters(recurse=False)
    }
    groups: dict[tuple[bool, bool], list[tuple[str, Tensor]]] = {}
    for name, param in _trainable(model):
        decays = param.ndim >= 2 and not name.endswith("bias") and id(param) not in undecayed
        groups.setdefault((project is not None and project(name, param), decays), []).append((name, param))
    if not groups:
        raise ValueError("the model has no trainable parameter; nothing would be optimized")
    return [
        {
            "params": groups[key],
            **({} if project is None else {"project": key[0]}),
            **({} if key[1] else {"weight_decay": 0.0}),
        }
        for key in sorted(groups, reverse=True)
    ]


def number_blocks(names: Iterable[str], *, single: bool) -> dict[str, int]:
    """Number the blocks in order of appearance: parameter name to block number.

    Args:
        names: Names of parameters.
        single: Whether a parameter outside the numbered blocks is a block of its own; otherwise it is left out.
    """
    numbers: dict[str, int] = {}
    found = {}
    for name in names:
        block = block_name(name) or (name if single else None)
        if block is not None:
            found[name] = numbers.setdefault(block, len(numbers))
    return found


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, param) for name, param in model.named_parameters() if param.requires_grad)
