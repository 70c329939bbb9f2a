"""TRL's preference and reinforcement trainers on tiny models, as `tiny_training` has the SFTTrainer."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer, set_seed
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from tests.lowmem.tiny_training import NUM_WORDS, lora, resident, streamed, texts, word_tokenizer

Make = Callable[..., Trainer]

_SHARED: dict[str, object] = {
    "max_steps": 5,
    "per_device_train_batch_size": 4,
    "optim": "sgd",
    "learning_rate": 0.5,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def _words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(f"w{rng.randrange(NUM_WORDS)}" for _ in range(rng.randint(low, high)))


def pairs(num: int = 24) -> Dataset:
    """Prompts with a chosen and a rejected completion."""
    rng = random.Random(3)
    rows = [
        {"prompt": _words(rng, 3, 6), "chosen": " " + _words(rng, 2, 6), "rejected": " " + _words(rng, 2, 6)}
        for _ in range(num)
    ]
    return Dataset.from_list(rows)


def judged(num: int = 24) -> Dataset:
    """Prompts with completions that are good or bad."""
    rng = random.Random(4)
    rows = [
        {"prompt": _words(rng, 3, 6), "completion": " " + _words(rng, 2, 6), "label": index % 2 == 0}
        for index in range(num)
    ]
    return Dataset.from_list(rows)


def questions(num: int = 24) -> Dataset:
    """Prompts alone."""
    rng = random.Random(5)
    return Dataset.from_list([{"prompt": _words(rng, 3, 6)} for _ in range(num)])


def even_words(completions: list[str], **columns: object) -> list[float]:
    """A reward: how many words have an even number."""
    return [sum(int(word[1:]) % 2 == 0 for word in text.split() if word[1:].isdigit()) / 8 for text in completions]


_TRAINERS: dict[str, tuple[type[Trainer], type, Callable[..., Dataset], dict[str, object]]] = {
    "sft": (SFTTrainer, SFTConfig, texts, {}),
    "dpo": (DPOTrainer, DPOConfig, pairs, {}),
    "kto": (KTOTrainer, KTOConfig, judged, {}),
    "reward": (RewardTrainer, RewardConfig, pairs, {}),
    "grpo": (GRPOTrainer, GRPOConfig, questions, {"num_generations": 4, "max_completion_length": 6}),
    "rloo": (RLOOTrainer, RLOOConfig, questions, {"num_generations": 4, "max_completion_length": 6}),
}


def rows_for(task: str, num: int) -> Dataset:
    """So many rows of what a task trains on."""
    return _TRAINERS[task][2](num)


def make(
    task: str, model: PreTrainedModel, output: Path, *, adapter: Mapping[str, object] | None = None, **options: object
) -> Trainer:
    """One of TRL's trainers, fp32, 5 steps of 4 examples, every step logged.

    Args:
        task: "sft", "dpo", "kto", "reward", "grpo" or "rloo".
        model: Streamed or resident.
        output: Its folder.
        adapter: What its LoRA on all linear layers, without dropout, has besides.
        options: For the trainer's configuration; `train_dataset`, `eval_dataset`, `callbacks` and `ref_model` for the
            trainer; `wrapped` to give it a PeftModel, of which it makes a frozen copy for a reference.
    """
    trainer_class, config_class, dataset, defaults = _TRAINERS[task]
    torch.manual_seed(0)
    arguments: dict[str, object] = {"train_dataset": options.pop("train_dataset", None) or dataset()}
    arguments |= {name: options.pop(name) for name in ("callbacks", "eval_dataset", "ref_model") if name in options}
    if task in ("grpo", "rloo"):
        arguments["reward_funcs"] = even_words
    peft_config = lora(**({"lora_dropout": 0.0} | dict(adapter or {})))
    if options.pop("wrapped", False):
        model, peft_config = _trained_before(model, peft_config), None
    return trainer_class(  # type: ignore[call-arg]
        model=model,
        args=config_class(str(output), **(_SHARED | defaults | options)),
        processing_class=word_tokenizer(),
        peft_config=peft_config,
        **arguments,
    )


def _trained_before(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """An adapter that is not the base model: a second stage's start."""
    made = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, param in made.named_parameters():
            if "lora_B" in name:
                param.copy_(0.1 * torch.randn(param.shape, generator=generator))
    return made


def trained(task: str, model: PreTrainedModel, output: Path, **options: object) -> Trainer:
    """A trainer that has trained; made right before, so that two of them draw the same random numbers."""
    made = make(task, model, output, **options)  # type: ignore[arg-type]
    set_seed(1)
    made.train()
    return made


_NOT_OF_THE_MODEL = ("runtime", "per_second", "step_time", "epoch", "total_flos", "profiling")


def records(done: Trainer) -> list[dict[str, float]]:
    """What each step logged, but for times: losses, gradient norms, rewards, margins, divergences, entropies."""
    steps = [entry for entry in done.state.log_history if "loss" in entry]
    return [
        {name: value for name, value in entry.items() if not any(part in name for part in _NOT_OF_THE_MODEL)}
        for entry in steps
    ]


def loaders(task: str) -> tuple[Callable[[Path], PreTrainedModel], Callable[[Path], PreTrainedModel]]:
    """How the resident and the streamed model of a task are opened."""
    if task != "reward":
        return resident, streamed
    return _resident_reward, _streamed_reward


def _resident_reward(folder: Path) -> PreTrainedModel:
    return _with_score(AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32))


def _streamed_reward(folder: Path) -> PreTrainedModel:
    return _with_score(streamed(folder, num_labels=1))


def _with_score(model: PreTrainedModel) -> PreTrainedModel:
    """The checkpoint has no head: the same one for both.

    Small, as heads begin: of rewards of ten fp32 keeps differences to a millionth only.
    """
    with torch.no_grad():
        head = torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(7))
        model.score.weight.copy_(0.1 * head)
    return model
