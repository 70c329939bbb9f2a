"""What a forward of transformers collects from inside its model: attention weights, router logits and the like.

transformers collects through hooks on modules, into lists that are there for the time of the model's forward
(`transformers.utils.output_capturing`). A block that goes in micro-batches would leave one entry for each of them; one
that is recomputed would leave tensors without a graph, and compute those with one when the lists are gone. So a
recorded call takes what the hooks collect, each time, as part of the block's output, and puts the whole ones into the
lists when autograd knows them.

The list of callbacks that every Trainer starts with: `lowmem.from_pretrained` returns a model, not a trainer, and a
Trainer asks its model nothing before the first forward. What has to be said before that, or in front of the reporters,
is said by a callback that no script has to pass. Which checkpoint a Trainer resumes from, an optimizer is not told
either.

How a model is filled from a checkpoint: renamings, conversions, dtypes, and the steps after the weights.
`PreTrainedModel.from_pretrained` does all of it in one go, on whole models in memory; a streamed model needs the parts.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from lowmem.errors import UnsupportedError, untested

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainerCallback
    from transformers.core_model_loading import WeightConverter


Collected = dict[str, list[Tensor]]


class _Collector(Protocol):
    def get(self) -> MutableMapping[str, list[Tensor]] | None: ...
    def set(self, value: Collected | None) -> object: ...
    def reset(self, token: object) -> None: ...


def _collector() -> _Collector:
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError as error:
        raise untested(
            "transformers",
            "it collects outputs from inside the blocks in another way, and their gradients would be lost",
        ) from error
    collector: _Collector = _active_collector
    return collector


def collected_keys() -> frozenset[str]:
    """What the forward under way collects from inside the model: "router_logits", "hidden_states" and the like.

    Raises:
        UnsupportedError: This transformers collects in another way.
    """
    return frozenset(key for key in _collector().get() or () if not key.startswith("_"))


@contextmanager
def collecting(into: Collected | None) -> Iterator[None]:
    """Have hooks collect into lists of ours, or nothing at all."""
    collector = _collector()
    token = collector.set(into)
    try:
        yield
    finally:
        collector.reset(token)


class CollectedOutputs:
    """What the hooks inside one block collect in one of its calls."""

    def __init__(self) -> None:
        """Note what is collected: the recomputation happens when nothing tells any more."""
        self.keys = sorted(collected_keys())
        self._flat: dict[str, list[bool]] = {}

    def run(self, forward: Callable[[], object], num_sequences: int) -> object:
        """Run a block; returns its output, together with what was collected if anything is.

        Args:
            forward: Runs it.
            num_sequences: Sequences in this run. Tensors of tokens in a row become tensors by sequence, so that the
                batch can be cut and joined as with every other output.

        Raises:
            UnsupportedError: A tensor has no row for each token or sequence.
        """
        if not self.keys:
            return forward()
        found: Collected = {key: [] for key in self.keys}
        with collecting(found):
            output = forward()
        self._flat = {key: [_is_flat(value, num_sequences) for value in found[key]] for key in self.keys}
        return output, {key: [_by_sequence(key, value, num_sequences) for value in found[key]] for key in self.keys}

    def give(self, output: object) -> object:
        """Put what was collected into the forward's own lists; returns the block's own output."""
        if not self.keys:
            return output
        own: object
        by_sequence: Collected
        own, by_sequence = output  # type: ignore[misc]
        lists = _collector().get()
        for key, values in by_sequence.items():
            if lists is not None and key in lists:
                pairs = zip(values, self._flat[key], strict=True)
                lists[key].extend(value.flatten(0, 1) if flat else value for value, flat in pairs)
        return own


def _is_flat(value: Tensor, num_sequences: int) -> bool:
    return value.shape[0] != num_sequences or value.ndim < 3


def _by_sequence(key: str, value: Tensor, num_sequences: int) -> Tensor:
    if not _is_flat(value, num_sequences):
        return value
    if value.shape[0] % num_sequences:
        raise UnsupportedError(
            f"output_{key}=True",
            reason=f"this model's {key} have {value.shape[0]} rows for {num_sequences} sequences",
            instead="router_aux_loss_coef=0.0 in the trainer's configuration: training without the auxiliary loss"
            if key == "router_logits"
            else f"output_{key}=False",
        )
    return value.view(num_sequences, -1, *value.shape[1:])


_CALLBACKS = "DEFAULT_CALLBACKS"


def add_default_callback(callback: type[TrainerCallback]) -> None:
    """Have every Trainer that is made from now on start with a callback, in front of reporters and of the user's own.

    Each Trainer makes an object of its own. May be called again with the same class.

    Args:
        callback: The class; its objects do nothing for trainers that do not concern them.

    Raises:
        UnsupportedError: This Trainer has no such list, or does not read it.
    """
    from transformers import trainer

    callbacks = getattr(trainer, _CALLBACKS, None)
    if not isinstance(callbacks, list) or _CALLBACKS not in trainer.Trainer.__init__.__code__.co_names:
        raise untested(
            "transformers",
            f"its Trainer does not begin with transformers.trainer.{_CALLBACKS}, so options that a streamed "
            "model cannot honour would pass",
        )
    if callback not in callbacks:
        callbacks.append(callback)


class Conversions:
    """A model class's renamings and conversions of stored tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._model = model
        self._all = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in self._all if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in self._all if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}

    def in_order(self, keys: Iterable[str]) -> list[str]:
        """Stored names in the order in which transformers loads them."""
        from transformers.core_model_loading import dot_natural_key

        return sorted(keys, key=dot_natural_key)

    def target_of(self, key: str, state: Mapping[str, Tensor]) -> tuple[str, str | None]:
        """The parameter that a stored tensor makes (the first of several), and the converter's pattern it matched.

        Args:
            key: Stored name.
            state: The model's parameters and buffers by name.
        """
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(key, self._renamings, self._converters, prefix, state)
        if target not in state and key in state:
            target, pattern = rename_source_key(key, [], [], prefix, state)
        return target, pattern

    def converter(self, pattern: str) -> WeightConverter:
        """The converter of a pattern."""
        return self._by_pattern[pattern]

    def remember(self) -> None:
        """Leave with the model what `save_pretrained` of a merged or fully trained model reverses."""
        self._model._weight_conversions = [conversion for conversion in self._all if conversion.was_used()]


def stored_layout(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `save_pretrained` stores for some parameters: tensors of a checkpoint by name, before any conversion.

    Args:
        model: The model.
        state: Parameters of it by name, or tensors on meta like them; whole groups that are converted together.

    Returns:
        Views of them where the conversion allows it; on meta where they are.
    """
    from transformers.core_model_loading import revert_weight_conversion

    stored: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    return stored


def keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the parameters that the class keeps in fp32 that dtype, as transformers does while loading."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    from transformers.core_model_loading import build_glob_alternation

    pattern, by_group, _ = build_glob_alternation(list(plan))
    for name, param in model.named_parameters():
        match = pattern.search(name)
        if match is not None and match.lastgroup is not None:
            param.data = param.data.to(plan[by_group[match.lastgroup]])


def may_be_missing(model: PreTrainedModel, name: str) -> bool:
    """Whether the class says that its checkpoints need not hold this parameter."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())


def mark_initialised(tensor: Tensor) -> None:
    """Have transformers leave a parameter or buffer as it is: it draws every one anew that has no such mark."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def finish_loading(model: PreTrainedModel, *, missing: Collection[str], device: torch.device) -> None:
    """Give values to what no checkpoint holds: buffers computed by the class, new heads, tied weights.

    Args:
        model: Filled; what `mark_initialised` was called for stays.
        missing: Names without a value yet.
        device: Where they are to be.

    Raises:
        UnsupportedError: This version of transformers draws weights anew that were marked.
    """
    from transformers.utils.loading_report import LoadStateDictInfo

    info = LoadStateDictInfo(
        missing_keys=set(missing),
        unexpected_keys=set(),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model.mark_tied_weights_as_initialized(info)
    model._move_missing_keys_from_meta_to_device(info.missing_and_mismatched(), {"": device}, None, None)
    _check_marks_are_heeded()
    model._initialize_missing_keys(False)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)


def _check_marks_are_heeded() -> None:
    """A mark of another name would be ignored without a word. What a class writes past the marks, it always writes."""
    from transformers import initialization

    for draw in (initialization.zeros_, initialization.normal_):
        value = torch.ones(8)
        mark_initialised(value)
        draw(value)
        if not torch.equal(value, torch.ones(8)):
            raise untested("transformers", "it initialises anew what was read from the checkpoint")


def leave_placement_alone(model: PreTrainedModel, device: torch.device, *, launched: bool = False) -> None:
    """Have Trainer and accelerate leave the model where it is: to them it is spread over two devices.

    Both are the compute device; on a GPU by two names of it, for a Trainer that counts the devices by name leaves a
    model on two of them out of `nn.DataParallel`, whatever other GPUs the process sees.

    In a process that a launcher started there is no `nn.DataParallel`, and accelerate refuses a model on two devices:
    it is on one, by the name that accelerate has for it. The Trainer then leaves it there because it has such a map,
    and accelerate moves it to where it is.

    Args:
        model: Filled.
        device: Where it is, with the GPU's number.
        launched: Whether a launcher (torchrun, accelerate) started this process.
    """
    if launched:
        model.hf_device_map = {"": device}
        return
    twice: tuple[torch.device, torch.device | str] = (device, device if device.type == "cpu" else str(device))
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), "lm_head")
    model.hf_device_map = {model.base_model_prefix: twice[0], head or "lm_head": twice[1]}


def before_resume(check: Callable[[nn.Module, str], None]) -> None:
    """Have every Trainer call a function before it reads anything of the checkpoint that it resumes from.

    May be called again with the same function.

    Args:
        check: Called with the Trainer's model and the checkpoint's folder; what it raises ends the resume.

    Raises:
        UnsupportedError: This Trainer begins to resume in another way.
    """
    _call_before(
        "_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"], check, "would be looked at first"
    )


_MOVES_MODEL = "_move_model_to_device"


def leave_where_it_is(is_placed: Callable[[nn.Module], bool]) -> None:
    """Have every Trainer leave models alone that place themselves, without a word.

    Because of the device map that keeps accelerate from moving such a model, a Trainer would log a warning that it is
    on multiple devices, which it is not. May be called again with the same function. Where a Trainer moves models in
    another way, nothing is changed: the map still holds, and only the warning comes.

    Args:
        is_placed: Whether a model is to be left where it is.
    """
    from transformers import Trainer

    move = getattr(Trainer, _MOVES_MODEL, None)
    if move is None or getattr(move, "lowmem_leaves", None) is is_placed:
        return
    if list(inspect.signature(move).parameters) != ["self", "model", "device"]:
        return

    @wraps(move)
    def leaving(self: Trainer, model: nn.Module, device: torch.device) -> None:
        if not is_placed(model):
            move(self, model, device)

    leaving.lowmem_leaves = is_placed  # type: ignore[attr-defined]
    setattr(Trainer, _MOVES_MODEL, leaving)


def on_optimizer_resume(tell: Callable[[nn.Module, str], None]) -> None:
    """Have every Trainer say from which folder it resumes, before it loads the optimizer's state from there.

    An optimizer is given the state without the folder that it comes from, to which large parts of it may be relative.
    May be called again with the same function.

    Args:
        tell: Called with the Trainer's model and the checkpoint's folder.

    Raises:
        UnsupportedError: This Trainer loads the optimizer's state in another way.
    """
    _call_before("_load_optimizer_and_scheduler", ["self", "checkpoint"], tell, "would be found after it was moved")


def _call_before(name: str, parameters: list[str], call: Callable[[nn.Module, str], None], otherwise: str) -> None:
    """Have a method of Trainer, whose first argument is a checkpoint's folder or None, begin with a call of ours."""
    from transformers import Trainer

    resume = getattr(Trainer, name, None)
    if getattr(resume, "lowmem_calls", None) is call:
        return
    if resume is None or list(inspect.signature(resume).parameters) != parameters:
        what = f"{name}({', '.join(parameters[1:])})"
        raise untested("transformers", f"its Trainer has no {what}, so no checkpoint {otherwise}")

    @wraps(resume)
    def resuming(self: Trainer, folder: str | None, *others: object, **named: object) -> None:
        if folder is not None:
            call(self.model, folder)
        resume(self, folder, *others, **named)

    resuming.lowmem_calls = call  # type: ignore[attr-defined]
    setattr(Trainer, name, resuming)


def on_interruption(tell: Callable[[nn.Module, BaseException], None]) -> None:
    """Have every Trainer's `train` tell of an interruption (Ctrl-C) or of what broke it, wherever in it that arrives.

    May be called again with the same function.

    Args:
        tell: Called with the Trainer's model and the exception, which then goes on its way.
    """
    from transformers import Trainer

    train = Trainer.train
    if getattr(train, "lowmem_tells", None) is tell:
        return

    @wraps(train)
    def telling(self: Trainer, *args: object, **kwargs: object) -> object:
        try:
            return train(self, *args, **kwargs)
        except BaseException as interruption:
            tell(self.model, interruption)
            raise

    telling.lowmem_tells = tell  # type: ignore[attr-defined]
    Trainer.train = telling
