"""Addition, a character at a time, and a small Llama trained from scratch to do it half right."""

import random
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

_SPECIAL = ("<pad>", "<eos>")
_CHARACTERS = "0123456789+="
LARGEST = 99
NUM_ANSWER_TOKENS = 4
"""Three digits and the end."""
_NUM_HELD_OUT = 1000
_LEARNING_RATE = 1.5e-3
_SLOW_LEARNING_RATE = 1e-4
_FIRST_CHECK = 50
_NUM_CHECKED = 300
_MOST_BEYOND = 0.1


@dataclass(frozen=True, kw_only=True)
class Problem:
    """a + b, both of two digits; the answer's digits stand in reverse, so that carries go the way that tokens do."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a:02d}+{self.b:02d}="

    @property
    def answer(self) -> str:
        return str(self.a + self.b)[::-1]


def problems(*, seed: int = 0) -> tuple[list[Problem], list[Problem]]:
    """All problems in two parts: to train on, and held out."""
    every = [Problem(a=a, b=b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    random.Random(seed).shuffle(every)
    return every[_NUM_HELD_OUT:], every[:_NUM_HELD_OUT]


def rows_of(chosen: list[Problem]) -> Dataset:
    """Prompts and answers for reward functions."""
    return Dataset.from_list([{"prompt": problem.prompt, "answer": problem.answer} for problem in chosen])


def exact_match(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """1 where the completion is the answer."""
    return [float(said.replace(" ", "") == right) for said, right in zip(completions, answer, strict=True)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character."""
    words = {word: index for index, word in enumerate((*_SPECIAL, *_CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def pretrain(folder: Path, *, until: float, seed: int = 0, max_steps: int = 6000, batch_size: int = 256) -> float:
    """Train a model of three layers from scratch until it answers a share of held-out problems, and save it.

    Args:
        folder: Where the checkpoint goes, tokenizer included.
        until: Share of problems whose sampled answer is right, at which to stop.
        seed: Of weights and batches.
        max_steps: Steps after which to give up.
        batch_size: Problems in a step.

    Returns:
        The share that it reached.

    Raises:
        RuntimeError: It did not get there.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(_config(len(tokenizer)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    training, held_out = problems()
    pick = random.Random(seed)
    # It learns carries all of a sudden: where it has jumped, it goes back and on in small steps.
    is_close = False
    kept: tuple[dict[str, torch.Tensor], dict[str, object]] | None = None
    for step in range(1, max_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = (_SLOW_LEARNING_RATE if is_close else _LEARNING_RATE) * min(1.0, step / 100)
        loss = _loss(model, tokenizer, pick.sample(training, batch_size))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step >= _FIRST_CHECK and step % 10 == 0:
            share = exact_share(model, tokenizer, held_out[:_NUM_CHECKED], seed=step)
            if share >= until + _MOST_BEYOND and kept is not None:
                model.load_state_dict(kept[0])
                optimizer.load_state_dict(kept[1])
                is_close = True
                continue
            kept = deepcopy((model.state_dict(), optimizer.state_dict()))
            if share >= until:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(str(folder))
                return share
    raise RuntimeError(f"the model answers {share:.0%} after {max_steps} steps, wanted were {until:.0%}")


def _config(vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=False,
    )


def _loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, batch: list[Problem]) -> torch.Tensor:
    texts = [f"{problem.prompt}{problem.answer}" for problem in batch]
    ids = tokenizer(texts, padding="max_length", max_length=9, padding_side="right", return_tensors="pt")["input_ids"]
    # The first padding is the end; what follows it is not learned.
    ids = torch.cat([ids, torch.zeros(len(batch), 1, dtype=ids.dtype)], dim=1)
    first_pad = (ids == 0).float().argmax(dim=1)
    ids[torch.arange(len(batch)), first_pad] = 1
    labels = ids.masked_fill(ids == 0, -100)
    labels[:, : len(batch[0].prompt)] = -100
    loss: torch.Tensor = model(input_ids=ids, labels=labels).loss
    return loss


@torch.no_grad()
def exact_share(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    chosen: list[Problem],
    *,
    seed: int,
    greedy: bool = False,
) -> float:
    """Share of problems that a model answers exactly, sampled as in training (temperature 1) or greedily.

    Leaves the global random state and the model's mode as they were.
    """
    ids = tokenizer([problem.prompt for problem in chosen], return_tensors="pt")["input_ids"]
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        answers = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_ANSWER_TOKENS,
            do_sample=not greedy,
            pad_token_id=0,
            eos_token_id=1,
        )
    model.train(was_training)
    texts = tokenizer.batch_decode(answers[:, ids.shape[1] :], skip_special_tokens=True)
    return sum(exact_match(texts, [problem.answer for problem in chosen])) / len(chosen)
