"""What every optimizer of the family promises, checked over all of them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lowmem import UnsupportedError, optim
from lowmem.optim.optimizer import RuleOptimizer
from tests.lowmem.tiny_optim import METHODS, TinyModel, backward, tiny_model, train

EVERY = pytest.mark.parametrize("name", METHODS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def saved_and_loaded(state_dict: object) -> dict[str, object]:
    """Through a file and torch's restricted loader, as Trainer does it."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(one: TinyModel, other: TinyModel) -> None:
    for (name, weight), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, expected), name


def first_step(name: str, **options: object) -> tuple[dict[str, Tensor], dict[str, Tensor], RuleOptimizer]:
    """Weights before and after the first step, and the optimizer."""
    model = tiny_model()
    optimizer = METHODS[name](model, **options)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    train(model, optimizer, range(1))
    return before, {key: value.detach() for key, value in model.named_parameters()}, optimizer


@EVERY
@DTYPES
def test_resumes_bit_by_bit(name: str, dtype: torch.dtype) -> None:
    whole = tiny_model(dtype)
    train(whole, METHODS[name](whole, lr=1e-2), range(8))

    first = tiny_model(dtype)
    optimizer = METHODS[name](first, lr=1e-2)
    train(first, optimizer, range(4))
    weights, state = saved_and_loaded(first.state_dict()), saved_and_loaded(optimizer.state_dict())

    second = tiny_model(dtype)
    second.load_state_dict(weights)
    resumed = METHODS[name](second, lr=0.5)  # overwritten by the saved one
    resumed.load_state_dict(state)
    train(second, resumed, range(4, 8))
    assert_same(second, whole)
    assert {param.dtype for param in second.parameters()} == {dtype}


@pytest.mark.gpu
@EVERY
def test_resumes_bit_by_bit_on_a_gpu_with_counters_on_the_cpu(name: str) -> None:
    whole, first, second = (tiny_model().cuda() for _ in range(3))
    train(whole, METHODS[name](whole, lr=1e-2), range(8))
    optimizer = METHODS[name](first, lr=1e-2)
    train(first, optimizer, range(4))
    second.load_state_dict(first.state_dict())
    resumed = METHODS[name](second, lr=1e-2)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for state in resumed.state.values():
        assert all(value.is_cuda == (value.ndim > 0) for value in state.values())
    train(second, resumed, range(4, 8))
    assert_same(second, whole)


@pytest.mark.slow
@EVERY
def test_learns(name: str) -> None:
    model = tiny_model()
    lr = {"AdaLomo": 0.05, "BAdam": 3e-2, "BAdam, all": 3e-2}.get(name, 1e-2)
    losses = train(model, METHODS[name](model, lr=lr), range(40))
    assert sum(losses[-4:]) / 4 < 0.8 * losses[0]


@EVERY
def test_reads_the_learning_rate_at_every_step(name: str) -> None:
    scheduled, by_hand = tiny_model(), tiny_model()
    one, other = METHODS[name](scheduled, lr=1e-2), METHODS[name](by_hand, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(one, lambda step: (1.0, 0.5, 0.0, 0.25)[step])
    for step, factor in enumerate((1.0, 0.5, 0.0)):
        for group in other.param_groups:
            group["lr"] = 1e-2 * factor
        before = [param.detach().clone() for param in scheduled.parameters()]
        for model, optimizer in ((scheduled, one), (by_hand, other)):
            train(model, optimizer, range(step, step + 1))
        schedule.step()
        is_still = all(torch.equal(a, b) for a, b in zip(before, scheduled.parameters(), strict=True))
        assert is_still == (factor == 0)
    assert_same(scheduled, by_hand)


@EVERY
def test_decays_weights_apart_from_norms_and_biases(name: str) -> None:
    before, plain, _ = first_step(name, lr=0.1, weight_decay=0.0)
    _, decayed, optimizer = first_step(name, lr=0.1, weight_decay=0.5)
    names = {id(param): key for group in optimizer.param_groups for key, param in named(group)}
    assert names
    num_decayed = 0
    for key, weight in before.items():
        moved = not torch.equal(weight, plain[key])
        decays = weight.ndim >= 2 and moved
        num_decayed += decays
        expected = plain[key] - (0.1 * 0.5 * weight if decays else 0)
        torch.testing.assert_close(decayed[key], expected, rtol=1e-5, atol=1e-6)
    assert num_decayed > 0


def named(group: dict[str, list[Tensor]]) -> list[tuple[str, Tensor]]:
    return list(zip(group["param_names"], group["params"], strict=True))  # type: ignore[arg-type]


@EVERY
@pytest.mark.parametrize("betas", [(0.5, 0.999), (0.9, 0.9)])
def test_uses_both_betas(name: str, betas: tuple[float, float]) -> None:
    models = [tiny_model(), tiny_model()]
    if name == "AdaLomo":
        with pytest.raises(TypeError, match="betas"):
            METHODS[name](models[0], lr=1e-2, betas=betas)
        return
    for model, chosen in zip(models, ((0.9, 0.999), betas), strict=True):
        train(model, METHODS[name](model, lr=1e-2, betas=chosen), range(2))
    is_sgd = name == "rows, sgd" and betas[1] == 0.9
    key = "layers.{}.up.weight"
    pairs = [[dict(model.named_parameters())[key.format(block)] for model in models] for block in range(3)]
    # sgd has no second moment.
    assert all(torch.allclose(*pair, rtol=1e-5, atol=1e-6) for pair in pairs) == is_sgd


@EVERY
@DTYPES
def test_state_takes_the_bytes_that_were_promised(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(dtype)
    optimizer = METHODS[name](model, lr=1e-2)
    train(model, optimizer, range(4))
    num_with_state = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            rule = optimizer.rule_of(param)
            has_moments = not state or "window" not in state or "exp_avg" in state
            if state and has_moments:
                num_with_state += 1
                real = sum(value.nbytes for value in state.values())
                promised = rule.init(torch.empty(param.shape, dtype=param.dtype, device="meta"))
                assert sum(value.nbytes for value in promised.values()) == real
                assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())
    assert num_with_state > 0


def _nothing(gradient: Tensor) -> None:
    gradient.zero_()


def _no_row_and_no_column(gradient: Tensor) -> None:
    gradient[..., 0] = 0
    gradient[..., 0, :] = 0


def _an_idle_expert(gradient: Tensor) -> None:
    gradient[0] = 0


def _tiny(gradient: Tensor) -> None:
    gradient.mul_(1e-25)


@pytest.mark.parametrize("spoil", [_nothing, _no_row_and_no_column, _an_idle_expert, _tiny])
@DTYPES
@EVERY
def test_gradients_that_are_zero_in_part_leave_numbers(
    name: str, dtype: torch.dtype, spoil: Callable[[Tensor], None]
) -> None:
    """LoRA's A has none in the first step, an expert that no token chose has none in any."""
    model = tiny_model(dtype)
    optimizer = METHODS[name](model, lr=1e-2)
    for step in range(3):
        backward(model, step)
        for param in model.parameters():
            if param.grad is not None and param.ndim >= 2:
                spoil(param.grad)
        optimizer.step()
        optimizer.zero_grad()
    for key, weight in model.named_parameters():
        assert weight.isfinite().all(), key


def test_adalomo_is_exact_where_rows_and_columns_are_zero() -> None:
    """Against the paper's equation in fp64, in which nothing underflows."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 5))
    exact = weight.detach().double()
    optimizer = optim.AdaLomo([weight], lr=1e-2)
    rows, columns = torch.zeros(6, 1, dtype=torch.float64), torch.zeros(1, 5, dtype=torch.float64)
    for step in range(1, 6):
        weight.grad = torch.randn(6, 5)
        if step < 4:
            _no_row_and_no_column(weight.grad)
        squares = weight.grad.double().square() + 1e-30
        rows = rows.lerp(squares.mean(1, keepdim=True), step**-0.8)
        columns = columns.lerp(squares.mean(0, keepdim=True), step**-0.8)
        towards = weight.grad.double() / (rows * columns / rows.mean()).sqrt()
        towards /= max(1.0, float(towards.square().mean().sqrt()))
        exact = exact - 1e-2 * exact.square().mean().sqrt().clamp_min(1e-3) * towards
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), exact, rtol=1e-5, atol=1e-6)


@EVERY
def test_clipped_and_accumulated_gradients_are_used_as_they_are(name: str) -> None:
    one, other = tiny_model(), tiny_model()
    first, second = METHODS[name](one, lr=1e-2), METHODS[name](other, lr=1e-2)
    backward(one, 0), backward(one, 1)
    norm = nn.utils.clip_grad_norm_(one.parameters(), 0.1)
    for param, source in zip(other.parameters(), one.parameters(), strict=True):
        param.grad = None if source.grad is None else source.grad.clone()
    assert norm > 0.1
    first.step()
    second.step()
    assert_same(one, other)
    third = tiny_model()
    optimizer = METHODS[name](third, lr=1e-2)
    backward(third, 0)
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), third.parameters(), strict=True))


@EVERY
def test_unknown_options_and_wrong_values_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match="momentum"):
        METHODS[name](tiny_model(), lr=1e-2, momentum=0.9)
    named = list(tiny_model().named_parameters())
    with pytest.raises(UnsupportedError, match="'rnak'"):
        METHODS[name]([{"params": named, "rnak": 4}], lr=1e-2)
    if name.startswith("Ada"):
        with pytest.raises(UnsupportedError, match="'project'"):
            METHODS[name]([{"params": named, "project": False}], lr=1e-2)
    with pytest.raises(ValueError, match="lr=-1"):
        METHODS[name](tiny_model(), lr=-1.0)
    with pytest.raises(ValueError, match=r"weight_decay=-0\.1"):
        METHODS[name](tiny_model(), lr=1e-2, weight_decay=-0.1)
    with pytest.raises(UnsupportedError, match="float16"):
        METHODS[name](tiny_model(torch.float16), lr=1e-2)


@EVERY
def test_state_of_another_optimizer_is_refused(name: str) -> None:
    model = tiny_model()
    optimizer = METHODS[name](model, lr=1e-2)
    train(model, optimizer, range(1))
    with pytest.raises(ValueError, match="saved by another optimizer"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    other = next(made for made in METHODS.values() if made(tiny_model()).method_name != optimizer.method_name)
    with pytest.raises(ValueError, match=f"this is {optimizer.method_name}"):
        optimizer.load_state_dict(other(tiny_model()).state_dict())


def test_state_of_other_shapes_is_refused() -> None:
    model = tiny_model()
    optimizer = optim.GaLore(model, rank=4)
    train(model, optimizer, range(1))
    state_dict = optimizer.state_dict()
    for state in state_dict["state"].values():
        state["exp_avg"] = state["exp_avg"][..., :1]
    with pytest.raises(ValueError, match=r"exp_avg.*expected"):
        optimizer.load_state_dict(state_dict)


def test_counters_keep_their_type_beside_bf16_weights() -> None:
    param = nn.Parameter(torch.zeros(4, 6, dtype=torch.bfloat16))
    optimizer = optim.GaLore([param], lr=1e-3, rank=2)
    param.grad = torch.randn(4, 6).bfloat16()
    optimizer.step()
    optimizer.state[param]["step"].fill_(257)
    loaded = optim.GaLore([param], lr=1e-3, rank=2)
    loaded.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert loaded.state[param]["step"].item() == 257
    assert loaded.state[param]["basis"].dtype == torch.float32


def test_embeddings_and_head_have_plain_adamw_unless_asked() -> None:
    for project, expected in ((False, {"step", "exp_avg", "exp_avg_sq"}), (True, {"step", "inner_step", "basis"})):
        model = tiny_model()
        optimizer = optim.GaLore(model, rank=4, project_embeddings=project)
        train(model, optimizer, range(1))
        for weight in (model.embed.weight, model.head.weight):
            assert expected <= set(optimizer.state[weight])
        assert "basis" in optimizer.state[model.layers[0].up.weight]
        assert set(optimizer.state[model.layers[0].up.bias]) == {"step", "exp_avg", "exp_avg_sq"}


def test_a_group_may_be_left_unprojected_or_have_its_own_rank() -> None:
    params = [nn.Parameter(torch.randn(6, 8)) for _ in range(3)]
    optimizer = optim.GaLore(
        [
            {"params": params[:1]},
            {"params": params[1:2], "rank": 2, "lr": 0.0},
            {"params": params[2:], "project": False},
        ],
        rank=4,
    )
    for param in params:
        param.grad = torch.randn(6, 8)
    before = params[1].detach().clone()
    optimizer.step()
    assert optimizer.state[params[0]]["basis"].shape == (6, 4)
    assert optimizer.state[params[1]]["basis"].shape == (6, 2)
    assert "basis" not in optimizer.state[params[2]]
    assert torch.equal(before, params[1])


def test_refreshes_are_spread_over_steps() -> None:
    model = tiny_model()
    optimizer = optim.GaLore(model, rank=4, update_proj_gap=6)
    due: list[int] = []
    for step in range(7):
        rules = [(optimizer.rule_of(p), optimizer.state[p]) for p in model.parameters() if optimizer.state[p]]
        due.append(sum(rule.refreshes(state) for rule, state in rules if "basis" in state))  # type: ignore[attr-defined]
        train(model, optimizer, range(step, step + 1))
    assert sum(due[1:]) == 9
    assert max(due[1:]) == 2


@pytest.mark.parametrize("make", [optim.BAdam, optim.LISA])
def test_methods_by_blocks_need_names(make: type[RuleOptimizer]) -> None:
    with pytest.raises(UnsupportedError, match="unnamed parameters"):
        make([nn.Parameter(torch.zeros(3, 3))], lr=1e-3)  # type: ignore[call-arg]


def test_badam_freezes_what_it_does_not_train() -> None:
    model = tiny_model()
    optimizer = optim.BAdam(model, lr=1e-2, switch_block_every=2)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    train(model, optimizer, range(6))
    changed = {name for name, value in model.named_parameters() if not torch.equal(before[name], value)}
    assert changed == {name for name in before if name.startswith("layers.")}
    assert sum(len(optimizer.state[param]) > 0 for param in model.parameters()) <= 7


def test_projections_of_more_than_stacks_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="shape \\(2, 3, 4, 5\\)"):
        optim.GaLore([nn.Parameter(torch.zeros(2, 3, 4, 5))])
    with pytest.raises(UnsupportedError, match="proj_type='full'"):
        optim.GaLore(tiny_model(), proj_type="full")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing would be optimized"):
        optim.GaLore(tiny_model().requires_grad_(False))


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(6, 4, sparse=True)
    optimizer = optim.AdamW(table)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedError, match="sparse"):
        optimizer.step()


def test_a_copy_of_an_optimizer_goes_on_as_the_original() -> None:
    model = tiny_model()
    optimizer = optim.GaLore(model, rank=4, update_proj_gap=3, lr=1e-2)
    train(model, optimizer, range(2))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for made, made_optimizer in ((model, optimizer), (twin, twin_optimizer)):
        train(made, made_optimizer, range(2, 5))
    assert_same(model, twin)
