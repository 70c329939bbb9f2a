"""Methods that train whole decoder blocks in turn: BAdam and LISA.

Blocks that are not trained in the coming step have `requires_grad` off, so that nothing is computed or kept for them.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from torch.optim.optimizer import ParamsT

from lowmem.optim.method import BlockOrder, Inner, Writer
from lowmem.optim.methods import MethodOptimizer
from lowmem.optim.optimizer import arguments, block_name, embedding_names, groups_of_module, number_blocks


class BAdam(MethodOptimizer):
    """BAdam (arXiv 2404.02827): Adam on one block, from zero moments, then on the next.

    Of a model, only decoder blocks are trained, and embedding and head if asked, each as a block of its own;
    everything else is frozen. Of named parameters, one without a number in its name is a block of its own.

    Args:
        params: A model or named parameters.
        switch_block_every: Steps per block.
        switch_mode: random (all in a new random order each round), ascending, descending or fixed.
        include_embedding: Train the embedding too.
        include_lm_head: Train the head too.
        inner: adamw, adamw8bit or sgd.
        writer: "fp32" keeps a master of the block in training, as the paper does.

    `lr` and the others are as in `GaLore`.
    """

    method_name: ClassVar[str] = "BAdam"
    _words: ClassVar = {"switch_block_every": "update_gap", "switch_mode": "block_order"}
    _parts: ClassVar = {"projector": "block", "active_blocks": 1, "at_refresh": "reset"}

    def __init__(
        self,
        params: nn.Module | ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        switch_block_every: int = 100,
        switch_mode: BlockOrder = "random",
        include_embedding: bool = False,
        include_lm_head: bool = False,
        inner: Inner = "adamw",
        writer: Writer = "fp32",
        seed: int = 0,
    ) -> None:
        given = arguments(locals())
        self._include = (given.pop("include_embedding"), given.pop("include_lm_head"))
        super().__init__(**given)

    def _groups_of(self, model: nn.Module) -> ParamsT:
        embeddings, head = embedding_names(model)
        included = (embeddings if self._include[0] else frozenset()) | (head if self._include[1] else frozenset())
        for name, param in model.named_parameters():
            if block_name(name) is None and name not in included:
                param.requires_grad_(False)
        return groups_of_module(model, project=lambda *_: True)

    def _blocks(self, groups: list[dict[str, Any]]) -> dict[str, int]:
        return number_blocks((name for group in groups for name in group.get("param_names", ())), single=True)


class LISA(MethodOptimizer):
    """LISA (arXiv 2403.17919): embedding, head and final norm always, with some decoder blocks drawn at random.

    Args:
        params: A model or named parameters.
        activated_layers: Blocks at a time.
        interval_steps: Steps between two draws; moments of blocks start from zero.
        inner: adamw, adamw8bit or sgd, for blocks.

    `lr` and the others are as in `GaLore`.
    """

    method_name: ClassVar[str] = "LISA"
    _words: ClassVar = {"interval_steps": "update_gap", "activated_layers": "active_blocks"}
    _parts: ClassVar = {"projector": "block", "block_order": "sample", "at_refresh": "reset"}

    def __init__(
        self,
        params: nn.Module | ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        activated_layers: int = 2,
        interval_steps: int = 20,
        inner: Inner = "adamw",
        writer: Writer = "stochastic",
        seed: int = 0,
    ) -> None:
        super().__init__(**arguments(locals()))
