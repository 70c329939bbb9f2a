"""Methods that train whole decoder blocks in turn: BAdam and LISA.

Blocks that are not trained in the coming step have `requires_grad` off, so that nothing is computed or kept for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from torch.optim.optimizer import ParamsT

from lowmem.optim.method import BlockOrder, Inner, Method, Writer
from lowmem.optim.methods import MethodOptimizer
from lowmem.optim.optimizer import block_name, embedding_names, groups_of_module, number_blocks


class BAdam(MethodOptimizer):
    """BAdam (arXiv 2404.02827): Adam on one block, from zero moments, then on the next.

    Of a model, only decoder blocks are trained, and embedding and head if asked, each as a block of its own;
    everything else is frozen. Of named parameters, one without a number in its name is a block of its own.

    Args:
        params: A model or named parameters.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled.
        switch_block_every: Steps per block.
        switch_mode: random (all in a new random order each round), ascending, descending or fixed.
        include_embedding: Train the embedding too.
        include_lm_head: Train the head too.
        inner: adamw, adamw8bit or sgd.
        writer: "fp32" keeps a master of the block in training, as the paper does.
        seed: Of the order and of roundings.
    """

    method_name: ClassVar[str] = "BAdam"

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
        self._include = (include_embedding, include_lm_head)
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            seed=seed,
            project_embeddings=False,
            fields={
                "switch_block_every": switch_block_every,
                "switch_mode": switch_mode,
                "inner": inner,
                "writer": writer,
            },
        )

    @classmethod
    def method_of(cls, group: Mapping[str, Any]) -> Method:
        """One block at a time, moments from zero."""
        return Method(
            projector="block",
            active_blocks=1,
            update_gap=group["switch_block_every"],
            block_order=group["switch_mode"],
            inner=group["inner"],
            at_refresh="reset",
            writer=group["writer"],
        )

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
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled.
        activated_layers: Blocks at a time.
        interval_steps: Steps between two draws; moments of blocks start from zero.
        inner: adamw, adamw8bit or sgd, for blocks.
        writer: How bf16 weights are written.
        seed: Of the draws and of roundings.
    """

    method_name: ClassVar[str] = "LISA"

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
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            seed=seed,
            project_embeddings=False,
            fields={
                "activated_layers": activated_layers,
                "interval_steps": interval_steps,
                "inner": inner,
                "writer": writer,
            },
        )

    @classmethod
    def method_of(cls, group: Mapping[str, Any]) -> Method:
        """Some blocks at a time, drawn anew each time."""
        return Method(
            projector="block",
            active_blocks=group["activated_layers"],
            update_gap=group["interval_steps"],
            block_order="sample",
            inner=group["inner"],
            at_refresh="reset",
            writer=group["writer"],
        )
