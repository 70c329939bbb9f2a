"""PEFT's private names and hooks: which adapters a module applies, embeddings, what is asked before a model changes.

The flags are read through PEFT's public properties. Setting them for the time of one run has no public way that leaves
gradients alone, so it is done through the private attributes, and the public properties must then show what was set:
with a PEFT that keeps its flags elsewhere, the policy would pass for its own reference.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lowmem.errors import UnsupportedError, untested
from lowmem.internals.torch import modules_in

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.lora.layer import Embedding, Linear

Flags = tuple[bool, str | tuple[str, ...]]
"""Of one adapted module: whether its adapters are disabled, and which are active."""

BlockFlags = tuple[Flags, ...]
"""Of a block's adapted modules in `modules()` order."""

Settings = tuple[tuple[bool, ...], tuple[object, ...]]
"""Modes of a block's modules, and settings of those that apply adapters."""

_DISABLED, _ACTIVE = "_disable_adapters", "_active_adapter"
_ASKS = "lowmem_asks_first"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _adapted_kinds() -> tuple[type[nn.Module], ...]:
    """Classes of the modules that apply adapters; none before PEFT is imported."""
    if "peft" not in sys.modules:
        return ()
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper
    except ImportError as error:
        raise _unknown("its adapter layers have other names") from error
    return (BaseTunerLayer, AuxiliaryTrainingWrapper)


def _adapted(block: nn.Module) -> Iterator[nn.Module]:
    return iter(those_that_apply_adapters(modules_in(block)))


def those_that_apply_adapters(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Of some modules those of PEFT's classes that apply adapters; each class is asked about once."""
    kinds = _adapted_kinds()
    adapted = {kind for kind in set(map(type, modules)) if issubclass(kind, kinds)} if kinds else ()
    return [module for module in modules if type(module) in adapted] if adapted else []


def _unknown(reason: str) -> UnsupportedError:
    return untested("peft", f"{reason}, so that a run without the adapter would silently be one with it")


def _flags_of(module: nn.Module) -> Flags:
    kind: Any = type(module)
    # Asked of the class: an auxiliary wrapper looks an attribute that it lacks up in the module that it wraps.
    if not (hasattr(kind, "disable_adapters") and hasattr(kind, "active_adapter")):
        raise _unknown(f"{kind.__name__} does not show which adapters are active")
    disabled, active = cast("tuple[bool, str | list[str]]", (module.disable_adapters, module.active_adapter))
    return bool(disabled), active if isinstance(active, str) else tuple(active)


def read_flags(block: nn.Module) -> BlockFlags:
    """The flags as they are: what PEFT's `disable_adapter` and `set_adapter` change.

    Raises:
        UnsupportedError: This PEFT does not show them.
    """
    return tuple(_flags_of(module) for module in _adapted(block))


@contextmanager
def flags_set(block: nn.Module, flags: BlockFlags) -> Iterator[None]:
    """Run a block with other flags; whether adapters require gradients stays as it is.

    Raises:
        UnsupportedError: This PEFT keeps its flags elsewhere: the block would run with those it has.
    """
    modules = list(_adapted(block))
    before = read_flags(block)
    try:
        for module, wanted in zip(modules, flags, strict=True):
            _set(module, wanted)
            if _flags_of(module) != wanted:
                raise _unknown(f"{type(module).__name__} keeps which adapters are active elsewhere")
        yield
    finally:
        for module, wanted in zip(modules, before, strict=True):
            _set(module, wanted)


def _set(module: nn.Module, flags: Flags) -> None:
    disabled, active = flags
    setattr(module, _DISABLED, disabled)
    setattr(module, _ACTIVE, active if isinstance(active, str) else list(active))


class _UnlessAutocast:
    """A flag that is off while autocast is on."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __bool__(self) -> bool:
        return not torch.is_autocast_enabled(self._kind)


_CASTS = "cast_input_dtype_enabled"


@contextmanager
def inputs_cast_once(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Run a block whose LoRA layers leave it to autocast to convert their inputs.

    PEFT converts an input to the type of the adapter's weights, fp32, and autocast converts that to its own type for
    the product. Where autocast is on the first conversion changes no bit of the result; it is a tensor twice as large
    for each layer, and another for its gradient. Layers that do more with their input (dropout, DoRA) are left alone.

    Args:
        block: The block.
        device: Where it computes.
    """
    changed, unless = _that_only_multiply(block) if "peft" in sys.modules else [], _UnlessAutocast(device.type)
    try:
        # A plain value of the module's own, as was looked at: `Module.__setattr__` takes ten times as long.
        for module in changed:
            vars(module)[_CASTS] = unless
        yield
    finally:
        for module in changed:
            vars(module)[_CASTS] = True


def _that_only_multiply(block: nn.Module) -> list[nn.Module]:
    """The linear layers of LoRA whose active adapters take their input for a product alone."""
    from peft.tuners.lora.layer import Linear

    return [module for module in modules_in(block) if type(module) is Linear and _only_multiplies(module)]


def _only_multiplies(layer: Linear) -> bool:
    if vars(layer).get(_CASTS) is not True:
        return False
    return all(
        name not in layer.lora_variant
        and type(layer.lora_A[name]) is nn.Linear
        and isinstance(layer.lora_dropout[name], nn.Identity)
        for name in layer.active_adapters
        if name in layer.lora_A
    )


def embed(layer: Embedding, ids: Tensor, weight: Tensor) -> Tensor:
    """Look rows of a weight up as an adapted embedding looks its base weight's up: padding, norms, sparsity."""
    found: Tensor = layer._embed(ids, weight)
    return found


def embed_scale(layer: Embedding) -> Tensor | None:
    """What an adapted embedding's base layer multiplies its rows with (Gemma's square root of the width)."""
    scale: Tensor | None = layer._get_embed_scale()
    return scale


def ask_first(*, adding: Callable[[nn.Module, PeftConfig], None], merging: Callable[[nn.Module], None]) -> None:
    """Make PEFT ask before it puts layers into any model and before it merges them into the weights.

    PEFT changes a model layer by layer: what is refused at the first layer whose weights are absent leaves the others
    changed. It has no hook for that, so four public methods of its base classes ask first, in the whole
    process; they do the same as before for models that the callbacks let pass. Asking for it again replaces nothing.

    Args:
        adding: Called with the model and the adapter's configuration; raises to refuse.
        merging: Called with the model; raises to refuse.

    Raises:
        UnsupportedError: This PEFT has no such methods.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    def before_prompts(peft_model: PeftModel, adapter_name: str, config: PeftConfig) -> None:
        # Prompt learning has no tuner; its first look at the model is for a device of each layer.
        adding(peft_model.base_model, config)

    def before_adding(tuner: BaseTuner, model: nn.Module, adapter_name: str) -> None:
        adding(model, tuner.peft_config[adapter_name])

    def before_merging(tuner: BaseTuner) -> None:
        merging(tuner.model)

    for owner, name, ask in (
        (BaseTuner, "inject_adapter", before_adding),
        (BaseTuner, "merge_adapter", before_merging),
        (BaseTuner, "merge_and_unload", before_merging),
        (PeftModel, "add_adapter", before_prompts),
    ):
        shipped = getattr(owner, name, None)
        if shipped is None:
            raise untested(
                "peft",
                f"its {owner.__name__} has no {name}, so that a streamed model would be half changed before "
                "it is refused",
            )
        if not hasattr(shipped, _ASKS):
            setattr(owner, name, _asking(shipped, ask))


def _asking(shipped: Callable[..., object], ask: Callable[..., None]) -> Callable[..., object]:
    num_asked = len(inspect.signature(ask).parameters)

    @wraps(shipped)
    def method(*args: object, **kwargs: object) -> object:
        bound = inspect.signature(shipped).bind(*args, **kwargs)
        ask(*list(bound.arguments.values())[:num_asked])
        return shipped(*args, **kwargs)

    setattr(method, _ASKS, True)
    return method


def weight_marks(blocks: Sequence[nn.Module], *, skip: type[Tensor]) -> tuple[object, ...]:
    """What changes when any weight of the blocks does: identities, versions, and sums over their bits.

    Some optimizers write through raw pointers, which no version counts: hence the bits.

    Args:
        blocks: Where to look.
        skip: Type of the parameters to leave out: the base weights, which are not in memory.
    """
    params = [param for block in blocks for param in block.parameters() if type(param) is not skip]
    sums = [_bit_sum(param) for param in params]
    return (
        tuple((id(param), param._version) for param in params),
        tuple(torch.stack(sums).tolist()) if sums else (),
    )


def _bit_sum(param: Tensor) -> Tensor:
    return param.detach().contiguous().view(_BITS[param.element_size()]).sum(dtype=torch.int64)


def settings_in(block: nn.Module) -> Settings:
    """The mode of each module in `modules()` order, and of each that is adapted what PEFT's switches change on it.

    Those are `set_adapter`, `disable_adapter`, `scale_layer` and merging.
    """
    modules = modules_in(block)
    adapted = those_that_apply_adapters(modules)
    return tuple([module.training for module in modules]), tuple([_settings_of(module) for module in adapted])


def changed_module(block: nn.Module, before: Settings, now: Settings) -> str | None:
    """Path within the block of the first module whose settings differ; None where there are others than there were."""
    paths = {module: path for path, module in block.named_modules()}
    modes = zip(paths, before[0], now[0], strict=False)
    settings = zip(those_that_apply_adapters(list(paths)), before[1], now[1], strict=False)
    return next((paths[module] for module, old, new in (*modes, *settings) if old != new), None)


def _settings_of(module: nn.Module) -> tuple[object, ...]:
    settings: list[object] = [_flags_of(module)]
    for name, value in vars(module).items():
        # Each visit comes by here for each adapted layer: exact types, of which nearly all are, are looked at first.
        if name[:1] == "_" or value is None:
            continue
        if type(value) in _PLAIN:
            settings.append((name, value))
        elif isinstance(value, _SETTINGS):
            settings.append((name, _frozen(value)))
    return tuple(settings)


_PLAIN = frozenset({bool, int, float, str, type(None)})
_SETTINGS = (bool, int, float, str, dict, list, tuple)


def _frozen(value: object) -> object:
    """A value that is equal to itself later on if nothing in it has changed."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, dict):
        # Most are a number for each adapter.
        if _PLAIN.issuperset(map(type, value)) and _PLAIN.issuperset(map(type, value.values())):
            return tuple(value.items())
        return tuple((str(key), _frozen(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    return value if isinstance(value, (bool, int, float, str)) else id(value)
