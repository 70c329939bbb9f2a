"""The optimizers inside a projection: from R, and the moments of earlier ones, to the direction N.

Bounds on an update, and the norms they are made of; each matrix of a stack by itself.

One rule for all methods that keep their moments in a projection of the gradient: GaLore, Fira, FRUGAL, APOLLO.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.optim.basis import Basis, DenseBasis, choose_coordinates, gaussian_basis, gradient_basis
from lowmem.optim.method import BY_DENSITY, FROM_GRADIENT, BlockOrder, Method
from lowmem.optim.rule import Hyper, Place, Rule, State, counter, generator, mix
from lowmem.optim.state import (
    ROUNDING_COPIES,
    check_writable,
    descend,
    new_moment,
    new_writer_state,
    read_moment,
    read_weight,
    write_moment,
    write_weight,
)

# Matrices as large as the gradient, in fp32, that its decomposition holds at its largest.
_BASIS_COPIES = 2.4

# Keeps the factored second moment above zero (Adafactor's eps_1).
_SQUARE_FLOOR = 1e-30


def new_inner_state(inner: str, shape: Sequence[int], *, state_dtype: str, device: torch.device) -> State:
    """Zero moments for R of this shape."""
    if inner == "adamw8bit":
        state_dtype = "8bit"
    state = new_moment("exp_avg", shape, state_dtype=state_dtype, signed=True, device=device)
    if inner in ("adamw", "adamw8bit"):
        state |= new_moment("exp_avg_sq", shape, state_dtype=state_dtype, signed=False, device=device)
    elif inner == "adafactor":
        *batch, num_rows, num_columns = shape
        state["exp_avg_sq_row"] = torch.zeros((*batch, num_rows, 1), device=device)
        state["exp_avg_sq_col"] = torch.zeros((*batch, 1, num_columns), device=device)
    return state


def inner_direction(inner: str, low: Tensor, state: State, hyper: Hyper, *, step: int, seed: int) -> Tensor:
    """N = inner(R), a new tensor; advances the moments.

    Args:
        inner: adamw (also for 8 bits), adafactor with a first moment and bias-corrected betas[1], or sgd with
            momentum betas[0].
        low: R, fp32.
        state: Its moments.
        hyper: Betas and eps.
        step: Steps since the moments were zero, this one included.
        seed: For stochastic rounding of the moments.
    """
    beta1, beta2 = hyper.betas
    exp_avg = read_moment(state, "exp_avg", low.shape)
    if inner == "sgd":
        exp_avg.mul_(beta1).add_(low)
        write_moment(state, "exp_avg", exp_avg, seed=seed)
        return exp_avg.clone()
    exp_avg.lerp_(low, 1 - beta1)
    write_moment(state, "exp_avg", exp_avg, seed=seed)
    if inner == "adafactor":
        second = _factored(low, state, beta2)
    else:
        second = read_moment(state, "exp_avg_sq", low.shape)
        second.mul_(beta2).addcmul_(low, low, value=1 - beta2)
        write_moment(state, "exp_avg_sq", second, seed=seed)
    denominator = (second / (1 - beta2**step)).sqrt_().add_(hyper.eps)
    return (exp_avg / (1 - beta1**step)).div_(denominator)


def rotate_moments(state: State, shape: Sequence[int], overlap: Tensor, *, seed: int) -> None:
    """Take the moments into a new basis: C m, and (C * C) v, C = P^T P_old.

    The second is exact if the old coordinates are uncorrelated, and never negative.
    """
    first = read_moment(state, "exp_avg", shape)
    write_moment(state, "exp_avg", first.copy_(overlap @ first), seed=seed)
    if "exp_avg_sq" in state:
        second = read_moment(state, "exp_avg_sq", shape)
        write_moment(state, "exp_avg_sq", second.copy_(overlap.square() @ second), seed=seed)


def _factored(low: Tensor, state: State, beta2: float) -> Tensor:
    """Adafactor's second moment (arXiv 1804.04235, section 3): row means x column means / their mean."""
    squares = low.square().add_(_SQUARE_FLOOR)
    rows = state["exp_avg_sq_row"].lerp_(squares.mean(dim=-1, keepdim=True), 1 - beta2)
    columns = state["exp_avg_sq_col"].lerp_(squares.mean(dim=-2, keepdim=True), 1 - beta2)
    # In this order: the product of a row and a column that are both nearly zero underflows.
    return rows / rows.mean(dim=-2, keepdim=True) * columns


def norm_of_matrices(values: Tensor) -> Tensor:
    """Frobenius norm over the last two dimensions, kept as size 1; over everything for fewer dimensions."""
    if values.ndim < 2:
        return torch.sqrt(values.square().sum()).reshape((1,) * values.ndim)
    norm: Tensor = torch.linalg.vector_norm(values, dim=(-2, -1), keepdim=True)
    return norm


def limit_norm_growth(values: Tensor, last_norm: Tensor, limit: float) -> Tensor:
    """Scale `values` down to `limit` times the last norm, in place, and remember the new norm (arXiv 2410.01623).

    Args:
        values: The update.
        last_norm: Norm of the last update after limiting; 0 (none yet, or nothing changed) limits nothing.
        limit: Largest ratio of the two.
    """
    norm = norm_of_matrices(values)
    bound = limit * last_norm
    limited = (last_norm > 0) & (norm > bound)
    values.mul_(torch.where(limited, bound / torch.where(norm > 0, norm, 1.0), 1.0))
    last_norm.copy_(torch.where(limited, bound, norm))
    return values


def limit_update_rms(values: Tensor, limit: float) -> Tensor:
    """Scale `values` down, in place, to a root mean square of at most `limit` (arXiv 1804.04235, section 6)."""
    num_values = values.shape[-2:].numel() if values.ndim >= 2 else values.numel()
    rms = norm_of_matrices(values) / num_values**0.5
    return values.div_((rms / limit).clamp_min_(1.0))


def norm_ratio(direction: Tensor, projected: Tensor, *, per: str) -> Tensor:
    """||N|| / ||R|| per channel (column) or per tensor, 0 where R is 0."""
    if per == "channel":
        upper = torch.linalg.vector_norm(direction, dim=-2, keepdim=True)
        lower = torch.linalg.vector_norm(projected, dim=-2, keepdim=True)
    else:
        upper, lower = norm_of_matrices(direction), norm_of_matrices(projected)
    return torch.where(lower > 0, upper / torch.where(lower > 0, lower, 1.0), 0.0)


@dataclass(frozen=True, kw_only=True)
class DirectionRule(Rule):
    """What projected rules share: a direction in fp32, its limiter, and how the weight is written."""

    method: Method
    place: Place

    @abstractmethod
    def direction(self, gradient: Tensor, state: State, hyper: Hyper) -> Tensor:
        """The limited update in fp32, before learning rate and decay; advances the state."""

    def update(self, weight: Tensor, gradient: Tensor, state: State, hyper: Hyper) -> None:
        """W <- (1 - lr * weight_decay) W - lr * direction."""
        towards = self.direction(gradient, state, hyper)
        exact = read_weight(weight, state)
        descend(exact, towards, hyper)
        write_weight(self.method.writer, weight, exact, state, seed=self._seed(hyper))

    def temporary_values(self, weight: Tensor) -> int:
        """See `Rule.temporary_values`: what the direction is made of; then it, the exact weight and its rounding."""
        if weight.dtype == torch.float32:
            return self._direction_values(weight.numel())
        rounding = ROUNDING_COPIES if self.method.writer == "stochastic" else 0
        return max(self._direction_values(weight.numel()) + weight.numel(), ceil((3 + rounding) * weight.numel()))

    def _direction_values(self, num_values: int) -> int:
        """fp32 values that making a direction of an fp32 gradient holds at its largest: it, and what it is made of."""
        return 2 * num_values

    def _seed(self, hyper: Hyper) -> int:
        return mix(self.place.own_seed, hyper.clock)

    def _limiter_state(self, weight: Tensor) -> State:
        if self.method.limiter != "norm_growth":
            return {}
        return {"update_norm": torch.zeros_like(norm_of_matrices(weight), dtype=torch.float32)}

    def _limit(self, update: Tensor, state: State) -> Tensor:
        if self.method.limiter == "norm_growth":
            return limit_norm_growth(update, state["update_norm"], self.method.limit)
        if self.method.limiter == "update_rms":
            return limit_update_rms(update, self.method.limit)
        return update


@dataclass(frozen=True, kw_only=True)
class ProjectedRule(DirectionRule):
    """A matrix, or a stack of matrices (experts), by a basis on one of its sides."""

    shape: tuple[int, ...]
    """Shape of the weight."""

    def __post_init__(self) -> None:
        if len(self.shape) not in (2, 3):
            raise UnsupportedError(
                f"projecting a parameter of shape {self.shape}",
                reason="a projection is defined for matrices, and for stacks of matrices such as experts",
                instead="put the parameter into a group with project=False",
            )

    def refreshes(self, state: State) -> bool:
        """Whether the coming step takes a new basis."""
        step = int(state["step"])
        return step == 0 or (step + self._offset) % self.method.update_gap == 0

    def num_flops(self) -> int:
        """See `Rule.num_flops`: P^T G, and P N where anything is lifted; refreshes are rare."""
        if self.method.projector in BY_DENSITY:
            return 0
        num_products = 1 + (self.method.scale_gradient == "none") + (self.method.residual != "none")
        return 2 * self._rank * prod(self.shape) * num_products

    def relative_time(self, weight_dtype: torch.dtype) -> float:
        """See `Rule.relative_time`; benchmarks/plan_accuracy.py, 1 x 256 of every weight on two cores."""
        del weight_dtype
        # What is lifted, scaled and compared with earlier norms passes through memory several times.
        return 1.9 if self.is_linear else 6.3

    def init(self, weight: Tensor) -> State:
        """Counters, a basis if it is read off the gradient, moments of R, the last norm, and what the writer keeps."""
        check_writable(weight)
        state: State = {"step": counter(), "inner_step": counter()}
        if self._keeps_basis:
            state["basis"] = torch.zeros(self.basis_shape, device=weight.device)
        state |= new_inner_state(
            self.method.inner, self.reduced_shape, state_dtype=self.method.state_dtype, device=weight.device
        )
        return state | self._limiter_state(weight) | new_writer_state(self.method.writer, weight)

    def _direction_values(self, num_values: int) -> int:
        """R, N and a denominator; a linear rule's new basis; of others the update and what is left of the gradient."""
        low = 3 * prod(self.reduced_shape)
        if self.is_linear:
            return max(ceil(_BASIS_COPIES * num_values), low)
        if self.method.scale_gradient != "none":
            return num_values + low
        # The rest is a difference, and what is subtracted is made first; of signs an eighth is kept.
        return (3 if self.method.residual in ("sgd", "fira") else 2) * num_values + low

    @property
    def is_linear(self) -> bool:
        """Whether all that a step wants of the gradient is R = P^T G, unless it takes a new basis."""
        method = self.method
        return self._keeps_basis and method.residual == method.scale_gradient == method.limiter == "none"

    @property
    def reduces(self) -> bool:
        """Whether that is less than the gradient."""
        return self.is_linear and prod(self.reduced_shape) < prod(self.shape)

    @property
    def reduced_shape(self) -> tuple[int, ...]:
        """Shape of R."""
        *batch, _, num_columns = self._oriented_shape
        return (*batch, self._rank, num_columns)

    @property
    def basis_shape(self) -> tuple[int, ...]:
        """Shape of a basis that is kept."""
        *batch, num_rows, _ = self._oriented_shape
        return (*batch, num_rows, self._rank)

    def reduce(self, gradient: Tensor, basis: Tensor) -> Tensor:
        """R = P^T G in fp32, of `reduced_shape`."""
        return DenseBasis(basis).project(self._oriented(gradient))

    def update(self, weight: Tensor, gradient: Tensor, state: State, hyper: Hyper) -> None:
        """As `DirectionRule.update`; P N and nothing else is lifted into the weight, and never a matrix of its own."""
        if not self.is_linear:
            super().update(weight, gradient, state, hyper)
            return
        full = self._oriented(gradient)
        _, low = self._project(full, state, hyper)
        # Of a bf16 gradient it is a copy, as large as the weight.
        del full
        self.update_reduced(weight, low, state, hyper)

    def update_reduced(self, weight: Tensor, low: Tensor, state: State, hyper: Hyper) -> None:
        """As `update`, of a linear rule with R in a step that takes no new basis, or has taken it.

        Args:
            weight: The weight.
            low: R, fp32.
            state: As for `update`.
            hyper: As for `update`.
        """
        method = self.method
        low = self._inner_direction(low, state, hyper)
        exact, basis = read_weight(weight, state), state["basis"]
        left, right = (low.mT, basis.mT) if self._is_transposed else (basis, low)
        add = torch.addmm if exact.ndim == 2 else torch.baddbmm
        decay, size = 1 - hyper.lr * hyper.weight_decay, hyper.lr * method.scale
        add(exact, left, right, beta=decay, alpha=-size, out=exact)
        write_weight(method.writer, weight, exact, state, seed=self._seed(hyper))

    def direction(self, gradient: Tensor, state: State, hyper: Hyper) -> Tensor:
        """Put the update together: scale * P N + residual_scale * residual, or the scaled gradient; limited."""
        method, full = self.method, self._oriented(gradient)
        basis, low = self._project(full, state, hyper)
        sign = (full - basis.lift(low)).sign_().to(torch.int8) if method.residual == "sign" else None
        if method.scale_gradient == "none" and method.residual not in ("sgd", "fira"):
            # Of a bf16 gradient it is a copy, as large as the weight.
            del full
        inner = self._inner_direction(low, state, hyper)
        if method.scale_gradient != "none":
            factors = norm_ratio(inner, low, per=method.scale_gradient)
            update = self._limit(full * factors.mul_(method.scale), state)
            return update.mT if self._is_transposed else update
        update = basis.lift(inner).mul_(method.scale)
        if sign is not None:
            update.add_(sign, alpha=method.residual_scale)
        elif method.residual != "none":
            rest = full - basis.lift(low)
            if method.residual == "fira":
                rest.mul_(norm_ratio(inner, low, per="channel"))
            if self._limits_residual:
                self._limit(rest, state)
            update.add_(rest, alpha=method.residual_scale)
        if not self._limits_residual:
            self._limit(update, state)
        return update.mT if self._is_transposed else update

    def _project(self, full: Tensor, state: State, hyper: Hyper) -> tuple[Basis, Tensor]:
        """P of this step and R = P^T G; where the basis is new, the moments have followed it."""
        is_new = self.refreshes(state)
        rotation = self._refresh(full, state) if is_new else None
        kept = DenseBasis(state["basis"]) if self._keeps_basis else None
        basis: Basis = kept or self._basis_from_seed(self._refresh_number(state), full.device)
        low = basis.project(full)
        if rotation is not None:
            rotate_moments(state, low.shape, rotation, seed=mix(self._seed(hyper), 1))
        elif is_new and int(state["step"]) > 0 and self.method.at_refresh == "reset":
            for name, value in state.items():
                if name.startswith("exp_avg"):
                    value.zero_()
            state["inner_step"].zero_()
        return basis, low

    def _inner_direction(self, low: Tensor, state: State, hyper: Hyper) -> Tensor:
        """N = inner(R); the step is counted."""
        state["inner_step"] += 1
        state["step"] += 1
        step = int(state["inner_step"])
        return inner_direction(self.method.inner, low, state, hyper, step=step, seed=self._seed(hyper))

    def _refresh(self, full: Tensor, state: State) -> Tensor | None:
        """Take a new basis; returns the rotation into it if the moments want one."""
        is_first = int(state["step"]) == 0
        rotates = self.method.at_refresh == "rotate" and not is_first
        if not self._keeps_basis:
            if not rotates:
                return None
            number = self._refresh_number(state)
            last = self._basis_from_seed(number - 1, full.device)
            return self._basis_from_seed(number, full.device).overlap(last)
        last_matrix = None if is_first else state["basis"]
        seed = mix(self.place.own_seed, self._refresh_number(state))
        matrix = gradient_basis(self.method.projector, full, self._rank, old=last_matrix, seed=seed)
        rotation = matrix.mT @ state["basis"] if rotates else None
        state["basis"].copy_(matrix)
        return rotation

    def _basis_from_seed(self, number: int, device: torch.device) -> Basis:
        seed = mix(self.place.own_seed, number)
        *batch, num_rows, _ = self._oriented_shape
        if self.method.projector == "gaussian":
            return DenseBasis(gaussian_basis((*batch, num_rows, self._rank), seed=seed, device=device))
        return choose_coordinates(num_rows, self._rank, seed=seed, device=device)

    def _oriented(self, gradient: Tensor) -> Tensor:
        """In fp32, with the projected side first."""
        return (gradient.mT if self._is_transposed else gradient).float()

    def _refresh_number(self, state: State) -> int:
        return (int(state["step"]) + self._offset) // self.method.update_gap

    @property
    def _limits_residual(self) -> bool:
        return self.method.residual == "fira" and self.method.limiter == "norm_growth"

    @property
    def _keeps_basis(self) -> bool:
        return self.method.projector in FROM_GRADIENT

    @property
    def _offset(self) -> int:
        """Steps by which the refreshes come early, spread over the parameters."""
        if not self.method.stagger:
            return 0
        return self.place.turn * self.method.update_gap // self.place.num_turns

    @property
    def _is_transposed(self) -> bool:
        """Whether the columns are the projected side."""
        num_rows, num_columns = self.shape[-2:]
        if self.method.projector in BY_DENSITY:
            return self.method.projector == "columns"
        if self.method.side == "std":
            return num_rows > num_columns
        if self.method.side == "reverse_std":
            return num_rows <= num_columns
        return self.method.side == "right"

    @property
    def _oriented_shape(self) -> Sequence[int]:
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self._is_transposed else self.shape

    @property
    def _rank(self) -> int:
        num_rows = self._oriented_shape[-2]
        share = max(1, round(self.method.density * num_rows))
        if self.method.projector in BY_DENSITY:
            return share
        # Bases read off a gradient have no more columns than the gradient has dimensions.
        return min(self.method.rank or share, *self._oriented_shape[-2:])


_CPU = torch.device("cpu")


@lru_cache(maxsize=64)
def active_blocks(order: BlockOrder, *, window: int, num_blocks: int, count: int, seed: int) -> frozenset[int]:
    """The blocks of one window of steps; a pure function, so that nothing has to be saved.

    Args:
        order: random goes through all blocks in a new random order each round (BAdam), sample draws `count` anew each
            time (LISA), ascending and descending go round, fixed stays with the first `count`.
        window: Number of the window, from 0.
        num_blocks: Blocks there are.
        count: Blocks at a time.
        seed: The same for all parameters of an optimizer.
    """
    if count >= num_blocks:
        return frozenset(range(num_blocks))
    if order == "fixed":
        return frozenset(range(count))
    if order == "sample":
        return frozenset(_permutation(num_blocks, mix(seed, window))[:count])
    positions = range(window * count, (window + 1) * count)
    if order == "random":
        rounds = {position // num_blocks for position in positions}
        orders = {number: _permutation(num_blocks, mix(seed, number)) for number in rounds}
        return frozenset(orders[position // num_blocks][position % num_blocks] for position in positions)
    ascending = [position % num_blocks for position in positions]
    return frozenset(ascending if order == "ascending" else [num_blocks - 1 - block for block in ascending])


def _permutation(count: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=generator(seed, _CPU)).tolist()
    return order


@dataclass(frozen=True, kw_only=True)
class BlockRule(DirectionRule):
    """A parameter of a decoder block that has moments only in the windows of steps in which its block is chosen.

    Without a residual the parameter is not touched in other windows and keeps nothing, not even an fp32 master.
    """

    def __post_init__(self) -> None:
        assert self.place.block is not None

    def is_active(self, clock: int) -> bool:
        """Always with a residual, otherwise while the block is chosen."""
        return self.method.residual != "none" or self.is_chosen(clock)

    def is_chosen(self, clock: int) -> bool:
        """Whether the block has moments in the step after `clock` completed ones."""
        num_blocks = self.place.num_blocks
        count = self.method.active_blocks or max(1, round(self.method.density * num_blocks))
        chosen = active_blocks(
            self.method.block_order,
            window=clock // self.method.update_gap,
            num_blocks=num_blocks,
            count=count,
            seed=self.place.seed,
        )
        return self.place.block in chosen

    def init(self, weight: Tensor) -> State:
        """The window of the last step, steps since the moments were zero, moments, and what the writer keeps."""
        check_writable(weight)
        state: State = {"window": counter(-1), "inner_step": counter()}
        state |= self._new_moments(weight)
        return state | self._limiter_state(weight) | new_writer_state(self.method.writer, weight)

    def direction(self, gradient: Tensor, state: State, hyper: Hyper) -> Tensor:
        """The inner direction if the block is chosen, the residual otherwise."""
        gradient = gradient.float()
        is_chosen = self.is_chosen(hyper.clock)
        self._enter_window(gradient, state, hyper, is_chosen=is_chosen)
        if is_chosen:
            state["inner_step"] += 1
            step = int(state["inner_step"])
            update = inner_direction(self.method.inner, gradient, state, hyper, step=step, seed=self._seed(hyper))
            return self._limit(update.mul_(self.method.scale), state)
        rest = gradient.sign() if self.method.residual == "sign" else gradient.clone()
        return self._limit(rest.mul_(self.method.residual_scale), state)

    def _enter_window(self, gradient: Tensor, state: State, hyper: Hyper, *, is_chosen: bool) -> None:
        """Bring the moments in line with the window of this step."""
        window = hyper.clock // self.method.update_gap
        has_moments = "exp_avg" in state
        is_new = int(state["window"]) != window
        if has_moments and (not is_chosen or (is_new and self.method.at_refresh == "reset")):
            for name in [name for name in state if name.startswith("exp_avg")]:
                del state[name]
            has_moments = False
        if is_chosen and not has_moments:
            state.update(self._new_moments(gradient))
            state["inner_step"].zero_()
        state["window"].fill_(window)

    def _new_moments(self, like: Tensor) -> State:
        return new_inner_state(self.method.inner, like.shape, state_dtype=self.method.state_dtype, device=like.device)
