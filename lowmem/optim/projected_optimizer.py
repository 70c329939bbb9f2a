"""The optimizers that consist of a `Method`: what they share, and the one that takes any method."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lowmem.errors import UnsupportedError
from lowmem.optim.adamw import AdamWRule
from lowmem.optim.block_rule import BlockRule
from lowmem.optim.groups import block_name, embedding_names, groups_of_module, is_matrix, number_blocks
from lowmem.optim.method import Method, Projector, Side
from lowmem.optim.optimizer import RuleOptimizer
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
