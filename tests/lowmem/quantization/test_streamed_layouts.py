"""Checkpoints in public layouts, trained streamed: the bits of a resident model that holds their values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.lowmem.quantization.checkpoints import tensors_of, write
from tests.lowmem.quantization.public_layouts import LAYOUTS, STACKS, write_layout
from tests.zoo.architectures import build
from tests.zoo.reference import ATTENTION_ONLY, Outcome, adapt, batch_of, resident, run
from tests.zoo.streamed import streamed

QUICK = [
    ("llama", "gptq", "dora"),
    ("llama", "gptq by activation", "lora"),
    ("llama", "awq", "lora"),
    ("llama", "mxfp8", "lora"),
    ("llama", "fp8 per row", "lora"),
    ("deepseek_v3", "fp8", "lora"),
    ("gpt_oss", "mxfp4", "lora"),
]
ARCHITECTURES = ("llama", "qwen3", "mistral", "gemma3_text", "phi3", "qwen3_moe", "mixtral", "deepseek_v3")
MATRIX = [
    (name, layout, kind)
    for name in ARCHITECTURES
    for layout in LAYOUTS
    if layout not in STACKS
    for kind in ("lora", "dora")
    if (name, layout, kind) not in QUICK
]


CHANGES: dict[str, dict[str, object]] = {"gpt_oss": {"intermediate_size": 64}}


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str, str], tuple[Path, Path]]:
    """Writes an architecture in a layout: the quantised checkpoint and the plain one of its values."""

    def write(name: str, layout: str) -> tuple[Path, Path]:
        return write_layout(build(name, tmp_path / "zoo", changes=CHANGES.get(name)), tmp_path / "written", layout)

    return write


def step(model: torch.nn.Module, *, use_dora: bool) -> Outcome:
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION_ONLY, use_dora=use_dora)
    return run(adapt(model, config), batch_of())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "layout", "kind"), QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in MATRIX]
)
def test_a_step_has_the_bits_of_a_resident_model_with_the_same_values(
    name: str, layout: str, kind: str, written: Callable[[str, str], tuple[Path, Path]], tmp_path: Path
) -> None:
    packed, plain = written(name, layout)
    expected = step(resident(plain), use_dora=kind == "dora")
    model = streamed(packed)
    assert not hasattr(model.config, "quantization_config")
    outcome = step(model, use_dora=kind == "dora")
    if kind == "dora":
        # Norms of streamed models need no dense product, and are sums in another order: to the bit only among them. The
        # matrices are stored wider, so that they are computed from the same places in memory.
        torch.testing.assert_close(outcome.loss, expected.loss, rtol=1e-5, atol=0)
        for key, gradient in expected.gradients.items():
            torch.testing.assert_close(outcome.gradients[key], gradient, rtol=1e-4, atol=1e-5)
        values = {key: value.double() if value.dim() == 2 else value for key, value in tensors_of(plain).items()}
        expected = step(streamed(write(tmp_path / "wide", plain, values)), use_dora=True)
    assert torch.equal(outcome.loss, expected.loss)
    assert torch.equal(outcome.logits, expected.logits)
    assert outcome.gradients.keys() == expected.gradients.keys()
    for key, gradient in expected.gradients.items():
        assert torch.equal(outcome.gradients[key], gradient), key


@pytest.mark.parametrize("layout", ["fp8", "gptq"])
def test_absent_weights_read_as_their_values(layout: str, written: Callable[[str, str], tuple[Path, Path]]) -> None:
    packed, plain = written("qwen3_moe", layout)
    expected = resident(plain).state_dict()
    for key, param in streamed(packed).named_parameters():
        assert torch.equal(param.detach() + 0.0, expected[key] + 0.0), key
