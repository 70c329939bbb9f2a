"""Every weight trained, state in each tier: weights after many steps are those of torch's AdamW in memory."""

from itertools import product
from pathlib import Path

import pytest
import torch

import lowmem
from lowmem.full import update_in_backward
from lowmem.full.engine import OffloadedGradient
from lowmem.full.tier import Contribution
from lowmem.streaming.runtime import runtime_of
from tests.lowmem.full_training import TIERS, backward, batches, full, resident, weights
from tests.zoo.architectures import build

NUM_STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama")))


def _decay_groups(model: torch.nn.Module) -> list[dict[str, object]]:
    params = list(model.parameters())
    return [
        {"params": [param for param in params if param.ndim >= 2], "weight_decay": 0.1},
        {"params": [param for param in params if param.ndim < 2], "weight_decay": 0.0},
    ]


def _train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, parts: int, max_norm: float | None
) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step; the learning rate warms up and decays."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5) * 0.97**step)
    history = []
    for step in range(NUM_STEPS):
        loss = sum(backward(model, ids, parts=parts) for ids in batches(parts, seed=step))
        norm = 0.0
        if max_norm is not None:
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        history.append((loss, norm))
    return history


QUICK = {("device", 1, None), ("host", 4, 0.5), ("disk", 1, 0.5), ("disk", 4, 0.5)}
CASES = [
    case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
    for case in product(TIERS, (1, 4), (None, 0.5))
]


@pytest.mark.parametrize(("tier", "parts", "max_norm"), CASES)
def test_weights_equal_torch_adamw_on_the_resident_model_bit_by_bit(
    folder: Path, tmp_path: Path, tier: str, parts: int, max_norm: float | None
) -> None:
    plain, tuned = resident(folder), full(folder, tier, tmp_path).train()
    reference = torch.optim.AdamW(_decay_groups(plain), lr=3e-3, fused=True)
    expected = _train(plain, reference, parts=parts, max_norm=max_norm)
    got = _train(tuned, lowmem.optim.AdamW(tuned, lr=3e-3, weight_decay=0.1), parts=parts, max_norm=max_norm)
    assert got == expected
    before = weights(resident(folder))
    for name, weight in weights(plain).items():
        assert torch.equal(weights(tuned)[name], weight), name
        assert not torch.equal(before[name], weight), name


def test_updates_within_the_backward_give_the_same_weights(folder: Path, tmp_path: Path) -> None:
    plain, tuned = resident(folder), full(folder, "disk", tmp_path).train()
    reference = torch.optim.AdamW(_decay_groups(plain), lr=3e-3, fused=True)
    optimizer = lowmem.optim.AdamW(tuned, lr=3e-3, weight_decay=0.1)
    update_in_backward(optimizer)
    # The norm is known afterwards; a bound that changes nothing is no clipping.
    expected = _train(plain, reference, parts=1, max_norm=1e9)
    assert _train(tuned, optimizer, parts=1, max_norm=1e9) == expected
    for name, weight in weights(plain).items():
        assert torch.equal(weights(tuned)[name], weight), name


def test_updates_within_the_backward_refuse_what_needs_all_gradients(folder: Path, tmp_path: Path) -> None:
    tuned = full(folder, "disk", tmp_path).train()
    optimizer = lowmem.optim.AdamW(tuned, lr=3e-3)
    update_in_backward(optimizer)
    backward(tuned, batches(1)[0])
    with pytest.raises(lowmem.UnsupportedError, match="max_grad_norm"):
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1e-3)
    with pytest.raises(lowmem.UnsupportedError, match="gradient_accumulation_steps"):
        backward(tuned, batches(1)[0])
    in_memory = full(folder, "device", tmp_path)
    with pytest.raises(lowmem.UnsupportedError, match="state is in memory"):
        update_in_backward(lowmem.optim.AdamW(in_memory))


@pytest.mark.parametrize("tier", ["device", "disk"])
def test_groups_of_ones_own_are_kept_to(folder: Path, tmp_path: Path, tier: str) -> None:
    plain, tuned = resident(folder), full(folder, tier, tmp_path).train()
    runs = []
    for model, make in ((plain, torch.optim.AdamW), (tuned, lowmem.optim.AdamW)):
        named = dict(model.named_parameters())
        attention = [param for name, param in named.items() if "q_proj" in name or "norm" in name]
        others = [param for name, param in named.items() if "v_proj" in name or "embed" in name]
        groups = [
            {"params": attention, "lr": 1e-2, "betas": (0.8, 0.95)},
            {"params": others, "weight_decay": 0.5, "eps": 1e-6},
        ]
        optimizer = make(groups, lr=1e-3, fused=True)
        for ids in batches(4):
            backward(model, ids)
            optimizer.step()
            model.zero_grad()
        runs.append(weights(model))
    before = weights(resident(folder))
    for name, weight in runs[0].items():
        assert torch.equal(runs[1][name], weight), name
    assert torch.equal(runs[1]["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("tier", ["device", "disk"])
def test_frozen_weights_stay_as_they_are_and_need_no_gradient(folder: Path, tmp_path: Path, tier: str) -> None:
    plain, tuned = resident(folder), full(folder, tier, tmp_path).train()
    for model in (plain, tuned):
        model.get_input_embeddings().requires_grad_(False)
        model.model.layers[0].requires_grad_(False)
        model.model.layers[1].mlp.requires_grad_(False)
    optimizers = [torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0, fused=True)]
    optimizers.append(lowmem.optim.AdamW(tuned, lr=1e-2, weight_decay=0.0))
    for ids in batches(3):
        for model, optimizer in zip((plain, tuned), optimizers, strict=True):
            backward(model, ids)
            optimizer.step()
            optimizer.zero_grad()
    assert tuned.model.layers[0].mlp.up_proj.weight.grad is None
    for name, weight in weights(plain).items():
        assert torch.equal(weights(tuned)[name], weight), name


@pytest.mark.parametrize("tier", ["device", "disk"])
def test_gradients_read_as_they_are(folder: Path, tmp_path: Path, tier: str) -> None:
    plain, tuned = resident(folder), full(folder, tier, tmp_path).train()
    for ids in batches(2):
        backward(plain, ids)
        backward(tuned, ids)
    expected = {name: param.grad for name, param in plain.named_parameters()}
    for name, param in tuned.named_parameters():
        assert param.grad is not None
        assert torch.equal(param.grad.clone(), expected[name]), name
        assert torch.equal(torch.linalg.vector_norm(param.grad), torch.linalg.vector_norm(expected[name])), name
        assert torch.equal(param.grad.abs().max(), expected[name].abs().max()), name
    norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-2) for model in (plain, tuned)]
    assert torch.equal(*norms)
    again = [torch.nn.utils.get_total_norm([param.grad for param in model.parameters()]) for model in (plain, tuned)]
    assert torch.equal(*again)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(tuned.get_parameter(name).grad + 0, plain.get_parameter(name).grad)
    # The infinity norm, and gradients added to what has been scaled.
    backward(plain, ids)
    backward(tuned, ids)
    infinity = float("inf")
    norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9, infinity) for model in (plain, tuned)]
    assert torch.equal(*norms)
    assert torch.equal(tuned.get_parameter(name).grad + 0, plain.get_parameter(name).grad)


# torch adds to a gradient that has one element of memory as it does to any other, and says that this may be slow.
@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
@pytest.mark.parametrize("tier", ["device", "disk"])
def test_gradients_are_changed_where_they_are(folder: Path, tmp_path: Path, tier: str) -> None:
    plain, tuned = resident(folder), full(folder, tier, tmp_path).train()
    for model in (plain, tuned):
        backward(model, batches(1)[0])
        changed, halved, replaced, doubled = (
            model.model.layers[0].get_submodule(path).weight
            for path in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj")
        )
        changed.grad.add_(1.0)
        halved.grad[3:].div_(2)
        replaced.grad = torch.ones(replaced.shape)
        torch._foreach_mul_([doubled.grad, changed.grad], [2.0, 1.0])
        # A loss that sees a weight itself.
        ((halved * halved).sum() + (replaced**3).sum()).backward()
        backward(model, batches(2)[1])
    for name, expected in plain.named_parameters():
        where = f"gradient of {name}"
        torch.testing.assert_close(tuned.get_parameter(name).grad + 0, expected.grad, rtol=1e-5, atol=1e-6, msg=where)
    param = tuned.model.layers[0].mlp.up_proj.weight
    assert isinstance(param.grad, OffloadedGradient)
    assert torch.equal((param * param.grad).sum(), (param.detach().clone() * param.grad.clone()).sum())
    with pytest.raises(lowmem.UnsupportedError, match="register_hook"):
        param.register_hook(lambda grad: grad)


def test_micro_batches_sum_to_the_gradient_of_the_batch(folder: Path) -> None:
    plain = resident(folder)
    budget = lowmem.Budget(device="64MiB", host="0")
    tuned = lowmem.from_pretrained(folder, tuning="full", budget=budget, device="cpu", micro_batch=1).train()
    ids = batches(1)[0]
    backward(plain, ids)
    backward(tuned, ids)
    for (name, expected), got in zip(plain.named_parameters(), tuned.parameters(), strict=True):
        where = f"gradient of {name}"
        torch.testing.assert_close(got.grad.clone(), expected.grad, rtol=1e-5, atol=1e-7, msg=lambda m, w=where: w + m)


@pytest.mark.parametrize("tier", ["device", "disk"])
def test_evaluation_and_generation_see_the_step_that_was_just_taken(folder: Path, tmp_path: Path, tier: str) -> None:
    plain, tuned = resident(folder), full(folder, tier, tmp_path).train()
    optimizers = [torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0, fused=True)]
    optimizers.append(lowmem.optim.AdamW(tuned, lr=1e-2, weight_decay=0.0))
    for ids in batches(2):
        outcomes = []
        for model, optimizer in zip((plain, tuned), optimizers, strict=True):
            backward(model, ids)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                logits = model.eval()(input_ids=ids).logits
            answer = model.generate(ids[:, :4], attention_mask=torch.ones(2, 4), max_new_tokens=4, do_sample=False)
            outcomes.append((logits, answer))
            model.train()
        torch.testing.assert_close(outcomes[1][0], outcomes[0][0], rtol=0, atol=0)
        assert torch.equal(outcomes[1][1], outcomes[0][1])


@pytest.mark.parametrize("tier", ["device", "disk"])
def test_weights_can_be_written_between_steps(folder: Path, tmp_path: Path, tier: str) -> None:
    tuned = full(folder, tier, tmp_path).train()
    param = tuned.model.layers[1].self_attn.q_proj.weight
    with torch.no_grad():
        expected = param * 2
        param.mul_(2)
    assert torch.equal(param + 0, expected)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        param.mul_(2)
    saved = {name: value + 0 for name, value in tuned.state_dict().items()}
    backward(tuned, batches(1)[0])
    optimizer = lowmem.optim.AdamW(tuned, lr=1e-2)
    optimizer.step()
    assert not torch.equal(param + 0, expected)
    tuned.load_state_dict(saved)
    assert torch.equal(param + 0, expected)


@pytest.mark.parametrize("method", ["GaLore", "AdaLomo"])
def test_other_optimizers_run_their_rules_on_weights_on_disk(folder: Path, tmp_path: Path, method: str) -> None:
    options = {"GaLore": {"rank": 4}, "AdaLomo": {}}[method]
    runs = []
    for model in (resident(folder), full(folder, "disk", tmp_path).train()):
        optimizer = getattr(lowmem.optim, method)(model, lr=1e-2, **options)
        for ids in batches(3):
            backward(model, ids, parts=2)
            backward(model, ids, parts=2)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(weights(model))
    for name, weight in runs[0].items():
        assert torch.equal(runs[1][name], weight), name


def test_a_frozen_block_on_disk_has_no_gradient_traffic(folder: Path, tmp_path: Path) -> None:
    model = full(folder, "disk", tmp_path).train()
    for param in model.model.layers[1].parameters():
        param.requires_grad_(False)
    backward(model, batches(1)[0])
    gradients = runtime_of(model).full.tier._gradients  # type: ignore[union-attr]
    assert {unit for unit, _ in gradients._slots} == {0, 2}
    plain = resident(folder)
    plain.model.layers[1].requires_grad_(False)
    backward(plain, batches(1)[0])
    for name, param in plain.named_parameters():
        found = model.get_parameter(name).grad
        assert (found is None) == (param.grad is None), name
        if param.grad is not None:
            assert torch.equal(found.clone(), param.grad), name
    runtime_of(model).close()


def test_a_block_is_recomputed_while_the_gradient_before_it_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = full(folder, "disk", tmp_path).train()
    gradients = runtime_of(model).full.tier._gradients  # type: ignore[union-attr]
    settled: list[bool] = []
    real = gradients._settle_buffer
    monkeypatch.setattr(gradients, "_settle_buffer", lambda: (settled.append(True), real())[1])
    place = gradients._layouts[0].places[0]
    with gradients.accumulating(0, adds=False, stays=False) as take:
        assert not settled
        take(Contribution(place=place, value=torch.ones(place.shape), earlier_scales=None))
        assert settled
    runtime_of(model).close()
