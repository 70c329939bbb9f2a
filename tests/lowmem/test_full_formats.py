"""Every weight trained with masters and moments in fewer bytes: bit by bit what the optimizer does to a plain model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import lowmem
from lowmem.full.flat import EXP_AVG, EXP_AVG_SQ, FlatMoment, lay_out_moments
from lowmem.optim.optimizer import RuleOptimizer
from lowmem.streaming.runtime import runtime_of
from tests.lowmem.full_training import TIERS, backward, batches, full, resident, weights
from tests.zoo.architectures import build

NUM_STEPS = 8
FORMATS = [("fp32", "bf16"), ("fp32", "8bit"), ("bf16", "fp32"), ("bf16", "bf16"), ("bf16", "8bit")]
QUICK = {("device", "bf16", "8bit"), ("host", "fp32", "8bit"), ("disk", "bf16", "8bit"), ("disk", "fp32", "bf16")}
CASES = [
    case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
    for case in ((tier, *formats) for tier in TIERS for formats in FORMATS)
]
WIDE = {"hidden_size": 64, "intermediate_size": 98, "head_dim": 16}
"""Some of a block's matrices are large enough for 8-bit moments, some are not, and one is no whole number of blocks."""
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama"), changes=WIDE))


def adamw(model: PreTrainedModel, moments: str) -> RuleOptimizer:
    return lowmem.optim.AdamW(model, lr=3e-3, weight_decay=0.1, state_dtype=moments, writer="stochastic", seed=3)


def train(
    model: PreTrainedModel, optimizer: RuleOptimizer, steps: range, *, max_norm: float | None = None
) -> list[float]:
    losses = []
    for step in steps:
        losses.append(backward(model, batches(1, seed=step)[0].to(model.device)))
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("tier", "masters", "moments"), CASES)
def test_steps_are_bitwise_those_of_the_optimizer_on_a_resident_model(
    folder: Path, tmp_path: Path, tier: str, masters: str, moments: str
) -> None:
    plain, tuned = resident(folder, TYPES[masters]), full(folder, tier, tmp_path, masters=masters).train()
    # Clipping multiplies bf16 gradients in bf16 there, and what was accumulated in fp32 here.
    run = partial(train, steps=range(NUM_STEPS), max_norm=0.5 if masters == "fp32" else None)
    expected = run(plain, adamw(plain, moments))
    optimizer = adamw(tuned, moments)
    assert run(tuned, optimizer) == expected
    check_equal(weights(tuned), weights(plain))
    full_tuning = runtime_of(tuned).full
    assert full_tuning is not None
    assert full_tuning.tier.state_dtype == moments
    assert not optimizer.state


@pytest.mark.parametrize("tier", ["device", "disk"])
def test_gradients_of_several_backwards_are_added_in_fp32(folder: Path, tmp_path: Path, tier: str) -> None:
    plain, tuned = resident(folder, torch.bfloat16), full(folder, tier, tmp_path, masters="bf16").train()
    named = dict(plain.named_parameters())
    optimizer = adamw(plain, "8bit")
    groups = {id(param): group for group in optimizer.param_groups for param in group["params"]}
    states: dict[str, Any] = {}
    ours = adamw(tuned, "8bit")
    for step in range(3):
        sums = {name: torch.zeros(param.shape) for name, param in named.items()}
        for ids in batches(4, seed=step):
            backward(plain, ids, parts=4)
            backward(tuned, ids, parts=4)
            for name, param in named.items():
                assert param.grad is not None
                if ".layers." in name:
                    sums[name] += param.grad.float()
                    param.grad = None
        for name, param in named.items():
            gradient = sums[name] if ".layers." in name else param.grad
            assert gradient is not None
            rule, state = optimizer.rule_of(param), states.setdefault(name, {})
            if not state:
                state.update(rule.init(param))
            with torch.no_grad():
                rule.update(param, gradient, state, optimizer.hyper(groups[id(param)]))
        plain.zero_grad()
        ours.step()
        ours.zero_grad()
    check_equal(weights(tuned), weights(plain))


@pytest.mark.parametrize(("masters", "moments"), [("bf16", "8bit"), ("fp32", "bf16")])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_saved_run_goes_on_bitwise(folder: Path, tmp_path: Path, tier: str, masters: str, moments: str) -> None:
    whole = full(folder, tier, tmp_path / "whole", masters=masters).train()
    train(whole, adamw(whole, moments), range(6))
    first = full(folder, tier, tmp_path / "first", masters=masters).train()
    optimizer = adamw(first, moments)
    train(first, optimizer, range(3))
    first.save_pretrained(tmp_path / "saved")
    state = optimizer.state_dict()
    runtime_of(first).close()
    second = full(tmp_path / "saved" if tier == "host" else folder, tier, tmp_path / "second", masters=masters).train()
    resumed = adamw(second, moments)
    state["lowmem_full"]["folder"] = str(tmp_path / "saved" / "optimizer_state")
    resumed.load_state_dict(state)
    train(second, resumed, range(3, 6))
    check_equal(weights(second), weights(whole))


def test_a_run_with_state_on_disk_goes_on_from_its_last_step(folder: Path, tmp_path: Path) -> None:
    whole = full(folder, "host", tmp_path, masters="bf16").train()
    train(whole, adamw(whole, "8bit"), range(6))
    first = full(folder, "disk", tmp_path / "state", masters="bf16").train()
    train(first, adamw(first, "8bit"), range(3))
    runtime_of(first).close()
    second = full(folder, "disk", tmp_path / "state", masters="bf16").train()
    # The state says how it is stored; the optimizer's groups follow it, as they do in everything else.
    resumed = adamw(second, "fp32")
    assert lowmem.full.resume_last_step(resumed) == 3
    train(second, resumed, range(3, 6))
    check_equal(weights(second), weights(whole))


def test_what_is_saved_is_a_bf16_checkpoint(folder: Path, tmp_path: Path) -> None:
    model = full(folder, "host", tmp_path, masters="bf16").train()
    train(model, adamw(model, "8bit"), range(1))
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    check_equal(weights(loaded), weights(model))


def test_another_optimizer_begins_with_moments_of_its_own(folder: Path, tmp_path: Path) -> None:
    for tier in ("host", "disk"):
        model, plain = full(folder, tier, tmp_path / tier).train(), resident(folder)
        for moments in ("8bit", "fp32", "bf16"):
            run = range(2)
            train(model, adamw(model, moments), run)
            train(plain, adamw(plain, moments), run)
        check_equal(weights(model), weights(plain))


@pytest.mark.parametrize("writer", ["kahan", "nearest", "fp32"])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_other_ways_to_write_bf16_weights_are_exact_too(folder: Path, tmp_path: Path, tier: str, writer: str) -> None:
    plain, tuned = resident(folder, torch.bfloat16), full(folder, tier, tmp_path, masters="bf16").train()
    train(plain, lowmem.optim.AdamW(plain, lr=3e-3, writer=writer), range(3))
    train(tuned, lowmem.optim.AdamW(tuned, lr=3e-3, writer=writer), range(3))
    check_equal(weights(tuned), weights(plain))


@pytest.mark.parametrize("options", [{"masters": "fp16"}, {"masters": "bf16", "dtype": "fp32"}])
def test_other_types_are_refused_by_name(folder: Path, options: dict[str, str]) -> None:
    with pytest.raises(lowmem.UnsupportedError, match="masters="):
        lowmem.from_pretrained(folder, tuning="full", device="cpu", **options)  # type: ignore[arg-type]
    with pytest.raises(lowmem.UnsupportedError, match="masters='bf16' with tuning='adapter'"):
        lowmem.plan(folder, seq_len=8, masters="bf16", device="cpu")


def test_moments_read_back_and_stored_again_stay_as_they_are() -> None:
    numel, num_wide = 8192, 5120
    layout = lay_out_moments("8bit", numel, num_wide=num_wide)
    generator = torch.Generator().manual_seed(0)
    sizes = 10 ** (-30 * torch.rand(numel // 256, 1, generator=generator))
    values = (torch.randn(numel // 256, 256, generator=generator) * sizes).view(-1)
    for name, given in ((EXP_AVG, values), (EXP_AVG_SQ, values.square())):
        memory = torch.zeros(layout.nbytes, dtype=torch.uint8)
        moment = FlatMoment(name, layout.views(memory))
        for piece in (slice(0, num_wide), slice(num_wide, numel)):
            moment.write(piece, given[piece])
        first = moment.values(numel).clone()
        for piece in (slice(0, num_wide), slice(num_wide, numel)):
            moment.write(piece, first[piece])
        assert torch.equal(moment.values(numel), first)
        assert torch.equal(first[num_wide:], given[num_wide:])
