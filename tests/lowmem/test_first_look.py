"""What a person sees of a streamed model and of importing: its repr, its plan, and no warnings that concern nobody."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lowmem
from tests.zoo.architectures import build


def test_a_models_repr_and_plan_say_what_is_streamed(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "model")
    budget = lowmem.Budget(device="40MiB", host="0")
    model = lowmem.from_pretrained(folder, budget=budget, device="cpu", dtype=torch.float32)
    assert "(streamed by lowmem): 3 blocks, " in repr(model)
    assert repr(model).startswith("LlamaForCausalLM(")
    assert isinstance(model.lowmem_plan, lowmem.Plan)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert "(streamed by lowmem): 3 blocks, " in repr(adapted)
    before = adapted.lowmem_plan
    ids = torch.arange(1, 33)[None].repeat(4, 1)
    adapted(input_ids=ids, labels=ids).loss.backward()
    after = adapted.lowmem_plan
    # Nobody had said what would be trained on: the batch that came is planned for, and that plan is shown.
    assert (after.batch_size * after.seq_len) == 4 * 32 != before.batch_size * before.seq_len


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_importing_is_silent() -> None:
    # On a processor with AVX512-BF16 bitsandbytes logs that a package of kernels is missing.
    program = "import lowmem; from peft import LoraConfig; from trl import SFTConfig; import bitsandbytes"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout == ""
