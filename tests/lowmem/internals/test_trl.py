"""TRL reaches its head and hashes a model as lowmem.internals.trl expects it; else its trainers are refused."""

from __future__ import annotations

import inspect

import pytest
import torch
import trl.trainer.utils as trl_utils
from torch import nn
from trl.trainer import dpo_trainer, kto_trainer

from lowmem.errors import UnsupportedError
from lowmem.internals import trl
from lowmem.internals.trl import HeadDispatch, install
from lowmem.streaming.head import TiledLogProbFunction


def test_trl_s_function_takes_what_ours_takes() -> None:
    shipped = trl_utils._ChunkedLogProbFunction
    function = shipped.shipped if isinstance(shipped, HeadDispatch) else shipped
    theirs = list(inspect.signature(function.forward).parameters)
    ours = list(inspect.signature(TiledLogProbFunction.forward).parameters)
    assert [*theirs, "tiles"] == ours
    assert theirs[1:3] == list(inspect.signature(HeadDispatch.apply).parameters)[1:3]
    assert "_ChunkedLogProbFunction.apply" in inspect.getsource(trl_utils.add_fused_lm_head) or (
        "_ChunkedLogProbFunction.apply" in inspect.getsource(trl_utils)
    )


@pytest.mark.parametrize("name", ["_ChunkedLogProbFunction", "hash_module"])
def test_a_name_that_is_gone_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(trl_utils, name)
    with pytest.raises(UnsupportedError, match=rf"trl 1.*has no {name}"):
        install(lambda *_: pytest.fail("no head was asked for"))


def test_trainers_hash_through_the_function_that_is_looked_for() -> None:
    for module in (dpo_trainer, kto_trainer):
        assert module.hash_module is trl_utils.hash_module
    seen: list[bool] = []

    class Hashed(nn.Linear):
        def state_dict(self, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:  # type: ignore[override]
            seen.append(trl._is_for_hashing())
            return {}

    trl_utils.hash_module(Hashed(1, 1))
    Hashed(1, 1).state_dict()
    assert seen == [True, False]
