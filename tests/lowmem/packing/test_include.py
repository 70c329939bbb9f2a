"""Embeddings and head packed on request: their codes, training on their values, what transformers can load of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lowmem
from lowmem.cli import app
from lowmem.errors import UnsupportedError
from lowmem.packing.place import verify_pack
from tests.lowmem.packing.test_pack import WIDE, by_bitsandbytes
from tests.lowmem.quantization.checkpoints import tensors_of
from tests.zoo.architectures import build
from tests.zoo.reference import adapt, batch_of, lora, resident, run
from tests.zoo.streamed import streamed

NAMES = {"embeddings": "model.embed_tokens.weight", "head": "lm_head.weight"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("llama") / "base", dtype=torch.bfloat16, changes=WIDE)


def packed_in(folder: Path) -> set[str]:
    """Names of the weights that are packed in a folder."""
    return {
        name.partition(".quant_state.")[0].replace(".SCB", ".weight")
        for name in tensors_of(folder)
        if name.endswith(".SCB") or ".quant_state." in name
    }


@pytest.mark.parametrize(
    ("include", "quantization"), [(("embeddings",), "nf4"), (("head",), "int8"), (("embeddings", "head"), "fp4")]
)
def test_what_is_asked_for_is_packed_and_trained_on(
    include: Any, quantization: str, llama: Path, tmp_path: Path
) -> None:
    packed = lowmem.pack(llama, quantization=quantization, output=tmp_path / "packed", device="cpu", include=include)
    plain = lowmem.pack(llama, quantization=quantization, output=tmp_path / "plain", device="cpu")
    assert packed_in(packed) - packed_in(plain) == {NAMES[part] for part in include}
    before, stored = tensors_of(llama), tensors_of(packed)
    for part in include:
        for key, value in by_bitsandbytes(NAMES[part], before[NAMES[part]], quantization).items():
            if "quant_state" not in key:
                assert torch.equal(stored[key].view(-1), value.view(-1)), key
    assert verify_pack(packed) == []
    ours, theirs = streamed(packed), resident(llama)
    with torch.no_grad():
        for key, param in theirs.named_parameters():
            param.copy_(ours.get_parameter(key).clone())
    outcomes = [run(adapt(model, lora("llama")), batch_of()) for model in (theirs, ours)]
    assert torch.equal(outcomes[0].loss, outcomes[1].loss)
    assert all(torch.equal(outcomes[1].gradients[key], value) for key, value in outcomes[0].gradients.items())


def test_transformers_loads_a_packed_head(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", changes=WIDE)
    packed = lowmem.pack(base, quantization="nf4", output=tmp_path / "packed", device="cpu", include=["head"])
    theirs = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).train()
    assert type(theirs.lm_head) is not nn.Linear
    ours = streamed(packed)
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch_of()).logits, theirs(**batch_of()).logits, rtol=1e-5, atol=1e-5)


def test_one_table_and_unknown_parts_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    tied = build("llama", tmp_path / "tied", dtype=torch.bfloat16, changes=WIDE | {"tie_word_embeddings": True})
    for part in ("embeddings", "head"):
        with pytest.raises(UnsupportedError, match=rf"include={part} of LlamaForCausalLM .*one table.*packing without"):
            lowmem.pack(tied, quantization="nf4", output=tmp_path / "out", device="cpu", include=[part])
    with pytest.raises(UnsupportedError, match=r"include='norms' is not supported.*'embeddings' or 'head'"):
        lowmem.pack(llama, quantization="nf4", output=tmp_path / "out", device="cpu", include=["norms"])
    assert not (tmp_path / "out").exists()


def test_command_includes_parts_and_other_settings_are_another_folder(llama: Path, tmp_path: Path) -> None:
    arguments = ["pack", str(llama), "--quantization", "nf4", "--output", str(tmp_path / "packed"), "--on", "cpu"]
    assert CliRunner().invoke(app, [*arguments, "--include", "embeddings,head"]).exit_code == 0
    assert set(NAMES.values()) <= packed_in(tmp_path / "packed")
    assert CliRunner().invoke(app, [*arguments, "--include", "head,embeddings"]).exit_code == 0
    assert isinstance(CliRunner().invoke(app, arguments).exception, FileExistsError)
