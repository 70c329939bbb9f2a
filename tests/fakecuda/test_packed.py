"""Packed checkpoints on the GPU, real or simulated: packed bytes cross, values are made there, and no race is seen."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from lowmem.experts.visiting import ExpertScheduler
from lowmem.streaming.runtime import runtime_of
from tests.fakecuda.steps import Step, open_model
from tests.lowmem.quantization.public_layouts import write_layout
from tests.zoo.architectures import build
from tests.zoo.reference import ATTENTION_ONLY, Outcome, adapt, batch_of, run

pytestmark = pytest.mark.gpu

CHANGES: dict[str, dict[str, object]] = {
    "gpt_oss": {"intermediate_size": 64},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2},
}
CASES = [("llama", "gptq by activation"), ("llama", "awq"), ("qwen3_moe", "fp8"), ("gpt_oss", "mxfp4")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


@cache
def packed(name: str, layout: str, root: Path) -> Path:
    folder = root / f"{name}-{layout}"
    return write_layout(build(name, folder / "zoo", changes=CHANGES.get(name)), folder / "written", layout)[0]


def step(folder: Path, placement: str, *, device: str) -> Outcome:
    model = open_model(folder, Step(placement=placement), device=device)
    config = LoraConfig(r=4, target_modules=ATTENTION_ONLY)
    batch = {name: value.to(device) for name, value in batch_of().items()}
    return run(adapt(model, config), batch)


@pytest.mark.parametrize(("name", "layout"), CASES)
@pytest.mark.parametrize("placement", ["streamed", "mixed"])
def test_a_step_is_that_of_the_cpu(name: str, layout: str, placement: str, root: Path) -> None:
    folder = packed(name, layout, root)
    expected = step(folder, placement, device="cpu")
    outcome = step(folder, placement, device="cuda")
    torch.testing.assert_close(outcome.loss.cpu(), expected.loss)
    for key, gradient in expected.gradients.items():
        torch.testing.assert_close(outcome.gradients[key].cpu(), gradient)


@pytest.mark.parametrize(("name", "layout"), CASES[2:])
def test_generation_reads_single_experts(name: str, layout: str, root: Path) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = []
    for device in ("cpu", "cuda"):
        model = open_model(packed(name, layout, root), Step(), device=device)
        tokens.append(model.generate(torch.tensor([[5, 17, 9]], device=device), **options).cpu())
        source = runtime_of(model).scheduler
        assert isinstance(source, ExpertScheduler)
        assert source.memory()["expert_bytes"] > 0
    assert torch.equal(*tokens)
