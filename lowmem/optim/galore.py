"""GaLore and Fira: moments in a subspace that is read off the gradient; argument names are those of their own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from torch.optim.optimizer import ParamsT

from lowmem.optim.method import AtRefresh, Inner, Method, Projector, Side, Writer
from lowmem.optim.projected_optimizer import MethodOptimizer, projector_with_rank, side_of


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
            projector=projector_with_rank(group["projector"]),
            rank=group["rank"],
            update_gap=group["update_proj_gap"],
            side=side_of(group["proj_type"]),
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
            projector=projector_with_rank(group["projector"]),
            rank=group["rank"],
            update_gap=group["update_proj_gap"],
            side=side_of(group["proj_type"]),
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
