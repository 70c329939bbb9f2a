"""The optimizers that consist of a `Method`: what they share, and the one that takes any method.

GaLore and Fira: moments in a subspace that is read off the gradient; argument names are those of their own code.

APOLLO and APOLLO-Mini: the gradient, scaled by what Adam does in a random projection.

FRUGAL: Adam on a share of the gradient, sign descent on the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import fields as dataclass_fields
from typing import Any, ClassVar, get_args

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lowmem.errors import UnsupportedError
from lowmem.optim.method import BY_DENSITY, AtRefresh, Inner, Method, Projector, Side, Writer
from lowmem.optim.optimizer import (
    RuleOptimizer,
    arguments,
    block_name,
    embedding_names,
    groups_of_module,
    is_matrix,
    number_blocks,
)
from lowmem.optim.plain import AdamWRule
from lowmem.optim.projected import BlockRule, ProjectedRule
from lowmem.optim.rule import Place, Rule

_METHOD_FIELDS = frozenset(field.name for field in dataclass_fields(Method))


class MethodOptimizer(RuleOptimizer):
    """An optimizer whose groups describe a `Method`.

    Of a model, the matrices inside it are projected; embeddings and head are too with `project_embeddings`, and get
    plain AdamW (fp32 moments, the same lr) otherwise, as do norms and biases, which do not decay. A method that goes
    by blocks applies to all parameters of the decoder blocks instead, which it knows by the number in their names.
    Of groups, one with `project=False` gets plain AdamW; of the others, everything but vectors is projected.
    """

    _words: ClassVar[Mapping[str, str]] = {}
    """Group fields by the names that the method's own code gives them, and the fields of `Method` that they are."""
    _values: ClassVar[Mapping[str, Mapping[Any, str]]] = {}
    """What may be given for some of these, and what it means for `Method`."""
    _parts: ClassVar[Mapping[str, object]] = {}
    """What the method is made of, whatever its options."""

    def __init__(self, params: nn.Module | ParamsT, *, project_embeddings: bool = False, **fields: Any) -> None:
        self._project_embeddings = project_embeddings
        defaults = {**fields, "project": True}
        self._by_block = self.method_of(defaults).projector == "block"
        super().__init__(params, defaults)

    @classmethod
    def method_of(cls, group: Mapping[str, Any]) -> Method:
        """What a group's fields, in the words of the method's paper, mean."""
        given = dict(group)
        for name, meanings in cls._values.items():
            if group[name] not in meanings:
                raise ValueError(f"{name}={group[name]!r}: expected one of {', '.join(map(str, meanings))}")
            given[name] = meanings[group[name]]
        given = {cls._words.get(name, name): value for name, value in given.items()}
        if given.get("side") == "full":
            raise UnsupportedError(
                "proj_type='full'",
                reason="it projects both sides at once",
                instead="proj_type='std', 'reverse_std', 'left' or 'right'",
            )
        return Method(**{name: value for name, value in {**given, **cls._parts}.items() if name in _METHOD_FIELDS})

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
        given = arguments(locals())
        super().__init__(**{**given, **asdict(given.pop("method"))})


_WITH_RANK = {name: name for name in get_args(Projector) if name not in BY_DENSITY}


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
    _words: ClassVar = {"update_proj_gap": "update_gap", "proj_type": "side"}
    _values: ClassVar = {"projector": _WITH_RANK}

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
        super().__init__(**arguments(locals()))


class Fira(MethodOptimizer):
    """Fira (arXiv 2410.01623): GaLore's update plus G - P R, each column scaled by ||N_j|| / ||R_j||.

    Args:
        alpha: Factor of the whole update.
        gamma: Largest growth of the residual's norm from step to step.

    `lr` and the others are as in `GaLore`.
    """

    method_name: ClassVar[str] = "Fira"
    _words: ClassVar = {"update_proj_gap": "update_gap", "proj_type": "side", "alpha": "scale", "gamma": "limit"}
    _values: ClassVar = {"projector": _WITH_RANK}
    _parts: ClassVar = {"residual": "fira", "limiter": "norm_growth"}

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
        super().__init__(**arguments(locals()))

    @classmethod
    def method_of(cls, group: Mapping[str, Any]) -> Method:
        """As the class says; its factor is the residual's too."""
        return super().method_of({**group, "residual_scale": group["alpha"]})


class APOLLO(MethodOptimizer):
    """APOLLO (arXiv 2412.05270): the gradient, scaled per channel by what Adam does in a random projection.

    W <- W - lr * sqrt(scale) * G diag(||N_j|| / ||R_j||), the update's norm growing by at most 1.01 per step.

    Args:
        scale: Its square root is the update's factor.
        scale_type: channel or tensor.
        proj: "random", a Gaussian basis made again from its seed at every step and never stored; or "svd".
        gamma: Largest growth of the update's norm from step to step.

    `lr` and the others are as in `GaLore`.
    """

    method_name: ClassVar[str] = "APOLLO"
    _words: ClassVar = {
        "update_proj_gap": "update_gap",
        "proj_type": "side",
        "gamma": "limit",
        "proj": "projector",
        "scale_type": "scale_gradient",
    }
    _values: ClassVar = {
        "proj": {"random": "gaussian", "svd": "svd"},
        "scale_type": {"channel": "channel", "tensor": "tensor"},
    }
    _parts: ClassVar = {"limiter": "norm_growth"}

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
        super().__init__(**arguments(locals()))

    @classmethod
    def method_of(cls, group: Mapping[str, Any]) -> Method:
        """As the class says; the factor is given squared."""
        return super().method_of({**group, "scale": group["scale"] ** 0.5})


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
        super().__init__(**arguments(locals()), scale_type="tensor")


class FRUGAL(MethodOptimizer):
    """FRUGAL (arXiv 2411.07837): Adam on a share of the gradient, sign descent on the rest.

    Args:
        density: Share of each matrix (or, for the projector block, of the blocks) that has moments.
        update_gap: Steps between two choices.
        proj_params_lr_scale: Factor of the Adam part.
        inactive_update_rule: sign_sgd, sgd or no.
        inactive_lr_scale: Factor of the rest: 1 for pre-training, 0.1 for fine-tuning in the paper.
        reset_statistics: Zero the moments at each choice; otherwise keep them.
        projector: columns, rows, block, or a basis of `density` times the projected side.
        proj_side: std, reverse_std, left or right, for bases.
        block_order: random, ascending or descending, for the projector block.

    `lr` and the others are as in `GaLore`.
    """

    method_name: ClassVar[str] = "FRUGAL"
    _words: ClassVar = {
        "proj_params_lr_scale": "scale",
        "inactive_lr_scale": "residual_scale",
        "proj_side": "side",
        "inactive_update_rule": "residual",
        "reset_statistics": "at_refresh",
    }
    _values: ClassVar = {
        "inactive_update_rule": {"no": "none", "sgd": "sgd", "sign_sgd": "sign"},
        "reset_statistics": {True: "reset", False: "keep"},
    }
    _parts: ClassVar = {"rank": None}

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
        super().__init__(**arguments(locals()))
