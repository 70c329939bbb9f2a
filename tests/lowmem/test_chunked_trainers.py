"""TRL's trainers on a streamed model whose blocks walk the sequence in chunks, boundary activations on disk."""

from pathlib import Path

import pytest
import torch

import lowmem
from lowmem.streaming.boundary import DiskBoundaries
from lowmem.streaming.runtime import runtime_of
from tests.lowmem.tiny_trainers import loaders, records, trained
from tests.zoo.architectures import build

pytestmark = [
    # TRL calls transformers by names that are on their way out.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "sft": ("sft", {}),
    "packed sft": ("sft", {"packing": True, "max_length": 16, "per_device_train_batch_size": 1}),
    "dpo": ("dpo", {}),
    "dpo, reference computed before": ("dpo", {"precompute_ref_log_probs": True}),
    "grpo": ("grpo", {}),
    "grpo with a reference": ("grpo", {"beta": 0.1}),
}
ROUNDING = 1e-5
QUICK = {("llama", "packed sft"), ("llama", "dpo"), ("qwen3", "grpo with a reference")}


def in_chunks(folder: Path, disk: Path) -> lowmem.Plan:
    """A plan for 3 tokens at a time, boundaries on disk: its budget has no room for them elsewhere."""

    def planned(device_bytes: int) -> lowmem.Plan:
        budget = lowmem.Budget(device=device_bytes, host=0, disk=disk)
        return lowmem.plan(folder, batch_size=8, seq_len=64, chunk_tokens=3, budget=budget, device="cpu")

    return planned(planned(0).smallest_device_bytes)


@pytest.mark.filterwarnings("ignore:Padding-free training is enabled:UserWarning")
@pytest.mark.parametrize(
    ("architecture", "case"),
    [
        pytest.param(name, case, marks=() if (name, case) in QUICK else pytest.mark.slow)
        for name in ("llama", "qwen3", "gemma3_text", "gpt_oss")
        for case in CASES
    ],
)
def test_losses_and_gradient_norms_equal_training_in_memory(architecture: str, case: str, tmp_path: Path) -> None:
    task, options = CASES[case]
    folder = Path(build(architecture, tmp_path / "model"))
    if architecture == "gpt_oss":
        options = options | {"router_aux_loss_coef": 0.0}
    resident, _ = loaders(task)
    expected = records(trained(task, resident(folder), tmp_path / "resident", **options))
    model = lowmem.from_pretrained(folder, plan=in_chunks(folder, tmp_path / "disk"), device="cpu")
    got = records(trained(task, model, tmp_path / "streamed", **options))
    boundaries = runtime_of(model).boundaries
    assert isinstance(boundaries, DiskBoundaries)
    assert boundaries.scratch.written_bytes
    assert len(got) == len(expected) == 5
    for step, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert one.keys() == other.keys()
        if abs(other.get("rewards/margins", 1.0)) < ROUNDING:
            # Which of two equal rewards is larger is rounding.
            one["rewards/accuracies"] = other["rewards/accuracies"]
        values = (torch.tensor([entry[name] for name in other], dtype=torch.float64) for entry in (one, other))
        torch.testing.assert_close(
            *values, rtol=2e-5, atol=2e-6, equal_nan=True, msg=lambda m, s=step, o=other: f"step {s}: {list(o)}\n{m}"
        )
