"""The two methods that `generate` is extended through are there, are called as before, and are missed loudly."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationMixin, LlamaConfig, LlamaForCausalLM
from transformers.generation import GenerationMode, StoppingCriteria, StoppingCriteriaList

from lowmem.errors import UnsupportedError
from lowmem.internals.generation import extend_generate

PROMPT = torch.arange(3, 9).view(2, 3)


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval()


class _Stop(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 5)


def test_generate_asks_both_hooks_and_uses_what_they_give(model: LlamaForCausalLM) -> None:
    asked: list[tuple[Any, ...]] = []
    caches: list[DynamicCache] = []

    def cache_made(is_given: bool, config: object, kwargs: dict[str, Any], *rest: Any) -> None:
        assert type(kwargs["past_key_values"]) is DynamicCache
        if not is_given:
            caches.append(DynamicCache(config=model.config))
            kwargs["past_key_values"] = caches[0]
        asked.append((is_given, *rest))

    extend_generate(
        model, cache_made=cache_made, criteria_made=lambda _, criteria: StoppingCriteriaList([*criteria, _Stop()])
    )
    assert model.generate(PROMPT, max_new_tokens=8, do_sample=False).shape == (2, 5)
    assert caches[0].get_seq_length() == 4
    model.generate(PROMPT, max_new_tokens=8, do_sample=False, past_key_values=DynamicCache(config=model.config))
    assert asked == [(False, GenerationMode.GREEDY_SEARCH, 2, 10), (True, GenerationMode.GREEDY_SEARCH, 2, 10)]


@pytest.mark.parametrize(
    "name", ["_prepare_cache_for_generation", "_get_stopping_criteria", "init_continuous_batching"]
)
def test_a_method_of_another_name_is_missed_before_anything_runs(
    name: str, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in type(model).__mro__:
        if name in vars(kind):
            monkeypatch.delattr(kind, name)
    with pytest.raises(UnsupportedError, match=rf"transformers {version('transformers')} .*{name}"):
        extend_generate(model, cache_made=lambda *_: None, criteria_made=lambda _, criteria: criteria)


def test_other_parameters_are_noticed(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GenerationMixin, "_get_stopping_criteria", lambda self, settings, tokenizer=None: None)
    with pytest.raises(UnsupportedError, match="_get_stopping_criteria"):
        extend_generate(model, cache_made=lambda *_: None, criteria_made=lambda _, criteria: criteria)
