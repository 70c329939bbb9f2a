"""What the end-to-end tests train with: a word tokenizer, a data set, TRL's trainers on a tiny model."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import lowmem

NUM_WORDS = 90


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 ... w89, three special ones, and a chat template with generation markers."""
    words = {f"w{index}": index for index in range(NUM_WORDS)}
    words |= {"<pad>": NUM_WORDS, "<eos>": NUM_WORDS + 1, "<unk>": NUM_WORDS + 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    made.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }} <eos> {% endgeneration %}"
        "{% else %}{{ m.content }} {% endif %}{% endfor %}"
    )
    return made


def _words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(f"w{rng.randrange(NUM_WORDS)}" for _ in range(rng.randint(low, high)))


def texts(num: int = 24) -> Dataset:
    """Plain texts of 8 to 20 words."""
    rng = random.Random(0)
    return Dataset.from_list([{"text": _words(rng, 8, 20)} for _ in range(num)])


def prompts(num: int = 24) -> Dataset:
    """Prompts and completions."""
    rng = random.Random(1)
    rows = [{"prompt": _words(rng, 3, 6), "completion": " " + _words(rng, 3, 8)} for _ in range(num)]
    return Dataset.from_list(rows)


def chats(num: int = 24) -> Dataset:
    """Conversations of one turn."""
    rng = random.Random(2)
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": _words(rng, 3, 6)},
                    {"role": "assistant", "content": _words(rng, 3, 8)},
                ]
            }
            for _ in range(num)
        ]
    )


def streamed(folder: Path, **options: object) -> PreTrainedModel:
    """The streamed model, no weights cached on the host."""
    budget = options.pop("budget", lowmem.Budget(device="64MiB", host="0"))
    return lowmem.from_pretrained(folder, budget=budget, device="cpu", **options)  # type: ignore[arg-type]


def resident(folder: Path) -> PreTrainedModel:
    """The same model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def lora(**options: object) -> LoraConfig:
    """LoRA on every linear layer."""
    return LoraConfig(r=4, **({"target_modules": "all-linear", "lora_dropout": 0.1} | options))


def trainer(
    model: PreTrainedModel,
    output: Path,
    *,
    dataset: Dataset | None = None,
    adapter: LoraConfig | None = None,
    callbacks: list[object] | None = None,
    **options: object,
) -> SFTTrainer:
    """TRL's SFTTrainer, fp32, 4 steps of 4 sequences, every step logged."""
    torch.manual_seed(0)
    defaults: dict[str, object] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        # Adam divides by the gradient's size and so makes a sign of each rounding error; with SGD errors stay errors.
        "optim": "sgd",
        "learning_rate": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(str(output), **(defaults | options)),
        train_dataset=dataset if dataset is not None else texts(),
        eval_dataset=texts(6) if "eval_strategy" in options else None,
        processing_class=word_tokenizer(),
        peft_config=adapter or lora(),
        callbacks=callbacks,
    )


def trained(model: PreTrainedModel, output: Path, **options: object) -> SFTTrainer:
    """A trainer that has trained; made right before, so that two of them draw the same random numbers."""
    made = trainer(model, output, **options)  # type: ignore[arg-type]
    made.train()
    return made


def logged(done: SFTTrainer) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    return [(entry["loss"], entry["grad_norm"]) for entry in done.state.log_history if "loss" in entry]


def adapter_weights(done: SFTTrainer) -> dict[str, torch.Tensor]:
    """The trained parameters by name."""
    return {name: param.detach().clone() for name, param in done.model.named_parameters() if param.requires_grad}
