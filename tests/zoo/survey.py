"""What each architecture's decoder blocks do, seen by running the tiny models: one JSON line per architecture.

python -m tests.zoo.survey [name ...]
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.zoo.architectures import ARCHITECTURES, build
from tests.zoo.reference import batch_of, resident, run, trainable
from tests.zoo.spy import BlockSpy, ParameterWatch

Fact = bool | int | float | str | list[str] | dict[str, str] | None


def survey(name: str) -> dict[str, Fact]:
    """Run the tiny model of an architecture and describe its blocks.

    Args:
        name: One of `ARCHITECTURES`.

    Returns:
        Facts by name; see the functions below for what each means.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = build(name, Path(scratch))
        model = resident(folder)
        facts: dict[str, Fact] = {"name": name, "class": type(model).__name__}
        facts |= _keys(model, folder)
        path, layers = block_list(model)
        facts |= _structure(model, path, layers)
        if layers:
            facts |= _calls(model, layers)
            facts |= _sharing(model, layers)
        facts |= _attention(folder)
        facts |= _recomputation(folder)
    return facts


def block_list(model: torch.nn.Module) -> tuple[str, list[torch.nn.Module]]:
    """The longest ModuleList that a text forward calls, GradientCheckpointingLayers before anything else.

    Returns:
        Its path and its children; "" and nothing where there is no such list.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    called: set[int] = set()
    hooks = [module.register_forward_pre_hook(lambda m, _: called.add(id(m))) for module in model.modules()]
    with torch.no_grad():
        model(input_ids=batch_of()["input_ids"], use_cache=False)
    for hook in hooks:
        hook.remove()
    lists = [
        (path, list(module))
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and any(id(child) in called for child in module)
    ]
    if not lists:
        return "", []

    def rank(entry: tuple[str, list[torch.nn.Module]]) -> tuple[bool, int, int]:
        path, children = entry
        checkpointed = all(isinstance(child, GradientCheckpointingLayer) for child in children)
        return checkpointed, -path.count("."), len(children)

    return max(lists, key=rank)


def _keys(model: torch.nn.Module, folder: Path) -> dict[str, Fact]:
    """Whether stored names are parameter names, and which conversions apply to this model's own keys."""
    from safetensors import safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping

    stored: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            stored |= set(handle.keys())
    state = set(model.state_dict())
    converters = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    return {
        "stored_names_are_parameter_names": stored <= state,
        "stored_not_in_model": sorted(stored - state)[:3],
        "conversions": sorted({type(o).__name__ for c in converters for o in getattr(c, "operations", ())}),
        "tied": dict(getattr(model, "all_tied_weights_keys", {})),
        "ignored_when_missing": [str(p) for p in model._keys_to_ignore_on_load_missing or ()],  # type: ignore[union-attr]
    }


def _structure(model: torch.nn.Module, path: str, layers: list[torch.nn.Module]) -> dict[str, Fact]:
    """Where the blocks are, of which classes, which other lists there are, and what lies outside."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    inside = {id(p) for layer in layers for p in layer.parameters()}
    others = [
        f"{name} ({type(module[0]).__name__} x {len(module)})"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and name != path
        and any(isinstance(child, GradientCheckpointingLayer) for child in module)
    ]
    classes = Counter(type(layer) for layer in layers)
    buffers = {
        f"{name} ({'persistent' if name in layer.state_dict() else 'not persistent'})"
        for layer in layers
        for name, _ in layer.named_buffers()
    }
    return {
        "path": path,
        "num_blocks": len(layers),
        "block_classes": sorted(kind.__name__ for kind in classes),
        "checkpointing_layers": all(isinstance(layer, GradientCheckpointingLayer) for layer in layers) and bool(layers),
        "raw_forward": all(hasattr(kind.forward, "__wrapped__") for kind in classes) and bool(layers),
        "signature": {kind.__name__: str(inspect.signature(_raw(kind))) for kind in classes},
        "other_checkpointed_lists": others,
        "block_buffers": sorted(buffers),
        "outside": [n for n, p in model.named_parameters() if id(p) not in inside and not _is_media(n)],
    }


def _raw(kind: type[torch.nn.Module]) -> object:
    return getattr(kind.forward, "__wrapped__", kind.forward)


def _is_media(name: str) -> bool:
    return any(word in name for word in ("vision", "visual", "audio", "image", "multi_modal"))


def _calls(model: torch.nn.Module, layers: list[torch.nn.Module]) -> dict[str, Fact]:
    """What one training forward passes to and gets from the blocks."""
    model.requires_grad_(True).train()
    before = {id(b): b.clone() for layer in layers for b in layer.buffers()}
    spy = BlockSpy(layers)
    watch = ParameterWatch(layers)
    with spy, watch:
        model(**batch_of(), use_cache=False).loss.backward()
    watch_calls = spy.calls
    facts: dict[str, Fact] = {
        "order": [str(call.index) for call in watch_calls],
        "once_in_order": [call.index for call in watch_calls] == list(range(len(layers))),
        "hidden_positional": all(call.num_positional > 0 for call in watch_calls),
        "num_positional": max((call.num_positional for call in watch_calls), default=0),
        "keywords": sorted({key for call in watch_calls for key in call.keywords}),
        "hidden_shape": str(watch_calls[0].hidden_shape) if watch_calls else "",
        "output": sorted({call.output for call in watch_calls}),
        "inputs_with_grad": sorted({key for call in watch_calls for key in call.with_grad}),
        "from_other_blocks": sorted({key for call in watch_calls for key in call.from_other_blocks}),
        "mutated_arguments": sorted({key for call in watch_calls for key in call.mutated}),
        "same_block_attributes_changed": sorted({key for call in watch_calls for key in call.attributes}),
        "objects_passed": sorted({kind for call in watch_calls for kind in call.objects}),
        "mutated_buffers": sorted(
            {n for layer in layers for n, b in layer.named_buffers() if not torch.equal(before[id(b)], b)}
        ),
        "parameters_read_outside": sorted(watch.read_outside),
    }
    model.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return facts | _cache(model, layers)


def _cache(model: torch.nn.Module, layers: list[torch.nn.Module]) -> dict[str, Fact]:
    """Whether a training forward with use_cache=False still passes cache objects, and what the default does."""
    answers: dict[str, Fact] = {}
    losses = []
    for label, options in (("default", {}), ("off", {"use_cache": False})):
        spy = BlockSpy(layers)
        torch.manual_seed(0)
        with spy, torch.no_grad():
            try:
                losses.append(model(**batch_of(), **options).loss)
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
                losses.append(torch.tensor(float("nan")))
                answers[f"cache_{label}_error"] = f"{type(error).__name__}: {str(error)[:120]}"
        answers[f"cache_{label}"] = sorted({k for call in spy.calls for k in call.objects if "Cache" in k})
    answers["cache_changes_loss"] = not torch.equal(*losses)
    return answers


def _sharing(model: torch.nn.Module, layers: list[torch.nn.Module]) -> dict[str, Fact]:
    """Parameters that two blocks, or a block and the rest of the model, have in common."""
    owners: dict[int, set[str]] = {}
    children = {id(module) for layer in layers for module in layer.modules()}
    for index, layer in enumerate(layers):
        for parameter in layer.parameters():
            owners.setdefault(id(parameter), set()).add(str(index))
    for module in model.modules():
        if id(module) not in children:
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(parameter), set()).add("outside")
    shared = {n for i, layer in enumerate(layers) for n, p in layer.named_parameters() if len(owners[id(p)]) > 1}
    return {"shared_parameters": sorted(shared)}


def _attention(folder: Path) -> dict[str, Fact]:
    """Losses under each attention implementation that the class accepts."""
    losses: dict[str, str] = {}
    for kind in ("sdpa", "eager"):
        try:
            model = resident(folder, attention=kind).train()
        except ValueError:
            losses[kind] = "not supported"
            continue
        with torch.no_grad():
            torch.manual_seed(0)
            losses[kind] = f"{model(**batch_of(), use_cache=False).loss.item():.6f}"
    return {"loss": losses}


def _recomputation(folder: Path) -> dict[str, Fact]:
    """Whether recomputing each block gives the gradients of the plain backward, bit for bit."""
    plain = resident(folder).requires_grad_(True).train()
    expected = run(plain, batch_of())
    answers: dict[str, Fact] = {"gradient_norm": round(_norm(expected.gradients), 4)}
    for reentrant in (False, True):
        model = resident(folder).requires_grad_(True).train()
        key = "recompute_reentrant" if reentrant else "recompute"
        try:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            got = run(model, batch_of())
        except (ValueError, RuntimeError, AttributeError, TypeError, KeyError) as error:
            answers[key] = f"{type(error).__name__}: {str(error)[:120]}"
            continue
        differing = [
            n for n, g in expected.gradients.items() if n not in got.gradients or not torch.equal(g, got.gradients[n])
        ]
        answers[key] = (
            "equal" if not differing else f"{len(differing)} of {len(trainable(model))} differ: {differing[0]}"
        )
    return answers


def _norm(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([g.double().norm() for g in gradients.values()]).norm())


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and warnings: the survey's lines are its only output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main(names: list[str]) -> None:
    """Print one JSON line per architecture."""
    torch.set_num_threads(1)
    with _quiet():
        for name in names or ARCHITECTURES:
            try:
                facts = survey(name)
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, StopIteration) as error:
                facts = {"name": name, "error": f"{type(error).__name__}: {error}"}
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
