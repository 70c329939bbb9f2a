"""Methods that keep their moments in a subspace of the gradient: GaLore, Fira, FRUGAL, APOLLO and APOLLO-Mini.

Argument names are those of the methods' own code. `update_proj_gap` and its kin count optimizer steps. All take
`projector`, `inner`, `writer`, `stagger` and `seed` as `Method` and `Projected` describe them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from torch.optim.optimizer import ParamsT

from lowmem.errors import UnsupportedError
from lowmem.optim.method import AtRefresh, Inner, Method, Projector, Side, Writer
from lowmem.optim.projected_optimizer import MethodOptimizer

_RESIDUALS = {"no": "none", "sgd": "sgd", "sign_sgd": "sign"}


class GaLore(MethodOptimizer):
    """GaLore (arXiv 2403.03507): W <- W - lr * scale * P Adam(P^T G).

    Args:
        params: As `RuleOptimizer`.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled.
        rank: Columns of P.
        update_proj_gap: Steps between two refreshes of P.
        scale: Factor of the projected update.
        proj_type: std, reverse_std, left or right.
        projector: "svd" is the paper's; "warm", a power iteration from the last basis, captures as much at a hundredth
            of the time.
        inner: adamw, adamw8bit, adafactor or sgd.
        at_refresh: "keep" is the paper's; reset or rotate.
        writer: How bf16 weights are written.
        stagger: Spread refreshes over steps.
        seed: Of random bases and roundings.
        project_embeddings: Project embeddings and head as well.
    """

    method_name: ClassVar[str] = "GaLore"

    def __init__(
        self,
        params: nn.Module | ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: Side = "std",
        projector: Projector = "warm",
        inner: Inner = "adamw",
        at_refresh: AtRefresh = "keep",
        writer: Writer = "stochastic",
        stagger: bool = True,
        seed: int = 0,
        project_embeddings: bool = False,
    ) -> None:
        fields: dict[str, object] = {
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
        }
        fields |= {"projector": projector, "inner": inner, "at_refresh": at_refresh, "writer": writer}
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            seed=seed,
            project_embeddings=project_embeddings,
            fields=fields | {"stagger": stagger},
        )

    @classmethod
    def method_of(cls, group: Mapping[str, Any]) -> Method:
        """No residual, no limiter."""
        return Method(
            projector=_by_rank(group["projector"]),
            rank=group["rank"],
            update_gap=group["update_proj_gap"],
            side=_side(group["proj_type"]),
            scale=group["scale"],
            inner=group["inner"],
            at_refresh=group["at_refresh"],
            writer=group["writer"],
            stagger=group["stagger"],
        )


class Fira(MethodOptimizer):
    """Fira (arXiv 2410.01623): GaLore's update plus G - P R, each column scaled by ||N_j|| / ||R_j||.

    Args:
        params: As `RuleOptimizer`.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled.
        rank: Columns of P.
        update_proj_gap: Steps between two refreshes of P.
        alpha: Factor of the whole update.
        proj_type: std, reverse_std, left or right.
        gamma: Largest growth of the residual's norm from step to step.
        projector: As `GaLore`.
        inner: As `GaLore`.
        at_refresh: As `GaLore`.
        writer: How bf16 weights are written.
        stagger: Spread refreshes over steps.
        seed: Of random bases and roundings.
        project_embeddings: Project embeddings and head as well.
    """

    method_name: ClassVar[str] = "Fira"

    def __init__(
        self,
        params: nn.Module | ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 128,
        update_proj_gap: int = 200,
        alpha: float = 0.25,
        proj_type: Side = "std",
        gamma: float = 1.01,
        projector: Projector = "warm",
        inner: Inner = "adamw",
        at_refresh: AtRefresh = "keep",
        writer: Writer = "stochastic",
        stagger: bool = True,
        seed: int = 0,
        project_embeddings: bool = False,
    ) -> None:
        fields: dict[str, object] = {
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "alpha": alpha,
            "proj_type": proj_type,
        }
        fields |= {"gamma": gamma, "projector": projector, "inner": inner, "at_refresh": at_refresh}
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            seed=seed,
            project_embeddings=project_embeddings,
            fields=fields | {"writer": writer, "stagger": stagger},
        )

    @classmethod
    def method_of(cls, group: Mapping[str, Any]) -> Method:
        """Fira's residual, its norm growth limited."""
        return Method(
            projector=_by_rank(group["projector"]),
            rank=group["rank"],
            update_gap=group["update_proj_gap"],
            side=_side(group["proj_type"]),
            scale=group["alpha"],
            residual="fira",
            residual_scale=group["alpha"],
            limiter="norm_growth",
            limit=group["gamma"],
            inner=group["inner"],
            at_refresh=group["at_refresh"],
            writer=group["writer"],
            stagger=group["stagger"],
        )


class FRUGAL(MethodOptimizer):
    """FRUGAL (arXiv 2411.07837): Adam on a share of the gradient, sign descent on the rest.

    Args:
        params: As `RuleOptimizer`.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled.
        density: Share of each matrix (or, for the projector block, of the blocks) that has moments.
        update_gap: Steps between two choices.
        proj_params_lr_scale: Factor of the Adam part.
        inactive_update_rule: sign_sgd, sgd or no.
        inactive_lr_scale: Factor of the rest: 1 for pre-training, 0.1 for fine-tuning in the paper.
        reset_statistics: Zero the moments at each choice; otherwise keep them.
        projector: columns, rows, block, or a basis of `density` times the projected side.
        proj_side: std, reverse_std, left or right, for bases.
        block_order: random, ascending or descending, for the projector block.
        inner: As `GaLore`.
        writer: How bf16 weights are written.
        stagger: Spread choices over steps.
        seed: Of choices and roundings.
        project_embeddings: Treat embeddings and head so as well.
    """

    method_name: ClassVar[str] = "FRUGAL"

    def __init__(
        self,
        params: nn.Module | ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        density: float = 0.25,
        update_gap: int = 200,
        proj_params_lr_scale: float = 1.0,
        inactive_update_rule: str = "sign_sgd",
        inactive_lr_scale: float = 1.0,
        reset_statistics: bool = True,
        projector: Projector = "columns",
        proj_side: Side = "std",
        block_order: str = "random",
        inner: Inner = "adamw",
        writer: Writer = "stochastic",
        stagger: bool = True,
        seed: int = 0,
        project_embeddings: bool = False,
    ) -> None:
        if inactive_update_rule not in _RESIDUALS:
            raise ValueError(f"inactive_update_rule={inactive_update_rule!r}: expected one of {', '.join(_RESIDUALS)}")
        fields: dict[str, object] = {
            "density": density,
            "update_gap": update_gap,
            "proj_params_lr_scale": proj_params_lr_scale,
        }
        fields |= {"inactive_update_rule": inactive_update_rule, "inactive_lr_scale": inactive_lr_scale}
        fields |= {"reset_statistics": reset_statistics, "projector": projector, "proj_side": proj_side}
        fields |= {"block_order": block_order, "inner": inner, "writer": writer, "stagger": stagger}
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            seed=seed,
            project_embeddings=project_embeddings,
            fields=fields,
        )

    @classmethod
    def method_of(cls, group: Mapping[str, Any]) -> Method:
        """A share with Adam, a residual of its own size."""
        return Method(
            projector=group["projector"],
            rank=None,
            density=group["density"],
            update_gap=group["update_gap"],
            side=_side(group["proj_side"]),
            block_order=group["block_order"],
            scale=group["proj_params_lr_scale"],
            residual=_RESIDUALS[group["inactive_update_rule"]],  # type: ignore[arg-type]
            residual_scale=group["inactive_lr_scale"],
            inner=group["inner"],
            at_refresh="reset" if group["reset_statistics"] else "keep",
            writer=group["writer"],
            stagger=group["stagger"],
        )


class APOLLO(MethodOptimizer):
    """APOLLO (arXiv 2412.05270): the gradient, scaled per channel by what Adam does in a random projection.

    W <- W - lr * sqrt(scale) * G diag(||N_j|| / ||R_j||), the update's norm growing by at most 1.01 per step.

    Args:
        params: As `RuleOptimizer`.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled.
        rank: Columns of P.
        update_proj_gap: Steps between two bases.
        scale: Its square root is the update's factor.
        scale_type: channel or tensor.
        proj: "random", a Gaussian basis made again from its seed at every step and never stored; or "svd".
        proj_type: std, reverse_std, left or right.
        gamma: Largest growth of the update's norm from step to step.
        inner: As `GaLore`.
        at_refresh: As `GaLore`.
        writer: How bf16 weights are written.
        stagger: Spread refreshes over steps.
        seed: Of random bases and roundings.
        project_embeddings: Scale the gradients of embeddings and head so as well.
    """

    method_name: ClassVar[str] = "APOLLO"

    def __init__(
        self,
        params: nn.Module | ParamsT,
        *,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 256,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        scale_type: str = "channel",
        proj: str = "random",
        proj_type: Side = "std",
        gamma: float = 1.01,
        inner: Inner = "adamw",
        at_refresh: AtRefresh = "keep",
        writer: Writer = "stochastic",
        stagger: bool = True,
        seed: int = 0,
        project_embeddings: bool = False,
    ) -> None:
        if proj not in ("random", "svd"):
            raise ValueError(f"proj={proj!r}: expected 'random' or 'svd'")
        if scale_type not in ("channel", "tensor"):
            raise ValueError(f"scale_type={scale_type!r}: expected 'channel' or 'tensor'")
        fields: dict[str, object] = {
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "scale_type": scale_type,
        }
        fields |= {"proj": proj, "proj_type": proj_type, "gamma": gamma, "inner": inner, "at_refresh": at_refresh}
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            seed=seed,
            project_embeddings=project_embeddings,
            fields=fields | {"writer": writer, "stagger": stagger},
        )

    @classmethod
    def method_of(cls, group: Mapping[str, Any]) -> Method:
        """The scaled gradient, its norm growth limited."""
        return Method(
            projector="gaussian" if group["proj"] == "random" else "svd",
            rank=group["rank"],
            update_gap=group["update_proj_gap"],
            side=_side(group["proj_type"]),
            scale=group["scale"] ** 0.5,
            scale_gradient=group["scale_type"],
            limiter="norm_growth",
            limit=group["gamma"],
            inner=group["inner"],
            at_refresh=group["at_refresh"],
            writer=group["writer"],
            stagger=group["stagger"],
        )


class APOLLOMini(APOLLO):
    """APOLLO-Mini: rank 1 and one factor per tensor (arXiv 2412.05270, section 4.2); arguments as `APOLLO`."""

    method_name: ClassVar[str] = "APOLLOMini"

    def __init__(
        self,
        params: nn.Module | ParamsT,
        *,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 1,
        update_proj_gap: int = 200,
        scale: float = 128.0,
        gamma: float = 1.01,
        inner: Inner = "adamw",
        writer: Writer = "stochastic",
        stagger: bool = True,
        seed: int = 0,
        project_embeddings: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            scale_type="tensor",
            gamma=gamma,
            inner=inner,
            writer=writer,
            stagger=stagger,
            seed=seed,
            project_embeddings=project_embeddings,
        )


def _by_rank(projector: Projector) -> Projector:
    if projector in ("columns", "rows", "block"):
        raise ValueError(f"projector={projector!r}: expected one that has a rank: svd, rsvd, warm or gaussian")
    return projector


def _side(proj_type: str) -> Side:
    if proj_type == "full":
        raise UnsupportedError(
            "proj_type='full'",
            reason="it projects both sides at once",
            instead="proj_type='std', 'reverse_std', 'left' or 'right'",
        )
    return proj_type  # type: ignore[return-value]
