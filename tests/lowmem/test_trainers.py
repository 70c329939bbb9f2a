"""TRL's trainers, unmodified, on streamed models: every step logs what it logs in memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, Trainer

from tests.lowmem.tiny_trainers import loaders, pairs, records, trained
from tests.zoo.architectures import build

pytestmark = [
    # TRL calls transformers by names that are on their way out.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    # PEFT says this of the patterns that it makes itself for stacked experts.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]

ARCHITECTURES = ("llama", "qwen3", "gemma3_text", "mixtral")
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "sft": ("sft", {}),
    "dpo": ("dpo", {}),
    "dpo, reference computed before": ("dpo", {"precompute_ref_log_probs": True}),
    "kto": ("kto", {}),
    "reward": ("reward", {"adapter": {"modules_to_save": ["score"], "task_type": "SEQ_CLS"}}),
    "grpo": ("grpo", {}),
    "grpo with a reference": ("grpo", {"beta": 0.1}),
    "rloo": ("rloo", {}),
    "rloo without a reference": ("rloo", {"beta": 0.0}),
}
OTHERS: dict[str, tuple[str, dict[str, object]]] = {
    "dpo, an adapter trained before": ("dpo", {"wrapped": True}),
    "dpo, a model for a reference": ("dpo", {"ref_model": True}),
    "dpo, batches added up and evaluation": (
        "dpo",
        {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": pairs(6)},
    ),
    "dpo with dropout": ("dpo", {"disable_dropout": False, "adapter": {"lora_dropout": 0.2}}),
    "grpo, an adapter trained before": ("grpo", {"wrapped": True, "beta": 0.1}),
    "grpo with dropout": ("grpo", {"beta": 0.1, "adapter": {"lora_dropout": 0.2}}),
    "grpo, every batch used twice": ("grpo", {"beta": 0.1, "num_iterations": 2}),
    "grpo, batches added up": ("grpo", {"beta": 0.1, "gradient_accumulation_steps": 2}),
    "rloo, batches added up": ("rloo", {"gradient_accumulation_steps": 2}),
    "kto with DoRA": ("kto", {"adapter": {"use_dora": True}}),
}
QUICK = {("llama", "dpo"), ("mixtral", "dpo"), ("llama", "grpo with a reference"), ("llama", "reward")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("models")
    return {name: Path(build(name, made / name)) for name in ARCHITECTURES}


@pytest.mark.parametrize(
    ("architecture", "case"),
    [
        pytest.param(name, case, marks=() if (name, case) in QUICK else pytest.mark.slow)
        for name in ARCHITECTURES
        for case in (CASES | OTHERS if name == "llama" else CASES)
    ],
)
def test_losses_rewards_and_gradient_norms_equal_training_in_memory(
    architecture: str, case: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    task, options = (CASES | OTHERS)[case]
    folder = folders[architecture]
    expected, got = (records(_trained(task, load, folder, tmp_path, **options)) for load in loaders(task))
    assert len(got) == len(expected) == 5
    assert any(entry["grad_norm"] > 0 for entry in got)
    for step, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert one.keys() == other.keys()
        values = (torch.tensor([entry[name] for name in other], dtype=torch.float64) for entry in (one, other))
        torch.testing.assert_close(
            *values, rtol=2e-5, atol=2e-6, equal_nan=True, msg=lambda m, s=step, o=other: f"step {s}: {list(o)}\n{m}"
        )


def _trained(
    task: str, load: Callable[[Path], PreTrainedModel], folder: Path, output: Path, **options: object
) -> Trainer:
    if options.get("ref_model"):
        options["ref_model"] = load(folder)
    return trained(task, load(folder), output, **options)
