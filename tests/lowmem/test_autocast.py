"""Training under bf16 autocast, as TRL's trainers do it: the bits of PEFT on a resident model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.zoo.architectures import build
from tests.zoo.reference import Outcome, adapt, batch_of, lora, resident, run
from tests.zoo.streamed import streamed

CASES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("llama", torch.bfloat16, {}),
    ("gemma2", torch.float32, {}),
    ("llama", torch.float32, {}),
    ("llama", torch.bfloat16, {"lora_dropout": 0.1}),
    ("phi3", torch.bfloat16, {"use_rslora": True}),
    ("gpt2", torch.bfloat16, {}),
    ("qwen3_moe", torch.bfloat16, {}),
]


def under_autocast(model: Any, batch: dict[str, torch.Tensor]) -> Outcome:
    with torch.autocast("cpu", torch.bfloat16):
        return run(model, batch)


# PEFT's conversion of mixtures names layers that a model has as one stack.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [pytest.param(*case, marks=[] if number < 2 else pytest.mark.slow) for number, case in enumerate(CASES)],
    ids=str,
)
def test_a_step_under_autocast_has_the_bits_of_a_resident_model(
    name: str, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = Path(build(name, tmp_path / "model"))
    batch = batch_of()
    # A configuration each: PEFT writes to that of a mixture's.
    theirs = under_autocast(adapt(resident(folder, dtype=dtype), lora(name, **options)), batch)
    ours = under_autocast(adapt(streamed(folder, dtype=dtype, micro_batch=2), lora(name, **options)), batch)
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.logits, theirs.logits)
    assert ours.gradients.keys() == theirs.gradients.keys() != set()
    for key, gradient in theirs.gradients.items():
        assert torch.equal(ours.gradients[key], gradient), key
