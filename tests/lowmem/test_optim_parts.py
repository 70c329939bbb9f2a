"""The pieces of the optimizers by themselves: 8-bit moments, rounding, bases, limiters, schedules, the seam."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import StateDict

from lowmem import optim
from lowmem.optim.basis import gradient_basis
from lowmem.optim.optimizer import RuleOptimizer, give_to_engine
from lowmem.optim.projected import active_blocks, limit_norm_growth, limit_update_rms, norm_ratio
from lowmem.optim.rule import Hyper, mix
from lowmem.optim.state import decode, encode, new_moment, random_bits, read_moment, round_to_bf16, write_moment
from tests.lowmem.tiny_optim import backward, tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_values", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("signed", [True, False])
def test_8_bit_codes_give_values_back_to_their_spacing(num_values: int, signed: bool) -> None:
    values = torch.randn(num_values) if signed else torch.randn(num_values).square()
    codes, scales = encode(values, signed=signed)
    assert codes.dtype == (torch.int8 if signed else torch.uint8)
    assert (codes.shape, scales.shape) == ((num_values,), (math.ceil(num_values / 256),))
    back = decode(codes, scales)
    # Half a level in the square root of a first moment, in the fourth root of a second one.
    root, levels = (2, 127) if signed else (4, 255)
    largest = scales.repeat_interleave(256)[:num_values]
    error = (back.abs() / largest) ** (1 / root) - (values.abs() / largest) ** (1 / root)
    assert error.abs().max() <= 0.5 / levels + 1e-5
    assert torch.equal(back.sign(), torch.where(codes == 0, 0.0, values.sign()))
    recoded, rescales = encode(back, signed=signed)
    assert torch.equal(recoded, codes)
    torch.testing.assert_close(rescales, scales)


def test_8_bit_second_moments_are_zero_only_where_they_are() -> None:
    values = torch.tensor([1.0, 1e-30, 0.0])
    back = decode(*encode(values, signed=False))
    assert back[1] > 0
    assert back[2] == 0
    assert torch.equal(decode(*encode(torch.zeros(300), signed=True)), torch.zeros(300))


@pytest.mark.parametrize(("state_dtype", "bound"), [("8bit", 0.13), ("bf16", 0.13)])
def test_small_moments_follow_fp32_adam(state_dtype: str, bound: float) -> None:
    """Gradients over two decades that shrink to a third half way: what rounding to nearest in bf16 cannot follow."""
    num_values, num_steps = 64 * 256, 600
    sizes = 10 ** (2 * torch.rand(num_values) - 1)
    state = new_moment("exp_avg", (num_values,), state_dtype=state_dtype, signed=True, device=CPU)
    state |= new_moment("exp_avg_sq", (num_values,), state_dtype=state_dtype, signed=False, device=CPU)
    exact, moments = [torch.zeros(num_values), torch.zeros(num_values)], [torch.zeros(0), torch.zeros(0)]
    for step in range(num_steps):
        gradient = (torch.randn(num_values) + 0.3) * sizes * (1.0 if step < num_steps // 2 else 0.3)
        for index, (name, power, beta) in enumerate((("exp_avg", 1, 0.9), ("exp_avg_sq", 2, 0.99))):
            exact[index].lerp_(gradient**power, 1 - beta)
            moments[index] = read_moment(state, name, (num_values,)).lerp_(gradient**power, 1 - beta)
            write_moment(state, name, moments[index], seed=step)
    expected, got = exact[0] / exact[1].sqrt(), moments[0] / moments[1].sqrt()
    assert ((got - expected).norm() / expected.norm()).item() < bound


def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average() -> None:
    value = torch.full((100_000,), 1.0 + 2**-9)  # a quarter of the way between two bf16 numbers
    rounded = round_to_bf16(value, seed=1).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert (rounded - 1).mean().item() == pytest.approx(2**-9, rel=0.03)
    exact = torch.tensor([0.0, -1.5, torch.inf, -torch.inf, 2.0**-130])
    assert torch.equal(round_to_bf16(exact, seed=1).float(), exact)
    assert round_to_bf16(torch.tensor([torch.nan]), seed=1).isnan().all()


def test_values_are_rounded_alike_in_whatever_pieces() -> None:
    values = torch.randn(5000)
    whole = round_to_bf16(values, seed=7)
    cuts = (0, 2, 256, 1024, 4998, 5000)
    pieces = [round_to_bf16(values[start:stop], seed=7, first=start) for start, stop in pairwise(cuts)]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(round_to_bf16(values[:4999], seed=7), whole[:4999])
    assert not torch.equal(round_to_bf16(values, seed=8), whole)


def test_random_bits_of_rounding_are_even_and_of_seeds_and_positions_unrelated() -> None:
    num_values = 1 << 16
    seeds = [*range(8), *(1 << power for power in range(8, 16)), *(mix(number) for number in range(8))]
    bits = torch.stack([random_bits(num_values, seed=seed, first=0, device=CPU) for seed in seeds]).double()
    even = bits / (1 << 16) + 2**-17
    assert (even.min(), even.max()) > (0, 0.99)
    assert even.mean(dim=1).sub(0.5).abs().max() < 6 * (1 / 12 / num_values) ** 0.5
    # Chi square of 256 equal parts: 255 on average, with a deviation of about 23.
    counts = torch.stack([torch.histc(row, 256, 0, 1) for row in even])
    chi = ((counts - num_values / 256) ** 2 / (num_values / 256)).sum(dim=1)
    assert chi.max() < 255 + 6 * 23
    assert chi.min() > 255 - 6 * 23
    # Of two seeds, of neighbours, and of the halves of a word and of words.
    normed = (even - even.mean(dim=1, keepdim=True)) / even.std(dim=1, keepdim=True)
    between = normed @ normed.T / num_values
    assert between.fill_diagonal_(0).abs().max() < 6 * num_values**-0.5
    for distance in (1, 2, 3, 16, 256, 4096, 1 << 15):
        beside = (normed * normed.roll(distance, dims=1)).mean(dim=1)
        assert beside.abs().max() < 6 * num_values**-0.5


@pytest.mark.parametrize(
    ("writer", "is_kept"), [("nearest", False), ("stochastic", True), ("kahan", True), ("fp32", True)]
)
def test_small_updates_of_bf16_weights_are_not_lost(writer: str, is_kept: bool) -> None:
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = optim.AdamW([weight], lr=1e-5, weight_decay=0.0, state_dtype="fp32", writer=writer)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    exact = optimizer.state[weight].get("master", weight.detach().float())
    if writer == "kahan":
        exact = exact + optimizer.state[weight]["compensation"].float()
    moved = (1 - exact).mean().item()
    assert moved == (pytest.approx(1e-3, rel=0.15) if is_kept else 0.0)


@pytest.mark.parametrize("kind", ["svd", "rsvd", "warm"])
def test_bases_are_orthonormal_and_capture_the_gradient(kind: str) -> None:
    source = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(2, 40, 40, generator=source)).Q
    right = torch.linalg.qr(torch.randn(2, 60, 60, generator=source)).Q
    gradient = left @ torch.diag_embed(0.7 ** torch.arange(40.0)).expand(2, 40, 40) @ right[:, :40]
    matrix = gradient_basis(kind, gradient, 8, old=None, seed=1)  # type: ignore[arg-type]
    torch.testing.assert_close(matrix.mT @ matrix, torch.eye(8).expand(2, 8, 8), atol=1e-5, rtol=0)
    best = torch.linalg.svdvals(gradient)[:, :8].square().sum().sqrt()
    assert (matrix.mT @ gradient).norm() > 0.99 * best
    again = gradient_basis(kind, gradient, 8, old=matrix, seed=2)  # type: ignore[arg-type]
    assert (again.mT @ gradient).norm() > 0.999 * best


def test_norm_growth_is_limited_from_the_second_update_on() -> None:
    last = torch.zeros(1, 1)
    one = limit_norm_growth(torch.full((2, 2), 3.0), last, 1.01)
    assert torch.equal(one, torch.full((2, 2), 3.0))
    assert limit_norm_growth(torch.full((2, 2), 9.0), last, 1.01).norm().item() == pytest.approx(6 * 1.01)
    assert last.item() == pytest.approx(6 * 1.01)
    assert limit_norm_growth(torch.zeros(2, 2), last, 1.01).norm() == 0
    assert limit_norm_growth(torch.full((2, 2), 9.0), last, 1.01).norm() == 18  # after nothing, anything


def test_limits_and_ratios_of_stacks_are_each_matrix_own() -> None:
    stack = torch.stack([torch.full((2, 3), 4.0), torch.full((2, 3), 0.5)])
    limited = limit_update_rms(stack.clone(), 2.0)
    torch.testing.assert_close(limited, torch.stack([torch.full((2, 3), 2.0), torch.full((2, 3), 0.5)]))
    ratio = norm_ratio(stack, torch.stack([stack[0], torch.zeros(2, 3)]), per="tensor")
    torch.testing.assert_close(ratio.flatten(), torch.tensor([1.0, 0.0]))


def test_block_schedules() -> None:
    def windows(order: str, num: int, count: int = 1, seed: int = 0) -> list[list[int]]:
        chosen = (active_blocks(order, window=w, num_blocks=5, count=count, seed=seed) for w in range(num))  # type: ignore[arg-type]
        return [sorted(blocks) for blocks in chosen]

    assert windows("ascending", 6) == [[0], [1], [2], [3], [4], [0]]
    assert windows("descending", 3, 2) == [[3, 4], [1, 2], [0, 4]]
    assert windows("fixed", 2, 2) == [[0, 1], [0, 1]]
    rounds = windows("random", 15)
    for start in (0, 5, 10):
        assert sorted(rounds[start : start + 5]) == [[0], [1], [2], [3], [4]]
    assert len({str(rounds[start : start + 5]) for start in (0, 5, 10)}) > 1
    assert windows("random", 15) == rounds != windows("random", 15, seed=1)
    samples = windows("sample", 20, 2)
    assert {len(blocks) for blocks in samples} == {2}
    assert {block for blocks in samples for block in blocks} == set(range(5))
    assert windows("ascending", 1, 9) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector": "qr"}, "projector='qr'"),
        ({"projector": "svd", "rank": 0}, "rank=0"),
        ({"projector": "columns", "density": 0.0}, r"density=0\.0"),
        ({"projector": "svd", "update_gap": 0}, "update_gap=0"),
        ({"projector": "svd", "limit": 0}, "limit=0"),
        ({"projector": "svd", "active_blocks": 2}, "active_blocks=2"),
        ({"projector": "svd", "residual": "sign", "scale_gradient": "channel"}, "residual must be 'none'"),
        ({"projector": "block", "at_refresh": "rotate"}, "blocks have no basis"),
        ({"projector": "block", "residual": "fira"}, "no basis to scale"),
        ({"projector": "block", "inner": "adafactor"}, "norms included"),
        ({"projector": "svd", "inner": "adafactor", "at_refresh": "rotate"}, "cannot be rotated"),
        ({"projector": "svd", "inner": "sgd", "state_dtype": "bf16"}, "is for inner='adamw'"),
    ],
)
def test_methods_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.Method(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (optim.GaLore, {"projector": "columns"}, "projector='columns': expected one of svd"),
        (optim.FRUGAL, {"inactive_update_rule": "same"}, "inactive_update_rule='same'"),
        (optim.APOLLO, {"proj": "qr"}, "proj='qr'"),
        (optim.APOLLO, {"scale_type": "row"}, "scale_type='row'"),
        (optim.AdamW, {"state_dtype": "fp8"}, "state_dtype='fp8'"),
        (optim.AdamW, {"writer": "ceil"}, "writer='ceil'"),
        (optim.AdamW, {"betas": (0.9, 1.0)}, "betas="),
        (optim.AdamW, {"eps": -1.0}, "eps="),
        (optim.AdaLomo, {"decay_rate": 0.8}, r"decay_rate=0\.8"),
    ],
)
def test_presets_refuse_values_that_they_do_not_have(
    make: type[RuleOptimizer], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(tiny_model(), lr=1e-3, **options)  # type: ignore[call-arg, arg-type]


def test_seeds_differ_in_every_argument() -> None:
    seeds = {mix(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)


class Recorder:
    """An engine that runs the rules one step late, as a deferred update does."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.pending: list[tuple[Tensor, Tensor, Hyper]] = []
        self.states: dict[int, dict[str, Tensor]] = {}

    def adopt(self, optimizer: RuleOptimizer) -> None:
        self.calls.append(f"adopt {optimizer.method_name}")

    def step(self, optimizer: RuleOptimizer) -> None:
        self.complete(optimizer)
        for group in optimizer.param_groups:
            for param in group["params"]:
                if hasattr(param, "lowmem_engine"):
                    self.pending.append((param, param.grad.clone(), optimizer.hyper(group)))

    def complete(self, optimizer: RuleOptimizer) -> None:
        for param, gradient, hyper in self.pending:
            rule = optimizer.rule_of(param)
            state = self.states.setdefault(id(param), rule.init(param))
            with torch.no_grad():
                rule.update(param, gradient, state, hyper)
        self.pending.clear()

    def save(self, state_dict: StateDict) -> StateDict:
        return {**state_dict, "recorder": len(self.states)}

    def load(self, state_dict: StateDict) -> None:
        self.calls.append(f"load {state_dict['recorder']}")


def test_an_engine_may_apply_updates_later_with_the_same_result() -> None:
    plain, offloaded = tiny_model(), tiny_model()
    engine = Recorder()
    for param in offloaded.layers.parameters():
        give_to_engine(param, engine)
    one = optim.GaLore(plain, lr=1e-2, rank=4, update_proj_gap=2)
    other = optim.GaLore(offloaded, lr=1e-2, rank=4, update_proj_gap=2)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(made, 0.5) for made in (one, other)]
    for step in range(5):
        for model, optimizer, schedule in zip((plain, offloaded), (one, other), schedules, strict=True):
            engine.complete(other)  # before the weights are used
            backward(model, step)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    engine.complete(other)
    for param, expected in zip(offloaded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(param, expected)
    state_dict = other.state_dict()
    assert len(state_dict["state"]) == 4  # embedding, head and the last norm
    other.load_state_dict(state_dict)
    assert engine.calls == ["adopt GaLore", f"load {len(engine.states)}"]
