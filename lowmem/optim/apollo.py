"""APOLLO and APOLLO-Mini: the gradient, scaled by what Adam does in a random projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from torch.optim.optimizer import ParamsT

from lowmem.optim.method import AtRefresh, Inner, Method, Side, Writer
from lowmem.optim.projected_optimizer import MethodOptimizer, side_of


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
            side=side_of(group["proj_type"]),
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
