"""The optimizers that consist of a `Method`: what they share, and the one that takes any method.

GaLore and Fira: moments in a subspace that is read off the gradient; argument names are those of their own code.

APOLLO and APOLLO-Mini: the gradient, scaled by what Adam does in a random projection.

FRUGAL: Adam on a share of the gradient, sign descent on the rest.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lowmem.errors import UnsupportedError
from lowmem.optim.block_rule import BlockRule
from lowmem.optim.method import AtRefresh, Inner, Method, Projector, Side, Writer
from lowmem.optim.optimizer import (
    RuleOptimizer,
    block_name,
    embedding_names,
    groups_of_module,
    is_matrix,
    number_blocks,
)
from lowmem.optim.plain import AdamWRule
from lowmem.optim.projected import ProjectedRule
from lowmem.optim.rule import Place, Rule


class MethodOptimizer(RuleOptimizer):
    """An optimizer whose groups describe a `Method`.

    Of a model, the matrices inside it are projected; embeddings and head are too with `project_embeddings`, and get
    plain AdamW (fp32 moments, the same lr) otherwise, as do norms and biases, which do not decay. A method that goes
    by blocks applies to all parameters of the decoder blocks instead, which it knows by the number in their names.
    Of groups, one with `project=False` gets plain AdamW; of the others, everything but vectors is projected.
    """

    def __init__(
        self,
        params: nn.Module | ParamsT,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        seed: int,
        project_embeddings: bool,
        fields: dict[str, Any],
    ) -> None:
        self._project_embeddings = project_embeddings
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed, **fields}
        defaults["project"] = True
        self._by_block = self.method_of(defaults).projector == "block"
        super().__init__(params, defaults)

    @classmethod
    @abstractmethod
    def method_of(cls, group: Mapping[str, Any]) -> Method:
        """What a group's fields, in the words of the method's paper, mean."""

    def _groups_of(self, model: nn.Module) -> ParamsT:
        embeddings, head = embedding_names(model)
        left_out = frozenset() if self._project_embeddings else embeddings | head

        def project(name: str, param: Tensor) -> bool:
            if self._by_block:
                return block_name(name) is not None
            return is_matrix(param) and name not in left_out

        return groups_of_module(model, project=project)

    def _rule(self, group: Mapping[str, Any], place: Place, param: Tensor) -> Rule:
        method = self.method_of(group)
        if group["project"] and method.projector == "block" and place.block is not None:
            return BlockRule(method=method, place=place)
        if group["project"] and method.projector == "block" and "param_names" not in group:
            raise UnsupportedError(
                f"{self.method_name} with unnamed parameters",
                reason="its blocks are known by the numbers in the parameters' names",
                instead="the model, or model.named_parameters()",
            )
        if group["project"] and method.projector != "block" and param.ndim >= 2:
            return ProjectedRule(method=method, place=place, shape=tuple(param.shape))
        return AdamWRule(state_dtype="fp32", writer=method.writer, seed=place.own_seed)

    def _blocks(self, groups: list[dict[str, Any]]) -> dict[str, int]:
        names = [name for group in groups if group["project"] for name in group.get("param_names", ())]
        return number_blocks(names, single=False)


class Projected(MethodOptimizer):
    """Any `Method` on any parameters: for combinations that have no name.

    Args:
        params: As `RuleOptimizer`.
        method: The method; its fields become fields of the groups, where they may differ between groups.
        lr: Learning rate.
        betas: Decay of the first and second moments; sgd uses the first as momentum.
        eps: Added to the denominator.
        weight_decay: Decoupled.
        seed: Of random bases, choices and roundings.
        project_embeddings: Project embeddings and head as well.
    """

    method_name: ClassVar[str] = "Projected"

    def __init__(
        self,
        params: nn.Module | ParamsT,
        *,
        method: Method,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        project_embeddings: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            seed=seed,
            project_embeddings=project_embeddings,
            fields=asdict(method),
        )

    @classmethod
    def method_of(cls, group: Mapping[str, Any]) -> Method:
        """The group's fields are the method's."""
        return Method(**{name: group[name] for name in Method.__dataclass_fields__})


def projector_with_rank(projector: Projector) -> Projector:
    """Refuse a projector that picks coordinates or blocks.

    Raises:
        ValueError: It has no rank.
    """
    if projector in ("columns", "rows", "block"):
        raise ValueError(f"projector={projector!r}: expected one that has a rank: svd, rsvd, warm or gaussian")
    return projector


def side_of(proj_type: str) -> Side:
    """The projected side by the name that the papers' code gives it.

    Raises:
        UnsupportedError: Both at once.
    """
    if proj_type == "full":
        raise UnsupportedError(
            "proj_type='full'",
            reason="it projects both sides at once",
            instead="proj_type='std', 'reverse_std', 'left' or 'right'",
        )
    return proj_type  # type: ignore[return-value]


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
