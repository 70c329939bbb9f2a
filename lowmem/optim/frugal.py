"""FRUGAL: Adam on a share of the gradient, sign descent on the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from torch.optim.optimizer import ParamsT

from lowmem.optim.method import Inner, Method, Projector, Side, Writer
from lowmem.optim.projected_optimizer import MethodOptimizer, side_of

_RESIDUALS = {"no": "none", "sgd": "sgd", "sign_sgd": "sign"}


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
            side=side_of(group["proj_side"]),
            block_order=group["block_order"],
            scale=group["proj_params_lr_scale"],
            residual=_RESIDUALS[group["inactive_update_rule"]],  # type: ignore[arg-type]
            residual_scale=group["inactive_lr_scale"],
            inner=group["inner"],
            at_refresh="reset" if group["reset_statistics"] else "keep",
            writer=group["writer"],
            stagger=group["stagger"],
        )
