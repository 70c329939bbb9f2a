"""Each optimizer equals its paper's equations, written out plainly here, over several steps and refreshes."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from lowmem import optim
from lowmem.optim.basis import choose_coordinates, gaussian_basis
from lowmem.optim.rule import mix

LR, WD, BETAS, EPS = 3e-2, 0.1, (0.8, 0.95), 1e-6
NUM_STEPS, GAP, RANK = 10, 4, 3
SHAPES = [(6, 10), (10, 6), (8, 8), (2, 6, 5)]
_CPU = torch.device("cpu")


def gradients(shape: tuple[int, ...], seed: int) -> list[Tensor]:
    """A few directions that persist, and noise; given in advance, so that rounding in one step does not grow."""
    source = torch.Generator().manual_seed(seed)
    *batch, m, n = shape
    signal = torch.randn(*batch, m, 4, generator=source) @ torch.randn(*batch, 4, n, generator=source)
    return [signal + 0.5 * torch.randn(shape, generator=source) for _ in range(NUM_STEPS)]


def run(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Train one parameter of each shape with given gradients; initial weights are ones of `weights()`."""
    params = [nn.Parameter(weight) for weight in weights()]
    optimizer = make(params)
    streams = [gradients(shape, seed) for seed, shape in enumerate(SHAPES)]
    for step in range(NUM_STEPS):
        for param, stream in zip(params, streams, strict=True):
            param.grad = stream[step].clone()
        optimizer.step()
    return [param.detach() for param in params], streams


def weights() -> list[Tensor]:
    source = torch.Generator().manual_seed(99)
    return [torch.randn(shape, generator=source) for shape in SHAPES]


class Adam:
    """Adam's direction, kept plain."""

    def __init__(self) -> None:
        self.m: Tensor | float = 0.0
        self.v: Tensor | float = 0.0
        self.t = 0

    def __call__(self, r: Tensor) -> Tensor:
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * r
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * r**2
        return (self.m / (1 - BETAS[0] ** self.t)) / ((self.v / (1 - BETAS[1] ** self.t)).sqrt() + EPS)


def refreshes(index: int) -> Iterator[tuple[int, bool]]:
    """Steps, and whether a new basis is due: at the first, then every GAP steps, early by the parameter's share."""
    offset = index * GAP // len(SHAPES)
    return ((step, step == 0 or (step + offset) % GAP == 0) for step in range(NUM_STEPS))


def svd(g: Tensor, _: Tensor | None) -> Tensor:
    return torch.linalg.svd(g, full_matrices=False).U[:, :RANK]


def warm(g: Tensor, last: Tensor | None) -> Tensor:
    assert last is not None
    return torch.linalg.qr(g @ g.T @ last).Q


def expected(plain: Callable[[Tensor, list[Tensor], int], Tensor]) -> Callable[[Tensor, list[Tensor], int], Tensor]:
    """The plain method for matrices with m <= n, on any matrix and on each expert of a stack."""

    def on_any(weight: Tensor, stream: list[Tensor], index: int) -> Tensor:
        if weight.ndim == 3:
            experts = [on_any(weight[e], [g[e] for g in stream], index) for e in range(len(weight))]
            return torch.stack(experts)
        if weight.shape[0] > weight.shape[1]:
            return on_any(weight.T, [g.T for g in stream], index).T
        return plain(weight, stream, index)

    return on_any


def check(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], plain: Callable[..., Tensor]) -> None:
    got, streams = run(make)
    for index, (weight, stream) in enumerate(zip(weights(), streams, strict=True)):
        torch.testing.assert_close(got[index], plain(weight, stream, index), rtol=1e-4, atol=2e-5)


def common(**options: object) -> dict[str, object]:
    return {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WD, "seed": 5, **options}


@pytest.mark.parametrize("at_refresh", ["keep", "reset", "rotate"])
def test_galore_equals_its_equation(at_refresh: str) -> None:
    def plain(w: Tensor, stream: list[Tensor], index: int) -> Tensor:
        adam, p = Adam(), None
        for step, is_due in refreshes(index):
            g = stream[step]
            if is_due:
                last, p = p, svd(g, p)
                if last is not None and at_refresh == "reset":
                    adam = Adam()
                if last is not None and at_refresh == "rotate":
                    c = p.T @ last
                    adam.m, adam.v = c @ adam.m, c**2 @ adam.v
            assert p is not None
            w = w - LR * WD * w - LR * 0.25 * p @ adam(p.T @ g)
        return w

    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        options = common(rank=RANK, update_proj_gap=GAP, scale=0.25, projector="svd", at_refresh=at_refresh)
        return optim.GaLore(params, **options)  # type: ignore[arg-type]

    check(make, expected(plain))


def test_galore_refines_a_warm_basis_by_one_power_iteration() -> None:
    weight, stream = weights()[0], gradients(SHAPES[0], 0)
    param = nn.Parameter(weight.clone())
    options = common(rank=RANK, update_proj_gap=GAP, scale=0.5, projector="warm")
    optimizer = optim.GaLore([param], **options)  # type: ignore[arg-type]
    adam, p = Adam(), None
    for step in range(NUM_STEPS):
        g = stream[step]
        param.grad = g.clone()
        optimizer.step()
        if step == 0:
            p = optimizer.state[param]["basis"].clone()
            torch.testing.assert_close(p.T @ p, torch.eye(RANK), atol=1e-5, rtol=0)
            assert (p.T @ g).norm() > 0.95 * (svd(g, None).T @ g).norm()
        elif step % GAP == 0:
            p = warm(g, p)
        assert p is not None
        weight = weight - LR * WD * weight - LR * 0.5 * p @ adam(p.T @ g)
    torch.testing.assert_close(param.detach(), weight, rtol=1e-4, atol=2e-5)


def test_fira_equals_its_equation() -> None:
    def plain(w: Tensor, stream: list[Tensor], index: int) -> Tensor:
        adam, p, last_norm = Adam(), None, None
        for step, is_due in refreshes(index):
            g = stream[step]
            p = svd(g, p) if is_due else p
            assert p is not None
            r = p.T @ g
            n = adam(r)
            s = (g - p @ r) * (n.norm(dim=0) / r.norm(dim=0))
            if last_norm is not None and s.norm() / last_norm > 1.01:
                s = s / s.norm() * 1.01 * last_norm
            last_norm = s.norm()
            w = w - LR * WD * w - LR * 0.3 * (p @ n + s)
        return w

    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return optim.Fira(params, **common(rank=RANK, update_proj_gap=GAP, alpha=0.3, projector="svd"))  # type: ignore[arg-type]

    check(make, expected(plain))


@pytest.mark.parametrize(("projector", "side"), [("columns", 1), ("rows", 0)])
def test_frugal_equals_its_equation(projector: str, side: int) -> None:
    def plain(w: Tensor, stream: list[Tensor], index: int) -> Tensor:
        if w.ndim == 3:
            return torch.stack([plain(w[e], [g[e] for g in stream], index) for e in range(len(w))])
        adam, number = Adam(), -1
        count = max(1, round(0.25 * w.shape[side]))
        for step, is_due in refreshes(index):
            if is_due:
                number += 1
                seed = mix(mix(5, index), number)
                chosen = choose_coordinates(w.shape[side], count, seed=seed, device=_CPU).indices.tolist()
                adam = Adam()
            g = stream[step]
            part = g[:, chosen] if side else g[chosen]
            u = 0.1 * g.sign()
            if side:
                u[:, chosen] = 0.7 * adam(part)
            else:
                u[chosen] = 0.7 * adam(part)
            w = w - LR * WD * w - LR * u
        return w

    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        options = common(density=0.25, update_gap=GAP, projector=projector, inactive_lr_scale=0.1)
        return optim.FRUGAL(params, proj_params_lr_scale=0.7, **options)  # type: ignore[arg-type]

    check(make, plain)


def test_frugal_by_blocks_takes_adam_in_the_chosen_block_and_signs_elsewhere() -> None:
    names = [f"layers.{block}.w" for block in range(4)]
    params = [nn.Parameter(torch.randn(4, 4)) for _ in names]
    plain_weights = [param.detach().clone() for param in params]
    optimizer = optim.FRUGAL(
        list(zip(names, params, strict=True)),
        projector="block",
        block_order="ascending",
        density=0.25,
        update_gap=3,
        lr=LR,
        betas=BETAS,
        eps=EPS,
        inactive_lr_scale=0.5,
    )
    adam = Adam()
    for step in range(9):
        adam = Adam() if step % 3 == 0 else adam
        for block, param in enumerate(params):
            g = torch.randn(4, 4)
            param.grad = g.clone()
            update = adam(g) if block == step // 3 else 0.5 * g.sign()
            plain_weights[block] = plain_weights[block] - LR * update
        optimizer.step()
    for param, weight in zip(params, plain_weights, strict=True):
        torch.testing.assert_close(param.detach(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_apollo_equals_its_equation(scale_type: str) -> None:
    rank, scale = (RANK, 1.5) if scale_type == "channel" else (1, 128.0)

    def on_matrix(w: Tensor, stream: list[Tensor], bases: list[Tensor], index: int) -> Tensor:
        adam, last_norm, number = Adam(), None, -1
        for step, is_due in refreshes(index):
            number += is_due
            p, g = bases[number], stream[step]
            r = p.T @ g
            n = adam(r)
            u = g * (n.norm(dim=0) / r.norm(dim=0) if scale_type == "channel" else n.norm() / r.norm())
            if last_norm is not None and u.norm() / last_norm > 1.01:
                u = u / u.norm() * 1.01 * last_norm
            last_norm = u.norm()
            w = w - LR * WD * w - LR * scale**0.5 * u
        return w

    def plain(w: Tensor, stream: list[Tensor], index: int) -> Tensor:
        if w.shape[-2] > w.shape[-1]:
            return plain(w.mT, [g.mT for g in stream], index).mT
        shape = (*w.shape[:-1], rank)
        bases = [gaussian_basis(shape, seed=mix(mix(5, index), number), device=_CPU) for number in range(4)]
        if w.ndim == 2:
            return on_matrix(w, stream, bases, index)
        return torch.stack(
            [on_matrix(w[e], [g[e] for g in stream], [b[e] for b in bases], index) for e in range(len(w))]
        )

    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        if scale_type == "tensor":
            return optim.APOLLOMini(params, **common(update_proj_gap=GAP))  # type: ignore[arg-type]
        return optim.APOLLO(params, **common(rank=RANK, update_proj_gap=GAP, scale=scale))  # type: ignore[arg-type]

    check(make, plain)


def test_adalomo_equals_its_equation() -> None:
    def plain(w: Tensor, stream: list[Tensor], _: int) -> Tensor:
        if w.ndim == 3:
            return torch.stack([plain(w[e], [g[e] for g in stream], 0) for e in range(len(w))])
        rows, columns = torch.zeros(w.shape[0]), torch.zeros(w.shape[1])
        for step in range(NUM_STEPS):
            g = stream[step]
            beta = 1 - (step + 1) ** -0.8
            rows = beta * rows + (1 - beta) * (g**2).mean(1)
            columns = beta * columns + (1 - beta) * (g**2).mean(0)
            u = g / (torch.outer(rows, columns) / rows.mean()).sqrt()
            u = u / max(1.0, u.square().mean().sqrt().item())
            w_rms = max(1e-3, w.square().mean().sqrt().item())
            w = w - LR * WD * w - LR * w_rms * u
        return w

    check(lambda params: optim.AdaLomo(params, lr=LR, weight_decay=WD), plain)


@pytest.mark.parametrize("writer", ["fp32", "nearest"])
def test_badam_trains_one_block_at_a_time_from_zero_moments(writer: str) -> None:
    names = [f"model.layers.{block}.{part}" for block in range(3) for part in ("w", "b")]
    params = [nn.Parameter(torch.randn(4, 4)) for _ in names]
    plain_weights = [param.detach().clone() for param in params]
    optimizer = optim.BAdam(
        list(zip(names, params, strict=True)),
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=WD,
        switch_block_every=3,
        switch_mode="descending",
        writer=writer,  # type: ignore[arg-type]
    )
    adams: dict[int, Adam] = {}
    for step in range(11):
        block = (2, 1, 0, 2)[step // 3]
        assert [param.requires_grad for param in params] == [index // 2 == block for index in range(6)]
        if step % 3 == 0:
            adams = {index: Adam() for index in (2 * block, 2 * block + 1)}
        for index, adam in adams.items():
            g = torch.randn(4, 4)
            params[index].grad = g.clone()
            plain_weights[index] = plain_weights[index] - LR * WD * plain_weights[index] - LR * adam(g)
        optimizer.step()
    for param, weight in zip(params, plain_weights, strict=True):
        torch.testing.assert_close(param.detach(), weight, rtol=1e-5, atol=1e-6)
    assert {index for index, param in enumerate(params) if optimizer.state[param]} == {4, 5}


def test_lisa_trains_some_blocks_and_everything_outside_them() -> None:
    names = ["embed.w", *[f"layers.{block}.w" for block in range(4)], "head.w"]
    params = [nn.Parameter(torch.randn(4, 4)) for _ in names]
    plain_weights = [param.detach().clone() for param in params]
    optimizer = optim.LISA(
        list(zip(names, params, strict=True)), lr=LR, betas=BETAS, eps=EPS, activated_layers=2, interval_steps=3
    )
    adams = {index: Adam() for index in range(6)}
    drawn = set()
    for step in range(12):
        active = [index for index, param in enumerate(params) if param.requires_grad]
        assert {0, 5} < set(active)
        assert len(active) == 4
        drawn.add(tuple(active))
        if step % 3 == 0:
            adams |= {index: Adam() for index in range(1, 5)}
        for index in active:
            g = torch.randn(4, 4)
            params[index].grad = g.clone()
            plain_weights[index] = plain_weights[index] - LR * adams[index](g)
        optimizer.step()
    assert len(drawn) > 1
    for param, weight in zip(params, plain_weights, strict=True):
        torch.testing.assert_close(param.detach(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_bitwise_torch(dtype: torch.dtype, fused: bool) -> None:
    shapes = [(33, 7), (5,), (4, 3, 9)]
    ours = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    theirs = [nn.Parameter(param.detach().clone()) for param in ours]

    def groups(params: list[nn.Parameter]) -> list[dict[str, object]]:
        return [{"params": params[:1], "weight_decay": WD}, {"params": params[1:], "weight_decay": 0.0, "lr": 1e-3}]

    options = {"lr": LR, "betas": BETAS, "eps": EPS}
    mine = optim.AdamW(groups(ours), fused=fused, **options)  # type: ignore[arg-type]
    torchs = torch.optim.AdamW(groups(theirs), fused=fused, foreach=False, **options)  # type: ignore[arg-type]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(made, 0.9) for made in (mine, torchs)]
    for _ in range(6):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape).to(dtype)
            other.grad = one.grad.clone()
        for made, schedule in zip((mine, torchs), schedules, strict=True):
            made.step()
            schedule.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(mine.state[one]["exp_avg_sq"], torchs.state[other]["exp_avg_sq"])


@pytest.mark.parametrize(("inner", "limiter"), [("sgd", "none"), ("adafactor", "update_rms")])
def test_other_inner_optimizers_equal_their_equations(inner: str, limiter: str) -> None:
    def plain(w: Tensor, stream: list[Tensor], index: int) -> Tensor:
        p, m, rows, columns = None, torch.zeros(()), torch.zeros(()), torch.zeros(())
        for step, is_due in refreshes(index):
            g = stream[step]
            p = svd(g, p) if is_due else p
            assert p is not None
            r = p.T @ g
            if inner == "sgd":
                m = BETAS[0] * m + r
                u = p @ m + 0.5 * (g - p @ r)
            else:
                m = BETAS[0] * m + (1 - BETAS[0]) * r
                rows = BETAS[1] * rows + (1 - BETAS[1]) * r.square().mean(1)
                columns = BETAS[1] * columns + (1 - BETAS[1]) * r.square().mean(0)
                v = torch.outer(rows, columns) / rows.mean() / (1 - BETAS[1] ** (step + 1))
                u = p @ (m / (1 - BETAS[0] ** (step + 1)) / (v.sqrt() + EPS)) + 0.5 * (g - p @ r)
                u = u / max(1.0, u.square().mean().sqrt().item() / 0.3)
            w = w - LR * WD * w - LR * u
        return w

    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        method = optim.Method(
            projector="svd",
            rank=RANK,
            update_gap=GAP,
            inner=inner,  # type: ignore[arg-type]
            residual="sgd",
            residual_scale=0.5,
            limiter=limiter,  # type: ignore[arg-type]
            limit=0.3,
        )
        return optim.Projected(params, method=method, **common())  # type: ignore[arg-type]

    check(make, expected(plain))
