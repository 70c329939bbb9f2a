"""ESSA: reward maximised over the singular values of an adapter, with forward passes only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.essa.answers import Answering, RewardFunction, Row
from lowmem.essa.config import ESSAConfig
from lowmem.essa.spectrum import Spectrum
from lowmem.essa.strategy import SeparableCma
from lowmem.generation.rows import ActiveRows
from lowmem.streaming.runtime import is_streamed, runtime_of

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_STATE = "essa_state.pt"


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
            self.model,
            processing_class,
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
        # Renamed when complete: a kill leaves no half checkpoint under that name.
        unfinished = folder / f"{_STATE}.part"
        torch.save(state, unfinished)
        unfinished.rename(folder / _STATE)

    def _resume(self, folder: Path) -> None:
        if not (folder / _STATE).is_file():
            raise FileNotFoundError(f"{folder}: no {_STATE}; give a folder that ESSATrainer saved as a checkpoint")
        state = torch.load(folder / _STATE, weights_only=True)
        self.spectrum.load_state_dict(state["spectrum"])
        self.strategy.load_state_dict(state["strategy"])
        self.log_history = list(state["log_history"])

    def _last(self) -> Path:
        folders = [path.parent for path in Path(self.args.output_dir).glob(f"checkpoint-*/{_STATE}")]
        if not folders:
            raise FileNotFoundError(f"{self.args.output_dir}: no checkpoint to resume from")
        return max(folders, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))


def _with_adapter(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, *, seed: int) -> PeftModel:
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ValueError("peft_config: the model has an adapter already; give one or the other")
        return model
    if peft_config is None:
        raise UnsupportedError(
            "ESSA without a LoRA adapter",
            reason="it evolves an adapter's singular values",
            instead="peft_config=LoraConfig(...), or a model with a LoRA adapter",
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, peft_config)


__all__ = ["ESSATrainer"]
