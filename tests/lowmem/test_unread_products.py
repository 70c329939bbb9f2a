"""Blocks recomputed without products that nobody reads, or that the forward has kept: a resident model's bits.

Whatever the architecture.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowmem.internals import unread
from lowmem.internals.torch import tree_leaves
from tests.zoo.architectures import build
from tests.zoo.reference import adapt, batch_of, lora, resident, run
from tests.zoo.streamed import streamed

# Residual streams that a product is added to, and norms behind the last product, which read it.
QUICK = {"llama": True, "gemma2": False}
SLOW = {"gpt_neox": True, "gpt2": True, "phi3": True, "qwen3": True, "olmo2": False, "granite": True, "falcon": False}


@pytest.mark.parametrize(
    ("name", "is_left_out"),
    [*QUICK.items(), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW.items())],
)
def test_a_step_has_the_bits_of_a_resident_model(
    name: str, is_left_out: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unread, "_MANY_OPERATIONS", 1)
    monkeypatch.setattr(unread, "_MANY_OPERATIONS_OF_A_BLOCK", 1)
    left_out: list[bool] = []
    give_up = unread.PuttingOff.give_up

    def noting(self: unread.PuttingOff, output: object) -> None:
        left_out.append(any(unread._is_unread(leaf) for leaf in tree_leaves(output)))
        give_up(self, output)

    monkeypatch.setattr(unread.PuttingOff, "give_up", noting)
    folder = Path(build(name, tmp_path / "model"))
    config, batch = lora(name), batch_of(padding=True)
    theirs = run(adapt(resident(folder), config), batch)
    ours = run(adapt(streamed(folder, micro_batch=2), config), batch)
    assert left_out
    assert set(left_out) == {is_left_out}
    assert torch.equal(ours.loss, theirs.loss)
    assert ours.gradients.keys() == theirs.gradients.keys() != set()
    for key, gradient in theirs.gradients.items():
        assert torch.equal(ours.gradients[key], gradient), key
