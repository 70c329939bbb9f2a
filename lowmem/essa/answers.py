"""Answers of a population to prompts, generated as one batch, and what reward functions make of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, object]
RewardFunction = Callable[..., Sequence[float | None]]
"""As in TRL: called with prompts, completions, completion_ids and the data set's columns, by keyword."""


class Answering:
    """Generates for several members at once and scores what comes.

    Args:
        model: What generates.
        tokenizer: Its tokenizer, with a padding token.
        rewards: The reward functions.
        weights: Of the reward functions.
        max_new_tokens: Tokens of a completion.
        temperature: 0 for greedy answers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rewards: Sequence[RewardFunction],
        weights: Sequence[float],
        max_new_tokens: int,
        temperature: float,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._rewards, self._weights = rewards, weights
        self._max_new_tokens, self._temperature = max_new_tokens, temperature

    def generate(self, rows: Sequence[Row], *, num_members: int) -> list[list[int]]:
        """Completions, without padding: those of the first member to all rows, then those of the next.

        Args:
            rows: Rows of the data set, with a "prompt".
            num_members: How often every prompt is answered.
        """
        texts = [self._text(row["prompt"]) for row in rows]
        encoded = self._tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=has_text_prompts(rows)
        )
        ids = encoded["input_ids"].to(self._model.device).repeat(num_members, 1)
        mask = encoded["attention_mask"].to(self._model.device).repeat(num_members, 1)
        sampling = {"do_sample": True, "temperature": self._temperature} if self._temperature else {"do_sample": False}
        eos, pad = self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        with torch.no_grad():
            whole = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self._max_new_tokens,
                eos_token_id=eos,
                pad_token_id=pad,
                **sampling,
            )
        return [_until(tokens, eos) for tokens in whole[:, ids.shape[1] :].tolist()]

    def score(self, rows: Sequence[Row], completions: Sequence[list[int]]) -> Tensor:
        """Weighted sums of the rewards, shape (len(completions),); the rows are repeated for each member."""
        repeated = [rows[index % len(rows)] for index in range(len(completions))]
        texts = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
        is_chat = not has_text_prompts(rows)
        said = [[{"role": "assistant", "content": text}] for text in texts] if is_chat else texts
        columns = {name: [row[name] for row in repeated] for name in rows[0]}
        prompts = columns.pop("prompt")
        total = torch.zeros(len(completions), dtype=torch.float64)
        for reward, weight in zip(self._rewards, self._weights, strict=True):
            found = reward(prompts=prompts, completions=said, completion_ids=list(completions), **columns)
            # None: the function has no opinion on this row, as in TRL.
            total += weight * torch.tensor([0.0 if value is None else float(value) for value in found]).double()
        return total

    def _text(self, prompt: object) -> str:
        if isinstance(prompt, str):
            return prompt
        messages = cast("list[dict[str, str]]", prompt)
        return cast("str", self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def has_text_prompts(rows: Sequence[Row]) -> bool:
    """Whether prompts are plain text, and not conversations, whose template has the special tokens already."""
    return isinstance(rows[0]["prompt"], str)


def _until(tokens: list[int], eos: int | None) -> list[int]:
    return tokens if eos not in tokens else tokens[: tokens.index(eos) + 1]


__all__ = ["Answering", "RewardFunction", "Row"]
