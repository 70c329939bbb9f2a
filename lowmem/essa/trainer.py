"""ESSA: reward maximised over the singular values of an adapter, with forward passes only.

A population answers prompts as one batch, reward functions score the answers, a strategy moves the mean.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from lowmem.essa.spectrum import Spectrum
from lowmem.essa.strategy import SeparableCma
from lowmem.internals.torch import damage_of_saved
from lowmem.processes.ranks import refuse_several
from lowmem.streaming.runtime import ActiveRows, is_streamed, runtime_of
from offload import Folder

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class ESSAConfig:
    """How to evolve an adapter's singular values."""

    output_dir: str
    """Folder for the adapter and for checkpoints."""
    max_steps: int = 100
    """Generations of the evolution strategy."""
    per_device_train_batch_size: int = 8
    """Prompts of a step; every member of the population answers all of them."""
    population_size: int = 16
    """Members of the population, in mirrored pairs."""
    sigma: float = 0.1
    """Standard deviation to begin with, in units of the mean singular value of each adapted layer."""
    generation_batch_size: int | None = None
    """Rows generated together at most, rounded down to whole members; None for the whole population at once."""
    max_completion_length: int = 256
    """Tokens of a completion."""
    temperature: float = 0.0
    """0 answers greedily, so that members differ by their values only; else as in `generate`."""
    reward_weights: tuple[float, ...] | None = None
    """Of the reward functions; 1 each if not given."""
    logging_steps: int = 1
    """Steps between two entries of the log."""
    save_steps: int = 50
    """Steps between two checkpoints; 0 for none."""
    seed: int = 0
    """Of prompts, members and samples."""

    def __post_init__(self) -> None:
        positive = ("max_steps", "per_device_train_batch_size", "max_completion_length", "logging_steps")
        for name, least in (dict.fromkeys(positive, 1) | {"temperature": 0, "save_steps": 0}).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")
        if self.population_size < 4 or self.population_size % 2:
            raise ValueError(f"population_size={self.population_size}: expected an even number of at least 4")
        if self.sigma <= 0:
            raise ValueError(f"sigma={self.sigma}: expected more than 0")
        rows = self.generation_batch_size
        if rows is not None and rows < self.per_device_train_batch_size:
            raise ValueError(
                f"generation_batch_size={rows}: a member answers {self.per_device_train_batch_size} prompts at once; "
                "give at least as many"
            )


Row = dict[str, object]

RewardFunction = Callable[..., Sequence[float | None]]
"""As in TRL: called with prompts, completions, completion_ids and the data set's columns, by keyword."""


@dataclass(frozen=True, kw_only=True)
class Answering:
    """Generates for several members at once and scores what comes."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    """With a padding token."""
    rewards: Sequence[RewardFunction]
    weights: Sequence[float]
    """Of the reward functions."""
    max_new_tokens: int
    temperature: float
    """0 for greedy answers."""

    def generate(self, rows: Sequence[Row], *, num_members: int) -> list[list[int]]:
        """Return completions, without padding: those of the first member to all rows, then those of the next.

        Args:
            rows: Rows of the data set, with a "prompt".
            num_members: How often every prompt is answered.
        """
        texts = [self._text(row["prompt"]) for row in rows]
        encoded = self.tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=has_text_prompts(rows)
        )
        ids = encoded["input_ids"].to(self.model.device).repeat(num_members, 1)
        mask = encoded["attention_mask"].to(self.model.device).repeat(num_members, 1)
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        with torch.no_grad():
            whole = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=eos,
                pad_token_id=pad,
                **sampling,
            )
        answers = whole[:, ids.shape[1] :].tolist()
        return [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in answers]

    def score(self, rows: Sequence[Row], completions: Sequence[list[int]]) -> Tensor:
        """Weighted sums of the rewards, shape (len(completions),); the rows are repeated for each member."""
        repeated = [rows[index % len(rows)] for index in range(len(completions))]
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
        is_chat = not has_text_prompts(rows)
        said = [[{"role": "assistant", "content": text}] for text in texts] if is_chat else texts
        columns = {name: [row[name] for row in repeated] for name in rows[0]}
        prompts = columns.pop("prompt")
        total = torch.zeros(len(completions), dtype=torch.float64)
        for reward, weight in zip(self.rewards, self.weights, strict=True):
            found = reward(prompts=prompts, completions=said, completion_ids=list(completions), **columns)
            # None: the function has no opinion on this row, as in TRL.
            total += weight * torch.tensor([0.0 if value is None else float(value) for value in found]).double()
        return total

    def _text(self, prompt: object) -> str:
        if isinstance(prompt, str):
            return prompt
        messages = cast("list[dict[str, str]]", prompt)
        return cast("str", self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def has_text_prompts(rows: Sequence[Row]) -> bool:
    """Whether prompts are plain text, and not conversations, whose template has the special tokens already."""
    return isinstance(rows[0]["prompt"], str)


_STATE = "essa_state.pt"
_UNREADABLE = (AttributeError, EOFError, KeyError, OSError, RuntimeError, TypeError, UnpicklingError)
"""What a file that holds something else ends in, in torch.load or when it is looked at."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class ESSATrainer:
    """Evolves the singular values of a LoRA adapter so that rewards rise. No gradients, no optimizer state.

    Each adapted layer's product B A is factored once, U diag(s) V^T, and only s varies: a few numbers for each layer.
    A step draws a population around the mean (`SeparableCma`), lets every member answer the same prompts and moves the
    mean to where the rewards were higher. The whole population generates as one batch: every block is visited once per
    token, each row with its own member's singular values. After Korotyshova et al., "ESSA: Evolutionary Strategies for
    Scalable Alignment" (arXiv:2507.04453), which has CMA-ES with a full covariance.

    Start from an adapter that was trained before (SFT), as there: a fresh one has only random directions.

    Args:
        model: A model, streamed or not, or a PEFT model with a LoRA adapter.
        args: Settings.
        reward_funcs: As in TRL's GRPOTrainer: called with `prompts`, `completions`, `completion_ids` and the other
            columns; one number for each completion.
        train_dataset: Rows with "prompt" (text or messages) and what the reward functions want.
        processing_class: The tokenizer.
        peft_config: A LoRA to begin with, where `model` has none.

    Raises:
        UnsupportedError: The adapter is no plain LoRA on linear layers.
        ValueError: There is nothing to train on, or weights do not match the reward functions.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: ESSAConfig,
        *,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        peft_config: PeftConfig | None = None,
    ) -> None:
        refuse_several(
            "ESSATrainer",
            reason="there are no gradients to average, and each would evolve an adapter of its own",
            instead="one process (python SCRIPT)",
        )
        rewards = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
        weights = args.reward_weights or (1.0,) * len(rewards)
        if len(weights) != len(rewards):
            raise ValueError(
                f"reward_weights: expected {len(rewards)}, one for each reward function, got {len(weights)}"
            )
        if not len(train_dataset) or "prompt" not in train_dataset.column_names:
            raise ValueError(f'train_dataset: expected rows with a "prompt", got columns {train_dataset.column_names}')
        self.args, self.train_dataset = args, train_dataset
        self.model = _with_adapter(model, peft_config, seed=args.seed)
        self.model.eval()
        self.log_history: list[dict[str, float]] = []
        """One entry for each logged step: step, reward, reward_best, reward_std, sigma."""
        rows = runtime_of(self.model).rows if is_streamed(self.model) else ActiveRows()
        self.spectrum = Spectrum(self.model, rows=rows, seed=args.seed)
        self.strategy = SeparableCma(
            torch.zeros(self.spectrum.num_values),
            sigma=args.sigma,
            population_size=args.population_size,
            seed=args.seed,
        )
        self._answering = Answering(
            model=self.model,
            tokenizer=processing_class,
            rewards=rewards,
            weights=weights,
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
        )

    def train(self, *, resume_from_checkpoint: str | Path | bool | None = None) -> None:
        """Run the steps that are left, and save the adapter.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the last one in `args.output_dir`.

        Raises:
            FileNotFoundError: There is no such checkpoint.
            ValueError: It is damaged, or of another adapter; nothing is changed.
        """
        if resume_from_checkpoint:
            self._resume(self._last() if resume_from_checkpoint is True else Path(resume_from_checkpoint))
        while self.strategy.num_steps < self.args.max_steps:
            self.step()
            step = self.strategy.num_steps
            if self.args.save_steps and step % self.args.save_steps == 0:
                self._save_checkpoint(Path(self.args.output_dir) / f"checkpoint-{step}")
        self.save_model()

    def evaluate(self, dataset: Dataset) -> float:
        """Mean reward of the mean's answers to all rows, as one batch."""
        return float(
            self.rewards_of(torch.zeros(1, self.spectrum.num_values) + self.strategy.mean, list(dataset)).mean()
        )

    def rewards_of(self, members: Tensor, rows: Sequence[Row]) -> Tensor:
        """Rewards of the members' answers to rows, shape (members, rows).

        Args:
            members: Coordinates, shape (members, n).
            rows: Rows of the data set.
        """
        size = len(members)
        if self.args.generation_batch_size is not None:
            size = max(1, self.args.generation_batch_size // len(rows))
        found = []
        for start in range(0, len(members), size):
            group = members[start : start + size]
            member_of_row = torch.arange(len(group)).repeat_interleave(len(rows))
            with self.spectrum.population(group, member_of_row=member_of_row):
                completions = self._answering.generate(rows, num_members=len(group))
            found.append(self._answering.score(rows, completions).reshape(len(group), len(rows)))
        return torch.cat(found)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Save the mean as an ordinary PEFT adapter, and the log."""
        folder = Path(output_dir or self.args.output_dir)
        with self.spectrum.written(self.strategy.mean):
            self.model.save_pretrained(str(folder))
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": self.log_history}, indent=2))

    def step(self) -> None:
        """One generation of the strategy: let a population answer, and move the mean."""
        step = self.strategy.num_steps
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
        num_rows = min(self.args.per_device_train_batch_size, len(self.train_dataset))
        rows = [
            self.train_dataset[index]
            for index in torch.randperm(len(self.train_dataset), generator=generator)[:num_rows].tolist()
        ]
        if self.args.temperature:
            torch.manual_seed(self.args.seed * 1_000_003 + step)
        sigma = self.strategy.sigma
        scores = self.rewards_of(self.strategy.ask(), rows).mean(dim=1)
        self.strategy.tell(scores)
        if self.strategy.num_steps % self.args.logging_steps == 0:
            self.log_history.append(
                {
                    "step": self.strategy.num_steps,
                    "reward": float(scores.mean()),
                    "reward_best": float(scores.max()),
                    "reward_std": float(scores.std()),
                    "sigma": sigma,
                }
            )

    def _save_checkpoint(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "strategy": self.strategy.state_dict(),
            "spectrum": self.spectrum.state_dict(),
            "log_history": self.log_history,
        }
        raw = io.BytesIO()
        torch.save(state, raw)
        # A kill leaves no half checkpoint under that name, and nobody else can read it.
        with Folder.open(folder) as opened:
            opened.put(_STATE, raw.getvalue())

    def _resume(self, folder: Path) -> None:
        """Go on from a checkpoint, all of which is looked at before anything is changed."""
        file = folder / _STATE
        if not os.path.lexists(file):
            raise FileNotFoundError(f"{folder}: no {_STATE}; give a folder that ESSATrainer saved as a checkpoint")
        try:
            # torch.load looks at no checksum, and would wait for a pipe.
            if (damage := damage_of_saved(file)) is not None:
                raise ValueError(damage)
            state = torch.load(file, map_location="cpu", weights_only=True)
            self.spectrum.check_state_dict(state["spectrum"])
            self.strategy.check_state_dict(state["strategy"])
            log = [_checked_entry(entry) for entry in state["log_history"]]
        except (*_UNREADABLE, ValueError) as error:
            why = str(error).partition("\n")[0][:200] if isinstance(error, ValueError) else type(error).__name__
            raise ValueError(f"{file}: damaged, or of another adapter ({why}); give another checkpoint") from error
        self.spectrum.load_state_dict(state["spectrum"])
        self.strategy.load_state_dict(state["strategy"])
        self.log_history = log

    def _last(self) -> Path:
        folders = {
            int(found[1]): path.parent
            for path in Path(self.args.output_dir).glob(f"checkpoint-*/{_STATE}")
            if (found := _CHECKPOINT.fullmatch(path.parent.name)) is not None
        }
        if not folders:
            raise FileNotFoundError(f"{self.args.output_dir}: no checkpoint to resume from")
        return folders[max(folders)]


def _checked_entry(entry: object) -> dict[str, float]:
    if not isinstance(entry, dict) or not all(
        isinstance(name, str) and type(value) in (int, float) for name, value in entry.items()
    ):
        raise ValueError("log_history: expected numbers by name")
    return entry


def _with_adapter(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, *, seed: int) -> PeftModel:
    from peft import PeftModel, get_peft_model

    if peft_config is None:
        # `Spectrum` refuses a model that has no adapter of its own either.
        return cast("PeftModel", model)
    if isinstance(model, PeftModel):
        raise ValueError("peft_config: the model has an adapter already; give one or the other")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, peft_config)
