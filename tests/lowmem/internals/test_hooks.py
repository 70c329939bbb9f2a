"""torch keeps a module's hooks where lowmem.internals.hooks looks for them, and runs what is put there."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from lowmem.internals import hooks
from lowmem.internals.hooks import BlockHooks, has_foreign_hooks


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, value: Tensor) -> Tensor:
        found: Tensor = self.inner(value)
        return found


def test_a_recomputation_runs_the_hooks_of_its_forward() -> None:
    block = _Block()
    assert all(isinstance(getattr(block, name), OrderedDict) for name in (*hooks._HOOKS, *hooks._OPTIONS))
    ran: list[str] = []
    handle = block.inner.register_forward_hook(lambda *_: ran.append("forward"))
    block.inner.register_forward_pre_hook(lambda module, args, kwargs: ran.append("pre"), with_kwargs=True)
    noted = BlockHooks(block, name="block")
    handle.remove()
    added = block.inner.register_forward_hook(lambda *_: ran.append("added"))
    with noted.in_recomputation(None):
        block(torch.ones(2))
    assert ran == ["pre", "forward"]
    ran.clear()
    block(torch.ones(2))
    assert ran == ["pre", "added"]
    added.remove()
    ran.clear()
    block(torch.ones(2))
    assert ran == ["pre"]


def test_hooks_on_a_module_are_seen() -> None:
    module = nn.Linear(2, 2)
    assert not has_foreign_hooks(module)
    module.register_forward_pre_hook(lambda *_: None)
    assert has_foreign_hooks(module)
