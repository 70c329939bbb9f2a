"""The activation formula against real blocks: never below what was measured, and at most 1.35 times as much."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from transformers import GPT2Config, PretrainedConfig

from lowmem.planning.block_memory import MicroBatch, block_forward_bytes, block_recompute_bytes
from tests.lowmem.block_peak import Measured, config_of, measure
from tests.lowmem.llama_shapes import llama_block

MOST = 1.35
SIZES = [
    {"hidden": 128, "mlp": 352, "heads": 4, "key_heads": 2, "head_dim": 32},
    {"hidden": 256, "mlp": 512, "heads": 8, "key_heads": 2, "head_dim": 32},
    {"hidden": 384, "mlp": 1024, "heads": 6, "key_heads": 6, "head_dim": 64},
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
DENSE_ADAPTERS = {
    "dropout": {"target_modules": "all-linear", "lora_dropout": 0.1, "r": 16},
    "dora": {"target_modules": "all-linear", "use_dora": True},
}


def check(found: Measured) -> None:
    predicted = block_recompute_bytes(found.block, found.batch)
    assert found.peak_bytes <= predicted <= MOST * found.peak_bytes, predicted / found.peak_bytes
    assert found.forward_bytes <= block_forward_bytes(found.block, found.batch)


# PEFT 0.21.2, about the patterns that it makes itself for stacked experts.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@DTYPES
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"hidden{size['hidden']}")
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "mixtral"])
def test_recomputation_takes_no_more_than_predicted(kind: str, size: dict[str, int], dtype: torch.dtype) -> None:
    lora = LoraConfig(r=8, target_modules="all-linear")
    check(measure(config_of(kind, **size), num_sequences=1, seq_len=128, dtype=dtype, lora=lora))


@DTYPES
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "mixtral"])
def test_layers_without_an_adapter_keep_less(kind: str, dtype: torch.dtype) -> None:
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    check(measure(config_of(kind, **SIZES[0]), num_sequences=1, seq_len=128, dtype=dtype, lora=lora))


@DTYPES
@pytest.mark.parametrize("adapter", DENSE_ADAPTERS)
@pytest.mark.parametrize("size", SIZES[::2], ids=lambda size: f"hidden{size['hidden']}")
def test_dropout_and_dora_are_counted(size: dict[str, int], adapter: str, dtype: torch.dtype) -> None:
    lora = LoraConfig(**{"r": 8, **DENSE_ADAPTERS[adapter]})
    check(measure(config_of("llama", **size), num_sequences=2, seq_len=96, dtype=dtype, lora=lora))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral"])
def test_a_padding_mask_is_counted(kind: str) -> None:
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    check(measure(config_of(kind, **SIZES[1]), num_sequences=2, seq_len=192, lora=lora, has_mask=True))


def test_a_block_with_an_activation_in_python_is_counted() -> None:
    config: PretrainedConfig = GPT2Config(
        n_embd=256, n_head=4, n_layer=1, vocab_size=128, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    )
    lora = LoraConfig(r=8, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)
    check(measure(config, num_sequences=1, seq_len=128, lora=lora))


def test_bytes_grow_with_the_number_of_sequences() -> None:
    def bytes_of(num_sequences: int) -> int:
        return block_recompute_bytes(
            llama_block(), MicroBatch(num_sequences=num_sequences, seq_len=32, dtype="float32")
        )

    fixed = bytes_of(2) - 2 * (bytes_of(2) - bytes_of(1))
    assert 0 <= fixed < bytes_of(1)
    assert bytes_of(8) == fixed + 8 * (bytes_of(2) - bytes_of(1))


def test_dropout_masks_are_smaller_on_a_gpu() -> None:
    from dataclasses import replace

    block = llama_block()
    dropped = replace(block, linears=tuple(replace(linear, has_dropout=True) for linear in block.linears))
    on_cpu, on_gpu = (
        block_recompute_bytes(dropped, MicroBatch(num_sequences=1, seq_len=64, dtype="float32", device=device))
        for device in ("cpu", "cuda")
    )
    assert on_gpu < on_cpu
