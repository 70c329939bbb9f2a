"""Forwards without gradients, evaluation and reference among them, in micro-batches like training."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import lowmem
from lowmem.streaming.runtime import runtime_of
from tests.lowmem.tiny_training import resident, streamed
from tests.zoo.architectures import build

IDS = torch.arange(35).view(5, 7)
MASK = torch.ones_like(IDS)
MASK[2, :3] = 0


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral"])
def test_micro_batches_give_the_logits_of_the_whole_batch(name: str, tmp_path: Path) -> None:
    folder = build(name, tmp_path)
    model = streamed(folder, micro_batch=2)
    sizes: list[int] = []
    block = runtime_of(model).blocks[1].block.module
    block.input_layernorm.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[0]))
    with torch.no_grad():
        got, expected = (
            loaded(IDS, attention_mask=MASK, use_cache=False).logits for loaded in (model, resident(folder).eval())
        )
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(got[MASK.bool()], expected[MASK.bool()], rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_of_them(tmp_path: Path) -> None:
    model = streamed(build("llama", tmp_path), micro_batch=1)
    kept: list[Tensor] = []
    boundaries = runtime_of(model).boundaries
    original = boundaries.keep
    boundaries.keep = lambda value: (kept.append(value), original(value))[1]  # type: ignore[method-assign]
    with torch.no_grad():
        model(IDS, use_cache=False)
    assert not kept


def test_router_logits_in_chunks_are_refused_without_gradients_too(tmp_path: Path) -> None:
    model = streamed(build("mixtral", tmp_path), chunk_tokens=3)
    with torch.no_grad(), pytest.raises(lowmem.UnsupportedError, match="router"):
        model(IDS, use_cache=False, output_router_logits=True)
