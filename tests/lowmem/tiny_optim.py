"""A tiny model with every kind of parameter, and every optimizer with settings that refresh within a few steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowmem import optim
from lowmem.optim.optimizer import RuleOptimizer

VOCAB, WIDTH, NUM_BLOCKS = 12, 8, 3
Make = Callable[..., RuleOptimizer]


class Norm(nn.LayerNorm):
    """By its name a norm."""


class Block(nn.Module):
    """Wide, tall and stacked matrices, biases and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm(WIDTH)
        self.up = nn.Linear(WIDTH, 20)
        self.down = nn.Linear(20, WIDTH)
        self.experts = nn.Parameter(torch.randn(2, WIDTH, WIDTH) * 0.2)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.down(self.up(self.norm(hidden)).tanh())
        return hidden + torch.einsum("bi,eij->bj", hidden, self.experts).tanh()


class TinyModel(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(NUM_BLOCKS)])
        self.norm = Norm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden))


def tiny_model(dtype: torch.dtype = torch.float32) -> TinyModel:
    """The same weights every time."""
    torch.manual_seed(0)
    return TinyModel().to(dtype)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Ids, and what follows them."""
    source = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCAB, (16,), generator=source)
    return ids, (3 * ids + 1) % VOCAB


def backward(model: nn.Module, step: int) -> float:
    """Put the gradients of one batch into `.grad`; the loss."""
    device = next(model.parameters()).device
    ids, targets = (tokens.to(device) for tokens in batch(step))
    loss = nn.functional.cross_entropy(model(ids).float(), targets)
    loss.backward()
    return loss.item()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Some steps; the loss of each."""
    losses = []
    for step in steps:
        losses.append(backward(model, step))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _projected(**method: object) -> Make:
    made = optim.Method(**{"update_gap": 3, "rank": 4, **method})  # type: ignore[arg-type]
    return lambda params, **options: optim.Projected(params, method=made, **options)


def _preset(kind: type[RuleOptimizer], **fixed: object) -> Make:
    return lambda params, **options: kind(params, **{**fixed, **options})  # type: ignore[arg-type]


METHODS: dict[str, Make] = {
    "AdamW": _preset(optim.AdamW),
    "AdamW, fp32 master": _preset(optim.AdamW, state_dtype="fp32", writer="fp32"),
    "AdamW, bf16 state": _preset(optim.AdamW, state_dtype="bf16", writer="kahan"),
    "AdamW, 8-bit state": _preset(optim.AdamW, state_dtype="8bit", writer="stochastic"),
    "GaLore": _preset(optim.GaLore, rank=4, update_proj_gap=3),
    "GaLore, svd, rotated": _preset(optim.GaLore, rank=4, update_proj_gap=3, projector="svd", at_refresh="rotate"),
    "GaLore, rsvd, 8 bits": _preset(optim.GaLore, rank=4, update_proj_gap=3, projector="rsvd", inner="adamw8bit"),
    "GaLore, right": _preset(optim.GaLore, rank=4, update_proj_gap=3, proj_type="right", inner="adafactor"),
    "Fira": _preset(optim.Fira, rank=4, update_proj_gap=3),
    "FRUGAL": _preset(optim.FRUGAL, update_gap=3),
    "FRUGAL, by blocks": _preset(optim.FRUGAL, update_gap=3, projector="block"),
    "FRUGAL, svd": _preset(optim.FRUGAL, update_gap=3, projector="svd", inactive_update_rule="sgd"),
    "APOLLO": _preset(optim.APOLLO, rank=4, update_proj_gap=3),
    "APOLLOMini": _preset(optim.APOLLOMini, update_proj_gap=3),
    "BAdam": _preset(optim.BAdam, switch_block_every=3),
    "BAdam, all": _preset(optim.BAdam, switch_block_every=2, include_embedding=True, include_lm_head=True),
    "LISA": _preset(optim.LISA, activated_layers=1, interval_steps=3),
    "AdaLomo": _preset(optim.AdaLomo),
    "gaussian, rotated, bf16": _projected(
        projector="gaussian", at_refresh="rotate", state_dtype="bf16", writer="kahan"
    ),
    "columns, rotated": _projected(
        projector="columns", at_refresh="rotate", residual="sign", limiter="update_rms", limit=1
    ),
    "rows, sgd": _projected(projector="rows", inner="sgd", residual="sgd", writer="fp32", limiter="norm_growth"),
}
