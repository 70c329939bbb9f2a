"""What a projected optimizer consists of: the choices that the published methods differ in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

Projector = Literal["svd", "rsvd", "warm", "gaussian", "columns", "rows", "block"]
Inner = Literal["adamw", "adamw8bit", "adafactor", "sgd"]
Side = Literal["std", "reverse_std", "left", "right"]
AtRefresh = Literal["keep", "reset", "rotate"]
Residual = Literal["none", "sign", "sgd", "fira"]
ScaleGradient = Literal["none", "channel", "tensor"]
Limiter = Literal["none", "norm_growth", "update_rms"]
Writer = Literal["fp32", "stochastic", "kahan", "nearest"]
BlockOrder = Literal["random", "sample", "ascending", "descending", "fixed"]

# Projectors whose basis is read off the gradient and kept; the others follow from a seed.
FROM_GRADIENT = ("svd", "rsvd", "warm")

# Projectors that pick a fraction of coordinates or blocks instead of a rank.
BY_DENSITY = ("columns", "rows", "block")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A projected optimizer.

    With G the gradient, m x n with m <= n, P an m x r basis, R = P^T G and N = inner(R):
    W <- (1 - lr * weight_decay) W - lr * limiter(scale * P N + residual_scale * residual(G, P, N)), or with
    `scale_gradient`, W <- (1 - lr * weight_decay) W - lr * limiter(scale * G diag(||N_j|| / ||R_j||)).
    """

    projector: Projector
    """svd, rsvd (randomised), warm (power iteration from the last basis), gaussian, columns, rows, or block (all of a
    matrix in the steps in which its decoder block is chosen)."""
    rank: int | None = 128
    """Columns of P, at most the shorter side; None: a share of the projected side, `density`. Without meaning for
    columns, rows and block."""
    density: float = 0.25
    """Share of columns, rows or blocks that are chosen."""
    update_gap: int = 200
    """Steps between two refreshes of P, or two choices of blocks."""
    side: Side = "std"
    """Which side P projects: std the shorter one, reverse_std the longer one, left the rows, right the columns."""
    inner: Inner = "adamw"
    """The optimizer inside the projection."""
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the inner moments; adamw8bit has its own."""
    at_refresh: AtRefresh = "keep"
    """What becomes of the inner moments at a refresh: kept, zeroed, or rotated into the new basis."""
    scale: float = 1.0
    """Factor of the projected part (GaLore's scale)."""
    residual: Residual = "none"
    """What is done with G - P R: nothing, its sign, itself, or Fira's column scaling ||N_j|| / ||R_j||."""
    residual_scale: float = 1.0
    """Factor of the residual."""
    scale_gradient: ScaleGradient = "none"
    """APOLLO: use the projection only to scale the gradient, per channel or per tensor."""
    limiter: Limiter = "none"
    """norm_growth: the norm (of Fira's residual, otherwise of the update) grows by at most `limit` from step to step;
    update_rms: the update's root mean square is at most `limit`."""
    limit: float = 1.01
    """The limiter's bound."""
    writer: Writer = "stochastic"
    """How bf16 weights are written: fp32 keeps an fp32 master, stochastic rounds, kahan keeps a bf16 compensation,
    nearest loses small changes. fp32 weights are written exactly whatever this says."""
    block_order: BlockOrder = "random"
    """For the projector block: random visits all in a random order, sample draws anew each time, fixed stays."""
    active_blocks: int | None = None
    """For the projector block: how many at a time, instead of `density`."""
    stagger: bool = True
    """Spread the refreshes of the parameters evenly over `update_gap` steps, instead of all in one step."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(choices)}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank}: expected at least 1")
        if self.update_gap < 1:
            raise ValueError(f"update_gap={self.update_gap}: expected at least 1")
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density}: expected above 0 and at most 1")
        if self.limit <= 0:
            raise ValueError(f"limit={self.limit}: expected above 0")
        if self.active_blocks is not None and (self.projector != "block" or self.active_blocks < 1):
            raise ValueError(f"active_blocks={self.active_blocks}: expected at least 1, and the projector block")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.scale_gradient != "none" and self.residual != "none":
            raise ValueError(
                f"scale_gradient={self.scale_gradient!r} uses all of the gradient; residual must be 'none'"
            )
        if self.projector == "block":
            if self.inner == "adafactor":
                raise ValueError(
                    "inner='adafactor' is for matrices; the projector block takes whole blocks, norms included"
                )
            if self.at_refresh == "rotate":
                raise ValueError("at_refresh='rotate': blocks have no basis to rotate; use 'keep' or 'reset'")
            if self.scale_gradient != "none" or self.residual == "fira":
                raise ValueError(
                    "the projector block has no basis to scale a gradient with; use residual none, sign or sgd"
                )
        if self.inner == "adafactor" and self.at_refresh == "rotate":
            raise ValueError("at_refresh='rotate': a factored second moment cannot be rotated; use 'keep' or 'reset'")
        if self.inner != "adamw" and self.state_dtype != "fp32":
            raise ValueError(f"state_dtype={self.state_dtype!r} is for inner='adamw'; inner is {self.inner!r}")


_CHOICES = {name: get_args(kind) for name, kind in get_type_hints(Method).items() if get_origin(kind) is Literal}
