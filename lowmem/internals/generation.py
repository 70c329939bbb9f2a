"""transformers' `generate`: the two methods of a model that it calls for its cache and its criteria, extended.

`generate` itself stays as it is: its sampling, its processors, its criteria. No public option reaches either method for
callers that do not know of streaming, TRL's trainers for one.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from lowmem.errors import UnsupportedError, untested

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation import GenerationConfig, GenerationMode, StoppingCriteriaList

    CacheHook = Callable[[bool, GenerationConfig, dict[str, object], GenerationMode, int, int], None]
    CriteriaHook = Callable[[GenerationConfig, StoppingCriteriaList], StoppingCriteriaList]


_PARAMETERS = {
    "_prepare_cache_for_generation": (
        "self",
        "generation_config",
        "model_kwargs",
        "generation_mode",
        "batch_size",
        "max_cache_length",
    ),
    "_get_stopping_criteria": ("self", "generation_config", "stopping_criteria", "tokenizer"),
    "init_continuous_batching": None,
}
"""Methods of transformers' models that are extended, and the parameters that ours pass on."""


def extend_generate(model: PreTrainedModel, *, cache_made: CacheHook, criteria_made: CriteriaHook) -> None:
    """Make `generate` of one model call us too. The model is held weakly.

    Args:
        model: The model.
        cache_made: Called with whether the caller gave a cache, the generation's configuration, the model's keyword
            arguments with the cache among them (it may put another there), the mode, the batch size and the tokens that
            the cache must have room for.
        criteria_made: Called with the configuration and the stopping criteria; returns the criteria to use.

    Raises:
        UnsupportedError: This transformers makes them otherwise: keys and values would not keep to the budget.
    """
    from transformers import GenerationMixin

    for name, parameters in _PARAMETERS.items():
        method = getattr(GenerationMixin, name, None)
        if method is None or (parameters and tuple(inspect.signature(method).parameters) != parameters):
            raise untested(
                "transformers",
                f"its GenerationMixin.{name} is not the one that generating with streamed models extends",
            )
    kind, held = type(model), weakref.ref(model)

    def prepare_cache(
        generation_config: GenerationConfig,
        model_kwargs: dict[str, object],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        arguments = (generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        is_given = model_kwargs.get("past_key_values") is not None
        kind._prepare_cache_for_generation(held(), *arguments)
        cache_made(is_given, *arguments)

    def stopping_criteria(
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteriaList | None,
        tokenizer: object = None,
    ) -> StoppingCriteriaList:
        found = kind._get_stopping_criteria(
            held(), generation_config=generation_config, stopping_criteria=stopping_criteria, tokenizer=tokenizer
        )
        return criteria_made(generation_config, found)

    model._prepare_cache_for_generation = prepare_cache
    model._get_stopping_criteria = stopping_criteria
    # TRL's way in converts the whole model before it calls this, too.
    model.init_continuous_batching = _refuse_continuous_batching


def _refuse_continuous_batching(*args: object, **kwargs: object) -> NoReturn:
    raise UnsupportedError(
        "continuous batching (generate_batch)",
        reason="its engine needs all weights, which are streamed",
        instead="generate with a batch of prompts: finished ones are no longer computed",
    )
